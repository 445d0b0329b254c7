"""Which tensors profit from a stronger decay of the weights, and whether a rule can choose it.

    python benchmarks/gso.py decay --decay convolutions=0.3 --tasks healthy,plain-12 --seeds 10,11
    python benchmarks/gso.py decay --decay beyond-first=0.3 --tasks healthy --seeds 0 --times 4

Each run is a line of benchmarks/results/gso/decay.jsonl; a run that is there is not run again. With a word and a
number, these tensors decay by it, all others by 0.01:

- `all`: all tensors;
- `convolutions`: kernels of convolutions, those of an output layer too;
- `hidden`: kernels of convolutions but for output layers;
- `heads`: output layers of any kind;
- `convolutions+heads`: kernels of convolutions, and output layers of any kind.

Or the number is multiplied by a share of the row's length, and acts where that share is above zero. L is the length of
a row, F its first one, and E = 0.1 sqrt(n) the least length that GSO counts:

- `beyond-first`: kernels of convolutions, 1 - F / L;
- `beyond-least`: kernels of convolutions, 1 - E / L;
- `beyond-least-everywhere`: the same for all matrices.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from benchmarks.gso.runs import factor
from gradsplit import GSO
from gradsplit.lab import evidence, workload
from gradsplit.optim.kinds import owners_of
from gradsplit.optim.share import ShareUpdate
from gradsplit.rates import Rates

OUT = Path(__file__).parents[1] / "results" / "gso" / "decay.jsonl"
USUAL = 0.01
TASKS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "healthy": ("detection", 500, {"healthy": True}),
    "exploding": ("detection", 500, {}),
    "photographs": ("aerial", 500, {}),
    "plain-12": ("plain-stack", 350, {}),
    "plain-36": ("plain-stack", 350, {"depth": 36}),
    "hot": ("residual-stack", 900, {}),
    "fashion-resnet": ("fashion-resnet", 300, {}),
    "fashion-vit": ("fashion-vit", 300, {}),
    "diffusion": ("diffusion", 300, {}),
    "gpt": ("gpt", 500, {}),
    "lstm": ("lstm", 500, {}),
}
GROUPS: dict[str, Callable[[str, nn.Module], bool]] = {
    "none": lambda name, owner: False,
    "all": lambda name, owner: True,
    "convolutions": lambda name, owner: _is_kernel(name, owner),
    "hidden": lambda name, owner: _is_kernel(name, owner) and "head" not in name,
    "heads": lambda name, owner: "head" in name and name.endswith("weight"),
    "convolutions+heads": lambda name, owner: _is_kernel(name, owner) or ("head" in name and name.endswith("weight")),
}
"""Word -> whether a tensor decays more, by its name and the module that owns it."""
RULES = ("beyond-first", "beyond-least", "beyond-least-everywhere")


def _is_kernel(name: str, owner: nn.Module) -> bool:
    return isinstance(owner, nn.modules.conv._ConvNd) and name.endswith("weight")


def in_groups(model: nn.Module, stronger: Callable[[str, nn.Module], bool], decay: float) -> GSO:
    """GSO whose tensors are what they are in their modules, in two groups of one decay each."""
    owners, parts = owners_of(model), {USUAL: [], decay: []}  # type: ignore[var-annotated]
    for name, p in model.named_parameters():
        if p.requires_grad:
            parts[decay if stronger(name, owners[id(p)][0]) else USUAL].append((name, p))
    made = GSO([{"params": pairs, "weight_decay": value} for value, pairs in parts.items() if pairs])
    made._owners = owners
    made._kinds = [made._kinds_of(group, "auto") for group in made.param_groups]
    made._build(0)
    return made


@contextmanager
def ruled(rule: str, decay: float) -> Iterator[None]:
    """Let a rule over lengths decide on the decay, in the definition of the step."""
    bound, value_B, now = ShareUpdate._bound, Rates.value_B, {}

    def seen(self: ShareUpdate, *arguments: Any) -> Any:
        made = bound(self, *arguments)
        fresh = (self.most_B == 0) & made[0].finite_B & (made[0].norm_B > 0)
        first_B = torch.where(fresh, made[1], now.get("first", torch.zeros_like(made[1])))
        chosen_B = torch.zeros_like(made[1])
        for t, kind in enumerate(self.kinds):
            everywhere = rule.endswith("everywhere") or self.split.owners[t].ndim > 2
            chosen_B[torch.from_numpy(self.split.bins_of_tensor[t])] = float(kind.name == "matrix" and everywhere)
        now.update(first=first_B, length=made[1], least=self._least_B, chosen=chosen_B)
        return made

    def decided(self: Rates, key: str, num_bins: int) -> Tensor:
        usual_B = value_B(self, key, num_bins)
        if key != "weight_decay":
            return usual_B
        start_B = now["first"] if rule == "beyond-first" else now["least"]
        beyond_B = (1 - start_B / now["length"].clamp(min=1e-20)).clamp(min=0) * now["chosen"]
        return torch.where(beyond_B > 0, decay * beyond_B, usual_B)

    ShareUpdate._bound, Rates.value_B = seen, decided  # type: ignore[method-assign]
    try:
        yield
    finally:
        ShareUpdate._bound, Rates.value_B = bound, value_B  # type: ignore[method-assign]


def run(word: str, decay: float, task_name: str, seed: int, times: int) -> dict[str, Any]:
    """Train once; the rate falls linearly to zero."""
    name, steps, options = TASKS[task_name]
    row = workload(name)
    task = row.build(seed=seed, **options)
    steps, model = steps * times, task.model
    optimizer = GSO(model, backend="eager") if word in RULES else in_groups(model, GROUPS[word], decay)
    schedule = LambdaLR(optimizer, partial(factor, steps=steps, schedule="linear", warmup=0))
    losses, used = [], time.process_time()
    with ruled(word, decay) if word in RULES else torch.enable_grad():
        for step in range(steps):
            optimizer.zero_grad()
            loss = task.loss(model, task.batch(step))
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
            losses.append(float(loss.detach()))
    return {
        "score": task.evaluate(model)[row.metric],
        "train_loss": statistics.fmean(losses[-max(1, steps // 10) :]),
        "cpu_seconds": round(time.process_time() - used, 1),
    }


def key_of(row: dict[str, Any]) -> tuple[Any, ...]:
    """What tells one run from the others."""
    return tuple(row[name] for name in ("tensors", "decay", "task", "seed", "times"))


def main(asked_for: Sequence[str]) -> None:
    """Run what is missing of one decay."""
    parser = argparse.ArgumentParser(prog="gso.py decay", description=__doc__.splitlines()[0])
    parser.add_argument("--decay", default="none=0.01", help=f"one of {', '.join((*GROUPS, *RULES))}, = and a number")
    parser.add_argument("--tasks", default="healthy", help=f"of {', '.join(TASKS)}, comma-separated")
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--times", type=int, default=1, help="as many times the task's usual steps")
    asked = parser.parse_args(asked_for)
    word, _, number = asked.decay.partition("=")
    torch.set_num_threads(1)
    where = evidence.conditions()
    for seed in map(int, asked.seeds.split(",")):
        for task in asked.tasks.split(","):
            lines = OUT.read_text(encoding="utf8").splitlines() if OUT.is_file() else []
            row = {"tensors": word, "decay": float(number), "task": task, "seed": seed, "times": asked.times}
            if key_of(row) in {key_of(json.loads(line)) for line in lines}:
                continue
            row |= run(word, float(number), task, seed, asked.times)
            row |= {"hardware": where["hardware"], "torch": where["versions"]["torch"]}
            row["date"] = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
            with OUT.open("a", encoding="utf8") as file:
                file.write(json.dumps(row) + "\n")
            print(row, flush=True)
