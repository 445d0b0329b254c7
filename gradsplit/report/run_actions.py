"""What a guard did to a run: one row an action, for the terminal and for the page."""

from __future__ import annotations

from collections.abc import Sequence

from ..record import GuardAction
from .run_advice import number

__all__ = ["ACTION_HEADINGS", "action_rows", "action_sentence"]

ACTION_HEADINGS = ["after step", "what", "because", "loss", "usual loss", "undone", "batches left out", "rates ×"]


def action_rows(actions: Sequence[GuardAction]) -> list[list[str]]:
    """Return table rows, oldest first."""
    return [
        [
            str(action.step),
            f"back to step {action.to_step}" if action.kind == "rolled_back" else f"stopped at step {action.to_step}",
            action.reason,
            number(action.loss),
            number(action.usual),
            str(action.num_undone),
            action.batches or "–",
            f"{action.factor:g}",
        ]
        for action in actions
    ]


def action_sentence(actions: Sequence[GuardAction]) -> str:
    """Say in one sentence what the guard did."""
    undone = sum(action.num_undone for action in actions)
    back = sum(action.kind == "rolled_back" for action in actions)
    stopped = actions[-1].kind == "stopped"
    return (
        f"The guard rolled back {back} time{'s' if back != 1 else ''}"
        + (" and then stopped the run" if stopped else "")
        + f": {undone} updates undone, learning rates × {actions[-1].factor:g} since step {actions[-1].step}."
    )
