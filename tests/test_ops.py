"""The generic suite: what holds for every operation, by the entries of cases.CASES."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, Case
from oracle import assert_no_worse_than_torch, map_tensors
from torch import Tensor

from llmkern._library import cpu_build

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
EACH_CASE = pytest.mark.parametrize("case", CASES, ids=str)


def permuted(x: Tensor) -> Tensor:
    """The same values with the last but one dimension running fastest."""
    return x.mT.contiguous().mT if x.dim() >= 2 else x


@EACH_CASE
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_matches_oracle(case: Case, dtype: torch.dtype, device: str) -> None:
    assert case.factor == 2.0 or case.reason
    for width in case.widths:
        tensors = case.make(3, width, dtype, device)
        assert_no_worse_than_torch(case.function, case.reference, tensors, case.names, case.factor)


@EACH_CASE
def test_gradcheck(case: Case, device: str) -> None:
    tensors = [None if t is None else t.requires_grad_() for t in case.make(2, 19, torch.float64, device)]
    # Kernels in every direction; the references, of which each evaluation takes long, in random ones.
    assert torch.autograd.gradcheck(case.function, tensors, fast_mode=cpu_build.isa is None)


@EACH_CASE
@pytest.mark.parametrize("layout", ["contiguous", "permuted"])
def test_opcheck(case: Case, layout: str, device: str) -> None:
    tensors = case.make(3, 37, torch.float32, device)
    if layout == "permuted":
        tensors = [None if t is None else permuted(t) for t in tensors]
    for op, args in case.raw(tensors):
        torch.library.opcheck(op, args)


@EACH_CASE
def test_compiles_whole(case: Case, device: str) -> None:
    tensors = [None if t is None else t.requires_grad_() for t in case.make(3, 37, torch.float32, device)]
    present = [t for t in tensors if t is not None]
    torch._dynamo.reset()
    compiled = torch.compile(case.function, fullgraph=True, backend="aot_eager")
    results = []
    for function in (case.function, compiled):
        out = function(*tensors)
        results.append([out, *torch.autograd.grad(out.square().sum(), present)])
    for eager, traced in zip(*results):
        assert torch.equal(eager, traced)


@EACH_CASE
def test_second_derivative_is_right_or_refused(case: Case, device: str) -> None:
    tensors = [None if t is None else t.requires_grad_() for t in case.make(1, 5, torch.float64, device)]
    if case.twice:
        assert torch.autograd.gradgradcheck(case.function, tensors)
        return
    out = case.function(*tensors)
    (grad,) = torch.autograd.grad(out.square().sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@EACH_CASE
def test_inputs_stay_as_they_are(case: Case, device: str) -> None:
    tensors = [None if t is None else t.requires_grad_() for t in case.make(3, 100, torch.float32, device)]
    before = [None if t is None else t.detach().clone() for t in tensors]
    case.function(*tensors).square().sum().backward()
    for now, then in zip(tensors, before):
        assert then is None or torch.equal(now, then)


@EACH_CASE
@pytest.mark.kernel
def test_thread_count_changes_no_bit(case: Case) -> None:
    for rows, width in case.large:
        tensors = [None if t is None else t.requires_grad_() for t in case.make(rows, width, torch.float32, "cpu")]
        present = [t for t in tensors if t is not None]
        results = []
        threads = torch.get_num_threads()
        try:
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                out = case.function(*tensors)
                results.append([out, *torch.autograd.grad(out.square().sum(), present)])
        finally:
            torch.set_num_threads(threads)
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other)), (rows, width)


@EACH_CASE
@pytest.mark.kernel
def test_layout_of_inputs_changes_no_bit(case: Case, device: str) -> None:
    tensors = case.make(4, 300, torch.float32, device)
    expected = case.function(*tensors)
    strided = map_tensors(tensors, lambda t: torch.stack([t, t], -1)[..., 0])
    padded = map_tensors(tensors, lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]])
    for changed in (map_tensors(tensors, permuted), strided, padded):
        assert torch.equal(case.function(*changed), expected)


@EACH_CASE
def test_no_rows(case: Case, device: str) -> None:
    tensors = [None if t is None else t.requires_grad_() for t in case.make(0, 7, torch.float32, device)]
    out = case.function(*tensors)
    assert out.shape == case.reference(*tensors).shape
    out.sum().backward()
    assert all(t is None or t.grad.shape == t.shape for t in tensors)


@EACH_CASE
def test_every_output_is_written(case: Case, device: str) -> None:
    """With torch.empty filled with NaN nothing may differ: what is not written would be NaN."""
    tensors = [None if t is None else t.requires_grad_() for t in case.make(3, 2049, torch.float32, device)]
    present = [t for t in tensors if t is not None]
    expected = case.function(*tensors)
    expected_grads = torch.autograd.grad(expected.square().sum(), present)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        assert torch.empty(3).isnan().all()
        out = case.function(*tensors)
        grads = torch.autograd.grad(out.square().sum(), present)
    finally:
        torch.use_deterministic_algorithms(False)
    for ours, theirs in zip([expected, *expected_grads], [out, *grads]):
        assert torch.equal(ours, theirs)


@EACH_CASE
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_never_pass_for_numbers(case: Case, value: float, device: str) -> None:
    """As torch has it such a row becomes NaN; some ops refuse it on the CPU by its index, where looking is free."""
    tensors = case.make(3, 50, torch.float32, device)
    tensors[0][1, 7] = value
    if case.refuses and device == "cpu":
        with pytest.raises(ValueError, match=case.refuses):
            case.function(*tensors)
    else:
        out, expected = case.function(*tensors), case.reference(*tensors)
        assert torch.equal(out.isfinite(), expected.isfinite())
        assert not out.isfinite().all()
