"""Models with shared MLPs: equal to their dense export wherever they run, and bit for bit what was stored."""

import copy
import errno
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from shared_models import GROUPS, logits, model_of, refusal
from tiny_models import PAD, WORDS, llama
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from llmkern.integrations.shared_mlp import FAMILIES, SharedMlp, register
from llmkern.integrations.sharing import PROJECTIONS
from llmkern.papers import sharp
from llmkern.papers.sharp import files
from llmkern.papers.sharp.conversion import (
    convert,
    export_dense,
    low_rank,
    merged,
    mlp_parameters,
    parameters,
    with_peft,
    with_tied_layers,
)
from llmkern.papers.sharp.evaluate import mean_loss
from llmkern.papers.sharp.groups import choose_groups, mlp_distances, parse_groups, spread
from llmkern.papers.sharp.observe import watch_mlps

UNEQUAL = {"gate_proj": 3, "down_proj": 5}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models of this size only lose by more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(3, WORDS, (4, 20), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def original():
    return model_of()


@pytest.fixture(scope="module")
def shared(original):
    """Factors that matter: drawn, unequal ranks, one projection without."""
    model = convert(original, GROUPS, rank=UNEQUAL, init="zero", scaling=0.5)
    torch.manual_seed(2)
    with torch.no_grad():
        for pair in files.pairs_of(model).values():
            pair.lora_A.weight.normal_(std=0.3)
            pair.lora_B.weight.normal_(std=0.3)
    return model


def test_the_package_gives_the_names_that_it_lists():
    assert sharp.convert is convert
    assert set(sharp.__all__) <= set(dir(sharp))
    assert all(callable(getattr(sharp, name)) for name in sharp.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'merge'"):
        sharp.merge  # noqa: B018


def assert_as_exact_as_dense(found, model, ids, **options):
    """Against float64 as truth, no worse than twice the dense export in the same dtype, plus four roundings.

    A deep model is the op many times over, so the rounding is that of the largest logit for every layer.
    """
    dense = export_dense(model)
    base = logits(dense, ids, **options).double()
    truth = logits(export_dense(copy.deepcopy(model).double()), ids, **options).double()
    layers = len(model.model.layers)
    allowed = 2 * (base - truth).abs().max() + 4 * layers * torch.finfo(found.dtype).eps * truth.abs().max()
    assert (found.double() - truth).abs().max() <= allowed


# Conversion -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_families_equal_their_dense_export(family, ids):
    original = model_of(family)
    model = convert(original, GROUPS, rank=UNEQUAL, init="svd")
    assert_as_exact_as_dense(logits(model, ids), model, ids)
    assert type(export_dense(model)) is type(original)
    assert not torch.equal(logits(model, ids), logits(original, ids))
    # A full rank takes up all that was lost.
    whole = convert(original, GROUPS, rank=32, init="svd")
    truth = logits(original.double(), ids)
    error = (logits(whole, ids).double() - truth).abs().max()
    assert error <= 200 * torch.finfo(torch.float32).eps * truth.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes_and_left_padding(shared, ids, dtype):
    model = copy.deepcopy(shared).to(dtype)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    assert_as_exact_as_dense(logits(model, ids, attention_mask=mask)[0], model, ids[:1])


def test_original_is_left_alone(original, ids):
    before, state = logits(original, ids), {k: v.clone() for k, v in original.state_dict().items()}
    model = convert(original, GROUPS, rank=2)
    with torch.no_grad():
        for pair in files.pairs_of(model).values():
            pair.lora_B.weight.fill_(1.0)
    assert torch.equal(logits(original, ids), before)
    assert type(original) is LlamaForCausalLM
    assert type(original.config) is LlamaConfig
    assert all(torch.equal(v, state[k]) for k, v in original.state_dict().items())
    assert all(p.requires_grad for p in original.parameters())
    base = model.model.layers[1].mlp.gate_proj.weight
    assert base.data_ptr() == original.model.layers[1].mlp.gate_proj.weight.data_ptr()
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trains == {name for name in dict(model.named_parameters()) if ".lora_" in name}


def test_svd_is_the_best_of_its_rank_and_whitening_of_its_text():
    torch.manual_seed(0)
    difference, x = torch.randn(12, 10), torch.randn(200, 10) * torch.logspace(0, -2, 10)
    moment = (x.double().mT @ x.double()) / len(x)
    singular = torch.linalg.svdvals(difference)
    a, b = low_rank(difference, 4)
    torch.testing.assert_close(torch.linalg.matrix_norm(difference - b @ a), singular[4:].norm())
    aw, bw = low_rank(difference, 4, moment)
    on_text = [torch.linalg.matrix_norm((difference - product) @ x.mT) for product in (b @ a, bw @ aw)]
    assert on_text[1] < on_text[0]
    best = torch.linalg.svdvals(difference.double() @ torch.linalg.cholesky(moment))[4:].norm() * len(x) ** 0.5
    torch.testing.assert_close(on_text[1].double(), best, rtol=1e-4, atol=0.0)


def test_whitened_start_is_nearer_on_its_text(original, ids):
    """What gate gives on the layer's own inputs, against the weight that it lost."""
    seen = []
    watch_mlps(original, ids, lambda layer, x, y: seen.append(x), [5])
    x, lost = torch.cat(seen), original.model.layers[5].mlp.gate_proj.weight.detach()
    errors = {}
    for init in ("zero", "svd", "whitened"):
        seen = {}
        mlp = convert(original, ((4, 5),), rank=4, init=init, text=ids, show=seen.__setitem__).model.layers[5].mlp
        assert list(seen) == ([] if init == "zero" else [5])
        weight = merged(mlp.reference.gate_proj.weight, mlp.gate_proj, 1.0).detach()
        errors[init] = float(torch.linalg.matrix_norm(x @ (lost - weight).mT))
    assert errors["whitened"] < errors["svd"] < errors["zero"]


def test_llama_2_7b_sizes():
    """24 of 32 layers at rank 400: 58.3 % of the dense bytes, from shapes alone."""
    with torch.device("meta"):
        dense = LlamaForCausalLM(LlamaConfig())
        assert parameters(dense) == 6_738_415_616
        groups = [(i, *range(i + 1, i + 5)) for i in range(1, 31, 5)]
        model = convert(dense, groups, rank=400, init="zero")
    assert len(model.sharing.references) == 24
    assert parameters(model) / parameters(dense) <= 0.585
    saved = 1 - mlp_parameters(model) / mlp_parameters(dense)
    assert 0.38 < saved < 0.6505
    names = [name for name in model.state_dict() if len(name) > 64]
    assert not names


# Groups ---------------------------------------------------------------------------------------------------------------


def test_patterns():
    assert choose_groups(10, replace=4) == ((1, 2), (3, 4), (5, 6), (7, 8))
    assert choose_groups(10, replace=2, pattern="earlier") == ((1, 2), (3, 4))
    assert choose_groups(10, replace=2) == ((5, 6), (7, 8))
    assert choose_groups(10, replace=5, group_size=4) == ((2, 3, 4), (5, 6, 7, 8))
    assert choose_groups(12, replace=0.5, group_size=3) == ((2, 3, 4), (5, 6, 7), (8, 9, 10))
    assert choose_groups(6) == ((1, 2), (3, 4))
    assert choose_groups(10, group_size=3) == ((1, 2), (3, 4, 5), (6, 7, 8))
    assert parse_groups(spread(GROUPS)) == GROUPS


def test_similar_layers_are_found(ids):
    """Layers made equal cost nothing to exchange, so they are the ones that share."""
    model = model_of(layers=8)
    for layer, like in ((3, 2), (6, 5)):
        model.model.layers[layer].mlp.load_state_dict(model.model.layers[like].mlp.state_dict())
    distances = mlp_distances(model, ids)
    assert distances.diagonal().tolist() == [0.0] * 8
    assert distances[2, 3] == distances[5, 6] == 0
    assert distances[1, 2] > 0.1
    found = convert(model, replace=2, pattern="similar", text=ids, rank=2, init="zero")
    assert found.sharing.groups == ((2, 3), (5, 6))
    assert torch.equal(logits(found, ids), logits(convert(model, ((2, 3), (5, 6)), rank=1, init="zero"), ids))


# Running --------------------------------------------------------------------------------------------------------------


def test_generation_cache_and_padding(shared):
    dense = export_dense(shared)
    prompts = torch.randint(3, WORDS, (3, 8), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(prompts)
    mask[0, :3] = mask[2, :5] = 0
    options = {"attention_mask": mask, "max_new_tokens": 10, "do_sample": False}
    tokens = shared.generate(prompts, **options)
    assert torch.equal(tokens, dense.generate(prompts, **options))
    assert torch.equal(tokens, shared.generate(prompts, use_cache=False, **options))
    alone = shared.generate(prompts[:1, 3:], max_new_tokens=10, do_sample=False)
    assert torch.equal(alone[0, 5:], tokens[0, 8 : 8 + alone.shape[1] - 5])


def gradients(model, ids, **options):
    model.zero_grad()
    autocast = options.pop("autocast", False)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        model(input_ids=ids, labels=ids, **options).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def test_gradients_are_those_of_plain_torch(shared, ids):
    """Of the factors, through a model whose MLPs PEFT's layers compute."""
    from peft import LoraConfig, get_peft_model

    model = copy.deepcopy(shared).double()
    found = gradients(model, ids)
    pairs = files.pairs_of(model)
    config = LoraConfig(r=3, lora_alpha=1.5, target_modules=list(pairs), rank_pattern={r".*down_proj": 5})
    config.alpha_pattern = {r".*down_proj": 2.5}
    plain = get_peft_model(with_tied_layers(model), config).double()
    for name, p in plain.named_parameters():
        if "lora_" in name:
            p.data.copy_(dict(model.named_parameters())[name[17:].replace(".default", "")])
    wanted = gradients(plain.eval(), ids)
    assert len(wanted) == len(found) == 12
    for name, grad in wanted.items():
        torch.testing.assert_close(found[name[17:].replace(".default", "")].float(), grad.float())


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(shared, ids, reentrant):
    model = copy.deepcopy(shared).train()
    wanted = gradients(model, ids)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    found = gradients(model, ids)
    assert all(torch.equal(found[name], grad) for name, grad in wanted.items())
    assert all(bool(grad.any()) for grad in found.values())


def test_autocast(shared, ids):
    model = copy.deepcopy(shared)
    found = gradients(model, ids, autocast=True)
    exact = gradients(model, ids)
    for name, grad in found.items():
        assert grad.dtype == torch.float32
        assert 0 < (grad - exact[name]).norm() < 0.1 * exact[name].norm(), name
    with torch.autocast("cpu", torch.bfloat16):
        assert logits(model, ids).dtype == torch.bfloat16


def test_dropout_in_training_only(original, ids):
    model = convert(original, GROUPS, rank=4, init="svd", dropout=0.5)
    assert torch.equal(logits(model, ids), logits(model, ids))
    model.train()
    assert not torch.equal(logits(model, ids), logits(model, ids))


def test_compile_without_a_break(ids):
    torch._dynamo.reset()
    model = convert(llama(0), ((0, 1),), keep_first=0, keep_last=0, rank=4)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    for name, grad in gradients(compiled, ids, use_cache=False).items():
        torch.testing.assert_close(gradients(model, ids)[name.removeprefix("_orig_mod.")], grad)


# Files ----------------------------------------------------------------------------------------------------------------


def test_round_trip_is_bit_exact(shared, ids, tmp_path):
    files.save(shared, tmp_path / "a")
    loaded = files.load(tmp_path / "a")
    files.save(loaded, tmp_path / "b")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    assert torch.equal(logits(loaded, ids), logits(shared, ids))
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == {
        n for n, p in shared.named_parameters() if p.requires_grad
    }
    sharing = json.loads((tmp_path / "a" / "config.json").read_text())["sharing"]
    assert sharing["weights"]["model.layers.3.mlp.up_proj.weight"] == "model.layers.1.mlp.up_proj.weight"
    stored = sum(t.numel() for t in shared.state_dict().values())
    assert stored == parameters(shared)
    assert (tmp_path / "a" / "model.safetensors").stat().st_size < 4 * stored + 20_000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_auto_class_reads_it_without_remote_code(shared, ids, tmp_path):
    files.save(shared, tmp_path / "a")
    register(["llama"])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert isinstance(loaded.model.layers[2].mlp, SharedMlp)
    assert torch.equal(logits(loaded.eval(), ids), logits(shared, ids))
    trains = [name for name, p in loaded.named_parameters() if p.requires_grad]
    assert len(trains) == 12
    assert all(".lora_" in name for name in trains)


def test_weights_are_mapped_from_the_file(shared, tmp_path):
    files.save(shared, tmp_path / "a")
    loaded = files.load(tmp_path / "a")
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    spans = [line[0].split("-") for line in lines if line[-1] == str(tmp_path / "a" / "model.safetensors")]
    places = [tensor.data_ptr() for tensor in loaded.state_dict().values()]
    assert all(any(int(low, 16) <= place < int(high, 16) for low, high in spans) for place in places)
    # What maps a folder may write it anew.
    files.save(loaded, tmp_path / "a")
    assert all(torch.equal(t, loaded.state_dict()[n]) for n, t in files.load(tmp_path / "a").state_dict().items())


def test_pickled_and_imported_by_name(shared, ids):
    from llmkern.integrations.shared_mlp import SharedMlpLlamaForCausalLM

    copied = pickle.loads(pickle.dumps(shared))
    assert type(copied) is type(shared) is SharedMlpLlamaForCausalLM
    assert torch.equal(logits(copied, ids), logits(shared, ids))
    assert copied.model.layers[2].mlp.reference is copied.model.layers[1].mlp


def test_dense_export_is_an_ordinary_checkpoint(shared, ids, tmp_path):
    export_dense(shared).save_pretrained(tmp_path / "dense")
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("llama", ["LlamaForCausalLM"])
    assert "sharing" not in config
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    assert type(plain) is LlamaForCausalLM
    assert torch.equal(logits(plain, ids), logits(export_dense(shared), ids))


def test_peft_reads_the_adapter(shared, ids, tmp_path):
    files.save_adapter(shared, tmp_path / "adapter")
    model = with_peft(shared, tmp_path / "adapter").eval()
    assert_as_exact_as_dense(logits(model, ids), shared, ids)
    # And back, from what PEFT writes itself.
    model.save_pretrained(str(tmp_path / "again"))
    other = copy.deepcopy(shared)
    with torch.no_grad():
        for pair in files.pairs_of(other).values():
            pair.lora_B.weight.zero_()
    files.load_adapter(other, tmp_path / "again")
    assert torch.equal(logits(other, ids), logits(shared, ids))


@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_brings_its_scaling(shared, ids, tmp_path, rslora):
    """As PEFT computes it; the model's own scaling is 0.5."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, lora_alpha=6, target_modules=list(files.pairs_of(shared)), use_rslora=rslora)
    config.rank_pattern = {r".*down_proj": 5, r".*gate_proj": 3}
    config.alpha_pattern = {r".*down_proj": 7}
    plain = get_peft_model(with_tied_layers(shared), config)
    torch.manual_seed(5)
    for name, p in plain.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(p, std=0.3)
    plain.save_pretrained(tmp_path / "adapter")
    other = copy.deepcopy(shared)
    files.load_adapter(other, tmp_path / "adapter")
    assert_as_exact_as_dense(logits(plain.eval(), ids), other, ids)
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(path.read_text()[:50])
    assert "a readable adapter_config.json" in refusal(files.load_adapter, other, tmp_path / "adapter")


def test_merging_is_refused(shared, tmp_path):
    files.save_adapter(shared, tmp_path / "adapter")
    for model in (shared, with_peft(shared, tmp_path / "adapter")):
        for name in ("merge_and_unload", "merge_adapter"):
            text = refusal(getattr(model, name))
            assert "of which a merge would change all; llmkern.papers.sharp.export_dense" in text


def test_adapter_of_another_base_is_refused(shared, tmp_path):
    files.save_adapter(shared, tmp_path / "adapter")
    torch.manual_seed(7)
    other = convert(llama(7).to(torch.float32), ((0, 1),), rank=UNEQUAL, init="zero", keep_first=0)
    assert "expected an adapter of this model" in refusal(files.load_adapter, other, tmp_path / "adapter")
    half = copy.deepcopy(shared).bfloat16()
    files.load_adapter(half, tmp_path / "adapter")
    ranks = convert(export_dense(shared), GROUPS, rank=2, init="zero")
    files.save_adapter(ranks, tmp_path / "two")
    tensors = tmp_path / "two" / files.ADAPTER
    tensors.write_bytes(tensors.read_bytes()[:100])
    assert "expected a readable adapter_model.safetensors" in refusal(files.load_adapter, ranks, tmp_path / "two")


def test_a_checkpoint_that_lacks_a_tensor_is_refused(shared, tmp_path):
    from safetensors.torch import load_file, save_file

    files.save(shared, tmp_path / "a")
    path = tmp_path / "a" / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    text = refusal(files.load, tmp_path / "a")
    assert "without 1 of them, the first model.layers.1.mlp.up_proj.weight" in text
    register(["llama"])
    assert "without 1 of them" in refusal(AutoModelForCausalLM.from_pretrained, tmp_path / "a")
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(3, 32)
    save_file(tensors, path, metadata={"format": "pt"})
    text = refusal(files.load, tmp_path / "a")
    assert (
        "model.layers.1.mlp.up_proj.weight of the model to have the shape (48, 32) of its config.json, got (3, 32)"
        in text
    )
    assert "a model that was not converted yet" in refusal(files.load, tmp_path / "a", shared=False)


def test_full_disk_leaves_what_was_there(shared, ids, tmp_path, monkeypatch):
    files.save(shared, tmp_path / "a")
    other = copy.deepcopy(shared)
    with torch.no_grad():
        other.model.layers[2].mlp.gate_proj.lora_A.weight.zero_()

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert "expected space on the disk" in refusal(files.save, other, tmp_path / "a")
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert torch.equal(logits(files.load(tmp_path / "a"), ids), logits(shared, ids))


def test_only_a_model_is_replaced(shared, tmp_path):
    """Not a folder of models, nor one of anything else; a link is followed."""
    files.save(shared, tmp_path / "models" / "a")
    assert "choose another folder" in refusal(files.save, shared, tmp_path / "models")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("mine")
    assert "got one that holds a.txt" in refusal(files.save, shared, tmp_path / "texts")
    (tmp_path / "link").symlink_to(tmp_path / "models" / "a")
    config = tmp_path / "models" / "a" / "config.json"
    config.write_text("{}")
    files.save(shared, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert len(config.read_text()) > 2
    assert (tmp_path / "texts" / "a.txt").read_text() == "mine"


# Bad input ------------------------------------------------------------------------------------------------------------


def test_refused_conversions(original, ids):
    assert "expected layers of one size in the group [1, 2]" in refusal(convert, uneven(), ((1, 2),), rank=2)
    assert "two or more consecutive layers, got [1, 3]" in refusal(convert, original, ((1, 3),), rank=2)
    assert "expected layers from 0 to 5, got [5, 6]" in refusal(convert, original, ((5, 6),), rank=2)
    assert "no layer in common" in refusal(convert, original, ((1, 2), (2, 3)), rank=2)
    assert "expected a rank of 0 to 32 for gate_proj" in refusal(convert, original, GROUPS, rank=33)
    assert "expected rank_ratio in (0, 1), got 2" in refusal(convert, original, GROUPS, rank_ratio=2)
    assert "expected one of rank_ratio and rank, got both" in refusal(convert, original, GROUPS, rank=2, rank_ratio=0.1)
    assert "expected ranks for gate_proj, up_proj, down_proj, got q_proj" in refusal(
        convert, original, GROUPS, rank={"q_proj": 2}
    )
    assert "expected 1 to 2 of 6 layers to replace" in refusal(convert, original, replace=5)
    assert "expected init as one of" in refusal(convert, original, GROUPS, rank=2, init="best")
    assert "expected text with init=whitened, got none" in refusal(convert, original, GROUPS, init="whitened")
    assert "expected mlp.gate_proj of every layer" in refusal(convert, model_of(mlp_bias=True), GROUPS)
    assert "expected a causal language model" in refusal(convert, torch.nn.Linear(2, 2))
    assert "a model that was not converted yet" in refusal(convert, convert(original, GROUPS, rank=2), GROUPS)
    assert "expected groups such as" in refusal(convert, original, [])
    assert "expected groups such as" in refusal(convert, original, [1, 2])
    assert "expected a whole number as rank of gate_proj, got 2.5" in refusal(convert, original, GROUPS, rank=2.5)
    for scaling in (0.0, float("nan")):
        assert "expected scaling as a finite" in refusal(convert, original, GROUPS, rank=2, scaling=scaling)


def test_refused_groups_and_texts(original, ids):
    assert "group_size of at least 2, got 0" in refusal(choose_groups, 10, group_size=0)
    assert "of at least 0, got -2 and 1" in refusal(choose_groups, 10, keep_first=-2)
    assert "a count or a share in (0, 1), got 'half'" in refusal(choose_groups, 10, replace="half")
    assert "got 3 layers, of which 1 and 1 are kept" in refusal(choose_groups, 3)
    distances = torch.full((10, 10), float("nan"))
    assert "got NaN" in refusal(choose_groups, 10, replace=2, pattern="similar", distances=distances)
    for text in (ids[0], ids[:0], ids.float()):
        assert "expected token ids (N, T), whole" in refusal(convert, original, GROUPS, init="whitened", text=text)
        assert "expected token ids (N, T), whole" in refusal(mean_loss, original, text)
    assert "expected token ids from 0 to 95, got 5" in refusal(mlp_distances, original, torch.tensor([[5, 96]]))
    assert "expected windows of at least two" in refusal(mean_loss, original, ids[:, :1])


def uneven():
    model = model_of()
    mlp = model.model.layers[2].mlp
    for name, (out, width) in zip(PROJECTIONS, ((40, 32), (40, 32), (32, 40))):
        setattr(mlp, name, torch.nn.Linear(width, out, bias=False))
    return model


# Packed bases, Zamba2, several processes ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bf16", "int8", "int4"])
def test_factors_take_up_quantisation(original, ids, dtype):
    model = convert(original, GROUPS, rank=32, init="svd", pack=dtype, pack_group_size=32)
    reference = model.model.layers[1].mlp
    assert reference.packed.dtype == dtype
    # Full rank, so that a replaced layer computes its own MLP again, though its reference is rounded.
    x = torch.randn(7, 32)
    wanted = original.model.layers[2].mlp(x)
    error = (model.model.layers[2].mlp(x) - wanted).abs().max() / wanted.abs().max()
    rounding = (reference(x) - original.model.layers[1].mlp(x)).abs().max() / wanted.abs().max()
    assert error < 1e-5 < rounding
    grads = gradients(model, ids)
    assert len(grads) == 18
    assert_as_exact_as_dense(logits(model, ids), model, ids)


@pytest.mark.parametrize("dtype", ["bf16", "int4"])
def test_packed_round_trip(original, ids, tmp_path, dtype):
    """Packed again at loading, and moved with the model; an adapter knows on which of the two it was trained."""
    model = convert(original, GROUPS, rank=UNEQUAL, init="svd", pack=dtype, pack_group_size=32)
    files.save(model, tmp_path / "a")
    loaded = files.load(tmp_path / "a")
    assert torch.equal(logits(loaded, ids), logits(model, ids))
    plain = convert(original, GROUPS, rank=UNEQUAL, init="svd")
    assert not torch.equal(logits(loaded, ids), logits(plain, ids))
    files.save(loaded, tmp_path / "b")
    assert (tmp_path / "a" / "config.json").read_bytes() == (tmp_path / "b" / "config.json").read_bytes()
    dense = export_dense(model)
    files.save(dense, tmp_path / "dense")
    assert torch.equal(logits(files.load(tmp_path / "dense", shared=False), ids), logits(dense, ids))
    packed = loaded.to("meta").model.layers[1].mlp.packed
    assert packed.data.device.type == "meta"
    files.save_adapter(model, tmp_path / "adapter")
    assert "expected an adapter of this model" in refusal(files.load_adapter, plain, tmp_path / "adapter")


def test_zamba2_computes_the_same():
    from transformers import Zamba2Config, Zamba2ForCausalLM

    from llmkern.integrations.zamba2 import SharedZamba2Mlp, use_shared_lora_mlp

    torch.manual_seed(0)
    config = Zamba2Config(
        vocab_size=WORDS,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        layers_block_type=["mamba", "hybrid", "mamba", "hybrid"],
        hybrid_layer_ids=[1, 3],
        num_mem_blocks=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        mamba_d_state=4,
        mamba_headdim=8,
        n_mamba_heads=8,
        mamba_ngroups=1,
        chunk_size=8,
        adapter_rank=4,
        initializer_range=0.2,
        pad_token_id=PAD,
        use_mem_eff_path=False,
    )
    model = Zamba2ForCausalLM(config).eval()
    ids = torch.randint(3, WORDS, (2, 9))
    base, truth = logits(model, ids).double(), logits(copy.deepcopy(model).double(), ids).double()
    use_shared_lora_mlp(model)
    assert sum(isinstance(module, SharedZamba2Mlp) for module in model.modules()) == 2
    found = logits(model, ids).double()
    allowed = 2 * (base - truth).abs().max() + 16 * torch.finfo(torch.float32).eps * truth.abs().max()
    assert (found - truth).abs().max() <= allowed
    assert "a model with the MLPs of Zamba2" in refusal(use_shared_lora_mlp, llama(0))


def test_two_processes_average_the_gradients(shared, ids, tmp_path):
    """DistributedDataParallel over gloo: a base that several layers use is one parameter, and frozen."""
    files.save(shared, tmp_path / "model")
    torch.save(ids, tmp_path / "ids.pt")
    worker = [sys.executable, str(Path(__file__).with_name("sharp_ddp_worker.py")), str(tmp_path)]
    variables = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    jobs = [subprocess.Popen([*worker, str(rank)], env=variables, stderr=subprocess.PIPE) for rank in range(2)]
    for job in jobs:
        assert job.wait(timeout=120) == 0, job.stderr.read().decode()
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    # Each process has half of the rows, of equal length: the mean of their losses is that of all.
    wanted = gradients(copy.deepcopy(shared).double(), ids)
    for name, grad in wanted.items():
        assert torch.equal(found[0][name], found[1][name])
        torch.testing.assert_close(found[0][name].float(), grad.float())
