"""Which layers share an MLP: by pattern and share of layers, or by what the exchange costs on a text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llmkern._library import bad_type, bad_value
from llmkern.papers.sharp.observe import watch_mlps

PATTERNS = ("later", "earlier", "similar")
Groups = tuple[tuple[int, ...], ...]


def choose_groups(
    layers: int,
    *,
    replace: float | int | None = None,
    pattern: str = "later",
    group_size: int = 2,
    keep_first: int = 1,
    keep_last: int = 1,
    distances: Tensor | None = None,
) -> Groups:
    """Groups of consecutive layers in which all but the first give up their MLP.

    Args:
        layers: L, of the model.
        replace: how many layers give up theirs; a float is a share of L, rounded; by default all that the groups allow.
        pattern: "later" takes groups from the end (there the paper found replacement to cost less; ``llmkern reproduce
            sharp`` found the opposite), "earlier" from the start, "similar" those whose exchange costs least by
            ``distances``.
        group_size: most layers in a group, the reference included.
        keep_first, keep_last: layers at both ends that stay out of all groups.
        distances: (L, L), entry (i, j) the cost of running MLP i in layer j; see ``mlp_distances``.
    """
    if pattern not in PATTERNS:
        raise bad_value("choose_groups", f"pattern as one of {', '.join(PATTERNS)}", repr(pattern))
    if group_size < 2:
        raise bad_value("choose_groups", "group_size of at least 2", group_size)
    if min(keep_first, keep_last) < 0:
        raise bad_value("choose_groups", "keep_first and keep_last of at least 0", f"{keep_first} and {keep_last}")
    first, last = keep_first, layers - keep_last
    whole, rest = divmod(max(0, last - first), group_size)
    most = whole * (group_size - 1) + max(0, rest - 1)
    if most < 1:
        kept = f"{layers} layers, of which {keep_first} and {keep_last} are kept"
        raise bad_value("choose_groups", "two layers or more beside those that are kept", kept)
    count = most if replace is None else _count(layers, replace)
    if not 1 <= count <= most:
        expected = f"1 to {most} of {layers} layers to replace in groups of {group_size}"
        raise bad_value("choose_groups", expected, f"replace={replace}", "raise group_size or keep fewer at the ends")
    if pattern == "similar":
        if distances is None or distances.shape != (layers, layers):
            got = "none" if distances is None else tuple(distances.shape)
            raise bad_value("choose_groups", f"distances of shape ({layers}, {layers}) with pattern='similar'", got)
        if bool(distances.isnan().any()):
            raise bad_value("choose_groups", "numbers as distances", "NaN", "look for NaN in the model and its text")
        return _cheapest(distances.double(), first, last, count, group_size)
    groups, left = [], count
    while left:
        size = min(group_size, left + 1)
        groups.append(tuple(range(last - size, last) if pattern == "later" else range(first, first + size)))
        first, last = (first, last - size) if pattern == "later" else (first + size, last)
        left -= size - 1
    return tuple(sorted(groups))


def _count(layers: int, replace: float | int) -> int:
    if isinstance(replace, float):
        if not 0 < replace < 1:
            raise bad_value("choose_groups", "replace as a count or a share in (0, 1)", replace)
        return max(1, round(replace * layers))
    if not isinstance(replace, int) or isinstance(replace, bool):
        raise bad_type("choose_groups", "replace as a count or a share in (0, 1)", repr(replace))
    return replace


def _cheapest(distances: Tensor, first: int, last: int, count: int, group_size: int) -> Groups:
    """Exactly ``count`` layers replaced at the least sum of distances: best[n] over the layers first..end."""
    table = distances.tolist()
    nothing: tuple[float, Groups] = (0.0, ())
    # best[end - first][n]: cost and groups of n replaced layers among first..end-1.
    best: list[list[tuple[float, Groups]]] = [[nothing] + [(math.inf, ())] * count]
    for end in range(first + 1, last + 1):
        row = list(best[-1])
        for size in range(2, min(group_size, end - first) + 1):
            start = end - size
            cost = sum(table[start][layer] for layer in range(start + 1, end))
            for n in range(size - 1, count + 1):
                before, groups = best[start - first][n - size + 1]
                if before + cost < row[n][0]:
                    row[n] = (before + cost, (*groups, tuple(range(start, end))))
        best.append(row)
    return best[-1][count][1]


def ranks_of(
    shapes: dict[str, tuple[int, int]], *, ratio: float | None = None, rank: int | dict[str, int] | None = None
) -> dict[str, int]:
    """{projection: rank} for weights of shape (out, in).

    By ``ratio`` the factors of a projection have that share of its parameters, r (in + out) = ratio in out, and at
    least rank 1; ``rank`` says it outright, for all or by projection, 0 or absent being none.
    """
    if (ratio is None) == (rank is None):
        raise bad_value("convert", "one of rank_ratio and rank", "both" if ratio is not None else "neither")
    if ratio is not None:
        if not 0 < ratio < 1:
            raise bad_value("convert", "rank_ratio in (0, 1)", ratio)
        return {name: max(1, round(ratio * out * width / (out + width))) for name, (out, width) in shapes.items()}
    ranks = rank if isinstance(rank, dict) else dict.fromkeys(shapes, rank)
    unknown = sorted(set(ranks) - set(shapes))
    if unknown:
        raise bad_value("convert", f"ranks for {', '.join(shapes)}", ", ".join(unknown))
    for name, value in ranks.items():
        if not isinstance(value, int) or isinstance(value, bool):
            raise bad_type("convert", f"a whole number as rank of {name}", repr(value))
    return {name: value for name, value in ranks.items() if value}


@torch.no_grad()
def mlp_distances(model: Any, ids: Tensor, *, batch_size: int = 8, span: int | None = None) -> Tensor:
    r"""(L, L): entry (i, j) is what MLP i does in the place of MLP j, on the input that layer j gets from the text ids
    (N, T):  sum |mlp_i(x_j) - mlp_j(x_j)|^2 / sum |mlp_j(x_j)|^2.  With ``span`` only |i - j| < span; the rest is inf.
    """
    layers = list(model.model.layers)
    error = torch.full((len(layers), len(layers)), math.inf, dtype=torch.float64)
    size = torch.zeros(len(layers), dtype=torch.float64)

    def see(j: int, x: Tensor, y: Tensor) -> None:
        size[j] += y.double().square().sum()
        for i, layer in enumerate(layers):
            if span is None or abs(i - j) < span:
                found = torch.zeros_like(y) if i == j else layer.mlp.forward(x) - y
                error[i, j] = found.double().square().sum() + (0.0 if error[i, j].isinf() else error[i, j])

    watch_mlps(model, ids, see, range(len(layers)), batch_size)
    return error / size


def parse_groups(text: str) -> Groups:
    """ "4-5,8-10" as ((4, 5), (8, 9, 10))."""
    groups = []
    for part in text.split(","):
        ends = part.split("-")
        if len(ends) != 2 or not all(end.strip().isdigit() for end in ends):
            raise bad_value("sharp convert", "--groups such as 4-5,8-10", repr(text))
        groups.append(tuple(range(int(ends[0]), int(ends[1]) + 1)))
    return tuple(groups)


def spread(groups: Sequence[Sequence[int]]) -> str:
    """((4, 5), (8, 9, 10)) as "4-5,8-10"."""
    return ",".join(f"{group[0]}-{group[-1]}" for group in groups)
