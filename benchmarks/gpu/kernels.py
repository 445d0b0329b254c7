"""(a) Every kernel on the device against the definition: dtypes, memory layouts, odd shapes, steps with faults."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

import gradsplit as gs
from gradsplit.kernels import BACKENDS, selfcheck
from gradsplit.kernels.kernel import accumulate_dtype
from gradsplit.lab.speed.figures import Shapes, gpt

from .setting import BUDGETS, Setting, model_of

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
STRIDES = ("contiguous", "turned", "channels_last", "gaps")
ULP = {torch.float64: 2.0**-52, torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


def odd_shapes(tiny: bool) -> Shapes:
    """Shapes at the edges of blocks and pieces, and of every number of dimensions."""
    shapes: Shapes = {"scalar": (), "one": (1,), "row": (1, 7), "column": (7, 1), "vector": (1025,), "rows": (6, 1023)}
    shapes |= {"narrow": (130, 3), "none": (0, 4), "conv": (5, 3, 3, 3), "three": (4, 2, 5)}
    if not tiny:
        shapes |= {"long": (3, 70_001), "wide": (257, 8_193), "table": (5_025, 768), "deep": (64, 64, 3, 3)}
    return shapes


def in_strides(tensor: Tensor, strides: str) -> Tensor:
    """The same values in another memory layout, where there is one."""
    if strides == "turned" and tensor.dim() > 1:
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if strides == "channels_last" and tensor.dim() == 4:
        return tensor.to(memory_format=torch.channels_last)
    if strides == "gaps" and tensor.dim() and tensor.numel():
        return torch.stack([tensor, tensor], dim=-1).reshape(*tensor.shape[:-1], -1)[..., ::2]
    return tensor.contiguous()


@functools.cache
def plans(device: torch.device, tiny: bool) -> dict[str, tuple[gs.Plan, list[Tensor]]]:
    """Plans of every kind of bin that a kernel meets, and the bin of every element."""
    layout = gs.Layout.from_shapes(odd_shapes(tiny))
    made = {"xsp": gs.xsp(layout), "columns": gs.xsp(layout, axis=1, parts=3), "whole": gs.whole(layout)}
    made |= {"per_tensor": gs.per_tensor(layout), "parts": gs.xsp(layout, parts=3)}
    return {name: (plan, labels(plan, device)) for name, plan in made.items()}


def labels(plan: gs.Plan, device: torch.device) -> list[Tensor]:
    """The bin of every element, painted box by box."""
    sizes = zip(plan.layout.rows, plan.layout.cols, strict=True)
    made = dict(zip(plan.layout.names, (torch.zeros(size, dtype=torch.int64) for size in sizes), strict=True))
    for b, bin_ in enumerate(plan.bins):
        for box in bin_.boxes:
            (r0, c0), (r1, c1) = box.start, box.stop
            made[box.tensor][r0:r1, c0:c1] = b
    return [x.reshape(shape).to(device) for x, shape in zip(made.values(), plan.layout.shapes, strict=True)]


def kernel_job(setting: Setting, backend: str, dtype: torch.dtype, strides: str) -> dict[str, Any]:
    """Squares and scaling of one backend beside the definition's: the largest deviations, in units of rounding."""
    row = BACKENDS[backend]
    if row.missing(setting.device):
        return {"skipped": row.missing(setting.device)}
    shapes = odd_shapes(setting.tiny)
    generator, found = torch.Generator().manual_seed(0), {"squares": 0.0, "scaled": 0.0}
    values = [torch.randn(shape, generator=generator) for shape in shapes.values()]
    for name, (plan, label_T) in plans(setting.device, setting.tiny).items():
        made = [in_strides(v.to(setting.device, dtype), strides) for v in values]
        made[1].fill_(math.nan)
        kernel = row.make(plan, setting.device)
        kernel.by_name = True
        squares_B = kernel.squares(made)
        wanted_B = torch.zeros(plan.num_bins, dtype=torch.float64, device=setting.device)
        for label, tensor in zip(label_T, made, strict=True):
            wanted_B.index_add_(0, label.reshape(-1), tensor.double().square().reshape(-1))
        finite_B = wanted_B.isfinite()
        assert torch.equal(finite_B, squares_B.isfinite()), f"{name}: other bins are finite"
        gap_B = torch.where(finite_B, (squares_B - wanted_B).abs() / wanted_B.clamp(min=1e-300), 0.0)
        found["squares"] = max(found["squares"], float(gap_B.max()) / ULP[accumulate_dtype(setting.device)])
        b = torch.arange(plan.num_bins, device=setting.device, dtype=torch.float64)
        scale_B = torch.where(finite_B, 1.0 / (1.0 + b % 4), 0.0)
        factors = [scale_B[label] for label in label_T]
        before = [tensor.clone() for tensor in made]
        kernel.scale_(made, scale_B, ~finite_B)
        for at, old, new, factor in zip(shapes, before, made, factors, strict=True):
            true = torch.where(factor > 0, old.double() * factor, 0.0)
            gap = (new.double() - true).abs() / true.abs().clamp(min=torch.finfo(dtype).smallest_normal)
            worst = float(gap.max()) if gap.numel() else 0.0
            assert not math.isnan(worst), f"{name}: {at} holds a NaN that it should not"
            found["scaled"] = max(found["scaled"], worst / ULP[dtype])
            same = torch.where(factor == 1, new, old)
            assert torch.equal(same.nan_to_num(), old.nan_to_num()), f"{name}: {at} kept and changed"
    assert found["squares"] <= 2**14 and found["scaled"] <= 1.01, f"beyond rounding: {found}"
    return {f"{name}_ulp": round(value, 3) for name, value in found.items()}


def beyond_job(setting: Setting) -> dict[str, Any]:
    """Squares and scaling of the last rows of a tensor of more than 2^31 elements."""
    if not setting.on_card or torch.cuda.mem_get_info()[0] < 8 * 2**30:
        return {"skipped": "no card with 8 GB to spare"}
    shape = (33_000, 66_000)
    tensor = torch.zeros(shape, dtype=torch.bfloat16, device=setting.device)
    tensor[-2:] = 2.0
    kernel = BACKENDS["triton"].make(gs.xsp(gs.Layout.from_shapes({"w": shape})), setting.device)
    squares_B = kernel.squares([tensor])
    assert squares_B[-3:].tolist() == [0.0, 4.0 * shape[1], 4.0 * shape[1]], squares_B[-3:].tolist()
    scale_B = torch.ones(shape[0], dtype=torch.float64, device=setting.device)
    scale_B[-1] = 0.5
    kernel.scale_([tensor], scale_B, torch.zeros(shape[0], dtype=torch.bool, device=setting.device))
    ends = [float(tensor[row].float().mean()) for row in (-3, -2, -1)]
    assert ends == [0.0, 2.0, 1.0], ends
    return {"elements": shape[0] * shape[1], "worst_relative": 0.0, "self_check": _self_check()}


def decision_job(setting: Setting, budget: str) -> dict[str, Any]:
    """Twelve steps of the splitter on the card beside twelve by the definition on the CPU, with spikes and a NaN."""
    shapes = gpt(1, 32, 97, 16)
    splitters = []
    for device, backend in ((setting.device, "auto"), (torch.device("cpu"), "reference")):
        named, optimizer = model_of(shapes, device, "AdamW")
        splitters.append(
            (named, gs.GradientSplitter(named, budget=BUDGETS[budget], backend=backend, optimizer=optimizer))
        )
    worst = 0.0
    for step in range(12):
        generator = torch.Generator().manual_seed(step)
        drawn = [torch.randn(shape, generator=generator) * (300.0 if step == 7 else 1.0) for shape in shapes.values()]
        if step == 4:
            drawn[0][3, 2] = math.nan
        for named, splitter in splitters:
            for (_, p), gradient in zip(named, drawn, strict=True):
                p.grad = gradient.to(p.device)
            splitter.step()
        for (_, p), (_, q) in zip(splitters[0][0], splitters[1][0], strict=True):
            assert p.grad is not None and q.grad is not None
            gap = (p.grad.cpu().double() - q.grad.double()).abs() / q.grad.double().abs().clamp(min=1e-30)
            worst = max(worst, float(gap.max()))
    assert worst < 1e-5, f"a gradient differs by {worst:g}"
    return {"kernel": splitters[0][1].kernel.name, "worst_relative": worst, "self_check": _self_check()}


def gso_job(setting: Setting, dtype: torch.dtype) -> dict[str, Any]:
    """Steps of GSO on the card beside steps by the definition on the CPU in float64, from the same gradients."""
    shapes: Shapes = {"embedding": (97, 24), "wide": (24, 40), "tall": (72, 24), "bias": (24,), "conv": (8, 4, 3, 3)}
    made = []
    for device, kind in ((setting.device, dtype), (torch.device("cpu"), torch.float64)):
        generator = torch.Generator().manual_seed(1)
        named = [
            (n, Parameter((torch.randn(s, generator=generator) * 0.3).to(device, kind))) for n, s in shapes.items()
        ]
        made.append((named, gs.GSO(named)))
    for step in range(5):
        generator = torch.Generator().manual_seed(10 + step)
        for t, shape in enumerate(shapes.values()):
            gradient = torch.randn(shape, generator=generator).to(dtype)
            for named, _ in made:
                p = named[t][1]
                p.grad = gradient.to(p.device, p.dtype)
        for _, optimizer in made:
            optimizer.step()
    moved = {}
    for (name, p), (_, q) in zip(made[0][0], made[1][0], strict=True):
        assert p.isfinite().all(), f"{name} is not finite"
        moved[name] = round(float((p.detach().cpu().double() - q.detach()).norm() / q.detach().norm()), 6)
    bound = {torch.float64: 1e-2, torch.float32: 1e-2, torch.float16: 3e-2, torch.bfloat16: 6e-2}[dtype]
    assert max(moved.values()) < bound, f"weights differ by {moved}"
    return {"relative_distance": moved, "self_check": _self_check()}


def _self_check() -> list[str]:
    return [
        f"{program}, {device}, {dtype}: {said}"
        for (program, device, dtype), said in selfcheck.findings().items()
        if said
    ]
