"""The gradient as a product and what is said of it: chains, joints, forks, penalties, diagnoses, ladders; the guard."""

from __future__ import annotations

import copy
import dataclasses
import functools
import tempfile
from typing import Any

import torch
from torch import Tensor, nn

import gradsplit as gs
from gradsplit.chain import Unrolled
from same_numbers.nets import loss_of, make_net, train
from same_numbers.sheet import Notes, Sheet


class TwoHeads(nn.Module):
    """A trunk with a residual block, a task fork, and a second call of one module."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.body = nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 6)
        self.last = nn.Linear(6, 6)
        self.label = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
        self.place = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scores of three classes, and a place."""
        h = torch.tanh(self.stem(x))
        for _ in range(2):
            h = h + torch.tanh(self.body(self.norm(h)))
        h = self.last(h)
        return self.label(h), self.place(h)


class Reader(nn.Module):
    """A recurrence with a head."""

    def __init__(self, kind: str, *, unrolled: bool = False) -> None:
        super().__init__()
        fused = getattr(nn, kind)(3, 5)
        self.rnn = Unrolled(fused) if unrolled else fused
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        """What is read off the last state."""
        return self.head(self.rnn(x)[0][-1])


def two_heads(dtype: torch.dtype = torch.float32) -> TwoHeads:
    torch.manual_seed(0)
    return TwoHeads().to(dtype)


def reader(kind: str, *, unrolled: bool = False) -> Reader:
    torch.manual_seed(4)
    return Reader(kind, unrolled=unrolled)


def inputs(step: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(400 + step), dtype=torch.float64).to(dtype)


def loss_of_heads(model: nn.Module, step: int) -> Tensor:
    """One head is a thousand times as loud; a step explodes, a sample of another is not finite."""
    x = inputs(step, 6, 4, dtype=next(model.parameters()).dtype)
    label, place = model(x)
    loss = nn.functional.cross_entropy(label, torch.arange(6) % 3)
    place = place.square().mean(1)
    if step == 4:
        place = place * torch.tensor([1, 1, float("nan"), 1, 1, 1], dtype=place.dtype)
    return loss + (1e6 if step == 3 else 10.0) * place.mean()


def loss_of_batch(model: nn.Module, batch: Tensor) -> Tensor:
    made = model(batch)
    return sum(one.square().mean() for one in (made if isinstance(made, tuple) else (made,)))


CHAINS: dict[str, dict[str, Any]] = {
    "auto": {},
    "forks": {"at": "forks", "total": 0.5},
    "layers": {"at": "layers"},
    "names": {"at": ["stem", "label.0"], "budget": gs.Fixed(0.01)},
    "ema": {"at": "layers", "budget": gs.Ema(1.1, warmup=1)},
    "percentile": {"at": "layers", "budget": gs.Percentile(0.5)},
    "zscore": {"at": "layers", "budget": gs.ZScore(1.0, warmup=2)},
    "per sample": {"at": "auto", "per_sample": True},
    "steps": {"at": "layers", "steps": True},
    "pass": {"on_nonfinite": "pass"},
    "declared": {"forks": ["last"]},
    "measured": {"at": "layers", "budget": gs.Fixed(float("inf"))},
    "without limits": {"parameters": None},
}


BALANCES: dict[str, dict[str, Any]] = {
    "plain": {},
    "target": {"target": 0.5},
    "on": {"on": 0.95},
    "orthogonal": {"orthogonal": True},
}
LADDERS: dict[str, dict[str, Any]] = {
    "direction": {},
    "bins": {"bins": "xsp"},
    "tensors": {"bins": "per_tensor", "order": 40},
    "recipe": {"recipe": "ladder-292"},
    "own recipe": {"recipe": ["square", "derivative"]},
}
GUARDS: dict[str, dict[str, Any]] = {
    "memory": {},
    "folder": {"folder": True},
    "late": {"check_every": 3, "keep": 1},
    "skip": {"skip": 2},
    "stopped": {"max_rollbacks": 1},
}


def part(sheet: Sheet) -> None:
    for name, options in CHAINS.items():
        for kind in ("sgd", "adam", "bare"):
            sheet.run(f"chain/splitter/{name}/{kind}", functools.partial(chained, kind=kind, **options))
    sheet.run("chain/splitter/in front of a splitter", beside_a_splitter)
    sheet.run("chain/splitter/recurrence", through_steps)
    sheet.run("chain/joints", joints)
    for kind in ("RNN", "GRU", "LSTM"):
        sheet.run(f"chain/penalty/{kind}", functools.partial(penalty, kind=kind))
    for name, options in BALANCES.items():
        sheet.run(f"chain/balance/{name}", functools.partial(balanced, **options))
    for name, make in HURT.items():
        sheet.run(f"chain/factors/{name}", functools.partial(factors, make=make))
        sheet.run(f"diagnose/{name}", functools.partial(diagnosis, make=make))
    for name, options in LADDERS.items():
        sheet.run(f"ladder/{name}", functools.partial(ladder, **options))
    for name, options in GUARDS.items():
        sheet.run(f"guard/{name}", functools.partial(guarded, **options))


def chained(notes: Notes, *, kind: str, **options: Any) -> None:
    model = two_heads()
    optimizer = torch.optim.Adam(model.parameters(), 0.01) if kind == "adam" else torch.optim.SGD(
        model.parameters(), 0.01, momentum=0.9
    )  # fmt: skip
    chain = gs.ChainSplitter(model, **options).attach(None if kind == "bare" else optimizer)

    def look(_: Tensor) -> None:
        notes.note("rows", chain.rows())

    bound = (lambda step: chain.bound_parameters()) if kind == "bare" else None
    train(notes, model, optimizer, loss=loss_of_heads, before_step=bound, after_step=look)
    state = chain.state_dict()
    notes.note("state", state)
    notes.note("worst", chain.worst(3))
    notes.note("module norms", chain.module_norms)
    chain.remove()
    again = gs.ChainSplitter(model, **options)
    again.load_state_dict(copy.deepcopy(state))
    with again:
        train(notes, model, optimizer, steps=2, first=6, loss=loss_of_heads)
    notes.note("state", again.state_dict())


def beside_a_splitter(notes: Notes) -> None:
    model = two_heads()
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    splitter = gs.GradientSplitter(model, sinks=[notes.record])
    splitter.attach(optimizer)
    chain = gs.ChainSplitter(model, parameters=splitter).attach(optimizer)
    train(notes, model, optimizer, loss=loss_of_heads)
    notes.note("rows", chain.rows())


def through_steps(notes: Notes) -> None:
    """Time steps as joints."""
    model = reader("RNN", unrolled=True)
    chain = gs.ChainSplitter(model, at="layers", budget=gs.Fixed(0.01), steps=True).attach()
    for step in range(3):
        model.zero_grad()
        loss_of_batch(model, inputs(step, 7, 4, 3)).backward()
        notes.note("gradients", [p.grad for p in model.parameters()])
    notes.note("rows", chain.rows(), chain.state_dict())


def joints(notes: Notes) -> None:
    heads, batch = two_heads(), torch.ones(2, 4)
    found = {
        "net": gs.joints(make_net(), torch.zeros(2, 6, dtype=torch.long)),
        "heads": gs.joints(heads, batch),
        "heads, loss": gs.joints(heads, batch, loss_of_batch),
        "recurrence": gs.joints(reader("LSTM"), torch.ones(5, 2, 3)),
    }
    for name, joints in found.items():
        notes.note(name, [(one.name, one.kind, one.role, one.module, one.shape) for one in joints])
        notes.text(name, "\n".join(one.note for one in joints))


def penalty(notes: Notes, *, kind: str) -> None:
    model = reader(kind, unrolled=True)
    with model.rnn.keep_signals():
        loss_of_batch(model, inputs(0, 6, 3, 3)).backward()
    value = gs.gain_penalty(model.rnn)
    (2.0 * value).backward()
    notes.note("penalty", value, [p.grad for p in model.parameters()])


def balanced(notes: Notes, **options: Any) -> None:
    nets = {"heads": (two_heads(), inputs(0, 8, 4)), "convolutions": (_convolutions(), inputs(1, 4, 2, 6, 6))}
    for kind, (model, batch) in nets.items():
        notes.note(kind, gs.balance_(model, loss_of_batch, batch, **options), dict(model.named_parameters()))


def _convolutions() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))


def _hot() -> Any:
    """A stack with a hot layer."""
    torch.manual_seed(2)
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(6)))
    with torch.no_grad():
        model[2].weight.mul_(1000)
    return model, inputs(2, 5, 6)


def _cold() -> Any:
    """Saturated and dead units, vanishing signals."""
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.Sigmoid(), nn.Linear(8, 8), nn.Sigmoid(), nn.Linear(8, 2)
    )
    with torch.no_grad():
        model[0].bias.sub_(50)
        model[2].weight.mul_(300)
    return model, inputs(3, 5, 6)


def _broken() -> Any:
    """A NaN inside."""
    model, batch = _hot()
    with torch.no_grad():
        model[4].weight[0, 0] = float("nan")
    return model, batch


HURT: dict[str, Any] = {
    "hot": _hot,
    "cold": _cold,
    "broken": _broken,
    "sound": lambda: (two_heads(), inputs(5, 6, 4)),
    "doubles": lambda: (two_heads(torch.float64), inputs(5, 6, 4, dtype=torch.float64)),
    "recurrence": lambda: (reader("RNN"), 3 * inputs(6, 9, 4, 3)),
    "gates": lambda: (reader("LSTM"), inputs(6, 9, 4, 3)),
}


def factors(notes: Notes, *, make: Any) -> None:
    model, batch = make()
    for way in ({}, {"operator_norms": True}, {"through_time": False}):
        chain = gs.gradient_chain(model, loss_of_batch, batch, **way)
        notes.note("chain", chain.to_dict(), [link.name for link in chain.worst(3)])
    notes.text("chain", chain.text())
    notes.note("parameters", dict(model.named_parameters()), [p.grad for p in model.parameters()])


def diagnosis(notes: Notes, *, make: Any) -> None:
    """With an optimizer whose rate is too large, and the ladder where the loss is smooth."""
    for rate in (None, 0.01, 100.0):
        model, batch = make()
        optimizer = None if rate is None else torch.optim.SGD(model.parameters(), rate)
        said = gs.diagnose(model, loss_of_batch, batch, optimizer, ladder=rate == 0.01)
        notes.note("findings", [(one.kind, one.name, one.value, one.severity) for one in said.findings])
        notes.note("numbers", said.loss, [dataclasses.asdict(fork) for fork in said.forks], said.chain.to_dict())
        notes.text(f"rate {rate}", said.text())
        notes.note("parameters", dict(model.named_parameters()))


def ladder(notes: Notes, *, order: int = 99, bins: str | None = None, **options: Any) -> None:
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Softplus(), nn.Linear(4, 1))
    x, y = inputs(7, 5, 3).double(), inputs(8, 5, 1).double()

    def loss(params: dict[str, Tensor]) -> Tensor:
        return (torch.func.functional_call(model, params, (x,)) - y).square().mean()

    params = {name: p.detach().double() for name, p in model.named_parameters()}
    model.double()
    plan = None if bins is None else getattr(gs, bins)(gs.layout_of(model))
    made = gs.taylor_ladder(loss, params, order=order, bins=plan, **options)
    notes.note("coefficients", made.names, made.loss, made.coefficient, made.derivative, made.length_B)
    notes.note("reach", made.radii, made.kink_B, made.safe_step_B, made.limited_by, made.predict(0.01), made.reach_B)
    notes.text("findings", "\n".join(made.findings(10.0)))
    if made.climb is not None:
        notes.note("climb", made.climb)


def guarded(notes: Notes, *, folder: bool = False, **options: Any) -> None:
    """Two divergences, with a splitter, a schedule and data that the guard hands out."""
    model = nn.Sequential(make_net(), nn.Dropout(0.1))
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.97)
    splitter = gs.GradientSplitter(model, budget=gs.Ema(1.5, warmup=2), sinks=[notes.record])
    splitter.attach(optimizer)
    with tempfile.TemporaryDirectory() as place:
        own = {"every": 4, "patience": 2, "history": 16, "folder": place if folder else None, **options}
        guard = gs.Guard(model, optimizer, splitter, schedule, **own)
        torch.manual_seed(6)
        try:
            for turn in guard.batches(list(range(40))):
                optimizer.zero_grad()
                loss = loss_of(model, turn)
                loss.backward()
                optimizer.step()
                schedule.step()
                if turn in (15, 25):
                    with torch.no_grad():
                        model[0].norm.weight[0] = float("nan")
                        loss = loss * float("nan")
                if turn in (30, 31, 32, 33):
                    loss = loss * 1000
                action = guard.step(loss)
                notes.note("losses", loss, guard.factor, optimizer.param_groups[0]["lr"], action is not None)
        except gs.DivergenceError as error:
            notes.note("stopped", len(error.actions))
        state = guard.state_dict()
        state["actions"] = [{**action, "time": 0, "reason": ""} for action in state["actions"]]
        notes.note("state", state)
        notes.text("actions", "\n".join(map(str, guard.actions)))
        notes.note("parameters", dict(model.named_parameters()), optimizer.state_dict())
        guard.remove()
