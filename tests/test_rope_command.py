"""``llmkern rope`` and ``llmkern reproduce rope`` in miniature: bounds hold, runs resume, files agree."""

import csv
import json
import math

import pytest
import torch
import torch.nn.functional as F

from llmkern.__main__ import main
from llmkern.demo.cache import Cache
from llmkern.papers.rope import experiment, general, measure, model, report, synthetic


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rope")
    assert main(["rope", "--quick", "--out", str(folder)]) == 0
    return folder


def test_files_agree(finished):
    stored = json.loads((finished / "rope.json").read_text())
    rows = list(csv.DictReader((finished / "rope.csv").open()))
    assert [row["bound"] for row in stored["rows"]] == ["1", "4", "none"]
    assert len(rows) == 3 * len(model.QUICK.lengths)
    assert {row["bound"]: float(row["loss"]) for row in rows} == {
        row["bound"]: round(row["history"][-1][2], 5) for row in stored["rows"]
    }
    assert (finished / "rope.png").read_bytes()[:4] == b"\x89PNG"
    assert not list(finished.rglob("*.new"))
    assert not list(finished.rglob("*.partial-*"))


def test_bounds_and_certificates_hold(finished):
    stored = json.loads((finished / "rope.json").read_text())
    for row in stored["rows"]:
        quality = row["quality"]
        if row["bound"] != "none":
            assert quality["largest_score"] <= float(row["bound"]) * (1 + 1e-5)
        if quality["degree"]:
            assert 0 < quality["row_error"] <= stored["rtol"]
            assert quality["logit_error"] > 0
        else:
            assert "certifies" in quality["reason"] or "bounded" in quality["reason"]
    assert stored["rows"][0]["quality"]["degree"]
    # Trained with the polynomial in the loop the curve is another, but hardly.
    twin, loop = stored["rows"][0]["history"], stored["loop"]["history"]
    assert [step for step, *_ in twin] == [step for step, *_ in loop]
    assert twin != loop
    assert max(abs(a[2] - b[2]) for a, b in zip(twin, loop)) < stored["rtol"] * twin[-1][2]


def test_second_run_makes_nothing_again(finished, monkeypatch):
    def refuse(*_args):
        raise AssertionError("made again")

    monkeypatch.setattr(Cache, "save", refuse)
    before = (finished / "rope.csv").read_bytes()
    assert main(["rope", "--quick", "--out", str(finished)]) == 0
    assert (finished / "rope.csv").read_bytes() == before


def test_findings_follow_from_numbers():
    def row(bound, loss, method, seconds, degree):
        timing = {"length": 4096, "seconds": seconds, "method": method, "degree": degree, "reason": "of its scores"}
        quality = {"degree": degree, "row_error": 2e-3}
        return {"bound": bound, "history": [[1, 0.0, loss]], "quality": quality, "timings": [timing]}

    results = {
        "rtol": 1e-2,
        "rows": [row("1", 3.0, "polynomial", 0.5, 2), row("none", 2.5, "exact", None, 0)],
        "sdpa": [{"length": 4096, "seconds": 2.0}],
        "loop": {"bound": "1", "history": [[1, 0.0, 3.25]]},
    }
    text = "\n".join(report.findings(results))
    for part in ("B = 1 +0.500", "B = 1: 4.0 times as fast", "B = none: exact at 4096 tokens, since of its scores"):
        assert part in text
    assert "held-out loss 3.250 against 3.000" in text
    assert report.speedup(results, results["rows"][1], 0) is None


def test_without_norms_it_is_a_llama():
    """And with a bound no score leaves it, rotary positions included."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = model.QUICK.training
    ours = model.new_model(sizes, 50, None)
    known = LlamaConfig().to_dict().keys() - {"model_type", "architectures"}
    config = LlamaConfig(**{name: value for name, value in ours.config.to_dict().items() if name in known})
    llama = LlamaForCausalLM(config)
    llama.load_state_dict(ours.state_dict())
    ids = torch.randint(0, 50, (1, 30))
    torch.testing.assert_close(ours(ids).logits, llama(ids).logits)
    for heads in measure.record_attention(model.bound_scores(ours, 0.75), ids):
        assert (heads.scale * heads.q @ heads.k.mT).abs().max() <= 0.75 * (1 + 1e-5)


def test_recorded_attention_is_what_the_model_runs():
    ours, ids = model.new_model(model.QUICK.training, 50, 1.0), torch.randint(0, 50, (1, 20))
    layers = measure.record_attention(ours, ids)
    assert len(layers) == 2
    assert ours.config._attn_implementation == "sdpa"
    (first,) = measure.record_attention(ours, ids, layers=1)
    assert torch.equal(first.q, layers[0].q)
    out = F.scaled_dot_product_attention(first.q, first.k, first.v, is_causal=True, scale=first.scale)
    hidden = ours.model.embed_tokens(ids)
    layer = ours.model.layers[0]
    after = hidden + layer.self_attn.o_proj(out.transpose(1, 2).flatten(2))
    after = after + layer.mlp(layer.post_attention_layernorm(after))
    torch.testing.assert_close(after, ours.model(ids, output_hidden_states=True).hidden_states[1])


def test_row_error_is_found():
    """Of an output that is wrong in one row alone."""
    heads = synthetic.gaussian_heads(600, 4, 0.5)
    plan = heads.plan(1e-3, "polynomial")
    right = measure.largest_row_error(heads, plan)
    assert 0 < right <= 1e-3
    spoiled = heads.v.clone()
    spoiled[0, 0, 300] += 1.0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            measure.llmkern,
            "rope_attention",
            lambda q, k, v, **o: F.scaled_dot_product_attention(q, k, spoiled, is_causal=True, scale=o["scale"]),
        )
        assert measure.largest_row_error(heads, plan) > right


# The exact experiments ------------------------------------------------------------------------------------------------


def test_certificate_of_the_dense_polynomial():
    for bound in (0.5, 2.0):
        rows = [synthetic.degree_row(200, 4, bound, degree) for degree in (2, 3, 4)]
        assert all(row.error <= row.moment for row in rows)
        assert [row.features for row in rows] == [15, 35, 70]
        assert rows[0].moment > rows[1].moment > rows[2].moment
        assert rows[0].error > rows[2].error


def test_gradients_get_closer_with_rtol():
    loose, tight = (synthetic.gradient_row(400, 4, 1.0, rtol, False) for rtol in (1e-1, 1e-4))
    assert loose.degree < tight.degree
    assert tight.error <= 1e-4
    assert max(tight.dq, tight.dk, tight.dv) < min(loose.dq, loose.dk)
    assert synthetic.gradient_row(400, 4, 15.0, 1e-4, False) is None


def test_the_general_case_agrees_with_dense_attention():
    """And the fast methods are no exact ones; the matrix is of norm 1 at most and no product of functions."""
    found = {method: general.agreement(general.LEAST, method) for method in general.METHODS}
    rounding = general.LEAST * torch.finfo(torch.float64).eps
    assert max(found["exact"].row, found["exact"].dq, found["exact"].dk, found["exact"].dw) <= rounding
    for method in ("blocks", "fft"):
        gradients = (found[method].dq, found[method].dk, found[method].dv, found[method].dw)
        assert rounding < found[method].row <= general.RTOL
        assert rounding < min(gradients)
        assert max(gradients) <= general.RTOL
    matrix = general.general_matrix(50, 4, torch.float64)
    dense = torch.zeros(99, 4, 4, dtype=torch.float64)
    dense[:, matrix.support[:, 0], matrix.support[:, 1]] = matrix.matrix[0].mT
    assert torch.linalg.matrix_norm(dense, 2).max() <= 1
    # Of a function that factorises, f(i - j) = g(i) h(j), this matrix has rank one.
    i = torch.arange(25)
    assert torch.linalg.matrix_rank(matrix.matrix[0, 3][i[:, None] - i[None, :] + 49], rtol=1e-6) > 2


@pytest.mark.usefixtures("slow_exact_attention")
def test_threshold_is_the_edge():
    edge = synthetic.largest_fast_bound(8192, 4, 1e-2, True, steps=4)
    assert edge > 0
    assert synthetic.gaussian_heads(8192, 4, edge).plan(1e-2).method == "polynomial"
    assert synthetic.gaussian_heads(8192, 4, 2 * edge).plan(1e-2).method == "exact"
    assert synthetic.largest_fast_bound(64, 4, 1e-2, True) == 0.0


def test_fitted_exponent():
    lengths = [10, 20, 40]
    assert measure.fitted_exponent(lengths, [3.0 * n**1.5 for n in lengths]) == pytest.approx(1.5)
    assert math.isnan(measure.fitted_exponent([10], [1.0]))


def test_reproduce_writes_its_tables(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(experiment, "ROWS", 128)
    monkeypatch.setattr(experiment, "DEGREES", (2, 3))
    whole = experiment.measure
    monkeypatch.setattr(experiment, "measure", lambda longest, show: whole(longest, show, rows=300, dim=4))
    assert main(["reproduce", "rope", "--longest", "2048", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "The moment certificate holds in 8 of 8 cells" in out
    assert "of max|v - o|, within rtol 0.01" in out.replace("\n", " ")
    text = (tmp_path / "rope.csv").read_text()
    empty = {"agreement": [], "times": []}
    for title, *_ in experiment.tables(
        {"times": [], "degrees": [], "thresholds": [], "gradients": [], "dim": 4, "general": empty}
    ):
        assert title in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rope.csv", "rope.png"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["rope", "--out", "x", "--steps", "0"], "expected --steps of at least 1, got 0"),
        (["rope", "--out", "x", "--rtol", "0"], "expected --rtol above 0, got 0.0"),
        (["reproduce", "rope", "--longest", "5"], "expected --longest of at least 512, got 5"),
    ],
    ids=str,
)
def test_refusals(argv, words, capsys):
    assert main(argv) == 2
    assert words in capsys.readouterr().err
