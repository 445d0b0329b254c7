"""What every kernel backend must do. A backend is a class made with (plan, device)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from gradsplit.kernels.reference import ReferenceKernel
from gradsplit.plan import Plan
from tests.laws.cases import CPU
from tests.laws.oracles import scaled_by_labels, square_sums, to_numpy, tolerance_of

Tensors = list[torch.Tensor | None]


def _copies(tensors: Tensors) -> Tensors:
    return [None if t is None else t.clone() for t in tensors]


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """Integers that differ where bits differ, so that NaN equals itself and -0 is not 0."""
    dense = tensor.to_dense() if tensor.is_sparse else tensor
    dense = torch.view_as_real(dense) if dense.is_complex() else dense
    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return dense.contiguous().view(kinds[dense.element_size()])


def check_squares(backend: Any, plan: Plan, tensors: Tensors) -> None:
    """Each bin's sum of squares is that of float64 numpy over the painted labels; inputs stay as they are."""
    before = _copies(tensors)
    got = backend(plan, CPU).squares(tensors)
    assert got.shape == (plan.num_bins,), "not one square a bin"
    assert got.dtype == torch.float64, f"squares added in {got.dtype}"
    want = square_sums(plan, tensors)
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-6 if _narrow(tensors) else 1e-12, atol=0)
    for a, b in zip(before, tensors, strict=True):
        assert a is None or torch.equal(_bits(a), _bits(b)), "reading changed a tensor"


def _narrow(tensors: Tensors) -> bool:
    """complex64: the modulus is taken in float32."""
    return any(t is not None and t.dtype == torch.complex64 for t in tensors)


def check_scaling(backend: Any, plan: Plan, tensors: Tensors, scale_B: torch.Tensor, zero_B: torch.Tensor) -> None:
    """Each element is multiplied by its bin's scale; 0 where told, whatever it was; untouched bins keep their bits."""
    before = _copies(tensors)
    backend(plan, CPU).scale_(tensors, scale_B, zero_B)
    for t, (old, new) in enumerate(zip(before, tensors, strict=True)):
        if old is None:
            assert new is None, "a gradient appeared"
            continue
        shape = plan.layout.shapes[t]
        want = scaled_by_labels(plan, to_numpy(old, shape), t, scale_B.numpy(), zero_B.numpy())
        real = old.dtype.to_real() if old.is_complex() else old.dtype
        got, tiny = to_numpy(new, shape), torch.finfo(real).smallest_normal
        np.testing.assert_allclose(got, want, rtol=tolerance_of(real), atol=tiny, err_msg=plan.layout.names[t])
        kept = scaled_by_labels(plan, np.ones(shape), t, (scale_B == 1).double().numpy(), zero_B.numpy()) == 1
        same = (_bits(old) == _bits(new)).numpy()
        same = same.all(-1) if old.is_complex() else same
        assert same[kept].all(), f"{plan.layout.names[t]}: a kept bin has other bits"


def check_equals_reference(
    backend: Any, plan: Plan, tensors: Tensors, scale_B: torch.Tensor, zero_B: torch.Tensor
) -> None:
    """The same squares to rounding and the same scaled values, to one unit in the last place, as the definition."""
    mine, theirs = _copies(tensors), _copies(tensors)
    got, want = backend(plan, CPU).squares(mine), ReferenceKernel(plan, CPU).squares(theirs)
    np.testing.assert_allclose(got.numpy(), want.numpy(), rtol=1e-12)
    backend(plan, CPU).scale_(mine, scale_B, zero_B)
    ReferenceKernel(plan, CPU).scale_(theirs, scale_B, zero_B)
    for t, (a, b) in enumerate(zip(mine, theirs, strict=True)):
        if a is not None and b is not None:
            shape, real = plan.layout.shapes[t], a.dtype.to_real() if a.is_complex() else a.dtype
            np.testing.assert_allclose(to_numpy(a, shape), to_numpy(b, shape), rtol=torch.finfo(real).eps, atol=0)


def check_writes_reach_the_tensor(backend: Any, plan: Plan, tensors: Tensors) -> None:
    """Scaling by 0 leaves zeros in the caller's own memory, whatever its strides, and bumps its version."""
    addresses = [t.data_ptr() if t is not None and not t.is_sparse else 0 for t in tensors]
    versions = [0 if t is None else t._version for t in tensors]
    zero = torch.zeros(plan.num_bins, dtype=torch.float64)
    backend(plan, CPU).scale_(tensors, zero, zero.bool())
    for t, tensor in enumerate(tensors):
        if tensor is None or tensor.numel() == 0:
            continue
        assert not to_numpy(tensor, plan.layout.shapes[t]).any(), f"{plan.layout.names[t]}: the write was lost"
        if not tensor.is_sparse:
            assert tensor.data_ptr() == addresses[t], "the tensor moved"
            assert tensor._version > versions[t], f"{plan.layout.names[t]}: autograd was not told of the write"
