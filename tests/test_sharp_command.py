"""``llmkern sharp`` from a local model to a report, ``llmkern reproduce sharp`` in miniature, and what they refuse."""

import json
import math

import pytest
import torch
from shared_models import model_of
from tiny_models import WORDS, word_tokenizer

from llmkern.__main__ import main
from llmkern.demo.cache import Cache
from llmkern.papers.data_selection.files import locked
from llmkern.papers.sharp import files, warmup
from llmkern.papers.sharp.conversion import export_dense
from llmkern.papers.sharp.evaluate import mean_loss
from llmkern.papers.sharp.study import settings, tables
from llmkern.papers.sharp.text import read_windows


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, converted, warmed up and tuned, and what was evaluated of the three."""
    folder = tmp_path_factory.mktemp("sharp")
    model_of().save_pretrained(folder / "model")
    word_tokenizer().save_pretrained(folder / "model")
    words = torch.randint(4, WORDS, (600,), generator=torch.Generator().manual_seed(0)).tolist()
    (folder / "a.txt").write_text(" ".join(f"w{i}" for i in words))
    (folder / "b.txt").write_text(" ".join(f"w{4 + i % 9}" for i in range(200)))
    (folder / "c.jsonl").write_text('{"prompt": "w5 w6", "completion": " w7 w8"}\n' * 40)

    def run(*words):
        assert main(["sharp", *map(str, words)]) == 0

    text = ["--text", folder / "a.txt", "--length", 16]
    similar = ["--replace", 2, "--pattern", "similar", "--pack", "int8", "--pack-group-size", 32]
    run("convert", folder / "model", "--out", folder / "one", "--rank", 6, *similar, *text)
    run("warmup", folder / "one", "--teacher", folder / "model", "--out", folder / "two", "--steps", 20, *text)
    tune = ["--steps", 5, "--batch-size", 4, "--answer-only", "--text", folder / "c.jsonl"]
    run("finetune", folder / "two", "--out", folder / "three", *tune)
    models = [folder / name for name in ("model", "one", "two", "three")]
    texts = ["--text", f"in={folder / 'a.txt'}", "--text", f"out={folder / 'b.txt'}", "--length", 16]
    run("eval", *models, "--out", folder / "eval", *texts, "--prompt", "w5 w6", "--max-new-tokens", 3)
    return folder


def test_every_step_leaves_a_model_and_its_record(folder):
    done = {"one": ["convert"], "two": ["convert", "warmup"], "three": ["convert", "finetune", "warmup"]}
    for name, records in done.items():
        model = files.load(folder / name)
        assert len(model.sharing.references) == 2
        assert all(model.model.layers[group[0]].mlp.packed.dtype == "int8" for group in model.sharing.groups)
        assert sorted(path.stem for path in (folder / name / "sharp").iterdir()) == records
        assert (folder / name / "tokenizer.json").exists()
        page = (folder / name / "report.html").read_text()
        assert page.count("<svg") == page.count("</svg>") == len(records)
    assert not [path for path in folder.iterdir() if path.suffix in (".new", ".old")]


def test_records_agree_with_models(folder):
    stored = json.loads((folder / "two" / "sharp" / "convert.json").read_text())
    before, after = stored["parameters"]
    assert after < before
    assert after == sum(p.numel() for p in files.load(folder / "two").parameters())
    layers = json.loads((folder / "two" / "sharp" / "warmup.json").read_text())["layers"]
    assert all(history[-1][1] < history[0][1] for history in layers.values())
    found = json.loads((folder / "eval" / "eval.json").read_text())
    assert [entry["shared"] for entry in found["models"]] == [False, True, True, True]
    assert all(set(entry["losses"]) == {"in", "out"} and len(entry["samples"]) == 1 for entry in found["models"])
    ids = read_windows("sharp", word_tokenizer(), [folder / "b.txt"], 16, 64)
    assert found["models"][3]["losses"]["out"] == pytest.approx(mean_loss(files.load(folder / "three"), ids))
    page = (folder / "eval" / "report.html").read_text()
    assert page.count("<svg") == 1 + 1 + 2 + 3


def test_finished_warmup_is_not_made_again(folder, monkeypatch):
    def refuse(*args, **options):
        raise AssertionError("made again")

    monkeypatch.setattr(warmup, "train_layer", refuse)
    monkeypatch.setattr(warmup, "watch_mlps", refuse)
    argv = ["sharp", "warmup", folder / "one", "--teacher", folder / "model", "--out", folder / "two", "--steps", "20"]
    assert main([*map(str, argv), "--text", str(folder / "a.txt"), "--length", "16"]) == 0


def test_half_precision_warms_up_in_float32(folder):
    """What a step of Adam adds is less than half of what bfloat16 resolves of most factors."""
    model_of().bfloat16().save_pretrained(folder / "half")
    word_tokenizer().save_pretrained(folder / "half")
    assert main(["sharp", *f"convert {folder}/half --out {folder}/half.one --rank 6 --init svd".split()]) == 0
    words = f"warmup {folder}/half.one --teacher {folder}/half --out {folder}/half.two --steps 40 --learning-rate 1e-4"
    assert main(["sharp", *words.split(), "--text", str(folder / "a.txt"), "--length", "16"]) == 0
    before, after = (files.pairs_of(files.load(folder / name, dtype="auto")) for name in ("half.one", "half.two"))
    moved = [(pair.lora_B.weight != before[name].lora_B.weight).float().mean() for name, pair in after.items()]
    assert after["layers.2.mlp.up_proj"].lora_B.weight.dtype == torch.bfloat16
    assert torch.stack(moved).mean() > 0.5


def test_export(folder, tmp_path):
    argv = ["sharp", "export", folder / "three", "--dense", tmp_path / "dense", "--adapter", tmp_path / "adapter"]
    assert main(list(map(str, argv))) == 0
    dense, wanted = files.load(tmp_path / "dense", shared=False), export_dense(files.load(folder / "three"))
    assert all(torch.equal(t, wanted.state_dict()[name]) for name, t in dense.state_dict().items())
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir())[0] == "adapter_config.json"
    files.load_adapter(files.load(folder / "one"), tmp_path / "adapter")


def test_bench_runs(folder, capsys):
    assert main(["sharp", "bench", str(folder / "three"), "--tokens", "3", "--repeats", "1"]) == 0
    out = capsys.readouterr().out
    for word in ("dense export", "shared, int4", "PEFT, teacher each step", "teacher from disk"):
        assert word in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("convert {0}/one --out {0}/x", "expected a model that was not converted yet"),
        ("convert {0}/nothing --out {0}/x", "which is absent; check the path"),
        ("convert {0}/model --out {0}/model", "model to write to, got"),
        ("convert {0}/model --out {0}", "a model or adapter alone, which is replaced, got one that holds"),
        ("export {0}/three --dense {0}/x --adapter {0}/x", "expected another folder than {0}/x to write to"),
        ("convert {0}/model --out {0}/x --pattern similar", "expected --text with --pattern similar, got none"),
        ("convert {0}/model --out {0}/x --groups 1-9", "expected layers from 0 to 5"),
        ("convert {0}/model --out {0}/x --groups 1", "expected --groups such as 4-5,8-10"),
        ("warmup {0}/model --teacher {0}/model --out {0}/x --text {0}/a.txt", "that `llmkern sharp convert` made"),
        (
            "warmup {0}/one --teacher {0}/other --out {0}/x --text {0}/a.txt",
            "the model that the converted one was",
        ),
        ("warmup {0}/one --teacher {0}/model --out {0}/x --text {0}/none", "expected a text file in UTF-8"),
        ("warmup {0}/one --teacher {0}/model --out {0}/x --text {0}/a.txt --length 9999", "a text of at least 9999"),
        (
            "warmup {0}/bare --teacher {0}/model --out {0}/x --text {0}/a.txt",
            "expected a model with factors, got one without",
        ),
        ("bench {0}/bare", "expected a model with factors, got one without any"),
        (
            "finetune {0}/one --out {0}/x --work {0}/busy --text {0}/c.jsonl",
            "that no other run writes to, got one in use",
        ),
        ("eval {0}/one --out {0}/x --text {0}/a.txt --text {0}/a.txt", "expected texts of different names, got a, a"),
        ("export {0}/one", "expected --dense or --adapter, got neither"),
    ],
    ids=lambda value: " ".join(value.split()[:3]) if "{0}" in value else "",
)
def test_refusals(folder, capsys, words, said):
    if not (folder / "other").exists():
        model = model_of()
        torch.nn.init.normal_(model.model.layers[1].self_attn.q_proj.weight)
        model.save_pretrained(folder / "other")
        assert main(["sharp", *f"convert {folder}/model --out {folder}/bare --rank 0".split()]) == 0
    (folder / "busy").mkdir(exist_ok=True)
    with locked("sharp", folder / "busy"):
        assert main(["sharp", *words.format(folder).split()]) == 2
    error = capsys.readouterr().err
    assert said.format(folder) in " ".join(error.split())
    assert not (folder / "x").exists()


# The study ------------------------------------------------------------------------------------------------------------


def test_study_in_miniature(tmp_path, monkeypatch, capsys):
    argv = ["reproduce", "sharp", "--quick", "--seeds", "1", "--out", str(tmp_path)]
    kept = ("original", "direct sharing", "SLW + SFT", "int4, SLW + SFT", "dropped layers, SFT", "smaller model")
    few = [row for row in settings.ROWS if row.name in kept]
    monkeypatch.setattr(settings, "ROWS", few)
    assert main(argv) == 0
    out = capsys.readouterr().out
    stored = json.loads((tmp_path / "sharp.json").read_text())
    assert list(stored["rows"]) == [row.name for row in few]
    sizes = {name: by_seed["0"]["parameters"] for name, by_seed in stored["rows"].items()}
    # Sharing, dropping and shrinking end at about one size.
    assert sizes["dropped layers, SFT"] <= sizes["SLW + SFT"]
    assert abs(sizes["smaller model"] - sizes["SLW + SFT"]) < 0.05 * sizes["original"]
    assert stored["rows"]["int4, SLW + SFT"]["0"]["bytes"] < stored["rows"]["SLW + SFT"]["0"]["bytes"]
    assert set(stored["forms"]["0"]) == {"additive", "left", "right", "two-sided", "additive, diagonals"}
    assert "- Sharing alone multiplies it by" in out
    assert sorted(p.name for p in tmp_path.iterdir() if p.name[0] == "s") == ["sharp.csv", "sharp.json", "sharp.png"]
    assert not list((tmp_path / "cache").glob("t*-*"))

    def refuse(*args):
        raise AssertionError("made again")

    monkeypatch.setattr(Cache, "save", refuse)
    assert main(argv) == 0


def test_closed_gap():
    def losses(value):
        return {"0": {"losses": {tables.IN: value}}}

    perplexities = {"original": 2, "direct sharing": 12, "x": 3}
    found = {"rows": {name: losses(math.log(value)) for name, value in perplexities.items()}}
    assert tables.closed(found, "x") == [pytest.approx(0.9)]
    assert tables.text_of([1.0]) == "1.00"
    assert tables.mean_and_half([1.0, 2.0, 3.0])[1] == pytest.approx(2.484, abs=1e-3)


def test_words_follow_the_interval():
    """Two rows whose difference varies less over seeds than it is, and two whose difference varies more."""

    def rows(*values):
        return {str(seed): {"losses": {tables.IN: value}} for seed, value in enumerate(values)}

    found = {"rows": {"a": rows(1.0, 2.0, 3.0), "b": rows(1.11, 2.10, 3.09), "c": rows(1.2, 1.9, 3.1), "d": rows(1.3)}}
    assert tables.relation(found, "a", "b") == "is better than"
    assert tables.relation(found, "b", "a") == "is worse than"
    assert tables.relation(found, "a", "c") == "cannot be told, over 3 seeds, from"
    assert tables.relation(found, "d", "a") == "is worse than"


def test_rows_are_compared_seed_by_seed():
    from llmkern.papers.sharp.study import tables

    def row(*losses):
        return {str(seed): {"losses": {tables.IN: loss}} for seed, loss in enumerate(losses)}

    # Seeds differ by far more than rows do.
    found = {"rows": {"one": row(3.0, 2.0, 5.0), "worse": row(3.1, 2.11, 5.09), "alike": row(3.1, 1.9, 5.0)}}
    assert tables.difference(found, "worse", "one") == pytest.approx([0.1, 0.11, 0.09])
    assert tables.relation(found, "worse", "one") == "is worse than"
    assert tables.relation(found, "one", "worse") == "is better than"
    assert tables.relation(found, "alike", "one") == "cannot be told, over 3 seeds, from"
