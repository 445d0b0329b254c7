"""Where the gradient comes from: samples and loss terms against the field's remedies, on five fresh seeds.

Every method with a strength is tuned on two seeds of its own; the best strength is then run on the fresh seeds 0 to 4.
The optimizer, its learning rate and the number of steps are the task's, the same for all methods. A run that is there
is not run again, so the program may be stopped and started at will.

Run: python benchmarks/sources.py [--task NAME …]      writes benchmarks/results/sources/TASK.json
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import platform
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gradsplit as gs

RESULTS = Path(__file__).parent / "results" / "sources"
FRESH, TUNING = range(5), (100, 101)


class Task(NamedTuple):
    """One test: what it is, its methods with the strengths to choose from, and whether more is better."""

    title: str
    run: Callable[[str, float | None, int], dict[str, float]]
    methods: dict[str, tuple[float | None, ...]]
    more_is_better: bool


def _finite(parameters: Iterable[Tensor]) -> bool:
    return all(bool(p.grad.isfinite().all()) for p in parameters if p.grad is not None)


# -------------------- samples: regression
def _friedman(size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    x = torch.rand(size, 10, generator=generator)
    y = 10 * torch.sin(math.pi * x[:, 0] * x[:, 1]) + 20 * (x[:, 2] - 0.5) ** 2 + 10 * x[:, 3] + 5 * x[:, 4]
    return (x - 0.5) * 12**0.5, (y - 14.4) / 4.9


def regression(fault: str) -> Callable[[str, float | None, int], dict[str, float]]:
    """Friedman's function; in 5 % of the training rows x is 30 times too large, or y is 15 deviations off."""

    def run(method: str, strength: float | None, seed: int) -> dict[str, float]:
        generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        x, y = _friedman(1000, generator)
        y = y + 0.2 * torch.randn(1000, generator=generator)
        test_x, test_y = _friedman(2000, generator)
        bad = torch.rand(1000, generator=generator) < 0.05
        if fault == "x":
            x[bad] *= 30
        elif fault == "y":
            y[bad] += 15 * torch.randn(int(bad.sum()), generator=generator).sign()
        net = nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
        optimizer = torch.optim.Adam(net.parameters(), 3e-3)
        splitter = gs.SampleSplitter(net, "regression") if method == "samples" else None
        if splitter is not None:
            splitter.attach(optimizer)
        for step in range(800):
            for part in optimizer.param_groups:
                part["lr"] = 3e-3 * (1 - step / 800)
            rows = torch.randint(1000, (64,), generator=generator)
            optimizer.zero_grad()
            u = net(x[rows])[:, 0]
            if method == "huber":
                loss = F.huber_loss(u, y[rows], delta=strength or 1.0)
            else:
                loss = F.mse_loss(u, y[rows])
            loss.backward()
            if method == "clip":
                nn.utils.clip_grad_norm_(net.parameters(), strength or 1.0)
            optimizer.step()
        if splitter is not None:
            splitter.remove()
        with torch.no_grad():
            return {"score": float((net(test_x)[:, 0] - test_y).square().mean().sqrt())}

    return run


# -------------------- samples: digits
class Cnn(nn.Module):
    """Two convolutions on 8 x 8 images that the model standardises itself: a blank image becomes 0 / 0."""

    def __init__(self, *, norm: bool, wide: int = 1) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width, out in ((1, 16 * wide), (16 * wide, 32 * wide)):
            layers += [nn.Conv2d(width, out, 3, padding=1), nn.BatchNorm2d(out) if norm else nn.Identity(), nn.ReLU()]
        self.body = nn.Sequential(*layers, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32 * wide * 16, 10))

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        flat = x.flatten(1)
        x = (x - flat.mean(1).view(-1, 1, 1, 1)) / flat.std(1, correction=0).view(-1, 1, 1, 1)
        return self.body(x)


def digits(*, norm: bool, blank: float) -> Callable[[str, float | None, int], dict[str, float]]:
    """Accuracy on scikit-learn's digits; a share of the training images is blank."""

    def run(method: str, strength: float | None, seed: int) -> dict[str, float]:
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        order = np.random.default_rng(seed).permutation(len(images))
        x = torch.tensor(images[order], dtype=torch.float32).view(-1, 1, 8, 8) / 16
        y = torch.tensor(labels[order])
        generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        bad = torch.rand(1200, generator=generator) < blank
        x[:1200][bad] = 0.5
        net = Cnn(norm=norm)
        optimizer = torch.optim.AdamW(net.parameters(), 3e-3)
        splitter = gs.SampleSplitter(net) if method == "samples" else None
        if splitter is not None:
            splitter.attach(optimizer)
        named, there = set(), set()
        for step in range(250):
            rows = torch.randint(1200, (64,), generator=generator)
            optimizer.zero_grad()
            each = F.cross_entropy(net(x[rows]), y[rows], reduction="none")
            if method == "masked loss":
                each = each[each.isfinite()]
            each.mean().backward()
            there |= {(step, int(i)) for i in bad[rows].nonzero()}
            if method == "clip":
                nn.utils.clip_grad_norm_(net.parameters(), strength or 1.0)
            if method == "samples" or _finite(net.parameters()):
                optimizer.step()
        found: dict[str, float] = {}
        if splitter is not None:
            named = {(row.step, row.sample) for row in splitter.named() if row.ratio == "not finite"}
            splitter.remove()
            if there:
                found = {
                    "precision": len(named & there) / max(len(named), 1),
                    "recall": len(named & there) / len(there),
                }
        net.eval()
        with torch.no_grad():
            return {"score": float((net(x[1200:]).argmax(1) == y[1200:]).float().mean()), **found}

    return run


# -------------------- terms: physics in the loss
def _derivative(u: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad(u.sum(), x, create_graph=True)[0]


def _tanh_net(inputs: int, width: int = 32) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1))


def helmholtz_line(net: nn.Module, generator: torch.Generator, points: int = 128) -> dict[str, Tensor]:
    """u'' + u = f on (-1, 1), u = sin(2 pi x)."""
    x = (torch.rand(points, 1, generator=generator) * 2 - 1).requires_grad_()
    u = net(x)
    curve = _derivative(_derivative(u, x), x)
    source = (1 - (2 * math.pi) ** 2) * torch.sin(2 * math.pi * x.detach())
    return {
        "pde": (curve + u - source).square().mean(),
        "boundary": net(torch.tensor([[-1.0], [1.0]])).square().mean(),
    }


def line_error(net: nn.Module) -> float:
    x = torch.linspace(-1, 1, 401).view(-1, 1)
    return _relative(net(x), torch.sin(2 * math.pi * x))


def helmholtz_plane(net: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
    """u_xx + u_yy + u = f on the square, u = sin(pi x) sin(2 pi y)."""
    z = (torch.rand(256, 2, generator=generator) * 2 - 1).requires_grad_()
    u = net(z)
    slope = _derivative(u, z)
    curve = sum(_derivative(slope[:, i], z)[:, i : i + 1] for i in range(2))
    exact = torch.sin(math.pi * z[:, :1]) * torch.sin(2 * math.pi * z[:, 1:])
    edge = torch.rand(128, 2, generator=generator) * 2 - 1
    side = torch.randint(2, (128,), generator=generator)
    edge[torch.arange(128), side] = torch.randint(2, (128,), generator=generator) * 2.0 - 1
    source = (1 - 5 * math.pi**2) * exact.detach()
    return {"pde": (curve + u - source).square().mean(), "boundary": net(edge).square().mean()}


def plane_error(net: nn.Module) -> float:
    x, y = torch.meshgrid(torch.linspace(-1, 1, 51), torch.linspace(-1, 1, 51), indexing="ij")
    z = torch.stack([x.flatten(), y.flatten()], 1)
    return _relative(net(z), (torch.sin(math.pi * z[:, :1]) * torch.sin(2 * math.pi * z[:, 1:])))


NU = 0.02 / math.pi


def burgers(net: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
    """u_t + u u_x = nu u_xx, u(x, 0) = -sin(pi x), u(±1, t) = 0, nu = 0.02 / pi."""
    z = torch.rand(256, 2, generator=generator) * torch.tensor([2.0, 1.0]) - torch.tensor([1.0, 0.0])
    z.requires_grad_()
    u = net(z)
    slope = _derivative(u, z)
    curve = _derivative(slope[:, 0], z)[:, :1]
    x = torch.rand(64, 1, generator=generator) * 2 - 1
    t = torch.rand(64, 1, generator=generator)
    sides = torch.cat([torch.cat([torch.full_like(t, s), t], 1) for s in (-1.0, 1.0)])
    start = net(torch.cat([x, torch.zeros_like(x)], 1)) + torch.sin(math.pi * x)
    return {
        "pde": (slope[:, 1:] + u * slope[:, :1] - NU * curve).square().mean(),
        "boundary": net(sides).square().mean(),
        "start": start.square().mean(),
    }


def burgers_error(net: nn.Module) -> float:
    """Against the Cole-Hopf integral, by Gauss-Hermite nodes in float64."""
    x = np.linspace(-1, 1, 81)
    nodes, weights = np.polynomial.hermite.hermgauss(120)
    points, values = [], []
    for t in (0.25, 0.5, 0.75, 1.0):
        shifted = x[:, None] - nodes * math.sqrt(4 * NU * t)
        kernel = weights * np.exp((-np.cos(math.pi * shifted) - 1) / (2 * math.pi * NU))
        values.append(-(np.sin(math.pi * shifted) * kernel).sum(1) / kernel.sum(1))
        points.append(np.stack([x, np.full_like(x, t)], 1))
    z = torch.tensor(np.concatenate(points), dtype=torch.float32)
    return _relative(net(z), torch.tensor(np.concatenate(values), dtype=torch.float32).view(-1, 1))


def _relative(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).detach().norm() / exact.norm())


def _gradients(terms: dict[str, Tensor], parameters: list[Tensor]) -> dict[str, list[Tensor]]:
    made = {name: torch.autograd.grad(t, parameters, retain_graph=True, allow_unused=True) for name, t in terms.items()}
    return {
        name: [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)]
        for name, found in made.items()
    }


class Annealing:
    """Wang et al. 2021: a term's weight follows max |gradient of the residual| / mean |its own|.

    The rate is 0.1, and the weights are renewed every ten steps, as in the authors' programs.
    """

    def __init__(self, parameters: list[Tensor]) -> None:
        self.parameters, self.weights = parameters, {}

    def backward(self, step: int, terms: dict[str, Tensor]) -> None:  # noqa: D102
        gradients = _gradients(terms, self.parameters)
        largest = max(float(g.abs().max()) for g in gradients["pde"])
        for name in terms:
            if name == "pde" or step % 10:
                continue
            flat = torch.cat([g.flatten() for g in gradients[name]])
            now = largest / max(float(flat.abs().mean()), 1e-12)
            self.weights[name] = 0.9 * self.weights.get(name, 1.0) + 0.1 * now
        for k, p in enumerate(self.parameters):
            p.grad = sum(self.weights.get(name, 1.0) * found[k] for name, found in gradients.items())


class GradNorm:
    """Chen et al. 2018: weights are trained so that all terms' gradients have a norm that fits their relative loss."""

    def __init__(self, parameters: list[Tensor], alpha: float) -> None:
        self.parameters, self.alpha = parameters, alpha
        self.weights: Tensor | None = None
        self.first: Tensor | None = None

    def backward(self, step: int, terms: dict[str, Tensor]) -> None:  # noqa: D102
        gradients = _gradients(terms, self.parameters)
        norms = torch.stack([torch.cat([g.flatten() for g in found]).norm() for found in gradients.values()])
        values = torch.stack([t.detach() for t in terms.values()])
        if self.weights is None:
            self.weights, self.first = torch.ones(len(terms), requires_grad=True), values.clone()
            self.optimizer = torch.optim.Adam([self.weights], 0.025)
        for k, p in enumerate(self.parameters):
            p.grad = sum(w.detach() * found[k] for w, found in zip(self.weights, gradients.values(), strict=True))
        pace = values / self.first
        weighted = self.weights * norms
        goal = (weighted.mean() * (pace / pace.mean()) ** self.alpha).detach()
        self.optimizer.zero_grad()
        (weighted - goal).abs().sum().backward()
        self.optimizer.step()
        with torch.no_grad():
            self.weights.clamp_(min=1e-3)
            self.weights.mul_(len(terms) / self.weights.sum())


def physics(
    inputs: int, terms_of: Callable[..., dict[str, Tensor]], error: Callable[[nn.Module], float], steps: int
) -> Callable[[str, float | None, int], dict[str, float]]:
    """Relative L2 error of a network trained on a differential equation, Adam, lr 3e-3 falling to 0 as a cosine."""

    def run(method: str, strength: float | None, seed: int) -> dict[str, float]:
        torch.manual_seed(seed)
        generator = torch.Generator().manual_seed(seed)
        net = _tanh_net(inputs)
        parameters = list(net.parameters())
        optimizer = torch.optim.Adam(parameters, 3e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        splitter, other = gs.TermSplitter(net), None
        if method == "annealing":
            other = Annealing(parameters)
        elif method == "gradnorm":
            other = GradNorm(parameters, strength or 1.0)
        aggregate = _torchjd() if method == "torchjd UPGrad" else None
        for step in range(steps):
            optimizer.zero_grad()
            terms = terms_of(net, generator)
            if method == "terms":
                splitter.backward(**terms)
            elif other is not None:
                other.backward(step, terms)
            elif aggregate is not None:
                aggregate(list(terms.values()), parameters)
            else:
                weight = strength or 1.0 if method == "tuned weight" else 1.0
                sum(t if name == "pde" else weight * t for name, t in terms.items()).backward()
                if method == "clip":
                    nn.utils.clip_grad_norm_(parameters, strength or 1.0)
            optimizer.step()
            schedule.step()
        return {"score": error(net)}

    return run


def _torchjd() -> Callable[[list[Tensor], list[Tensor]], None]:
    """The peer from PyPI, if it is installed: conflicting gradients are projected."""
    from torchjd.aggregation import UPGrad
    from torchjd.autojac import backward

    aggregator = UPGrad()

    def step(terms: list[Tensor], parameters: list[Tensor]) -> None:
        backward(terms, aggregator) if _takes_aggregator(backward) else _two_calls(terms, parameters, aggregator)

    return step


def _takes_aggregator(backward: Any) -> bool:
    import inspect

    return "aggregator" in inspect.signature(backward).parameters


def _two_calls(terms: list[Tensor], parameters: list[Tensor], aggregator: Any) -> None:
    from torchjd.autojac import backward, jac_to_grad

    backward(terms)
    jac_to_grad(parameters, aggregator)


# The method that is measured comes first, the longest tuning last: what there is after an hour is then the most.
_SAMPLES = {"none": (None,), "samples": (None,), "huber": (0.1, 0.3, 1.0), "clip": (0.1, 1.0)}
_DIGITS = {"none": (None,), "samples": (None,), "masked loss": (None,), "clip": (0.1, 1.0)}
_HEALTHY = {"none": (None,), "samples": (None,)}
_TERMS = {
    "none": (None,),
    "terms": (None,),
    "tuned weight": (10.0, 100.0, 1000.0),
    "annealing": (None,),
    "gradnorm": (1.5,),
    "clip": (0.1, 1.0),
    "torchjd UPGrad": (None,),
}
TASKS: dict[str, Task] = {
    "outliers-in-x": Task("Friedman regression, 5 % of x 30 times too large, RMSE", regression("x"), _SAMPLES, False),
    "helmholtz-1d": Task(
        "Helmholtz on a line, relative error", physics(1, helmholtz_line, line_error, 1500), _TERMS, False
    ),
    "digits-blank-batchnorm": Task(
        "digits with BatchNorm, NaN born inside the model, accuracy", digits(norm=True, blank=0.02), _DIGITS, True
    ),
    "outliers-in-y": Task("Friedman regression, 5 % of y 15 deviations off, RMSE", regression("y"), _SAMPLES, False),
    "digits-blank": Task("digits, NaN born inside the model, accuracy", digits(norm=False, blank=0.02), _DIGITS, True),
    "healthy-regression": Task("Friedman regression, no fault, RMSE", regression(""), _HEALTHY, False),
    "digits-healthy": Task("digits, no fault, accuracy", digits(norm=False, blank=0.0), _HEALTHY, True),
    "digits-healthy-batchnorm": Task(
        "digits with BatchNorm, no fault, accuracy", digits(norm=True, blank=0.0), _HEALTHY, True
    ),
    "helmholtz-2d": Task(
        "Helmholtz on a square, relative error", physics(2, helmholtz_plane, plane_error, 1000), _TERMS, False
    ),
    "burgers": Task("Burgers, nu = 0.02 / pi, relative error", physics(2, burgers, burgers_error, 1000), _TERMS, False),
}


# -------------------- why the square is harder
WHY = {
    # weight of the boundary (None: `TermSplitter`), number of steps -> seeds that are in no other table
    (None, 1000): range(5, 25),
    (100.0, 1000): range(5, 25),
    (30.0, 1000): range(5, 15),
    (200.0, 1000): range(5, 15),
    (None, 2000): range(5, 11),
    (100.0, 2000): range(5, 11),
}


def why(file: Path) -> None:
    """Helmholtz on the square with other weights, more steps and more seeds; a run that is there is not run again."""
    there = [json.loads(line) for line in file.read_text(encoding="utf8").splitlines()] if file.exists() else []
    done = {(row["weight"], row["steps"], row["seed"]) for row in there}
    for (weight, steps), seeds in WHY.items():
        run = physics(2, helmholtz_plane, plane_error, steps)
        for seed in seeds:
            if (weight, steps, seed) not in done:
                score = run("terms" if weight is None else "tuned weight", weight, seed)["score"]
                row = {"weight": weight, "steps": steps, "seed": seed, "score": round(score, 5)}
                with file.open("a", encoding="utf8") as lines:
                    lines.write(json.dumps(row) + "\n")
                print(row, flush=True)


def _best(task: Task, runs: dict[str, dict[str, Any]], strengths: tuple[float | None, ...]) -> float | None:
    """The strength with the best median over the tuning seeds; a diverged run is the worst."""

    def median(strength: float | None) -> float:
        worst = -math.inf if task.more_is_better else math.inf
        scores = [runs[str(strength)][f"seed {seed}"]["score"] for seed in TUNING]
        return statistics.median(worst if score is None else score for score in scores)

    return (max if task.more_is_better else min)(strengths, key=median)


def run_task(name: str, file: Path) -> None:
    """All runs of a task that are not there yet, one file written after each."""
    task = TASKS[name]
    kept = json.loads(file.read_text(encoding="utf8")) if file.exists() else {"runs": {}}
    kept["about"] = {
        "task": task.title,
        "command": f"python benchmarks/sources.py --task {name}",
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, 1 thread of 2 shared cores, torch {torch.__version__}",
        "tuning_seeds": list(TUNING),
    }

    def ensure(method: str, strength: float | None, seed: int) -> None:
        place = kept["runs"].setdefault(method, {}).setdefault(str(strength), {})
        if f"seed {seed}" not in place:
            found = task.run(method, strength, seed)
            place[f"seed {seed}"] = {k: round(v, 5) if math.isfinite(v) else None for k, v in found.items()}
            _write(task, kept, file)
            print(name, method, strength, seed, place[f"seed {seed}"], flush=True)

    for method, strengths in task.methods.items():
        try:
            if len(strengths) > 1:
                for strength in strengths:
                    for seed in TUNING:
                        ensure(method, strength, seed)
                chosen = _best(task, kept["runs"][method], strengths)
            else:
                (chosen,) = strengths
            for seed in FRESH:
                ensure(method, chosen, seed)
        except ImportError as error:
            print(f"{name}: {method} is left out, since {error.name} is not installed", flush=True)


def _write(task: Task, kept: dict[str, Any], file: Path) -> None:
    """The runs, and per method the scores of the fresh seeds at its best strength, once all are there."""
    kept["fresh"] = {}
    for method, runs in kept["runs"].items():
        for strength, seeds in runs.items():
            found = [seeds.get(f"seed {seed}") for seed in FRESH]
            if all(row is not None for row in found):
                keys = [key for key in found[0] if all(key in row for row in found)]
                kept["fresh"][method] = {"strength": strength, **{key: [row[key] for row in found] for key in keys}}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf8")


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs="*", choices=[*TASKS, "why"], default=[*TASKS, "why"])
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    for name in asked.task:
        file = asked.out / f"{name}.json"
        if name == "why":
            why(asked.out / "helmholtz-2d-why.jsonl")
        else:
            run_task(name, file)


if __name__ == "__main__":
    main()
