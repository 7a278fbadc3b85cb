"""The parts of `llmkern select` that need no files: cuts, set algebra, VAS-D."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkern.ops.vas_score import SecondMoment
from llmkern.papers.data_selection.rank import keep_top, ranks, sort_keys
from llmkern.papers.data_selection.uids import combine, contains, first_of_equals, uid_order
from llmkern.papers.data_selection.vas_d import Work, vas_d, vas_d_naive

floats = st.floats(width=32, allow_nan=True) | st.sampled_from([0.0, -0.0, 0.25, 0.5])
uid_sets = st.lists(st.tuples(st.integers(0, 3), st.sampled_from([0, 1, 2**63, 2**64 - 1])), max_size=12)


def as_uids(pairs: list[tuple[int, int]]) -> np.ndarray:
    return np.array(pairs, np.uint64).reshape(-1, 2)


@given(st.lists(floats, min_size=1, max_size=60), st.data())
@settings(deadline=None)
def test_keep_top_is_a_sort_with_ties_by_uid(values: list[float], data: st.DataObject) -> None:
    """Fault 13: arbitrary ties, or one more than asked for."""
    scores = np.array(values, np.float32)
    count = data.draw(st.integers(0, len(values)))
    uids = np.random.default_rng(0).permutation(len(values)).astype(np.uint64)[:, None].repeat(2, 1)
    number = [i for i in range(len(values)) if not np.isnan(scores[i])]
    wanted = sorted(number, key=lambda i: (-scores[i], uids[i, 0]))[:count]
    assert np.flatnonzero(keep_top(scores, uids, count)).tolist() == sorted(wanted)


@given(st.lists(floats, min_size=2, max_size=30))
def test_keys_ascend_with_the_scores(values: list[float]) -> None:
    scores = np.array([v for v in values if not np.isnan(v)], np.float32)
    keys = sort_keys(scores)
    assert ((scores[:, None] < scores) == (keys[:, None] < keys)).all()
    assert ((scores[:, None] == scores) == (keys[:, None] == keys)).all()


@given(st.lists(st.sampled_from([-1.0, 0.0, 0.5, 2.0]), max_size=12))
def test_ranks_of_equals_are_their_mean(values: list[float]) -> None:
    scores = np.array(values, np.float32)
    below, equal = (scores < scores[:, None]).sum(1), (scores == scores[:, None]).sum(1)
    assert ranks(scores).tolist() == (below + (equal - 1) / 2).tolist()


@given(st.lists(uid_sets, min_size=1, max_size=4))
@settings(deadline=None)
def test_set_algebra(lists: list[list[tuple[int, int]]]) -> None:
    subsets = [as_uids(pairs) for pairs in lists]
    sets = [set(pairs) for pairs in lists]
    assert combine("union", subsets).tolist() == [list(p) for p in sorted(set.union(*sets))]
    assert combine("intersection", subsets).tolist() == [list(p) for p in sorted(set.intersection(*sets))]
    assert combine("difference", subsets).tolist() == [list(p) for p in sorted(sets[0].difference(*sets[1:]))]
    every = sum((Counter(pairs) for pairs in lists), Counter())
    assert combine("repeat", subsets).tolist() == [list(p) for p in sorted(every.elements())]
    assert contains(subsets[0], subsets[-1]).tolist() == [p in sets[0] for p in lists[-1]]
    assert int(first_of_equals(subsets[0]).sum()) == len(sets[0])
    assert subsets[0][uid_order(subsets[0])].tolist() == [list(p) for p in sorted(lists[0])]


def embeddings(n: int, d: int, seed: int, power: float) -> torch.Tensor:
    """Unit rows around a mean direction, with variances that fall as a power."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.arange(1, d + 1) ** -power
    x = torch.randn(n, d, generator=generator) * scale + torch.randn(d, generator=generator) * scale
    return (x / x.norm(dim=1, keepdim=True)).half()


@pytest.mark.parametrize("power", [0.0, 0.5, 1.5])
@pytest.mark.parametrize("rank", [1, 8, 64])
def test_vas_d_leaves_the_set_of_the_naive_loop(power: float, rank: int) -> None:
    x = embeddings(1500, 32, 3, power)
    work = Work()
    found = vas_d(x, 900, 40, rank=rank, work=work)
    assert np.array_equal(found, vas_d_naive(x, 900, 40))
    # Fault 9: every round scores everybody and counts everything again.
    assert work.referenced + work.rescored < 0.35 * 40 * 1200


def test_vas_d_of_a_mapped_file_with_a_first_moment_and_a_restart(tmp_path) -> None:
    x = embeddings(700, 16, 4, 0.5)
    first = SecondMoment(16).add(embeddings(900, 16, 5, 0.5))
    np.save(tmp_path / "x.npy", x.numpy())
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    states = []
    found = vas_d(mapped, 300, 9, first=first, checkpoint=lambda done, alive: states.append((done, alive)))
    assert np.array_equal(found, vas_d_naive(x, 300, 9, first=first))
    assert not np.array_equal(found, vas_d_naive(x, 300, 9))
    assert [done for done, _ in states] == list(range(1, 10))
    for state in states[::4]:
        assert np.array_equal(vas_d(x, 300, 9, first=first, resume=state), found)


def test_vas_d_ties_go_by_key() -> None:
    x = torch.eye(4).half().repeat(3, 1)
    assert vas_d(x, 9, 1).tolist() == list(range(9))
    assert vas_d(x, 9, 1, ties=np.arange(12)[::-1]).tolist() == list(range(3, 12))
    for bad in (0, 13):
        with pytest.raises(ValueError, match="expected count in 1 to 12"):
            vas_d(x, bad, 3)
    with pytest.raises(ValueError, match="expected rounds of at least 1"):
        vas_d(x, 3, 0)
