"""GSO by Triton programs beside GSO by its definition, in Triton's interpreter; prints what each case found as JSON.

Triton decides between interpreter and compiler when it is imported, so this is a process of its own:
``TRITON_INTERPRET=1 python -m tests.kernels.triton_runs FOLDER``, with a folder for programs with planted faults.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

import gradsplit as gs
from gradsplit.kernels import selfcheck
from tests.kernels.interpreter import equal, falls_back

RTOL = {torch.float32: 1e-5, torch.float64: 1e-12, torch.float16: 2**-10, torch.bfloat16: 2**-7}
"""The interpreter rounds bfloat16 towards zero: one unit in the last place."""

ROWS_ONLY = {"bin": (gs.Relative(0.2), gs.RelativeStep(0.03))}

EQUAL: dict[str, dict[str, Any]] = {
    **{
        f"{moment}, {dtype}": {"second_moment": moment, "dtype": dtype}
        for moment in ("element", "bin")
        for dtype in RTOL
    },
    **{
        f"{moment}, {name}": {"second_moment": moment, **options}
        for moment in ("element", "bin")
        for name, options in {
            "maximize": {"maximize": True},
            "eps of 0": {"eps": 0.0},
            "nothing bounded": {"budget": gs.Fixed(float("inf"))},
            "three bounds, a row counts as 1 long": {
                "budget": (gs.Relative(0.2), gs.Fixed(0.5), gs.RelativeStep(0.03, length=1.0))
            },
        }.items()
    },
    "one bin a tensor, of few elements": {"plan": "per_tensor"},
}
"""What is updated by the programs and equals the definition."""

FALLBACKS: dict[str, tuple[dict[str, Any], str]] = {
    "history": ({"budget": gs.Ema(1.5, warmup=2)}, "'bin': Ema at this level looks beyond the bin"),
    "root": ({"budget": {"root": gs.Fixed(1.0)}}, "'root': Fixed at this level looks beyond the bin"),
    "several tensors": ({"plan": "whole", "budget": gs.Fixed(1.0)}, "'p0': a bin of its plan lies in several pieces"),
    "shared memory": ({"shared": True}, "'p0': it or a parameter beside it shares memory with another"),
    "large bins": ({"plan": "per_tensor", "longest": 64}, "'p3': a bin of it has more than the 64 elements"),
}
"""What the definition updates, and the reason that the warning states."""

SHORT = {"budget": (gs.Relative(0.2), gs.RelativeStep(0.001))}
"""Budgets that shorten every update of `parameters`."""

FAULTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "the cap is not applied": ("update * cap.to(WIDE)", "update", {}),
    "the gradient is not scaled": ("s = (scale * tl.load(number + _SIGN))", "s = tl.load(number + _SIGN)", {}),
    "maximize is forgotten": ("scale * tl.load(number + _SIGN)", "scale", {"maximize": True}),
    "the decay is not shortened with the update": ("cap * tl.load(number + _DECAY)", "tl.load(number + _DECAY)", SHORT),
    "weights do not decay": ("weight * shrink", "weight", {}),
    "a bin that is not finite decays": (
        '    if gradient2 < float("inf"):  # nan is not\n        norm',
        "    if gradient2 - gradient2 != 0.0:\n"
        "        at, there = _elements(row, 0, BLOCK)\n"
        "        none, one = tl.full([], 0.0, tl.float64), tl.full([], 1.0, tl.float64)\n"
        "        _write(p, at, there, tl.zeros([BLOCK], WIDE), none, one, number, KIND, WIDE, BLOCK)\n"
        '    if gradient2 < float("inf"):\n        norm',
        {},
    ),
    "a bin that is not finite is entered": ('if gradient2 < float("inf"):  # nan is not\n', "if size > 0:\n", {}),
    "the first block alone is read and written": ("range(0, size, BLOCK)", "range(0, BLOCK, BLOCK)", {}),
    "lanes without an element count": ("u = tl.where(there, u, 0.0)", "u = u", {"eps": 0.0}),
    "an update that is not finite is taken": ("mask=there & is_finite)", "mask=there)", {"eps": 0.0}),
    "floors are forgotten": ("floor + root * root_of_numel", "floor * 0.0", {}),
    "the second moment of a bin takes the gradient before its scale": (
        "mean = (scale * norm) * (scale * norm)",
        "mean = norm * norm",
        {"second_moment": "bin"},
    ),
    "the length of a bin's update is the moment's": (
        "moved2 = moved2 * rate * rate",
        "moved2 = moved2 * 1.0",
        {"second_moment": "bin"},
    ),
}
"""Text of a program, what is put in its place, and the run that must tell."""


TOLD = ("the cap is not applied", "weights do not decay", "a bin that is not finite is entered", "floors are forgotten")
"""The faults that the self-check is asked about; it raises, since the backend is named."""


def parameters(dtype: torch.dtype, *, shared: bool = False) -> list[Parameter]:
    """Rows of different lengths, columns in memory, a vector, a row longer than a program's block, zeros."""
    generator = torch.Generator().manual_seed(1)
    shapes = ((2, 5), (3, 2), (3,), (1, 1030), (1, 4))
    made = [torch.randn(shape, generator=generator) for shape in shapes]
    made[1], made[4] = made[1].t(), torch.zeros(1, 4)
    made = [torch.empty_strided(t.shape, t.stride(), dtype=dtype).copy_(t) for t in made]
    if shared:
        made[2] = made[0].view(-1)[:3]
    return [Parameter(t) for t in made]


def difference(*, dtype: torch.dtype = torch.float32, steps: int = 2, shared: bool = False, **options: Any) -> str:
    """What differs between the two after one of some steps from the same state; empty: nothing."""
    from gradsplit.optim.updates.triton_gpu import TritonUpdate

    options = {"lr": 1e-2, "weight_decay": 0.1, "budget": ROWS_ONLY["bin"], **options}
    ours, truth = parameters(dtype, shared=shared), parameters(dtype, shared=shared)
    mine = gs.GSO([(f"p{t}", p) for t, p in enumerate(ours)], backend="triton", **options, direction="adam")
    true = gs.GSO([(f"p{t}", p) for t, p in enumerate(truth)], backend="reference", **options, direction="adam")
    assert type(mine._parts[0].update) is TritonUpdate
    generator = torch.Generator().manual_seed(5)
    for step in range(steps):
        for optimizer in (mine, true):
            optimizer.param_groups[0]["lr"] = 1e-2 / (1 + step)  # caps follow the pace
        for t, (p, q) in enumerate(zip(ours, truth, strict=True)):
            gradient = torch.randn(p.shape, generator=generator) * (0.01 if t == 2 else 3.0)
            if t < 2 and step == 0:
                gradient[1 - t, 1] = float("nan") if t else float("inf")
            if t == 0:
                gradient[0] = 0.0
            p.grad, q.grad = (None if t == 1 and step else torch.empty_like(p).copy_(gradient) for p in (p, q))
        mine.step()
        true.step()
        for found, wanted in zip(_state(mine, ours), _state(true, truth), strict=True):
            try:
                rtol = max(RTOL[dtype], RTOL[torch.float32] if found.dtype == torch.float32 else 0.0)
                rtol = max(rtol, 1e-6) if options.get("second_moment") == "bin" else rtol  # float32 a bin
                torch.testing.assert_close(found, wanted, rtol=rtol, atol=1e-7 if dtype != torch.float64 else 1e-9)
            except AssertionError as error:
                return f"step {step}: {error}"
            found.copy_(wanted)
    return ""


def _state(optimizer: gs.GSO, parameters: list[Parameter]) -> list[torch.Tensor]:
    decision: Any = optimizer._parts[0].update.decision
    made = [p.detach() for p in parameters]
    made += [value for p in parameters if p in optimizer.state for _, value in sorted(optimizer.state[p].items())]
    return [*made, decision.scale_B.clone(), decision.norm_B.clone(), decision.finite_B.clone()]


def faulty(folder: Path, old: str, new: str, options: dict[str, Any]) -> str:
    """A run of programs with a fault."""
    from gradsplit.optim.updates import triton_gpu as sound

    text = Path(str(sound.__file__)).read_text(encoding="utf-8")
    if old not in text:
        return ""
    path = folder / f"faulty_{len(list(folder.iterdir()))}.py"
    path.write_text(text.replace(old, new), encoding="utf-8")
    spec: Any = importlib.util.spec_from_file_location(f"{sound.__package__}.{path.stem}", path)
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    program: Any = sound.one_pass
    sound.one_pass = module.one_pass
    try:
        return difference(steps=1, **options)
    finally:
        sound.one_pass = program


def told(folder: Path, old: str, new: str, options: dict[str, Any]) -> str:
    """What the self-check says of programs with a fault; empty: nothing."""
    from gradsplit.kernels.selfcheck import SelfCheckError, findings, forget

    known = findings()
    forget()
    try:
        return "" if faulty(folder, old, new, options) else "the fault is no fault"
    except SelfCheckError as error:
        return str(error)
    finally:
        forget()
        selfcheck._FOUND.update(known)


class _Readings(TorchDispatchMode):
    """Counts what would wait for a device: numbers read back, shapes that depend on values."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(word in str(func) for word in ("_local_scalar_dense", "nonzero", "is_nonzero", "equal.default")):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


def readings(options: dict[str, Any], *, look: bool = False) -> str:
    """What a step reads back; with ``look`` also what a look at its decision does."""
    made = parameters(torch.float32)[:3]
    optimizer = gs.GSO(made, backend="triton", budget=ROWS_ONLY["bin"], **options, direction="adam")
    for p in made:
        p.grad = torch.ones_like(p)
    with _Readings() as mode:
        optimizer.step()
        decision: Any = optimizer._parts[0].update.decision if look else None
        if decision is not None:
            decision.scale_B.sum().item()
    return " ".join(mode.found)


def main(folder: Path) -> None:
    """Run all cases."""
    from gradsplit.kernels.kernel import BACKENDS

    BACKENDS["triton"] = dataclasses.replace(BACKENDS["triton"], devices=())  # the interpreter's device is the CPU
    from gradsplit.optim.updates import triton_gpu

    cases: dict[str, Callable[[], str]] = {
        f"equal: {name}": partial(equal, difference, run) for name, run in EQUAL.items()
    }
    cases |= {
        f"fallback: {name}": partial(falls_back, triton_gpu, difference, run) for name, (run, _) in FALLBACKS.items()
    }
    cases |= {f"fault: {name}": partial(faulty, folder, *fault) for name, fault in FAULTS.items()}
    cases |= {f"told: {name}": partial(told, folder, *FAULTS[name]) for name in TOLD}
    cases |= {"read back": partial(readings, {}), "read back, capturable": partial(readings, {"capturable": True})}
    cases |= {"read back by a look": partial(readings, {}, look=True)}
    print(json.dumps({name: case() for name, case in cases.items()}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
