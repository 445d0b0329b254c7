"""(b) No step waits for the device; (c) what a step costs beside `clip_grad_norm_`, fused AdamW and Muon."""

from __future__ import annotations

import functools
import math
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import Parameter

import gradsplit as gs
from gradsplit.lab.speed.figures import Shapes, gpt, resnet50

from .setting import BUDGETS, Setting, model_of


def steps_of(setting: Setting, shapes: Shapes, only: str = "") -> dict[str, Callable[[], Callable[[], Any]]]:
    """What is measured: a name, and what makes its step."""
    device = setting.device

    def clip() -> Callable[[], Any]:
        named, _ = model_of(shapes, device, "AdamW")
        made = [p for _, p in named]
        return lambda: nn.utils.clip_grad_norm_(made, 1.0)

    def adamw() -> Callable[[], Any]:
        return model_of(shapes, device, "AdamW")[1].step  # type: ignore[no-any-return]

    def muon() -> Callable[[], Any]:
        named, _ = model_of(shapes, device, "AdamW")
        matrices = [p for name, p in named if p.dim() == 2 and "wte" not in name and "wpe" not in name]
        rest = [p for _, p in named if all(p is not other for other in matrices)]
        first = torch.optim.Muon(matrices, lr=1e-3)
        second = torch.optim.AdamW(rest, lr=1e-4, fused=device.type == "cuda") if rest else None
        return lambda: (first.step(), second.step() if second else None)

    def splitter(budget: Any, optimizer: str, backend: str = "auto") -> Callable[[], Any]:
        named, behind = model_of(shapes, device, optimizer)
        return gs.GradientSplitter(named, budget=budget, optimizer=behind, backend=backend).step

    def gso(**options: Any) -> Callable[[], Any]:
        return gs.GSO(model_of(shapes, device, "AdamW")[0], **options).step

    made = {
        "clip_grad_norm_": clip,
        "AdamW, fused": adamw,
        "Muon with fused AdamW": muon,
        "splitter in front of SGD": functools.partial(splitter, None, "SGD"),
        "splitter in front of AdamW": functools.partial(splitter, None, "AdamW"),
        "splitter, Ema with the root": functools.partial(splitter, BUDGETS["Ema with the root"], "AdamW"),
        "splitter, eager": functools.partial(splitter, None, "SGD", "eager"),
        "GSO": gso,
        "GSO, direction='adam'": functools.partial(gso, direction="adam"),
    }
    if not hasattr(torch.optim, "Muon") or not any(len(shape) == 2 for shape in shapes.values()):
        del made["Muon with fused AdamW"]
    return {name: make for name, make in made.items() if only in name}


def sync_job(setting: Setting, name: str) -> dict[str, Any]:
    """A warm step where every wait for the device raises; then a step in a CUDA graph, beside the same step outside."""
    if not setting.on_card:
        return {"skipped": "no card: nothing waits on a CPU"}
    shapes = gpt(1, 64, 97, 16)
    step = steps_of(setting, shapes)[name]()
    for _ in range(3):
        step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    found: dict[str, Any] = {"waits": 0}
    options = {"capturable": True} if name.startswith("GSO") else {}
    named, behind = model_of(shapes, setting.device, "SGD" if "SGD" in name else "AdamW")
    if name.startswith("splitter"):
        budget = BUDGETS["Ema with the root"] if "Ema" in name else None
        backend = "eager" if "eager" in name else "auto"
        step = gs.GradientSplitter(named, budget=budget, optimizer=behind, backend=backend).step
    elif name.startswith("GSO"):
        step = gs.GSO(named, **({"direction": "adam"} if "adam" in name else {}), **options).step
    else:
        return found
    return found | _replayed(step, named)


def _replayed(step: Callable[[], Any], named: list[tuple[str, Parameter]]) -> dict[str, Any]:
    """Capture a step and replay it on other gradients; return the norms of the gradients before and after."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    gradients = [p.grad for _, p in named if p.grad is not None]
    for gradient in gradients:
        gradient.copy_(torch.randn_like(gradient) * 10.0)
    weights = [p.detach().clone() for _, p in named]
    before = float(torch.stack(torch._foreach_norm(gradients)).norm())
    graph.replay()
    torch.cuda.synchronize()
    after = float(torch.stack(torch._foreach_norm(gradients)).norm())
    moved = max(float((p.detach() - w).abs().max()) for (_, p), w in zip(named, weights, strict=True))
    assert math.isfinite(after) and math.isfinite(moved), f"after a replay: gradient {after:g}, moved {moved:g}"
    assert after < before or moved > 0, "a replay does nothing"
    return {"replayed": True, "gradient_before": before, "gradient_after": after, "weights_moved": moved}


def layouts(setting: Setting) -> dict[str, Shapes]:
    """The shapes whose steps are measured."""
    if setting.tiny:
        return {"GPT, tiny": gpt(2, 16, 37, 8), "LoRA, tiny": lora(4, 16, 2)}
    made = {"GPT-124M": gpt(12, 768, 50_257, 1_024), "ResNet-50": resnet50(), "LoRA of 500": lora(125, 1_024, 8)}
    room = torch.cuda.mem_get_info()[0] if setting.on_card else 2**32
    block = 12 * 1_600**2
    blocks = max(1, min(48, int(room * 0.6 / 24 - 82e6) // block))  # 24 bytes a parameter: weights, gradients, states
    return {**made, f"GPT-1.5B, {blocks} blocks of 48": gpt(blocks, 1_600, 50_257, 1_024)}


def lora(pairs: int, width: int, rank: int) -> Shapes:
    """Pairs of low-rank matrices for the queries and values of a block each: four small tensors."""
    return {
        f"h.{i}.{which}.{part}": ((rank, width) if part == "a" else (width, rank))
        for i in range(pairs)
        for which in ("q", "v")
        for part in ("a", "b")
    }


def cost_job(setting: Setting, layout: str, name: str) -> dict[str, Any]:
    """Milliseconds of a step on the device and on the host, memory at its peak beside what stays, launches."""
    # What is timed here are many steps with the same gradients.
    warnings.filterwarnings("ignore", r"GradientSplitter\.step\(\): \d+ calls in a row found the same gradients")
    shapes = layouts(setting)[layout]
    made = steps_of(setting, shapes)
    if name not in made:
        return {"skipped": "torch has no Muon, or there is no matrix"}
    if setting.on_card:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    step = made[name]()
    for _ in range(3):
        setting.settle()
        begun = time.perf_counter()
        step()
    setting.settle()
    turns = max(3, min(setting.turns, int(3.0 / (time.perf_counter() - begun))))
    found: dict[str, Any] = {"numel": sum(math.prod(shape) for shape in shapes.values()), "tensors": len(shapes)}
    if setting.on_card:
        stays = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        setting.settle()
        found["peak_above_mb"] = round((torch.cuda.max_memory_allocated() - stays) / 2**20, 1)
        found["stays_mb"] = round(stays / 2**20, 1)
    device_ms, host_ms = [], []
    for _ in range(turns):
        setting.settle()
        before = time.perf_counter()
        if setting.on_card:
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            step()
            stop.record()
            host_ms.append(1e3 * (time.perf_counter() - before))
            setting.settle()
            device_ms.append(start.elapsed_time(stop))
        else:
            step()
            host_ms.append(1e3 * (time.perf_counter() - before))
    found["host_ms"] = [round(ms, 4) for ms in _quartiles(host_ms)]
    if device_ms:
        found["device_ms"] = [round(ms, 4) for ms in _quartiles(device_ms)]
    found |= _launches(setting, step)
    return found


def _quartiles(values: list[float]) -> list[float]:
    return statistics.quantiles(values, n=4, method="inclusive")


def _launches(setting: Setting, step: Callable[[], Any]) -> dict[str, Any]:
    """Kernels of one step by the profiler; on the CPU the dispatched operations."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    kinds += [torch.profiler.ProfilerActivity.CUDA] if setting.on_card else []
    with torch.profiler.profile(activities=kinds) as seen:
        step()
        setting.settle()
    if not setting.on_card:
        return {"operations": sum(event.name.startswith("aten::") for event in seen.events())}
    names = [event.name for event in seen.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    copies = sum(name.startswith(("Memcpy", "Memset")) for name in names)
    return {"kernels": len(names) - copies, "copies": copies}
