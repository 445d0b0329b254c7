"""What `gradsplit run` was asked for, carried to every process of the script in one environment variable.

Nothing here imports torch: the interpreter of every child process reads it at its start.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["VARIABLE", "Settings", "budget_from_words", "words_of_budget"]

VARIABLE = "GRADSPLIT_RUN"


@dataclass(frozen=True)
class Settings:
    """What to do in every process of the script.

    Attributes:
        record: the run file; other ranks and processes put their own beside it.
        control: bound gradients; otherwise only measure them.
        plan: a strategy's name, for control.
        budget: words like "relative_step:tau=0.03" or "root@fixed:limit=1"; empty: by the optimizer.
        collective: with a budget, also the rule for batches that are scaled as a whole.
        guard: go back to a snapshot when an optimizer's run diverges.
        samples: keep which samples of a batch stood out at a departure.
        max_nodes: nodes of the recording.
        max_megabytes: size above which old rows are thinned.
        to: further sinks, "tensorboard:FOLDER", "jsonl:FILE", "wandb:PROJECT", "mlflow:EXPERIMENT".
        depth: levels of modules for the further sinks; 0: every module and tensor.
        fail_on: "explosion", "nonfinite", "exception": the process ends with a code other than 0 if so.
        quiet: say nothing on stderr at the end.
        seconds: between flushes.
        pid: of the process that becomes the script.
        about: what to keep about the run.
    """

    record: str = "run.db"
    control: bool = False
    plan: str = "xsp"
    budget: tuple[str, ...] = ()
    collective: bool = False
    guard: bool = False
    samples: bool = False
    max_nodes: int = 1000
    max_megabytes: float = 400.0
    to: tuple[str, ...] = ()
    depth: int = 1
    fail_on: tuple[str, ...] = ()
    quiet: bool = False
    seconds: float = 1.0
    pid: int = 0
    about: dict[str, Any] = field(default_factory=dict)

    def to_environment(self) -> dict[str, str]:
        """Return the variable that `from_environment` reads."""
        return {VARIABLE: json.dumps(dataclasses.asdict(self))}

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Settings | None:
        """Return the settings that a parent process left, None if there was none.

        Raises:
            ValueError: the variable holds something else.
        """
        text = environment.get(VARIABLE)
        if not text:
            return None
        try:
            values = json.loads(text)
            made = cls(**{**values, **{name: tuple(values[name]) for name in ("budget", "to", "fail_on")}})
            sound = all(_alike(getattr(made, one.name), getattr(cls(), one.name)) for one in dataclasses.fields(cls))
        except (ValueError, TypeError, KeyError):
            sound = False
        if not sound:
            raise ValueError(
                f"{VARIABLE}={text!r:.80}: expected what gradsplit run leaves there, got something else. Unset it."
            )
        return made


def budget_from_words(words: Sequence[str]) -> dict[str, Any]:
    """Return budgets by level from words ``[LEVEL@]NAME[:KEY=NUMBER]…``; the level is "bin" unless it is said.

    Raises:
        ValueError: an unknown name or key, or a value that is not a number.

    >>> budget_from_words(["relative:factor=0.2", "root@fixed:limit=1"])
    {'bin': (Relative(factor=0.2, eps=0.001),), 'root': (Fixed(limit=1.0),)}
    """
    from ...budget.registry import BUDGETS

    made: dict[str, Any] = {}
    for word in words:
        call = f"--budget {word}"
        level, at, rest = word.rpartition("@")
        name, *pairs = rest.split(":")
        if name not in BUDGETS:
            raise ValueError(
                f"{call}: expected a budget of {', '.join(BUDGETS)}, got {name!r}. Write for example "
                "--budget relative:factor=0.2."
            )
        keys = {one.name: one for one in dataclasses.fields(BUDGETS[name])}
        options: dict[str, Any] = {}
        for pair in pairs:
            key, _, text = pair.partition("=")
            if key not in keys:
                raise ValueError(f"{call}: expected a key of {', '.join(keys) or 'none'} after {name!r}, got {key!r}.")
            try:
                value = float(text)
            except ValueError:
                raise ValueError(f"{call}: expected a number for {key!r}, got {text!r}.") from None
            whole = "int" in str(keys[key].type)
            if whole and not value.is_integer():
                raise ValueError(f"{call}: expected a whole number for {key!r}, got {text!r}.")
            options[key] = int(value) if whole else value
        made[level if at else "bin"] = (*made.get(level if at else "bin", ()), BUDGETS[name](**options))
    return made


def _alike(value: Any, default: Any) -> bool:
    """Whether a value is of its default's kind; a whole number may stand for a float."""
    return type(value) is type(default) or (type(value) is int and type(default) is float)


def words_of_budget(level: str, budget: Any) -> str:
    """Return the words from which `budget_from_words` makes a budget: its first number, and others that are set.

    >>> from gradsplit.budget import Fixed, RelativeStep
    >>> words_of_budget("bin", RelativeStep(0.03, length=1.0)), words_of_budget("root", Fixed(1.0))
    ('relative_step:tau=0.03:length=1', 'root@fixed:limit=1')
    """
    from ...budget.registry import BUDGETS

    name = next(name for name, kind in BUDGETS.items() if kind is type(budget))
    words = [name]
    for i, one in enumerate(dataclasses.fields(budget)):
        value = getattr(budget, one.name)
        if i == 0 or value != one.default:
            words.append(f"{one.name}={value:.12g}")
    return ("" if level == "bin" else f"{level}@") + ":".join(words)
