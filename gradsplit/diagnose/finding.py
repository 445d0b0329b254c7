"""Finding: what is wrong and where, by how much, how that is known, and what to change."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        kind: the name of its row in `KINDS`.
        name: the guilty module (or head, or "(loss)").
        value: the figure that shows it.
        unit: what the figure counts.
        sentence: the finding in plain words.
        evidence: how it is known.
        change: what to do.
        severity: decades beyond what is sound; findings are sorted by it. From 100 on the gradient is not finite.
    """

    kind: str
    name: str
    value: float
    unit: str
    sentence: str
    evidence: str
    change: str
    severity: float

    def text(self) -> str:
        """Three lines: the sentence, the evidence and the change."""
        return f"{self.sentence}\n    evidence: {self.evidence}\n    change:   {self.change}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values; a figure that is not finite becomes text, since JSON cannot hold it."""
        values = asdict(self)
        for key in ("value", "severity"):
            number = values[key]
            values[key] = number if abs(number) < float("inf") else str(number)
        return values
