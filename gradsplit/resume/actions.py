"""GuardAction: what a guard did to a run, and why, as plain numbers and words that a run file keeps."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["GuardAction"]

_KINDS: dict[str, Any] = {"str": str, "int": int, "float": (int, float), "tuple[str, ...]": str}


@dataclass(frozen=True)
class GuardAction:
    """One action.

    Attributes:
        kind: "rolled_back", or "stopped" where no rollback was left.
        step: the guarded step after which it happened, counted from 0.
        to_step: the number of guarded steps after which the state was as it is now.
        time: seconds since the epoch.
        reason: in words, with numbers.
        loss: of that step; nan or inf where not finite.
        usual: the median of the loss's history; nan without one.
        factor: by which every learning rate is multiplied from now on.
        num: rollbacks so far, this one included.
        num_undone: updates that were undone.
        optimizer: the class's name.
        batches: the batches left out, as "epoch 0: 12 to 17"; empty where the guard does not hand them out.
        worst: names and norms of what was hit worst, as far as they are known.
    """

    kind: str
    step: int
    to_step: int
    time: float
    reason: str
    loss: float
    usual: float
    factor: float
    num: int
    num_undone: int
    optimizer: str = ""
    batches: str = ""
    worst: tuple[str, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {**dataclasses.asdict(self), "worst": list(self.worst)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GuardAction:
        """Undo `to_dict`.

        Raises:
            ValueError: a value of another kind than its field.
        """
        made = cls(**{**values, "worst": tuple(values["worst"])})
        for one in dataclasses.fields(cls):
            given = made.worst if one.name == "worst" else (getattr(made, one.name),)
            if not all(isinstance(value, _KINDS[str(one.type)]) and not isinstance(value, bool) for value in given):
                raise ValueError(
                    f"GuardAction.from_dict(…): expected {one.type} in {one.name!r}, got "
                    f"{getattr(made, one.name)!r:.40}. The state is damaged: load another, or start without one."
                )
        return made

    def __str__(self) -> str:
        """Say it in a sentence."""
        undone = f"{self.num_undone} update{'s' if self.num_undone != 1 else ''} undone"
        left_out = f", batches left out: {self.batches}" if self.batches else ""
        hit = f"; worst: {', '.join(self.worst)}" if self.worst else ""
        if self.kind == "stopped":
            return f"Step {self.step}: stopped after {self.num} rollbacks, {self.reason}; {undone}{hit}."
        return (
            f"Step {self.step}: rolled back to step {self.to_step} (number {self.num}), {self.reason}; {undone}"
            f"{left_out}, learning rate from now on × {self.factor:g}{hit}."
        )
