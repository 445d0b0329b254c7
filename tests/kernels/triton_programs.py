"""The Triton kernel beside the definition in Triton's interpreter, and with planted faults; prints JSON.

Triton decides between interpreter and compiler when it is imported, so this is a process of its own:
``TRITON_INTERPRET=1 python -m tests.kernels.triton_programs FOLDER``, with a folder for programs with planted faults.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import Parameter

import gradsplit as gs
from gradsplit.kernels import triton_gpu
from gradsplit.kernels.addressable import FallbackWarning
from gradsplit.kernels.kernel import BACKENDS
from gradsplit.kernels.reference import ReferenceKernel
from gradsplit.kernels.selfcheck import SelfCheckError, findings, forget
from tests.laws.cases import CPU, PLANS, STRIDES, ZOO, tensors
from tests.laws.laws_of_backends import check_squares, check_writes_reach_the_tensor
from tests.laws.oracles import to_numpy

REAL = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

ROUNDING = {torch.float64: 0.0, torch.float32: 1e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}
"""The interpreter rounds bfloat16 towards zero: one unit in the last place."""

FAULTS: dict[str, tuple[str, str]] = {
    "the square is not taken": ("x * x, axis=0", "x, axis=0"),
    "squares are added in float32": (
        "other=0.0).to(tl.float64)\n",
        "other=0.0).to(tl.float32).to(tl.float64) * 1.0001\n",
    ),
    "lanes without an element count": (
        "mask=there, other=0.0).to(tl.float64)",
        "mask=there, other=1.0).to(tl.float64)",
    ),
    "the last piece is left out": ("i < stop", "i < stop - 1"),
    "turned columns are read as rows": ("i % length, i < stop", "i // length, i < stop"),
    "every bin gets the first bin's scale": (
        "factor, zeroed = tl.load(scale + bin_)",
        "factor, zeroed = tl.load(scale)",
    ),
    "the scale is rounded": ("* factor.to(WIDE)", "* factor.to(tl.bfloat16).to(WIDE)"),
    "0 times inf": ("* zeroed > 0, tl.zeros", "* zeroed > 1, tl.zeros"),
    "it does not compile": ("y = x.to(WIDE) * factor.to(WIDE)", "y = x.to(WIDE) * no_such_name"),
}
"""Text of a program, and what is put in its place; the self-check must catch each."""


def equal(strategy: str, strides: str) -> str:
    """What differs between the programs and the definition on a plan and memory layout; empty: nothing."""
    plan = PLANS[strategy](ZOO)
    for dtype in REAL:
        made = tensors(ZOO, dtype, strides, 2)
        kernel, definition = triton_gpu.TritonKernel(plan, CPU), ReferenceKernel(plan, CPU)
        check_squares(lambda *_, kernel=kernel: kernel, plan, made)
        check_writes_reach_the_tensor(lambda *_, kernel=kernel: kernel, plan, tensors(ZOO, dtype, strides, 2))
        rng = np.random.default_rng(1)
        kind = rng.integers(0, 3, plan.num_bins)
        zero_B = torch.from_numpy(kind == 2)
        scale_B = torch.from_numpy(np.where(kind == 0, 1.0, np.where(kind == 2, 0.0, rng.random(plan.num_bins))))
        truth = [t.clone() for t in made]
        kernel.scale_(made, scale_B, zero_B)
        definition.scale_(truth, scale_B, zero_B)
        for name, shape, mine, true in zip(ZOO.names, ZOO.shapes, made, truth, strict=True):
            pair = to_numpy(mine, shape), to_numpy(true, shape)
            np.testing.assert_allclose(*pair, rtol=ROUNDING[dtype], atol=0, err_msg=f"{name}, {dtype}")
    return ""


@contextmanager
def planted(folder: Path, old: str, new: str) -> Iterator[None]:
    """Programs with a fault, and nothing known of any program."""
    text = Path(str(triton_gpu.__file__)).read_text(encoding="utf-8")
    assert old in text, f"the programs no longer hold {old!r}"
    path = folder / f"faulty_{len(list(folder.iterdir()))}.py"
    path.write_text(text.replace(old, new), encoding="utf-8")
    spec: Any = importlib.util.spec_from_file_location(f"{triton_gpu.__package__}.{path.stem}", path)
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    names = [name for name, value in vars(module).items() if type(value).__name__ == "InterpretedFunction"]
    sound = {name: getattr(triton_gpu, name) for name in names}
    for name in names:
        setattr(triton_gpu, name, getattr(module, name))
    forget()
    try:
        yield
    finally:
        forget()
        for name, program in sound.items():
            setattr(triton_gpu, name, program)


def caught(folder: Path, old: str, new: str) -> str:
    """What is wrong with a planted fault: empty if the self-check tells, falls back, and raises by name."""
    with planted(folder, old, new):
        named = [(f"p{i}", Parameter(torch.full(shape, 2.0))) for i, shape in enumerate(((4, 3), (3,)))]
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            splitters = [gs.GradientSplitter(named, budget=gs.Fixed(0.5)) for _ in range(2)]
        said = [str(warning.message) for warning in told if issubclass(warning.category, FallbackWarning)]
        if splitters[0].kernel.name != "triton" or len(said) != 1:
            return f"{splitters[0].kernel.name}: told {said}"
        if "falls back to eager torch" not in said[0]:
            return said[0]
        for _, p in named:
            p.grad = torch.ones_like(p)
        splitters[0].step()
        for _, p in named:
            wanted = torch.full_like(p, 0.5 / p.shape[-1] ** 0.5)
            torch.testing.assert_close(p.grad, wanted, rtol=1e-6, atol=0)
        try:
            gs.GradientSplitter(named, budget=gs.Fixed(0.5), backend="triton")
        except SelfCheckError as error:
            return "" if "Use backend='auto'" in str(error) else str(error)
    return "backend='triton' did not raise"


def remembered() -> str:
    """The self-check is made once per dtype and process."""
    forget()
    calls = []
    trial = triton_gpu._trial
    triton_gpu._trial = lambda *given: calls.append(given) or trial(*given)
    try:
        for dtype in (torch.float32, torch.float32, torch.bfloat16):
            gs.GradientSplitter([("p", Parameter(torch.ones(3, 2, dtype=dtype)))], budget=gs.Fixed(0.5))
    finally:
        triton_gpu._trial = trial
    dtypes = [given[1] for given in calls]
    wanted = [torch.float32, torch.bfloat16]
    return "" if dtypes == wanted and set(findings().values()) == {""} else f"{dtypes}, {findings()}"


def main(folder: Path) -> None:
    """Run all cases."""
    torch.manual_seed(0)
    BACKENDS["triton"] = dataclasses.replace(BACKENDS["triton"], devices=())  # the interpreter's device is the CPU
    BACKENDS["numba"] = dataclasses.replace(BACKENDS["numba"], automatic=False)  # so that "auto" is what it is on CUDA
    warnings.filterwarnings("ignore", category=FallbackWarning)
    cases: dict[str, Callable[[], str]] = {
        f"equal: {strategy}, {strides}": partial(equal, strategy, strides) for strategy in PLANS for strides in STRIDES
    }
    cases |= {f"caught: {name}": partial(caught, folder, *fault) for name, fault in FAULTS.items()}
    cases |= {"remembered": remembered}
    found = {}
    for name, case in cases.items():
        try:
            found[name] = case()
        except AssertionError as error:
            found[name] = str(error) or "an assertion"
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
