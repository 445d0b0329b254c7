"""FSDP2 and DDP on two gloo ranks: splitter, GSO and ChainSplitter, with each rank's records, shards and states."""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import gradsplit as gs
from same_numbers.gso import make_gso, note_state
from same_numbers.sheet import Notes, Sheet, settle
from same_numbers.splitters import EMA, PLANS, ZSCORE

HERE = Path(__file__).resolve().parents[1]
SIZE, STEPS = 2, 5
LIMIT = datetime.timedelta(seconds=60)
"""A rank that waits so long for the other has lost it."""

SPLITTERS: dict[str, dict[str, Any]] = {
    "default": {},
    "ema and root": {"budget": {"root": gs.Fixed(0.2), "bin": (EMA, gs.RelativeStep())}},
    "nearest": {"budget": {"root": gs.Fixed(0.2), "bin": gs.Relative(0.1)}, "rule": "nearest"},
    "columns": {"plan": PLANS["xsp axis=1 parts=3"], "budget": gs.Relative(0.05)},
    "parts": {"plan": PLANS["xsp parts=2"], "budget": ZSCORE},
    "whole": {"plan": "whole", "budget": gs.Fixed(0.2)},
    "modules": {"plan": "tree_sp", "budget": {"module": gs.Relative(0.1), "tensor": gs.Percentile(0.5)}},
    "lbf": {"plan": "lbf"},
    "capped": {"cap_updates": True},
    "capped, root": {"cap_updates": True, "budget": {"root": gs.Fixed(0.2), "bin": gs.RelativeStep(0.02)}},
    "eager": {"backend": "eager"},
    "reference": {"backend": "reference"},
    "stages": {"stages": True, "budget": {"root": gs.Fixed(0.2), "bin": gs.RelativeStep()}},
}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "default": {},
    "bin": {"second_moment": "bin"},
    "root": {"budget": {"root": gs.Fixed(0.2), "bin": (gs.Relative(0.2), gs.RelativeStep(0.03))}},
    "root, bin": {"budget": {"root": gs.RelativeStep(0.02), "bin": gs.Relative(0.2)}, "second_moment": "bin"},
    "ema": {"budget": (EMA, gs.RelativeStep(0.03))},
    "columns": {"plan": PLANS["xsp axis=1 parts=3"]},
    "per_tensor": {"plan": "per_tensor"},
    "in_backward": {"in_backward": True},
    "cyclic": {"schedule": "cyclic", "switch_every": 2, "order": "energy"},
    "eager": {"backend": "eager"},
    "reference, bin": {"backend": "reference", "second_moment": "bin"},
    "fused=False": {"fused": False},
    "maximize": {"maximize": True},
    "bfloat16": {"dtype": torch.bfloat16},
}


class Net(nn.Module):
    """Rows that two ranks do not share evenly, a convolution, a norm, two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 5, 3, padding=1)
        self.norm = nn.LayerNorm(5)
        self.body = nn.ModuleList([nn.Linear(5, 7), nn.Linear(7, 5)])
        self.label, self.place = nn.Linear(5, 3), nn.Linear(5, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scores of three classes, and a place."""
        h = self.norm(torch.tanh(self.conv(x)).mean(-1))
        h = h + self.body[1](torch.tanh(self.body[0](h)))
        return self.label(h), self.place(h)


def part(sheet: Sheet) -> None:
    """Start the ranks and gather what they note."""
    with tempfile.TemporaryDirectory() as folder:
        own = [sheet.only or "*", "" if sheet.values is None else sheet.values.name]
        ranks = [
            # Python looks for modules in the working folder first, which may hold another tree of the package.
            subprocess.Popen([sys.executable, "-m", "same_numbers.ranks", str(rank), folder, *own], cwd=HERE)
            for rank in range(SIZE)
        ]
        for rank, process in enumerate(ranks):
            try:
                process.wait(timeout=300)
            except subprocess.TimeoutExpired:
                process.kill()
            place = Path(folder) / f"{rank}.json"
            ended = {f"sharded/{rank}/ended": "early"}
            sheet.digests |= json.loads(place.read_text(encoding="utf8")) if place.exists() else ended


def on_rank(rank: int, folder: Path, only: str, values: str) -> None:
    """Note what one rank sees; each has a file of values of its own."""
    settle()
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=SIZE, timeout=LIMIT)
    sheet = Sheet(only, open(f"{values}.{rank}", "w", encoding="utf8") if values else None)  # noqa: SIM115
    for kind in ("fsdp", "ddp"):
        for name, options in SPLITTERS.items():
            if kind == "ddp" and name not in ("default", "ema and root", "capped", "lbf", "stages"):
                continue
            sheet.run(f"sharded/{kind}/splitter/{name}/{rank}", lambda notes, k=kind, o=options: split(notes, k, **o))
        for name, options in OPTIMIZERS.items():
            if kind == "fsdp" or name in ("default", "root", "cyclic"):
                sheet.run(f"sharded/{kind}/gso/{name}/{rank}", lambda notes, k=kind, o=options: optimize(notes, k, **o))
        sheet.run(f"sharded/{kind}/chain/{rank}", lambda notes, k=kind: chained(notes, k))
    sheet.run(f"sharded/guard/{rank}", guarded)
    (folder / f"{rank}.json").write_text(json.dumps(sheet.digests), encoding="utf8")
    dist.barrier()
    dist.destroy_process_group()


def make(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model over the ranks."""
    torch.manual_seed(0)
    net = Net().to(dtype)
    if kind == "ddp":
        return nn.parallel.DistributedDataParallel(net)
    for layer in (net.conv, net.body[0]):
        fully_shard(layer)
    return fully_shard(net)


def loss_at(model: nn.Module, step: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Every rank has a batch of its own; one loss explodes, and one is broken on one rank."""
    draw = torch.Generator().manual_seed(300 + SIZE * step + dist.get_rank())
    x = torch.randn(6, 2, 4, generator=draw).to(dtype)
    label, place = model(x)
    loss = nn.functional.cross_entropy(label, torch.arange(6) % 3) + place.square().mean()
    return loss * 1e6 if step == 2 else loss


def train(notes: Notes, model: nn.Module, optimizer: Any, dtype: torch.dtype = torch.float32) -> None:
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = loss_at(model, step, dtype)
        notes.note("losses", loss)
        loss.backward()
        break_gradients(model, step)
        optimizer.step()
    notes.note("parameters", dict(model.named_parameters()))


def break_gradients(model: nn.Module, step: int) -> None:
    """A NaN in one shard, and 3e30 in another; the copies of DDP stay equal."""
    word, value = {1: ("conv.weight", float("nan")), 3: ("body.0.bias", 3e30)}.get(step, ("nothing", 0.0))
    for name, parameter in model.named_parameters():
        if name.endswith(word) and parameter.grad is not None:
            sharded = hasattr(parameter.grad, "to_local")
            local = parameter.grad.to_local() if sharded else parameter.grad
            if not sharded or dist.get_rank() == 0:
                local.view(-1)[0] = value


def split(notes: Notes, kind: str, *, stages: bool = False, **options: Any) -> None:
    model = make(kind)
    capped = options.get("cap_updates", False)
    optimizer = (torch.optim.AdamW(model.parameters(), 0.02) if capped
                 else torch.optim.SGD(model.parameters(), 0.05, momentum=0.9))  # fmt: skip
    if stages:
        options["stages"] = dist.group.WORLD
    splitter = gs.GradientSplitter(model, optimizer=optimizer, sinks=[notes.record], **options)
    if options.get("plan") == "lbf":
        splitter.calibrate(lambda: (model.zero_grad(), loss_at(model, 9).backward()), 2)
        notes.note("plan", splitter.plan.to_dict())
    splitter.attach(optimizer)
    train(notes, model, optimizer)
    notes.note("state", splitter.state_dict())


def optimize(notes: Notes, kind: str, *, dtype: torch.dtype = torch.float32, **options: Any) -> None:
    model = make(kind, dtype)
    optimizer = make_gso(model, lr=0.02, **options)
    train(notes, model, optimizer, dtype)
    note_state(notes, optimizer)


def chained(notes: Notes, kind: str) -> None:
    """Signals at the joints, the fork of the two heads, limits of modules over the ranks."""
    model = make(kind)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    chain = gs.ChainSplitter(model).attach(optimizer)
    train(notes, model, optimizer)
    notes.note("rows", chain.rows(), chain.state_dict())
    notes.note("module norms", chain.module_norms)


def guarded(notes: Notes) -> None:
    """A divergence that only one rank sees."""
    model = make("ddp")
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    guard = gs.Guard(model, optimizer, every=2, patience=2)
    for step in range(8):
        optimizer.zero_grad()
        loss = loss_at(model, 0) * (float("nan") if step == 5 and dist.get_rank() == 1 else 1.0)
        loss.backward()
        optimizer.step()
        guard.step(loss)
    notes.note("actions", [{**action.to_dict(), "time": 0, "reason": ""} for action in guard.actions])
    notes.note("parameters", dict(model.named_parameters()))


if __name__ == "__main__":
    on_rank(int(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
