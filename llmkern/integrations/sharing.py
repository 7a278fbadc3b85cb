"""Which layers of a model share an MLP and with what factors: what config.json keeps, and whether a model allows it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from llmkern._library import bad_value

NAME = "shared MLP"
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Sharing:
    """Which layers share, and with what factors.

    groups: consecutive layers, the reference first; ranks: {layer: {projection: rank}} of every layer but references,
    a projection that is absent or 0 having no factors; scaling: s; dropout: of x before A, in training; pack and
    pack_group_size: what ``pack_mlp`` makes of the references, None if they run as they are.
    """

    groups: tuple[tuple[int, ...], ...]
    ranks: Mapping[int, Mapping[str, int]] = field(default_factory=dict)
    scaling: float = 1.0
    dropout: float = 0.0
    pack: str | None = None
    pack_group_size: int = 128

    @property
    def references(self) -> dict[int, int]:
        """{layer: its reference} of every layer that gave up its MLP."""
        return {layer: group[0] for group in self.groups for layer in group[1:]}

    def to_dict(self) -> dict[str, Any]:
        """Plain values for config.json, with the name under which each absent weight is found."""
        weights = {
            weight_name(layer, name): weight_name(reference, name)
            for layer, reference in self.references.items()
            for name in PROJECTIONS
        }
        return {
            "groups": [list(group) for group in self.groups],
            "ranks": {str(layer): dict(ranks) for layer, ranks in self.ranks.items()},
            "scaling": self.scaling,
            "dropout": self.dropout,
            "weights": weights,
            **({} if self.pack is None else {"pack": self.pack, "pack_group_size": self.pack_group_size}),
        }

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Sharing:
        try:
            return cls(
                groups=tuple(tuple(int(i) for i in group) for group in stored["groups"]),
                ranks={int(i): {str(k): int(r) for k, r in ranks.items()} for i, ranks in stored["ranks"].items()},
                scaling=float(stored.get("scaling", 1.0)),
                dropout=float(stored.get("dropout", 0.0)),
                pack=stored.get("pack"),
                pack_group_size=int(stored.get("pack_group_size", 128)),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise bad_value(
                NAME, "sharing in config.json with groups and ranks", repr(stored), "save it anew"
            ) from error


def weight_name(layer: int, projection: str) -> str:
    return f"model.layers.{layer}.mlp.{projection}.weight"


def check_sharing(model: Any, sharing: Sharing) -> None:
    layers = model.model.layers
    used: set[int] = set()
    for group in sharing.groups:
        if len(group) < 2 or list(group) != list(range(group[0], group[0] + len(group))):
            raise bad_value(NAME, "groups of two or more consecutive layers", list(group))
        if group[0] < 0 or group[-1] >= len(layers):
            raise bad_value(NAME, f"layers from 0 to {len(layers) - 1}", list(group))
        if used & set(group):
            raise bad_value(NAME, "groups that have no layer in common", [list(g) for g in sharing.groups])
        used |= set(group)
        shapes = {layer: [tuple(getattr(layers[layer].mlp, n).weight.shape) for n in PROJECTIONS] for layer in group}
        for layer, found in shapes.items():
            if found != shapes[group[0]]:
                expected = f"layers of one size in the group {list(group)}, gate_proj {shapes[group[0]][0]}"
                raise bad_value(NAME, expected, f"{found[0]} in layer {layer}", "share layers of equal size only")
    for layer, ranks in sharing.ranks.items():
        if layer not in sharing.references:
            raise bad_value(NAME, "ranks of layers that share another's MLP", f"layer {layer}")
        for name, rank in ranks.items():
            if name not in PROJECTIONS:
                raise bad_value(NAME, f"ranks by projection, {', '.join(PROJECTIONS)}", repr(name))
            linear = getattr(layers[sharing.references[layer]].mlp, name)
            most = min(linear.in_features, linear.out_features)
            if not 0 <= rank <= most:
                raise bad_value(NAME, f"a rank of 0 to {most} for {name} of layer {layer}", rank)
    if not 0 <= sharing.dropout < 1:
        raise bad_value(NAME, "dropout in [0, 1)", sharing.dropout)
    if not math.isfinite(sharing.scaling) or sharing.scaling == 0:
        raise bad_value(NAME, "scaling as a finite number other than 0", sharing.scaling)
