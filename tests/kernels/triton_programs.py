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
import triton
import triton.language as tl
from torch.nn import Parameter
from torch.utils._python_dispatch import _disable_current_modes

import gradsplit as gs
from gradsplit.kernels import triton_decide, triton_gpu
from gradsplit.kernels.addressable import FallbackWarning
from gradsplit.kernels.kernel import BACKENDS
from gradsplit.kernels.reference import ReferenceKernel
from gradsplit.kernels.selfcheck import SelfCheckError, findings, forget
from tests.kernels.launches import SPLITTERS, Operations, gpt, named
from tests.laws.cases import BUDGETS, CPU, PLANS, STRIDES, ZOO, tensors
from tests.laws.laws_of_backends import check_squares, check_writes_reach_the_tensor
from tests.laws.oracles import to_numpy

REAL = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

ROUNDING = {torch.float64: 0.0, torch.float32: 1e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}
"""The interpreter rounds bfloat16 towards zero: one unit in the last place."""

FAULTS: dict[str, tuple[str, str]] = {
    "the square is not taken": ("total += x * x", "total += x"),
    "squares lose digits": ("total += x * x", "total += (x * x).to(tl.bfloat16).to(tl.float64)"),
    "one block of a piece is read": (
        "tl.load(row + _FIRST), BLOCK):\n        at, there",
        "tl.load(row + _FIRST), PIECE):\n        at, there",
    ),
    "one slot of a bin is left out": ("mask=i < count", "mask=i < count - 1"),
    "lanes without an element count": (
        "mask=there, other=0.0).to(tl.float64)",
        "mask=there, other=1.0).to(tl.float64)",
    ),
    "the last piece is left out": ("i < stop", "i < stop - 1"),
    "turned columns are read as rows": ("i % length, i < stop", "i // length, i < stop"),
    "pieces all begin at the first element": ("i = first + lo", "i = lo"),
    "every bin gets the first bin's scale": (
        "factor, zeroed = tl.load(scale + bin_)",
        "factor, zeroed = tl.load(scale)",
    ),
    "the scale is rounded": ("* factor.to(WIDE)", "* factor.to(tl.bfloat16).to(WIDE)"),
    "0 times inf": ("* zeroed > 0, tl.zeros", "* zeroed > 1, tl.zeros"),
    "kept bins are written": ("if factor < 1.0 or zeroed != 0:", "if factor >= 0.0:\n        factor = factor * 0.5"),
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


LAYOUT = gs.Layout.from_shapes({"a.w": (20, 7), "a.b": (20,), "c.w": (3, 4), "c.one": (1,)})

LEVELS: dict[str, Any] = {
    **{f"{name} of bins": {"bin": budget} for name, budget in BUDGETS.items()},
    **{f"{name} of the root": {"root": budget} for name, budget in BUDGETS.items()},
    "Ema with the root": {"bin": gs.Ema(1.05, beta=0.5, warmup=2), "root": gs.Ema(1.1, beta=0.5, warmup=2)},
    "two of bins, two of the root": {
        "bin": (gs.Relative(0.2), gs.ZScore(0.5, beta=0.5, warmup=2)),
        "root": (gs.Fixed(1.0), gs.Percentile(0.5, eta=0.1)),
    },
    "the default in front of AdamW": None,
}
"""Budgets that are decided by programs."""


def _splitter(backend: str, budget: Any) -> tuple[gs.GradientSplitter, list[Parameter], torch.optim.Optimizer]:
    named = [
        (name, Parameter(w))
        for name, w in zip(LAYOUT.names, tensors(LAYOUT, torch.float64, "contiguous", 7), strict=True)
    ]
    made = [p for _, p in named]
    optimizer: torch.optim.Optimizer = torch.optim.SGD(
        [{"params": made[:2]}, {"params": made[2:], "lr": 0.3}], lr=0.1, momentum=0.9
    )
    optimizer = torch.optim.AdamW(made) if budget is None else optimizer
    return gs.GradientSplitter(named, budget=budget, backend=backend, optimizer=optimizer), made, optimizer


def decides(budget: Any) -> str:
    """What differs between the programs and the definition over steps with faults; empty: nothing."""
    (ours, mine, _), (truth, theirs, _) = (_splitter(backend, budget) for backend in ("triton", "reference"))
    if ours._split.programs is None:
        return "there are no programs"
    for step in range(12):
        for t, (p, q) in enumerate(zip(mine, theirs, strict=True)):
            size = 300.0 if step in (7, 8) and t == step - 7 else 40.0 if step == 10 else 1.0
            p.grad = tensors(LAYOUT, torch.float64, "contiguous", 50 * step)[t] * size
            p.grad = None if t == 1 and step == 5 else p.grad
            if step == 3 and t == 0 and p.grad is not None:
                p.grad[1, 2], p.grad[2] = float("nan"), 0.0
            q.grad = None if p.grad is None else p.grad.clone()
        if step == 6:  # a state goes from one to the other
            ours.load_state_dict(truth.state_dict())
        found, wanted = ours.step(), truth.step()
        for name, p, q in zip(LAYOUT.names, mine, theirs, strict=True):
            if p.grad is not None and q.grad is not None:
                torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=0, msg=f"{name}, step {step}")
        pairs = [(found.squares_B, wanted.squares_B), (found.decision.scale_B, wanted.decision.scale_B)]
        pairs += [(found.decision.limit_N, wanted.decision.limit_N), (found.decision.norm_B, wanted.decision.norm_B)]
        pairs += zip(_history(ours), _history(truth), strict=True)
        for mine_now, true_now in pairs:
            torch.testing.assert_close(mine_now, true_now, rtol=1e-9, atol=0, equal_nan=True, msg=f"step {step}")
    return ""


def _history(splitter: gs.GradientSplitter) -> list[torch.Tensor]:
    recent = splitter._split.recent
    made = [vector for state in splitter.ledger.history for vector in state]
    return made if recent is None else [*made, recent.recent_B, recent.steps]


HALF = {"bin": gs.Fixed(0.5)}
OF_ROOT = {"bin": gs.Fixed(0.5), "root": gs.Fixed(0.1)}
PACED = {"bin": gs.RelativeStep(0.03)}

TEXT_FAULTS: dict[str, tuple[str, str, str, Any]] = {
    "no bin is bounded": ("_BOUND", "norm > limit", "norm > limit * 2.0", HALF),
    "a bad bin keeps its scale": ("_BOUND", "tl.where(finite, scale, 0.0)", "scale", HALF),
    "the root adds up what was there before": ("_ADD", "norm * scale * (norm * scale)", "norm * norm", OF_ROOT),
    "the root's factor is left out": ("_SETTLE", "* tl.load(partial + 5 * num_blocks)", "", OF_ROOT),
    "the pace is left out": ("_READ_MORE", "pace = tl.load(paces + b * pace_step", "pace = tl.load(numels + b", PACED),
    "recent norms are not entered": ("_COLLECTIVE", "moved, recent)", "recent, recent)", None),
    "steps are not counted": ("_COLLECTIVE", "0.0, 1.0, 0.0))", "0.0, 0.0, 0.0))", None),
    "a scaled batch is let through": ("_FACTOR", "1.0 / median, 1.0", "1.0, 1.0", None),
    "few bins scale a batch": ("_FACTOR", ">= tl.load(rules + 4)", ">= 30.0", None),
}
"""A part of the text, what is put in its place, and budgets that must tell; the self-check must catch each."""


def caught_in_text(part: str, old: str, new: str, budget: Any) -> str:
    """What is wrong with a planted fault: empty if the self-check tells and torch decides."""
    sound = getattr(triton_decide, part)
    if old not in sound:
        return f"{part} no longer holds {old!r}"
    setattr(triton_decide, part, sound.replace(old, new))
    forget()
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            splitter, _, _ = _splitter("auto", budget)
        said = [str(warning.message) for warning in told if issubclass(warning.category, FallbackWarning)]
        if splitter._split.programs is not None or len(said) != 1 or "triton: decision" not in said[0]:
            return f"told {said}"
    finally:
        setattr(triton_decide, part, sound)
        forget()
    return ""


def launches(which: str) -> str:
    """How many launches a warm step makes: those of programs, and operations of torch; "sent" if something is sent."""
    splitter = SPLITTERS[which](named(gpt(2, 5, 3), "cpu"), "triton")
    splitter.step()
    programs = []
    real = triton_gpu.launch

    def count(device: torch.device, program: Any, grid: tuple[int, ...], *given: Any) -> None:
        programs.extend([program] if all(grid) else [])
        with _disable_current_modes():  # the interpreter is torch and numpy itself
            real(device, program, grid, *given)

    triton_gpu.launch = triton_decide.launch = count
    try:
        with Operations("cpu") as seen:
            splitter.step()
    finally:
        triton_gpu.launch = triton_decide.launch = real
    if seen.sent or seen.brought:
        return f"sent {dict(seen.sent)}, brought {dict(seen.brought)}"
    return f"{len(programs)} + {seen.total()} {dict(seen.seen)}"


def moved() -> str:
    """Gradients whose addresses change between steps are found where they are; what stays is not sent again."""
    pairs = [(f"p{i}", Parameter(torch.ones(3, 4))) for i in range(3)]
    splitter = gs.GradientSplitter(pairs, budget=gs.Fixed(0.5), backend="triton")
    kept = []
    for step in range(6):
        for _, p in pairs:
            p.grad = torch.full((3, 4), 2.0 + step)
            kept.append(p.grad)  # so that no address comes again
        splitter.step()
        for _, p in pairs:
            torch.testing.assert_close(p.grad, torch.full((3, 4), 0.25))
    before = splitter.kernel._sent._pairs[0]
    splitter.step()
    return "" if splitter.kernel._sent._pairs[0] is before else "addresses were sent again"


def without_bf16() -> str:
    """On a card that cannot compile bfloat16, those tensors go to eager torch with one warning, all others do not."""
    forget()
    trial = triton_gpu._trial

    def on_an_old_card(device: torch.device, dtype: torch.dtype) -> Any:
        if dtype == torch.bfloat16:
            raise RuntimeError("PTX .bf16 requires sm_80")
        return trial(device, dtype)

    triton_gpu._trial = on_an_old_card
    try:
        made = {dtype: Parameter(torch.full((3, 4), 2.0, dtype=dtype)) for dtype in REAL[::3]}
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            splitter = gs.GradientSplitter([(str(d)[6:], p) for d, p in made.items()], budget=gs.Fixed(0.5))
            for _ in range(2):
                for p in made.values():
                    p.grad = torch.full_like(p, 2.0)
                splitter.step()
        said = [str(one.message) for one in told if "requires sm_80" in str(one.message)]
        if len(said) != 1 or splitter.kernel.name != "triton":
            return f"told {[str(one.message) for one in told]}"
        if splitter.kernel._tables_of([p.grad for p in made.values()]).eager_T != (1,):
            return "other tensors went to eager torch too"
        for p in made.values():
            torch.testing.assert_close(p.grad, torch.full_like(p, 0.25))
        try:
            gs.GradientSplitter([("w", made[torch.bfloat16])], budget=gs.Fixed(0.5), backend="triton")
        except SelfCheckError:
            return ""
        return "backend='triton' did not raise"
    finally:
        triton_gpu._trial = trial
        forget()


@triton.jit
def _offsets(row, found, BLOCK: tl.constexpr):
    at, there = triton_gpu._elements(row, 0, BLOCK)
    tl.store(found + tl.arange(0, BLOCK), tl.where(there, at, -1))


def beyond() -> str:
    """Offsets beyond 2^31 elements are those of integers without bound; no memory is taken for the tensors."""
    start, first, length, row_step = 2**33 + 5, 2**32 - 3, 2**20 + 1, 2**31 + 7
    row = torch.tensor([0, 0, 0, start, first, first + 60, length, row_step])
    found = torch.zeros(64, dtype=torch.int64)
    _offsets[(1,)](row, found, 64)
    wanted = [start + ((first + i) // length) * row_step + (first + i) % length for i in range(60)] + [-1] * 4
    if found.tolist() != wanted:
        return f"{found.tolist()}"
    layout = gs.Layout.from_shapes({"w": (70_000, 65_536)})
    pieces = triton_gpu._pieces(gs.xsp(layout), [(65_536, 1)])
    stops = pieces[:, 3] + pieces[:, 5]
    whole = pieces.dtype == np.int64 and int(stops.max()) == 70_000 * 65_536 and (np.diff(pieces[:, 3]) >= 0).all()
    return "" if whole else "the table of a large tensor is wrong"


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


def main(folder: Path, only: str = "") -> None:
    """Run all cases, or those whose names begin so."""
    torch.manual_seed(0)
    BACKENDS["triton"] = dataclasses.replace(BACKENDS["triton"], devices=())  # the interpreter's device is the CPU
    BACKENDS["numba"] = dataclasses.replace(BACKENDS["numba"], automatic=False)  # so that "auto" is what it is on CUDA
    warnings.filterwarnings("ignore", category=FallbackWarning)
    cases: dict[str, Callable[[], str]] = {
        f"equal: {strategy}, {strides}": partial(equal, strategy, strides) for strategy in PLANS for strides in STRIDES
    }
    cases |= {f"caught: {name}": partial(caught, folder, *fault) for name, fault in FAULTS.items()}
    cases |= {f"decides: {name}": partial(decides, levels) for name, levels in LEVELS.items()}
    cases |= {f"caught in text: {name}": partial(caught_in_text, *fault) for name, fault in TEXT_FAULTS.items()}
    cases |= {f"launches: {which}": partial(launches, which) for which in SPLITTERS}
    cases |= {"remembered": remembered, "moved": moved, "beyond 2^31": beyond, "without bf16": without_bf16}
    found = {}
    for name, case in cases.items():
        if not name.startswith(only):
            continue
        print(name, file=sys.stderr, flush=True)
        try:
            found[name] = case()
        except Exception as error:  # so that all others are heard of
            found[name] = f"{type(error).__name__}: {error}"
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
