"""The command line: parses, calls, prints. A command is a file here with a function `run`, and a row of `COMMANDS`.

Only the command that is asked for is imported, so that `gradsplit --help` does not wait for torch.
"""

from __future__ import annotations

import sys

__all__ = ["COMMANDS", "main"]

COMMANDS: dict[str, tuple[str, str]] = {
    "demo": ("demo", "Train detection and text with and without splitting."),
    "compare": ("compare", "Sweep a workload over methods and rates."),
    "run": ("run", "Run a training script, measured or bounded."),
    "report": ("report", "Show what a run file says; write its page."),
    "watch": ("watch", "Show a run while it goes on."),
    "diagnose": ("diagnose", "Say in words what is wrong with a gradient."),
    "ladder": ("ladder", "Show how far each bin may step."),
    "plan": ("plan", "Show how a model is split: bins and bytes."),
    "bench": ("bench", "Time a step beside clip and fused AdamW."),
    "doctor": ("doctor", "Show versions, backends and data found."),
}
"""Command -> (module of this package, one line for the list of commands)."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; the console script `gradsplit`.

    Args:
        arguments: without the program's name; None: those of the process.
    """
    try:
        from .app import run_app
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        sys.exit(
            f"gradsplit: expected the package {error.name}, which the command line needs, found none. "
            "Run: pip install typer rich"
        )
    run_app(COMMANDS, sys.argv[1:] if arguments is None else arguments)
