"""The share step by Triton programs beside its definition, in Triton's interpreter; prints what was found as JSON.

Triton decides between interpreter and compiler when it is imported, so this is a process of its own:
``TRITON_INTERPRET=1 python -m tests.optim.share.triton_runs FOLDER``, with a folder for programs with planted faults.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import gradsplit as gs
from tests.kernels.interpreter import equal, falls_back
from tests.optim.launches import Launches, gpt, launches
from tests.optim.share import laws

RTOL = {torch.float32: 2e-5, torch.float64: 1e-10, torch.float16: 2**-9, torch.bfloat16: 2**-6}
"""The interpreter rounds bfloat16 towards zero: one unit in the last place."""


class Small(nn.Module):
    """Matrices of two shapes, one of them twice, a row longer than a program's block, words, a vector, a scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 3), nn.Linear(5, 3, bias=False)
        self.tall = nn.Linear(3, 4, bias=False)
        self.long = nn.Linear(1030, 1, bias=False)
        self.conv = nn.Conv2d(2, 3, 2, bias=False)
        self.words = nn.Embedding(3, 6)
        self.scale = nn.Parameter(torch.tensor(0.5))


def small(dtype: torch.dtype = torch.float32, form: str = "") -> Small:
    torch.manual_seed(0)
    model = Small().to(dtype)
    with torch.no_grad():
        model.tall.weight[0] *= 8  # longer than 3 from the start
        if form == "turned":
            model.conv.weight.data = model.conv.weight.data.contiguous(memory_format=torch.channels_last)
            model.a.weight.data = model.a.weight.data.t().contiguous().t()
            model.words.weight.data = torch.stack([model.words.weight.data] * 2, -1)[..., 0]
    return model


EQUAL: dict[str, dict[str, Any]] = {
    **{str(dtype): {"dtype": dtype} for dtype in RTOL},
    "channels_last, turned, gaps": {"form": "turned"},
    "gradients of other strides, ascending": {"turn": True, "maximize": True},
    "far, with decay": {"lr": 0.5, "weight_decay": 0.5},
    "a rate on the device, counters too": {"lr": torch.tensor(0.03), "capturable": True},
    "the built-in schedule": {"steps": 3},
    "blocks": {"blocks": {"tall.weight": 2, "a.weight": 3}},
    "all Adam": {"direction": {"*": "adam"}},
    "one bin per tensor": {"plan": "per_tensor"},
    "two bounds": {"budget": (gs.Relative(0.2), gs.Fixed(0.1))},
    "a budget with a history, and one at the root": {
        "budget": {"bin": gs.Ema(1.1, warmup=1), "root": gs.Relative(0.2)}
    },
    "under a scaler": {"scaled": 1024.0},
    "under a scaler, half": {"scaled": 64.0, "dtype": torch.float16},
}
"""What the programs do, and the definition does the same."""

FALLBACKS: dict[str, tuple[dict[str, Any], str]] = {
    "columns": ({"plan": "columns"}, "'a.weight': its bins are no runs of rows of at most 1048576 elements"),
    "large bins": ({"longest": 64}, "'long.weight': its bins are no runs of rows of at most 64 elements"),
    "another dtype of gradient": (
        {"odd": True},
        "'a.weight': its dtype is torch.float32, its gradient's torch.float64",
    ),
}
"""What the definition does, and the reason that the warning states."""

FAULTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "the gradient is not scaled": (
        "x = tl.load(g + of_weight, mask=there, other=0.0).to(WIDE) * s",
        "x = tl.load(g + of_weight, mask=there, other=0.0).to(WIDE)",
        {},
    ),
    "maximize is forgotten": ("* tl.load(number + _SIGN)", "* 1.0", {"maximize": True}),
    "no Nesterov": ("return x, m0, m1, m1 + w1 * (x - m1)", "return x, m0, m1, m1", {}),
    "a row that is not finite is written": (
        "if here & (tl.load(vectors + FINITE * num_bins + b) > 0):",
        "if here:",
        {},
    ),
    "a row that is not finite is entered": ("tl.where(learns, ahead, m0)", "tl.where(learns, ahead, ahead)", {}),
    "weights do not decay": ("(1.0 - tl.load(number + _DECAY) * tau)", "(1.0 - 0.0 * tau)", {"weight_decay": 0.5}),
    "rows without a gradient walk on": ("moves & (tl.load(vectors + NORM * num_bins + b) > 0)", "moves", {}),
    "rows without a direction decay": ("tl.where(moves, fresh, weight)", "fresh", {"weight_decay": 0.5}),
    "no limit on growth": ("shrink = tl.where(beyond, held", "shrink = tl.where(beyond, reached", {"lr": 0.5}),
    "the first length is forgotten": ("tl.maximum(length, longest), held)", "longest, held)", {"lr": 0.5}),
    "the first block alone is walked": ("range(0, size, BLOCK)", "range(0, BLOCK, BLOCK)", {}),
    "the least length is forgotten": ("tl.maximum(length, tl.load(number + _LEAST) * root)", "length", {}),
    "Adam's own length is forgotten": ("tl.where(tl.load(number + _KEEPS) > 0, root, 1e-30)", "1e-30", {}),
    "the angle is that of the other side": (
        "tl.sum(dot, axis=0) * tl.load(number + _SIGN)",
        "tl.sum(dot, axis=0)",
        {"maximize": True},
    ),
    "rows that are drawn back are not told": ("tl.full([], 2, tl.int8)", "tl.full([], 1, tl.int8)", {"lr": 0.5}),
    "no bias correction": ("ahead / unbias1.to(WIDE)", "ahead", {}),
    "the second moment is not corrected": ("tl.sqrt(v1 / unbias2.to(WIDE))", "tl.sqrt(v1)", {}),
    "the limit does not follow the weights": ("tl.maximum(slope * length, floor", "tl.maximum(slope, floor", {}),
    "the collective rule does not divide": (
        "factor = tl.where(fired, 1.0 / tl.where(fired, middle, 1.0), 1.0)",
        "factor = tl.where(fired, 1.0, 1.0)",
        {},
    ),
    "recent norms do not fall": ("tl.maximum(norm, falls * before)", "tl.maximum(norm, before)", {}),
    "an overflow is not seen": (
        "tl.where(tl.load(unscale + 1) > 0,",
        "tl.where(tl.load(unscale + 1) > 2,",
        {"scaled": 1024.0},
    ),
    "gradient times gradient in place of weight": (
        "x * tl.load(other + of_weight, mask=there, other=0.0).to(tl.float64)",
        "x * x",
        {},
    ),
    "the order of turned weights is forgotten": ("if not PLAIN:", "if PLAIN:", {"form": "turned"}),
}
"""Text of a program, what is put in its place, and the run that must tell."""


def _give(model: nn.Module, step: int, *, turn: bool = False, odd: bool = False) -> None:
    generator = torch.Generator().manual_seed(step)
    for name, p in model.named_parameters():
        gradient = torch.randn(p.shape, generator=generator) * (0.02 if name == "a.bias" else 1.0)
        if p.dim() > 1:
            gradient[-1] *= 20.0
        if name == "words.weight":
            gradient[1] = 0.0  # a word that never comes
            gradient[2] = 0.0 if step else gradient[2]
        if step == 1 and name in ("a.weight", "words.weight"):
            gradient[0, 1] = float("nan") if name == "a.weight" else float("inf")
        if name == "a.weight" and step > 1:
            gradient[2] = 0.0  # a unit that dies
        if name == "tall.weight":
            gradient = -p.detach().float()  # so that its rows grow
        if step == 3:
            gradient *= 1000.0
        gradient = gradient.to(p.dtype)
        if turn and p.dim() == 2:
            gradient = gradient.t().contiguous().t()
        p.grad = torch.empty_like(p).copy_(gradient) if not turn else gradient
    if odd:
        model.a.weight.grad_dtype = None
        model.a.weight.grad = model.a.weight.grad.double()
    if step == 2:
        model.b.weight.grad = None


def difference(
    *,
    dtype: torch.dtype = torch.float32,
    form: str = "",
    turn: bool = False,
    odd: bool = False,
    scaled: float = 0.0,
    num_steps: int = 4,
    **options: Any,
) -> str:
    """What differs between programs and definition after one of some steps from the same state; empty: nothing."""
    from gradsplit.optim.updates.share_triton import TritonShare

    models = [small(dtype, form) for _ in range(2)]
    if options.get("plan") == "columns":
        options["plan"] = gs.xsp(gs.layout_of(models[0]), axis=1)
    mine, true = (gs.GSO(m, backend=name, **options) for m, name in zip(models, ("triton", "eager"), strict=True))
    assert type(mine._parts[0].update) is TritonShare
    mine.measures = true.measures = not scaled
    for step in range(num_steps):
        for model, optimizer in zip(models, (mine, true), strict=True):
            _give(model, step, turn=turn, odd=odd)
            if scaled:
                for p in model.parameters():
                    p.grad = None if p.grad is None else p.grad * scaled
                optimizer.grad_scale = torch.tensor(scaled)
                optimizer.found_inf = torch.tensor(1.0 if step == 2 else 0.0)
            if not isinstance(optimizer.param_groups[0]["lr"], torch.Tensor) and "steps" not in options:
                optimizer.param_groups[0]["lr"] = options.get("lr", 0.03) / (1 + step)
            optimizer.step()
        for (name, found), (_, wanted) in zip(_state(mine, models[0]), _state(true, models[1]), strict=True):
            try:
                rtol = RTOL[dtype] if found.dtype in (dtype, torch.float64) else RTOL[torch.float32]
                atol = 1e-12 if dtype == torch.float64 else 1e-6 if dtype == torch.float32 else 1e-3
                torch.testing.assert_close(found, wanted, rtol=rtol, atol=atol, equal_nan=True)
            except AssertionError as error:
                return f"step {step}, {name}: {error}"
            found.copy_(wanted)
    return ""


def _state(optimizer: gs.GSO, model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    update: Any = optimizer._parts[0].update
    made = [(name, p.detach()) for name, p in model.named_parameters()]
    for name, p in model.named_parameters():
        made += [(f"{key} of {name}", value) for key, value in sorted(optimizer.state[p].items())]
    for name in ("scale_B", "norm_B", "limit_B"):
        made.append((name, getattr(update.decision, name).clone()))
    made += [("recent", update.recent_B), ("most", update.most_B), ("steps", update.seen_steps)]
    made.append(("layers in series", update.series.of_late))
    made += [("finite", update.decision.finite_B.double()), ("factor", update.collected.clone())]
    for name, value in (("moved", update.moved_B), ("grown", update.grown_B), ("cosine", update.cosine_B)):
        made.append((name, torch.zeros_like(update.most_B) if value is None else value.double()))
    return made


def _with_fault(folder: Path, old: str, new: str, run: Callable[[], str]) -> str:
    """A run in which a program has other text; empty where the text is not there."""
    from gradsplit.optim.updates import share_programs as sound
    from gradsplit.optim.updates import share_triton

    text = Path(str(sound.__file__)).read_text(encoding="utf-8")
    if old not in text:
        return ""
    path = folder / f"faulty_{len(list(folder.iterdir()))}.py"
    path.write_text(text.replace(old, new), encoding="utf-8")
    spec: Any = importlib.util.spec_from_file_location(f"{sound.__package__}.{path.stem}", path)
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    share_triton.programs = module
    try:
        return run()
    finally:
        share_triton.programs = sound


def faulty(folder: Path, old: str, new: str, options: dict[str, Any]) -> str:
    """A run of programs with a fault, which are not tried before."""
    from gradsplit.optim.updates.share_triton import TritonShare

    tried = TritonShare._is_sound
    TritonShare._is_sound = lambda self, dtype: True  # type: ignore[method-assign]
    try:
        return _with_fault(folder, old, new, partial(difference, num_steps=4, **options))
    finally:
        TritonShare._is_sound = tried  # type: ignore[method-assign]


def law(name: str, *arguments: Any) -> str:
    """A law of the share step over the whole zoo; empty where it holds."""

    def make(model: nn.Module, **options: Any) -> gs.GSO:
        return gs.GSO(model, backend="triton", **options)

    try:
        getattr(laws, name)(make, *arguments)
    except AssertionError as error:
        return str(error) or name
    return ""


def caught_by_itself(folder: Path) -> str:
    """Programs that are wrong are found out before the first step; named, they raise; else the definition goes on."""
    from gradsplit.kernels.selfcheck import SelfCheckError, forget

    def run() -> str:
        forget()
        models = [small() for _ in range(3)]
        named, chosen, true = (
            gs.GSO(m, backend=name) for m, name in zip(models, ("triton", "triton", "eager"), strict=True)
        )
        chosen._parts[0].split.kernel.by_name = False  # as where "auto" chooses on a card
        for model in models:
            _give(model, 0)
        before = [p.detach().clone() for p in models[0].parameters()]
        try:
            named.step()
            return "the wrong program was taken"
        except SelfCheckError as error:
            told = str(error)
        if any(not torch.equal(a, b) for a, b in zip(before, models[0].parameters(), strict=True)):
            return "the refused step has moved weights"
        if any(float(state["step"]) != 0 for state in named.state.values()):
            return "the refused step was counted"
        forget()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for step in range(2):
                for model, optimizer in zip(models[1:], (chosen, true), strict=True):
                    _give(model, step)
                    optimizer.step()
        if len(caught) != 1:
            return f"{len(caught)} warnings"
        if any(not torch.equal(a, b) for a, b in zip(models[1].parameters(), models[2].parameters(), strict=True)):
            return "the definition did not go on"
        return f"{told} || {caught[0].message}"

    try:
        return _with_fault(folder, "return x, m0, m1, m1 + w1 * (x - m1)", "return x, m0, m1, m1", run)
    finally:
        forget()


def survives(where: str) -> str:
    """A step in which memory runs out leaves everything as it was, and the next one is as without it."""
    from gradsplit.optim.updates import share_triton

    def fail(*_: Any) -> Any:
        raise torch.OutOfMemoryError("planted")

    models = [small() for _ in range(2)]
    optimizers = [gs.GSO(m, backend="triton", budget=(gs.Ema(1.1, warmup=1), gs.Relative(0.2))) for m in models]
    for step in range(3):
        for model, optimizer, broken in zip(models, optimizers, (True, False), strict=True):
            _give(model, step)
            if broken and step == 1:
                before = json.dumps(_listed(optimizer, model))
                owner: Any = share_triton if where == "orthogonalised" else share_triton.TritonShare
                kept = getattr(owner, where)
                setattr(owner, where, fail)
                try:
                    optimizer.step()
                    return "the failure was swallowed"
                except torch.OutOfMemoryError:
                    pass
                finally:
                    setattr(owner, where, kept)
                if json.dumps(_listed(optimizer, model)) != before:
                    return "the failed step has changed something"
            optimizer.step()
    same = [_listed(optimizer, model) for optimizer, model in zip(optimizers, models, strict=True)]
    return "" if same[0] == same[1] else "the step after the failure differs"


def _listed(optimizer: gs.GSO, model: nn.Module) -> Any:
    def plain(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.detach().nan_to_num(nan=-7.0).tolist()
        if isinstance(value, dict):
            return {str(k): plain(v) for k, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, (list, tuple)) else str(value)

    state = optimizer.state_dict()
    return plain([[*model.parameters()], state["state"], state["gradsplit"]])


class _Counted:
    """Stands for a program, and counts its launches in place of making them."""

    def __init__(self, seen: Any, name: str) -> None:
        self.seen, self.name = seen, name

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*_: Any) -> None:
            self.seen[f"triton::{self.name}"] += 1

        return launch


def count(options: dict[str, Any]) -> str:
    """Launches of a warm step on the GPT of 145 tensors: programs, and torch's operations that move data."""
    from gradsplit.optim import gso
    from gradsplit.optim.updates import share_programs, share_triton

    model, look = gpt(), gso.check_numbers
    optimizer = gs.GSO(model, backend="triton", **options)
    optimizer._parts[0].update._is_sound = lambda dtype: True
    optimizer._parts[0].update._narrow = lambda wide: torch.bfloat16  # as on a card
    kept = {name: getattr(share_programs, name) for name in ("measure", "decide", "enter", "commit")}
    mode_seen: Any = {}

    def step() -> None:
        optimizer.step()

    class Both(Launches):
        def __enter__(self) -> Any:
            mode_seen["now"] = self.seen
            return super().__enter__()

    class Seen:
        def __getitem__(self, key: str) -> int:
            return mode_seen.get("now", {}).get(key, 0)

        def __setitem__(self, key: str, value: int) -> None:
            if "now" in mode_seen:
                mode_seen["now"][key] = value

    from tests.optim import launches as counting

    counting.Launches = Both  # type: ignore[misc]
    gso.check_numbers = lambda *_, **__: None  # type: ignore[assignment]  # rates on a card are not looked at
    try:
        for name in kept:
            setattr(share_triton.programs, name, _Counted(Seen(), name))
        seen = launches(model, step)
    finally:
        counting.Launches, gso.check_numbers = Launches, look  # type: ignore[misc]
        for name, program in kept.items():
            setattr(share_triton.programs, name, program)
    return json.dumps(seen)


COUNTS: dict[str, dict[str, Any]] = {"default": {}, "capturable": {"capturable": True, "lr": torch.tensor(0.03)}}

LAWS: dict[str, tuple[Any, ...]] = {
    "check_follows_the_formulas": (),
}


def main(folder: Path) -> None:
    """Run all cases."""
    from gradsplit.kernels.kernel import BACKENDS

    BACKENDS["triton"] = dataclasses.replace(BACKENDS["triton"], devices=())  # the interpreter's device is the CPU
    from gradsplit.optim.updates import share_triton

    cases: dict[str, Callable[[], str]] = {
        f"equal: {name}": partial(equal, difference, run) for name, run in EQUAL.items()
    }
    cases |= {
        f"fallback: {name}": partial(falls_back, share_triton, partial(difference, num_steps=2), run)
        for name, (run, _) in FALLBACKS.items()
    }
    cases |= {f"fault: {name}": partial(faulty, folder, *fault) for name, fault in FAULTS.items()}
    cases |= {f"law: {name}": partial(law, name, *more) for name, more in LAWS.items()}
    cases |= {"caught by itself": partial(caught_by_itself, folder)}
    cases |= {f"survives: {where}": partial(survives, where) for where in ("orthogonalised", "_decide")}
    cases |= {f"count: {name}": partial(count, run) for name, run in COUNTS.items()}
    print(json.dumps({name: case() for name, case in cases.items()}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
