r"""From a model of transformers to one whose adjacent layers share an MLP, and back.

A replaced layer p with reference q starts from the low-rank part of what it loses, D = W_p - W_q for each projection:

    init="svd":       B A = the best approximation of D of rank r, |D - B A|_F least
    init="whitened":  |(D - B A) X|_F least over the inputs X that the projection gets on a text: with E[x x^T] = L L^T,
                      B A = svd_r(D L) L^-1
    init="zero":      B = 0, the layer runs its reference's MLP as it is

Against a packed (quantised) reference D is W_p less the values that the packed weights stand for, so that the factors
also take up the error of quantisation.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmkern._library import bad_value
from llmkern.integrations.shared_mlp import (
    PREFIX,
    LoraPair,
    SharedMlp,
    check_model,
    freeze_base,
    merge_refused,
    pack_base,
    share_mlps,
    sharing_classes,
)
from llmkern.integrations.sharing import PROJECTIONS, Sharing
from llmkern.ops.shared_lora_mlp import PackedMlp
from llmkern.papers.sharp.groups import Groups, choose_groups, mlp_distances, ranks_of
from llmkern.papers.sharp.observe import Show, moments

INITS = ("svd", "whitened", "zero")
RANK_RATIO = 0.05
# Above this many rows and columns a few steps of subspace iteration take the place of a full decomposition.
FULL_SVD = 2048


def convert(
    model: Any,
    groups: Sequence[Sequence[int]] | None = None,
    *,
    replace: float | int | None = None,
    pattern: str = "later",
    group_size: int = 2,
    keep_first: int = 1,
    keep_last: int = 1,
    rank_ratio: float | None = None,
    rank: int | dict[str, int] | None = None,
    init: str = "zero",
    text: Tensor | None = None,
    scaling: float = 1.0,
    dropout: float = 0.0,
    pack: str | None = None,
    pack_group_size: int = 128,
    seed: int = 0,
    show: Show = lambda layer, note: None,
) -> Any:
    """A model whose groups of layers share an MLP; ``model`` stays as it is, and the two hold the same base tensors.

    Args:
        model: a causal language model of a family in ``llmkern.integrations.shared_mlp.FAMILIES``.
        groups: layers that share, each group consecutive and its reference first; else they are chosen by the next
            five, see ``choose_groups``.
        rank_ratio: share of a projection's parameters that its factors get (default 0.05).
        rank: a rank in place of the ratio, for all projections or by name: {"down_proj": 16}; 0 or absent is none.
        init: "zero", "svd" or "whitened". With factors of a few percent the last two start further from the original
            than no factors do, and training from zero ended better (``llmkern reproduce sharp``).
        text: token ids (N, T) for pattern="similar" and init="whitened".
        scaling: s of s B A. dropout: of the factors' input, in training.
        seed: of what A is drawn from where no difference gives it.
        show: called with each layer whose factors have been fitted, and a word on it.
        pack: "bf16", "int8" or "int4" to run the shared MLPs on packed weights; see ``pack_base``.

    Raises:
        ValueError, TypeError: for a model, groups or ranks that do not fit.
    """
    if getattr(getattr(model, "config", None), "sharing", None):
        raise bad_value(
            "convert", "a model that was not converted yet", "one whose layers share MLPs", "export_dense it"
        )
    check_model(model)
    if init not in INITS:
        raise bad_value("convert", f"init as one of {', '.join(INITS)}", repr(init))
    if text is None and (init == "whitened" or (groups is None and pattern == "similar")):
        expected = f"text with {'init=whitened' if init == 'whitened' else 'pattern=similar'}"
        raise bad_value("convert", expected, "none", "pass token ids of shape (N, T)")
    if groups is None:
        distances = None
        if pattern == "similar":
            assert text is not None
            distances = mlp_distances(model, text, span=group_size)
        options = {"group_size": group_size, "keep_first": keep_first, "keep_last": keep_last, "distances": distances}
        groups = choose_groups(len(model.model.layers), replace=replace, pattern=pattern, **options)  # type: ignore[arg-type]
    if not groups or not all(isinstance(group, list | tuple) for group in groups):
        raise bad_value("convert", "groups such as ((4, 5), (8, 9, 10)), at least one", repr(groups))
    chosen: Groups = tuple(tuple(group) for group in groups)
    layers = [layer for group in chosen for layer in group[1:] if 0 <= layer < len(model.model.layers)]
    ratio = RANK_RATIO if rank is None and rank_ratio is None else rank_ratio
    ranks = {}
    for layer in layers:
        mlp = model.model.layers[layer].mlp
        ranks[layer] = ranks_of({n: tuple(getattr(mlp, n).weight.shape) for n in PROJECTIONS}, ratio=ratio, rank=rank)
    sharing = Sharing(chosen, ranks, scaling, dropout)
    shared = _as_class(twin(model), sharing_classes(model.config.model_type), sharing)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        share_mlps(shared, sharing)
    freeze_base(shared)
    if pack is not None:
        pack_base(shared, pack, pack_group_size)
    init_factors(shared, model, init, text, show)
    return shared


def twin(model: Any) -> Any:
    """A copy of the modules over the same memory of weights."""
    memo = {id(p): nn.Parameter(p.detach(), requires_grad=p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, memo)


def _as_class(model: Any, classes: tuple[Any, Any], sharing: Sharing | None) -> Any:
    config_class, model.__class__ = classes
    for config in {id(config): config for config in (model.config, model.model.config)}.values():
        config.__class__ = config_class
        if sharing is None:
            del config.sharing
        else:
            config.sharing = sharing.to_dict()
        config.architectures = [type(model).__name__]
    return model


# Factors --------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def init_factors(
    shared: Any, original: Any, init: str, text: Tensor | None = None, show: Show = lambda layer, note: None
) -> None:
    """In place: the factors of every replaced layer from what it lost, see the formulas above."""
    if init == "zero":
        return
    replaced = shared.sharing.references
    measured = moments(original, text, replaced) if init == "whitened" and text is not None else {}
    for layer in replaced:
        mlp, lost = shared.model.layers[layer].mlp, original.model.layers[layer].mlp
        bases = dict(zip(PROJECTIONS, dense_weights(mlp)))
        for name in PROJECTIONS:
            pair = getattr(mlp, name)
            if pair is None:
                continue
            difference = getattr(lost, name).weight.float() - bases[name].float()
            moment = measured[layer][name == "down_proj"] if measured else None
            a, b = low_rank(difference, pair.lora_A.out_features, moment)
            pair.lora_A.weight.copy_(a)
            pair.lora_B.weight.copy_(b / shared.sharing.scaling)
        show(layer, f"layer {layer}")


def dense_weights(mlp: Any, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """gate, up and down that a reference, or the reference of a layer, stands for; packed ones come in ``dtype``."""
    weights = getattr(mlp, "reference", mlp).weights
    gate, up, down = weights.dequantize(dtype or torch.float32) if isinstance(weights, PackedMlp) else weights
    assert gate is not None
    # Unpacked ones are views of what is interleaved, which no file takes.
    return gate.contiguous(), up.contiguous(), down.contiguous()


def low_rank(difference: Tensor, rank: int, moment: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A (rank, in), B (out, rank) with B A closest to ``difference``, of equal weight; ``moment`` is E[x x^T]."""
    factor = None
    if moment is not None:
        # A direction that the text never takes costs nothing, yet the inverse needs it: a millionth of the mean.
        ridge = 1e-6 * moment.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
        factor = torch.linalg.cholesky(moment + ridge * torch.eye(len(moment), dtype=moment.dtype))
        difference = (difference.double() @ factor).float()
    if min(difference.shape) > FULL_SVD:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(difference, q=min(rank + 16, min(difference.shape)), niter=4)
    else:
        u, s, vh = torch.linalg.svd(difference, full_matrices=False)
        v = vh.mT
    root = s[:rank].sqrt()
    a, b = root[:, None] * v[:, :rank].mT, u[:, :rank] * root
    if factor is not None:
        a = torch.linalg.solve_triangular(factor, a.double(), upper=False, left=False).float()
    return a, b


# Back -----------------------------------------------------------------------------------------------------------------


def export_dense(shared: Any) -> Any:
    """An ordinary model of the family in which each layer has a weight of its own, W + s B A, for any other tool."""
    return _plain(shared, merge=True)


def with_tied_layers(shared: Any) -> Any:
    """An ordinary model whose layers hold the shared weights and no factors: the base that PEFT puts an adapter on.

    PEFT's own merge would change each weight once for every layer that shares it; ``with_peft`` refuses it.
    """
    return _plain(shared, merge=False)


def with_peft(shared: Any, folder: str | Path) -> Any:
    """PEFT's model with the adapter of a folder from ``save_adapter``: it computes what ``shared`` does with them,
    for tools that ask for a ``PeftModel``. Merging is refused, see ``with_tied_layers``.
    """
    from peft import PeftModel

    found: Any = PeftModel.from_pretrained(with_tied_layers(shared), str(folder))

    def refuse(*_: Any, **__: Any) -> None:
        raise merge_refused()

    # Where PeftModel looks for them.
    found.base_model.merge_and_unload = found.base_model.merge_adapter = refuse
    return found


@torch.no_grad()
def _plain(shared: Any, merge: bool) -> Any:
    family = shared.config.model_type.removeprefix(PREFIX)
    config_class, model_class = sharing_classes(family)
    plain = twin(shared)
    sharing = shared.sharing
    members = {layer for group in sharing.groups for layer in group}
    for layer in members:
        mlp = plain.model.layers[layer].mlp
        reference = getattr(mlp, "reference", mlp)
        with torch.device("meta"):
            made = reference.plain_class(plain.config)
        for name, base in zip(PROJECTIONS, dense_weights(mlp, reference.gate_proj.weight.dtype)):
            weight = base if isinstance(base, nn.Parameter) else nn.Parameter(base)
            if merge and isinstance(mlp, SharedMlp):
                pair = getattr(mlp, name)
                weight = nn.Parameter(base.clone() if pair is None else merged(base, pair, sharing.scaling))
            getattr(made, name).weight = weight
        plain.model.layers[layer].mlp = made.train(plain.training)
    plain = _as_class(plain, (config_class.__base__, model_class.__mro__[2]), None)
    return plain.requires_grad_(True)


def merged(base: Tensor, pair: LoraPair, scaling: float) -> Tensor:
    """W + s B A, added up in at least float32 and rounded once."""
    wide = torch.promote_types(base.dtype, torch.float32)
    a, b = pair.pair
    return (base.to(wide) + scaling * (b.to(wide) @ a.to(wide))).to(base.dtype)


# Sizes ----------------------------------------------------------------------------------------------------------------


def mlp_parameters(model: Any) -> int:
    """Stored parameters of all MLPs, factors included, a shared one counted once."""
    return sum(p.numel() for layer in model.model.layers for p in layer.mlp.parameters())


def parameters(model: Any) -> int:
    return sum(p.numel() for p in model.parameters())
