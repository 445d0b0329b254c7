"""Configuration from outside: the environment with a run's settings, words of budgets and of workloads, grids."""

from __future__ import annotations

import json
import random

from benchmarks.fuzz.draws import damaged, name, number
from benchmarks.fuzz.verdict import outcome
from gradsplit.cli import arguments
from gradsplit.lab.cells import Grid
from gradsplit.lab.methods import METHODS
from gradsplit.lab.optimizers import Settings as Training
from gradsplit.watch.run.settings import VARIABLE, Settings, budget_from_words

__all__ = ["configurations"]


def configurations(rng: random.Random) -> str:
    """One of five kinds of configuration."""
    return rng.choice((_environment, _budget_words, _word_lists, _training, _grid))(rng)


def _environment(rng: random.Random) -> str:
    sound = json.loads(Settings(budget=("relative:factor=0.2",), about={"argv": ["a"]}).to_environment()[VARIABLE])
    text = json.dumps(damaged(rng, sound), default=str)
    if rng.random() < 0.2:
        text = text[: rng.randrange(len(text))]
    return outcome(lambda: Settings.from_environment({VARIABLE: text}), what=text)[0]


def _budget_words(rng: random.Random) -> str:
    words_of_budgets = ("relative", "fixed", "ema", "zscore", "percentile", "relative_step", "factor", "limit", "tau")
    pieces = (*words_of_budgets, ":", "=", "@", "bin", "root", "1", "warmup", "beta", "")
    made = ["".join(rng.choice((*pieces, name(rng), str(number(rng)))) for _ in range(rng.randint(0, 6)))]
    if rng.random() < 0.5:
        key = rng.choice(("factor", "eps"))
        made.append(f"{rng.choice(('bin@', 'root@', ''))}relative:{key}={number(rng)}")
    if rng.random() < 0.3:
        made.append(f"ema:warmup={number(rng)}")
    return outcome(lambda: budget_from_words(made), what=repr(made))[0]


def _word_lists(rng: random.Random) -> str:
    text = ",".join(rng.choice((str(number(rng)), name(rng), "")) for _ in range(rng.randint(0, 4)))
    kind, _ = outcome(lambda: arguments.numbers(text, "--lr"), what=repr(text))
    outcome(
        lambda: arguments.options([rng.choice(("a=1", "a", "=", name(rng), f"{name(rng)}={number(rng)}"))]), what=text
    )
    return kind


def _training(rng: random.Random) -> str:
    def make() -> Training:
        return Training(
            steps=rng.choice((1, 10, 0, -1, 10**9)),
            optimizer=rng.choice(("sgd", "adamw", "adam", "sgdm", "gso", name(rng))),
            schedule=rng.choice(("constant", "cosine", name(rng))),
            warmup=rng.choice((None, 0, 5, -1, 10**10)),
        )

    return outcome(make, what="settings of a training")[0]


def _grid(rng: random.Random) -> str:
    def make() -> Grid:
        grid = Grid(
            workload=rng.choice(("gpt", "detection", "adding", name(rng))),
            methods=tuple(rng.choice((*METHODS, name(rng))) for _ in range(rng.randint(0, 3))),
            lrs=tuple(number(rng) for _ in range(rng.randint(0, 3))),
            settings=Training(10),
            seeds=rng.choice((1, 2, 0, -1)),
            fresh_seeds=rng.choice((0, 1, -1)),
            options=rng.choice(({}, {"width": 8}, {name(rng): 1})),
        )
        assert list(grid.cells()) or not grid.methods
        return grid

    return outcome(make, what="a grid")[0]
