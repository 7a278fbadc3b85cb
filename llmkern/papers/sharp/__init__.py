"""SHARP (arXiv 2502.07832): adjacent layers of a model of transformers share one MLP, each with low-rank factors.

``llmkern sharp`` goes from a folder to a report. The same in Python::

    from llmkern.papers.sharp.convert import convert, export_dense, with_peft
    from llmkern.papers.sharp.files import load, load_adapter, save, save_adapter
    from llmkern.papers.sharp.finetune import finetune
    from llmkern.papers.sharp.text import read_examples, read_windows
    from llmkern.papers.sharp.warmup import TeacherCache, warm_up

    shared = convert(model)
    ids = read_windows("warmup", tokenizer, [Path("text.txt")], length=256)
    warm_up(shared, TeacherCache("work", model, ids, shared.sharing.references))
    finetune(shared, read_examples("finetune", tokenizer, [Path("text.txt")], length=256), "work")
    save(shared, "shared", tokenizer)
    save(export_dense(shared), "dense", tokenizer)

``shared`` is a model of transformers like any other. Another program reads it by ``load("shared")``, or through
``AutoModelForCausalLM`` after ``llmkern.integrations.shared_mlp.register()``.
"""
