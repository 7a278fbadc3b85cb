"""`llmkern select` on pools in DataComp's layout and others, and the faults of the public code."""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("pyarrow")

import pyarrow as pa
import pyarrow.parquet as pq
import select_units
from datacomp_tree import drop_row, flip_bit, make_tree, truncate, write_npz

from llmkern.__main__ import main
from llmkern.ops.pairwise_scores import neg_clip_loss, norm_sim, random_division
from llmkern.ops.vas_score import second_moment, vas_score
from llmkern.papers import data_selection
from llmkern.papers.data_selection import engine, files, filter
from llmkern.papers.data_selection.filter import FilterOptions, filter_store
from llmkern.papers.data_selection.rank import parse_stage
from llmkern.papers.data_selection.score import Options, Run, score_pool
from llmkern.papers.data_selection.shards import open_pool
from llmkern.papers.data_selection.store import Store
from llmkern.papers.data_selection.uids import UID, load_subset, parse_uids, save_subset

ROOT = Path(__file__).resolve().parent.parent
SMALL = Options(batch_size=100, num_partitions=2, temperature=0.05)
ONE, SKIP = Run(workers=1, quiet=True), Run(workers=1, quiet=True, on_bad_shard="skip")


def towers(folder: Path, arch: str = "l14") -> tuple[torch.Tensor, torch.Tensor]:
    found = [np.load(path) for path in sorted((folder / "metadata").glob("*.npz"))]
    return tuple(torch.from_numpy(np.concatenate([f[f"{arch}_{end}"] for f in found])) for end in ("img", "txt"))


def scores_of(folder: Path) -> dict[str, np.ndarray]:
    table = pq.read_table(folder / "scores.parquet")
    return {name: table.column(name).to_numpy(zero_copy_only=False) for name in table.column_names}


def outputs(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in ("scores.parquet", "manifest.json", "bad_shards.json")}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tree(tmp_path_factory.mktemp("tree"), rows=630, shards=4)


@pytest.fixture(scope="module")
def store(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("store")
    score_pool(open_pool(tree), out, SMALL, ONE)
    return out


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows that samples are to be like."""
    path = tmp_path_factory.mktemp("target") / "rows.npy"
    x = np.random.default_rng(5).standard_normal((40, 16)).astype(np.float32)
    np.save(path, (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16))
    return path


# Scores ---------------------------------------------------------------------------------------------------------------


def test_scores_are_those_of_the_ops(tree: Path, store: Path) -> None:
    image, text = towers(tree)
    found = scores_of(store)
    assert np.array_equal(found["clip"], torch.ops.llmkern.paired_dot(image, text).numpy())
    truth = neg_clip_loss(image.double(), text.double(), temperature=0.05, batch_size=100, num_partitions=2)
    base = neg_clip_loss(image.float(), text.float(), temperature=0.05, batch_size=100, num_partitions=2)
    limit = 2 * (base - truth).abs().max() + 4 * torch.finfo(torch.float32).eps * truth.abs().max()
    assert (torch.from_numpy(found["neg_clip"]).double() - truth).abs().max() <= limit
    assert not found["flags"].any()
    tables = [pq.read_table(path) for path in sorted((tree / "metadata").glob("*.parquet"))]
    stored = pa.concat_tables(tables).column("clip_l14_similarity_score").to_numpy()
    assert np.array_equal(found["stored_clip"], stored)


def test_negatives_come_from_the_whole_pool_in_batches_of_one_size(tree: Path, store: Path) -> None:
    """Fault 5: within a shard, with a small last batch."""
    sizes = [len(batch) for batch in random_division(630, 100, seed=0, index=0)]
    assert max(sizes) - min(sizes) <= 1
    edges = [630 * i // 4 for i in range(5)]
    for batch in random_division(630, 100, seed=0, index=1):
        assert len(np.unique(np.searchsorted(edges, batch.numpy(), side="right"))) == 4


def test_no_shard_and_no_row_is_left_out_unasked(tree: Path, store: Path) -> None:
    """Faults 2 and 7: 3 % of the shards by default; only the first batch of candidates written."""
    manifest = json.loads((store / "manifest.json").read_text())
    assert [s["rows"] for s in manifest["shards"]] == [157, 158, 157, 158]
    found = scores_of(store)
    assert len(found["uid"]) == 630
    for name in ("clip", "neg_clip", "neg_clip_se"):
        assert np.isfinite(found[name]).all()


def test_long_shards_are_scored_to_their_last_row(tmp_path: Path, target: Path) -> None:
    """Fault 7 at the size of our own blocks."""
    make_tree(tmp_path, rows=8200, shards=1)
    score_pool(open_pool(tmp_path), tmp_path / "s", Options(("norm_sim", "vas"), target=str(target)), ONE)
    image, rows = towers(tmp_path)[0], torch.from_numpy(np.load(target))
    found = scores_of(tmp_path / "s")
    torch.testing.assert_close(torch.from_numpy(found["norm_sim"]), norm_sim(image, rows))
    torch.testing.assert_close(torch.from_numpy(found["vas"]), vas_score(image, second_moment(rows)))


def test_equal_directions_do_not_overflow(tmp_path: Path) -> None:
    """Fault 4: exp(s / T) without a shift is infinite for s = 1, T = 0.01."""
    image = make_tree(tmp_path, rows=50, shards=1) and np.load(tmp_path / "metadata/00000000.npz")["l14_img"]
    write_npz(tmp_path / "metadata/00000000.npz", {"l14_img": image, "l14_txt": image})
    score_pool(open_pool(tmp_path), tmp_path / "s", Options(batch_size=50, num_partitions=1), ONE)
    assert np.isfinite(scores_of(tmp_path / "s")["neg_clip"]).all()


def test_seed_decides_and_nothing_else_does(tree: Path, store: Path, tmp_path: Path) -> None:
    """Fault 3: draws without a seed, and results that depend on the timing of workers."""
    score_pool(open_pool(tree), tmp_path / "two", SMALL, Run(workers=2, quiet=True))
    assert outputs(tmp_path / "two") == outputs(store)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        score_pool(open_pool(tree), tmp_path / "threads", SMALL, Run(workers=1, quiet=True, max_memory=2**31))
    finally:
        torch.set_num_threads(threads)
    assert outputs(tmp_path / "threads") == outputs(store)
    other = Options(batch_size=100, num_partitions=2, temperature=0.05, seed=1)
    score_pool(open_pool(tree), tmp_path / "seed", other, ONE)
    assert not np.array_equal(scores_of(tmp_path / "seed")["neg_clip"], scores_of(store)["neg_clip"])


def test_convergence_ends_at_one(store: Path) -> None:
    found = json.loads((store / "manifest.json").read_text())["convergence"]
    assert [row["partitions"] for row in found] == [1, 2]
    assert found[0]["overlap"] < found[1]["overlap"] == 1


# Layouts --------------------------------------------------------------------------------------------------------------


def test_compressed_and_column_and_npy_layouts_give_the_same_scores(tree: Path, store: Path, tmp_path: Path) -> None:
    make_tree(tmp_path / "packed", rows=630, shards=4, compressed=True)
    columns, npy = tmp_path / "columns", tmp_path / "npy"
    for folder in (columns, npy / "img_emb", npy / "text_emb", npy / "metadata"):
        folder.mkdir(parents=True)
    for i, path in enumerate(sorted((tree / "metadata").glob("*.npz"))):
        image, text = (np.load(path)[key] for key in ("l14_img", "l14_txt"))
        table = pq.read_table(path.with_suffix(".parquet"))
        np.save(npy / f"img_emb/img_emb_{i}.npy", image)
        np.save(npy / f"text_emb/text_emb_{i}.npy", text)
        pq.write_table(table, npy / f"metadata/metadata_{i}.parquet")
        lists = {key: pa.array(list(x), pa.list_(pa.float16())) for key, x in (("l14_img", image), ("l14_txt", text))}
        for key, column in lists.items():
            table = table.append_column(key, column)
        pq.write_table(table, columns / f"{i}.parquet")
    for name in ("packed", "columns", "npy"):
        score_pool(open_pool(tmp_path / name), tmp_path / f"s-{name}", SMALL, ONE)
        found, wanted = scores_of(tmp_path / f"s-{name}"), scores_of(store)
        for column in wanted:
            np.testing.assert_array_equal(found[column], wanted[column], err_msg=f"{name} {column}")


def test_a_stored_member_is_mapped_and_not_copied(tree: Path, store: Path) -> None:
    pool = open_pool(tree)
    matrix, _ = Store(str(store)).matrix(pool.shards[0], "image")
    assert isinstance(matrix, np.memmap)
    assert matrix.filename == pool.shards[0].image[0]
    assert not (store / "unpacked").exists()


def test_other_keys_are_named_and_not_edited_in(tmp_path: Path) -> None:
    """Fault 12: key names changed by editing comments; a GPU needed."""
    make_tree(tmp_path, rows=30, shards=1)
    path = tmp_path / "metadata/00000000.npz"
    write_npz(path, dict(zip(("mine-image", "mine-text"), np.load(path).values())))
    argv = ["select", "score", "--input", str(tmp_path), "--out", str(tmp_path / "s"), "--scores", "clip"]
    assert main([*argv, "--image-key", "mine-image", "--text-key", "mine-text", "--workers", "1"]) == 0


def test_rows_that_are_no_directions_are_counted_and_left_out(tmp_path: Path) -> None:
    make_tree(tmp_path, rows=60, shards=2)
    path = tmp_path / "metadata/00000001.npz"
    held = dict(np.load(path))
    held["l14_img"][3] = np.nan
    held["l14_txt"][4] = np.inf
    held["l14_txt"][5] = 0
    held["l14_img"][6] *= 2
    write_npz(path, held)
    table = pq.read_table(path.with_suffix(".parquet"))
    uids = table.column("uid").to_pylist()
    # The second of equal uids goes, and one whose first place has no score stays.
    uids[10] = uids[9]
    uids[11] = uids[3]
    pq.write_table(table.set_column(0, "uid", pa.array(uids)), path.with_suffix(".parquet"))
    manifest = score_pool(open_pool(tmp_path), tmp_path / "s", SMALL, ONE)
    counts = manifest["counts"]
    assert (counts["not_finite"], counts["zero_norm"], counts["duplicate_uid"], counts["not_unit"]) == (2, 1, 1, 1)
    assert manifest["kept"] == 56
    found = scores_of(tmp_path / "s")
    bad = [33, 34, 35, 40]
    assert np.flatnonzero(found["flags"]).tolist() == bad
    assert np.flatnonzero(np.isnan(found["neg_clip"])).tolist() == bad
    filter_store(tmp_path / "s", tmp_path / "o.npy", FilterOptions((parse_stage("neg_clip:1"),)), ONE)
    assert len(load_subset(tmp_path / "o.npy")) == 56


# Bad shards, kills, and what is used again ----------------------------------------------------------------------------


def test_bad_shards_end_the_run_or_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fault 10: a dead worker drops its shard in silence."""
    make_tree(tmp_path, rows=210, shards=7, bad=3)
    argv = ["select", "score", "--input", str(tmp_path), "--out", str(tmp_path / "s"), "--scores", "clip"]
    assert main([*argv, "--workers", "1"]) == 2
    assert ".npz" in capsys.readouterr().err
    assert not (tmp_path / "s/manifest.json").exists()
    assert main([*argv, "--workers", "1", "--on-bad-shard", "skip"]) == 3
    listed = json.loads((tmp_path / "s/bad_shards.json").read_text())
    assert [(shard["name"], shard["kind"]) for shard in listed] == [
        ("00000004", "row_mismatch"),
        ("00000005", "checksum"),
        ("00000006", "unreadable"),
    ]
    error = capsys.readouterr().err
    assert all(shard["bad"] in error for shard in listed)
    assert len(scores_of(tmp_path / "s")["clip"]) == 120
    # A shard that was mended is taken in.
    make_tree(tmp_path, rows=210, shards=7)
    assert main([*argv, "--workers", "1", "--on-bad-shard", "skip"]) == 0
    assert len(scores_of(tmp_path / "s")["clip"]) == 210


def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(tree: Path, tmp_path: Path) -> None:
    make_tree(tmp_path / "pool", rows=2400, shards=24)
    options = ["--batch-size", "100", "--num-partitions", "10", "--temperature", "0.05", "--workers", "2"]
    argv = ["select", "score", "--input", str(tmp_path / "pool"), "--out", str(tmp_path / "killed"), *options]
    command = [sys.executable, "-m", "llmkern", *argv]
    for pattern, least in (("shards/*.parquet", 3), ("neg_clip/*/part-*.npy", 2)):
        process = subprocess.Popen(
            command, env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=ROOT, stderr=subprocess.DEVNULL
        )
        started = time.monotonic()
        while len(list((tmp_path / "killed").glob(pattern))) < least and process.poll() is None:
            assert time.monotonic() - started < 60
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
    found = len(list((tmp_path / "killed").glob("shards/*.parquet")))
    assert main(argv) == 0
    events = [json.loads(line) for line in (tmp_path / "killed/log.jsonl").read_text().splitlines()]
    last = max(i for i, e in enumerate(events) if e["event"] == "start")
    assert events[last + 1]["found"] == found == 24
    assert events[last + 2]["found"] >= 2
    assert not list((tmp_path / "killed").rglob("*.new"))
    straight = Options(batch_size=100, num_partitions=10, temperature=0.05)
    score_pool(open_pool(tmp_path / "pool"), tmp_path / "straight", straight, ONE)
    assert outputs(tmp_path / "killed") == outputs(tmp_path / "straight")


def test_what_changed_is_scored_again(tmp_path: Path) -> None:
    make_tree(tmp_path / "pool", rows=90, shards=3)

    def made() -> list[str]:
        lines = (tmp_path / "s/log.jsonl").read_text().splitlines()
        return [json.loads(line)["name"] for line in lines if '"shard"' in line]

    score_pool(open_pool(tmp_path / "pool"), tmp_path / "s", Options(("clip",)), ONE)
    before = scores_of(tmp_path / "s")["clip"]
    path = tmp_path / "pool/metadata/00000001.npz"
    held = dict(np.load(path))
    write_npz(path, {"l14_img": held["l14_txt"], "l14_txt": held["l14_txt"]})
    score_pool(open_pool(tmp_path / "pool"), tmp_path / "s", Options(("clip",)), ONE)
    assert made() == ["00000000", "00000001", "00000002", "00000001"]
    after = scores_of(tmp_path / "s")["clip"]
    assert np.array_equal(before[:30], after[:30])
    assert not np.array_equal(before[30:60], after[30:60])
    score_pool(open_pool(tmp_path / "pool"), tmp_path / "s", Options(("clip",), normalize=True), ONE)
    assert len(made()) == 7


def test_two_runs_in_one_store_are_refused(tmp_path: Path) -> None:
    with (
        files.locked("select score", tmp_path),
        pytest.raises(ValueError, match="no other run writes to, got one in use"),
    ):
        score_pool(open_pool(make_tree(tmp_path / "pool", rows=4, shards=1)), tmp_path, SMALL, ONE)


def test_units_survive_their_process(tmp_path: Path) -> None:
    """Fault 10: a worker that died took its shard with it."""
    units = [(str(tmp_path), x) for x in range(8)]
    seen: dict[int, int] = {}
    found = engine.run_units(select_units.die_once, units, workers=2, done=lambda i, r: seen.update({i: r}))
    assert (tmp_path / "died").exists()
    assert found == [x * x for x in range(8)] == [seen[x] for x in range(8)]
    with pytest.raises(RuntimeError, match="died 3 times with unit"):
        engine.run_units(select_units.die_always, [(1,), (2,)], workers=2)


def test_memory_decides_how_many_processes() -> None:
    run = Run(workers=8, max_memory=3 * 2**30)
    assert run.processes("select score", 2**29) == 2
    assert run.processes("select score", 2**20) == 6
    assert run.processes("select score", 2 * 2**30) == 1
    with pytest.raises(ValueError, match="--max-memory of at least 4496M for these sizes, got 3072M"):
        run.processes("select score", 4 * 2**30)


# Filter ---------------------------------------------------------------------------------------------------------------


def test_stages_count_on_the_pool_and_score_survivors_only(
    tree: Path, store: Path, target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault 8: NormSim of all rows, though only survivors need it."""
    rows: list[int] = []
    original = filter.row_score
    monkeypatch.setattr(filter, "row_score", lambda name, x, *rest: rows.append(len(x)) or original(name, x, *rest))
    stages = tuple(map(parse_stage, ("neg_clip:0.4", "norm_sim:0.2")))
    found = filter_store(store, tmp_path / "o.npy", FilterOptions(stages, str(target)), ONE)
    assert [step["rows"] for step in found["steps"]] == [630, 630, 252, 126]
    assert sum(rows) == 252
    scores, image = scores_of(store), towers(tree)[0]
    first = np.argsort(-scores["neg_clip"], kind="stable")[:252]
    values = norm_sim(image[first], torch.from_numpy(np.load(target)))
    best = first[values.argsort(descending=True, stable=True)[:126].numpy()]
    wanted = sorted(scores["uid"][best])
    assert [f"{hi:016x}{lo:016x}" for hi, lo in load_subset(tmp_path / "o.npy").tolist()] == wanted
    # What is there is not computed again.
    filter_store(store, tmp_path / "o.npy", FilterOptions(stages, str(target)), ONE)
    assert sum(rows) == 252


def test_subset_is_what_the_resharder_takes(store: Path, tmp_path: Path) -> None:
    filter_store(store, tmp_path / "o.npy", FilterOptions((parse_stage("clip>=0.2"),)), ONE)
    array = np.load(tmp_path / "o.npy", mmap_mode="r")
    assert array.dtype == UID == np.dtype("u8,u8")
    assert array.tolist() == sorted(array.tolist())
    scores = scores_of(store)
    wanted = [(int(u[:16], 16), int(u[16:], 16)) for u in scores["uid"][scores["clip"] >= np.float32(0.2)]]
    assert array.tolist() == sorted(wanted)
    # The resharder looks each uid up in the subset, from the left and from the right.
    assert all(np.searchsorted(array, a, "right") - np.searchsorted(array, a, "left") == 1 for a in array[:5])


def test_filter_starts_from_the_set_of_another_method(store: Path, tmp_path: Path) -> None:
    filter_store(store, tmp_path / "a.npy", FilterOptions((parse_stage("clip:0.5"),)), ONE)
    argv = ["select", "filter", "--store", str(store), "--stage", "neg_clip:0.3", "--within", str(tmp_path / "a.npy")]
    assert main([*argv, "--out", str(tmp_path / "b.npy")]) == 0
    scores = scores_of(store)
    inside = np.sort(np.argsort(-scores["clip"], kind="stable")[:315])
    wanted = inside[np.argsort(-scores["neg_clip"][inside], kind="stable")[:189]]
    found = [f"{hi:016x}{lo:016x}" for hi, lo in load_subset(tmp_path / "b.npy").tolist()]
    assert found == sorted(scores["uid"][wanted])


def test_vas_d_stage_has_the_moment_of_the_pool_first(tree: Path, store: Path, tmp_path: Path) -> None:
    stages = tuple(map(parse_stage, ("clip:0.5", "vas_d:0.3")))
    options = FilterOptions(stages, rounds=7)
    filter_store(store, tmp_path / "o.npy", options, ONE)
    image, scores = towers(tree)[0].double(), scores_of(store)
    order = np.lexsort((scores["uid"], -scores["clip"]))[:315]
    alive, step = np.sort(order), -(-(315 - 189) // 7)
    sigma = image.t() @ image / 630
    while len(alive) > 189:
        values = ((image[alive] @ sigma) * image[alive]).sum(1).numpy()
        alive = np.sort(alive[values.argsort()[min(step, len(alive) - 189) :]])
        sigma = image[alive].t() @ image[alive] / len(alive)
    wanted = sorted(scores["uid"][alive])
    assert [f"{hi:016x}{lo:016x}" for hi, lo in load_subset(tmp_path / "o.npy").tolist()] == wanted


def test_report_is_one_page_that_loads_nothing(store: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for name in ("clip", "neg_clip"):
        filter_store(store, tmp_path / f"{name}.npy", FilterOptions((parse_stage(f"{name}:0.3"),)), ONE)
    subsets = [f"{name}={tmp_path / name}.npy" for name in ("clip", "neg_clip")]
    argv = ["select", "report", "--store", str(store), "--out", str(tmp_path / "page")]
    assert main([*argv, "--subset", subsets[0], "--subset", subsets[1]]) == 0
    page = (tmp_path / "page/index.html").read_text()
    assert not re.search(r"<(script|link|img|iframe)\b|(src|href)=\"(?!#|data:)|url\((?!#)|@import", page)
    for words in (
        "Scores before and after",
        "Convergence in K",
        "Overlap of subsets",
        "Most disputed",
        "Worst by CLIP",
    ):
        assert words in page
    scores = scores_of(store)
    best = scores["uid"][scores["clip"].argmax()]
    assert page.index("Best by CLIP score") < page.index(best[:12])


# Input that does not fit ----------------------------------------------------------------------------------------------


def refusal(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(argv) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if "expected" in line]
    assert len(error) == 1
    return error[0]


def break_uid(root: Path, name: str) -> None:
    path = root / f"{name}.parquet"
    table = pq.read_table(path)
    uids = table.column("uid").to_pylist()
    uids[2] = "abc"
    pq.write_table(table.set_column(0, "uid", pa.array(uids)), path)


def drop_key(root: Path, name: str) -> None:
    held = dict(np.load(root / f"{name}.npz"))
    write_npz(root / f"{name}.npz", {"l14_img": held["l14_img"]})


def narrow(root: Path, name: str) -> None:
    held = dict(np.load(root / f"{name}.npz"))
    write_npz(root / f"{name}.npz", {"l14_img": held["l14_img"], "l14_txt": held["l14_txt"][:, :7]})


def flatten(root: Path, name: str) -> None:
    held = dict(np.load(root / f"{name}.npz"))
    write_npz(root / f"{name}.npz", {"l14_img": held["l14_img"].ravel(), "l14_txt": held["l14_txt"]})


def lose(root: Path, name: str) -> None:
    (root / f"{name}.parquet").unlink()


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        (drop_key, "00000001.npz: expected the key 'l14_txt', got only l14_img"),
        (narrow, "00000001.npz: expected 'l14_img' and 'l14_txt' of one width, got 16 and 7"),
        (
            flatten,
            "00000001.npz: expected 'l14_img' as a matrix of floating numbers (rows, width), got float16 of",
        ),
        (break_uid, "00000001.parquet: expected column 'uid', to hold uids of 32 hexadecimal digits, got 3 characters"),
        (truncate, "00000001.npz: expected the member l14_img.npy of a whole zip, got a file that cannot be read"),
        (flip_bit, "00000001.npz: expected 'l14_img' with the CRC"),
        (drop_row, "00000001.npz: expected as many rows in both towers as there are uids, got 10 of image"),
        (lose, "00000001.parquet: expected a file, got none"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_a_bad_shard_is_named_by_file_and_key(fault, sentence, tmp_path, capsys) -> None:
    make_tree(tmp_path, rows=20, shards=2)
    fault(tmp_path / "metadata", "00000001")
    argv = ["select", "score", "--input", str(tmp_path), "--out", str(tmp_path / "s"), "--workers", "1"]
    assert str(tmp_path / "metadata" / sentence) in refusal(argv, capsys)


def test_bad_arguments_are_one_sentence(tree, store, target, tmp_path, capsys) -> None:
    score = ["select", "score", "--input", str(tree), "--out", str(tmp_path / "s")]
    filters = ["select", "filter", "--store", str(store), "--out", str(tmp_path / "o.npy")]
    (tmp_path / "file").touch()
    np.save(tmp_path / "wide.npy", np.ones((5, 17), np.float32))
    np.save(tmp_path / "ints.npy", np.arange(5))
    cases = [
        ([*score, "--arch", "l15"], "expected an architecture out of b32, l14"),
        ([*score[:3], "/nowhere", *score[4:]], "expected the pool as a folder, got /nowhere"),
        ([*score[:3], str(tmp_path), *score[4:]], "expected a folder with *.npz and *.parquet"),
        ([*score[:-1], str(tmp_path / "file")], "expected --out as a folder that can be written"),
        ([*score, "--scores", "clip,beauty"], "expected scores out of clip, neg_clip, vas, norm_sim, got 'beauty'"),
        ([*score, "--scores", "vas"], "expected --target for vas and norm_sim, got none"),
        ([*score, "--scores", "vas", "--target", str(tmp_path / "wide.npy"), "--workers", "1"], "wide.npy of width 16"),
        (
            [*score, "--scores", "vas", "--target", str(tmp_path / "ints.npy")],
            "ints.npy to hold a (d, d)",
        ),
        ([*score, "--batch-size", "0"], "expected batch_size of at least 1, got 0"),
        ([*score, "--temperature", "-1"], "expected temperature above 0, got -1.0"),
        ([*filters, "--stage", "clip:1.5"], "expected a fraction in (0, 1] in the stage 'clip:1.5', got 1.5"),
        ([*filters, "--stage", "clip"], "expected a stage as score:fraction or score>=threshold, got 'clip'"),
        ([*filters, "--stage", "clip:.2", "--stage", "neg_clip:.3"], "expected fractions of the original pool"),
        ([*filters, "--stage", "beauty:.2"], "expected a score out of"),
        ([*filters, "--stage", "norm_sim:.2"], "expected --target for the stage norm_sim:0.2"),
        ([*filters], "expected at least one --stage, got none"),
        ([*filters[:3], str(tmp_path / "none"), *filters[4:], "--stage", "clip:.2"], "expected"),
        ([*filters[:-1], str(tmp_path / "file" / "o.npy"), "--stage", "clip:.2"], "as a folder that can be written"),
        (["select", "report", "--store", str(store), "--subset", "x", "--out", "x"], "expected --subset as NAME=FILE"),
        (["select", "combine", "union", str(tmp_path / "ints.npy"), "--out", "x"], "to be an npy file of dtype u8,u8"),
    ]
    for argv, sentence in cases:
        assert sentence in refusal(argv, capsys), argv


def test_the_library_imports_as_it_is_published() -> None:
    """Fault 1: an import of a private module."""
    for module in pkgutil.iter_modules(data_selection.__path__):
        importlib.import_module(f"{data_selection.__name__}.{module.name}")


def test_uids_are_parsed_as_integers_are() -> None:
    """Fault 11: a Python integer for each half of each row."""
    texts = [os.urandom(16).hex() for _ in range(100)] + ["F" * 32, "0" * 32]
    found = parse_uids(pa.chunked_array([texts[:40], texts[40:]]), "here")
    assert found.tolist() == [[int(t[:16], 16), int(t[16:], 16)] for t in texts]
    assert parse_uids(pa.array(texts).slice(7, 5), "here").tolist() == found[7:12].tolist()
    with pytest.raises(ValueError, match=r"here to hold uids .* got 'g0{31}' at row 1"):
        parse_uids(pa.array(["0" * 32, "g" + "0" * 31]), "here")


def test_save_is_whole_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "o.npy"
    save_subset(path, np.array([[3, 1], [1, 2], [1, 1]], np.uint64))
    assert np.load(path).tolist() == [(1, 1), (1, 2), (3, 1)]

    def interrupted() -> None:
        with files.atomic(path) as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert np.load(path).tolist() == [(1, 1), (1, 2), (3, 1)]
    assert [p.name for p in tmp_path.iterdir()] == ["o.npy"]


def test_arrays_give_what_the_store_gives(tree: Path, store: Path, target: Path, tmp_path: Path) -> None:
    image, text = towers(tree)
    rows = np.load(target)
    np.save(tmp_path / "image.npy", image.numpy())
    mapped = np.load(tmp_path / "image.npy", mmap_mode="r")
    found = data_selection.score_pairs(mapped, text.numpy(), batch_size=100, num_partitions=2, temperature=0.05)
    assert torch.equal(found["clip"], torch.from_numpy(scores_of(store)["clip"]))
    uids = parse_uids(pq.read_table(store / "scores.parquet").column("uid"), "here")
    for stages in (("clip:0.5", "norm_sim:0.3"), ("clip>=0.1", "vas:0.2"), ("clip:0.5", "vas_d:0.3")):
        kept = data_selection.keep(found, stages, image=mapped, target=rows, uids=uids, rounds=7)
        options = FilterOptions(tuple(map(parse_stage, stages)), str(target), rounds=7)
        filter_store(store, tmp_path / "o.npy", options, ONE)
        assert sorted(map(tuple, uids[kept].tolist())) == [tuple(u) for u in load_subset(tmp_path / "o.npy").tolist()]
    with pytest.raises(ValueError, match="expected image and target for norm_sim, got none"):
        data_selection.keep(found, ["norm_sim:0.2"])
    with pytest.raises(ValueError, match="expected scores out of clip"):
        data_selection.score_pairs(image, text, scores=("beauty",))
