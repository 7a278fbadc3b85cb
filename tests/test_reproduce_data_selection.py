"""The toy of data selection: its corpora have the faults that they claim, and its arms select what they say."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")

import clip_torchrun_worker

from llmkern.__main__ import main
from llmkern.papers.data_selection.toy import arms, corpora, experiment, hubness, pairs, tables
from llmkern.papers.data_selection.toy.corpora import CLEAN, GENERIC, OFF_TARGET, SHUFFLED, Shares
from llmkern.papers.data_selection.toy.towers import train

SHARES = Shares(0.25, 0.15, 0.2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished miniature."""
    out = tmp_path_factory.mktemp("toy")
    assert main(["reproduce", "data-selection", "--quick", "--seeds", "2", "--workers", "1", "--out", str(out)]) == 0
    return out


def test_functions_lose_their_docstring_and_nothing_else() -> None:
    source = '''
class A:
    @property
    def size(self):
        """How many entries there are.

        Never negative.
        """
        return self.n

    def bare(self):
        return 1
'''
    [(code, doc)] = list(pairs.functions(source))
    assert doc == "How many entries there are."
    assert code == "    def size(self):\n        return self.n"
    assert list(pairs.functions("def broken(:")) == []


def test_words_take_names_apart() -> None:
    def word(text: str) -> int:
        return int(pairs.words(text, 1)[0])

    expected = [word(w) for w in ("read", "http", "response", "as", "utf", "8")]
    assert pairs.words("readHTTPResponse_as_utf8", 8).tolist() == [*expected, 0, 0]
    assert min(expected) > 0


def test_packages_are_of_one_part_each() -> None:
    found = pairs.packages()
    assert "argparse" in found
    assert "llmkern" not in found
    parts = [pairs.part_of(name) for name in found]
    assert {"pool", "target", "test"} <= set(parts)


def test_code_corpus_has_its_faults() -> None:
    rng = np.random.default_rng(0)
    made = {
        f"{part}_{side}": rng.integers(1, pairs.VOCABULARY, (400, width)).astype(np.int32)
        for part in ("pool", "target", "test")
        for side, width in (("code", pairs.CODE_WORDS), ("doc", pairs.DOC_WORDS))
    }
    made["pool_code"][:, 40:] = 0
    corpus = corpora.code_corpus(made, SHARES, 0)
    code, doc = torch.from_numpy(made["pool_code"]), torch.from_numpy(made["pool_doc"])
    same_code, same_doc = (corpus.image == code).all(1), (corpus.text == doc).all(1)
    kind = corpus.kind
    assert (same_code == (kind != OFF_TARGET)).all()
    assert (same_doc == (kind == CLEAN)).all()
    # A shuffled text is that of another pair, a generic one is the same for many.
    shuffled = corpus.text[kind == SHUFFLED]
    assert all((doc == row).all(1).any() for row in shuffled)
    assert len(corpus.text[kind == GENERIC].unique(dim=0)) == len(corpora.GENERIC_DOCS)
    assert ((corpus.image == 0) == (code == 0)).all()
    shares = [float((kind == k).float().mean()) for k in (SHUFFLED, GENERIC, OFF_TARGET)]
    assert np.allclose(shares, [0.25, 0.15, 0.2], atol=5 * 0.5 / np.sqrt(400))


def test_digit_target_and_test_are_not_in_the_pool() -> None:
    corpus = corpora.digit_corpus(500, Shares(0, 0, 0), 0)
    assert len(corpus.image) == 500
    assert not (corpus.target[:, None] == corpus.test_image[None]).all(-1).any()
    assert (corpus.kind == CLEAN).all()
    assert set(corpus.answer.tolist()) == set(range(10))


def test_arms_keep_what_they_say() -> None:
    corpus = corpora.digit_corpus(400, SHARES, 1)
    generator = torch.Generator().manual_seed(0)
    image = torch.nn.functional.normalize(torch.randn(400, 8, generator=generator), dim=1)
    scores = {name: torch.randn(400, generator=generator) for name in ("clip", "neg_clip", "vas", "norm_inf", "norm_2")}
    scores["image"] = image
    first, second = int(400 * arms.FIRST), int(400 * arms.SECOND)
    for arm in arms.ARMS:
        rows = arms.select(arm, corpus, scores, 0)
        assert len(rows.unique()) == len(rows) == (400 if arm == "none" else second)
    top = set(scores["neg_clip"].topk(first).indices.tolist())
    assert set(arms.select("negCLIPLoss, NormSim_inf", corpus, scores, 0).tolist()) <= top
    assert (corpus.kind[arms.select("oracle", corpus, scores, 0)] == CLEAN).all()


def test_auc_counts_ties_for_half() -> None:
    assert arms.auc(np.array([0.1, 0.5, 0.5, 0.9]), np.array([False, True, False, True])) == 0.875


def test_hubness_has_a_null_case() -> None:
    found = [row for seed in range(3) for row in hubness.rows(seed)]
    for strength, gains in ((hubness.STRENGTHS[0], False), (hubness.STRENGTHS[-1], True)):
        clip, neg = (tables.hub_values(found, strength, score, "auc") for score in ("CLIPScore", "negCLIPLoss"))
        difference = tables.estimate([b - a for a, b in zip(clip, neg)])
        assert (difference.mean - difference.half > 0.01) == gains


def test_intervals_are_students() -> None:
    found = tables.estimate([1.0, 2.0, 3.0])
    # The quantile of t with two degrees of freedom is (2 p - 1) / sqrt(2 p (1 - p)), here 4.30; the deviation is 1.
    assert found.mean == 2
    assert found.half == pytest.approx(0.95 / np.sqrt(2 * 0.975 * 0.025) / np.sqrt(3))


def test_command_keeps_every_arm_and_seed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (folder / "arms.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["corpus"], r["seed"], r["arm"]) for r in rows] == [
        (corpus, str(seed), arm) for corpus in ("code", "digits") for seed in range(2) for arm in sorted(arms.ARMS)
    ]
    assert (folder / "arms.png").read_bytes().startswith(b"\x89PNG")
    # Nothing is made again, and the tables are the same.
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*.json")}
    assert len(before) == 4
    assert main(["reproduce", "data-selection", "--quick", "--seeds", "2", "--workers", "1", "--out", str(folder)]) == 0
    out = capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*.json")} == before
    assert all(arm in out for arm in arms.ARMS)
    assert "…" not in out


def test_a_seed_is_the_same_wherever_it_runs(folder: Path) -> None:
    path = next(folder.glob("digits-1-*.json"))
    corpus = experiment.load_corpus(str(folder), experiment.QUICK, "digits", 1)
    from llmkern.papers.data_selection.engine import one_thread

    with one_thread():
        again = arms.run_seed(corpus, experiment.QUICK.digit, 1)
    assert json.loads(json.dumps(again)) == json.loads(path.read_text())


def test_bad_counts_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "data-selection", "--seeds", "1"]) == 2
    assert "expected --seeds of at least 2, got 1" in capsys.readouterr().err


def towers_under_torchrun(folder: Path, *fatal: str) -> dict[str, torch.Tensor]:
    folder.mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=3"]
    variables = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    # With gloo, the store that torchrun shares between restarts may still hold the address of a process that is dead.
    variables["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    worker = Path(__file__).with_name("clip_torchrun_worker.py")
    ended = subprocess.run([*command, worker, folder, *fatal], env=variables, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return torch.load(folder / "towers.pt")


def test_a_process_killed_under_torchrun_loses_nothing(tmp_path: Path) -> None:
    """Two towers trained with clip_loss over two processes: killed in the middle and started again, they go on from the
    last checkpoint to the bits of an undisturbed run, and both are what one process trains.
    """
    killed = towers_under_torchrun(tmp_path / "killed", "6")
    straight = towers_under_torchrun(tmp_path / "straight")
    steps = [int(line) for line in (tmp_path / "killed" / "1.steps").read_text().split()]
    assert steps == [1, 2, 3, 4, 5, 6, *range(5, 13)]
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        alone = train(*clip_torchrun_worker.data(), 50, clip_torchrun_worker.FIT, 3).state_dict()
    finally:
        torch.set_default_dtype(before)
    for name, value in alone.items():
        assert torch.equal(killed[name], straight[name]), name
        # Sums over processes round otherwise; Adam divides by what may be small.
        assert float((straight[name] - value).abs().max()) <= torch.finfo(torch.float64).eps ** 0.5, name
