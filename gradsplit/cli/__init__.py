"""The command line: parses, calls, prints. A command is a file here with a function `run`, and a row of `COMMANDS`.

Only the command that is asked for is imported, so that `gradsplit --help` does not wait for torch.
"""

from __future__ import annotations

import sys

__all__ = ["COMMANDS", "main"]

COMMANDS: dict[str, tuple[str, str]] = {
    "demo": ("demo", "Train two small models by several methods."),
    "compare": ("compare", "Compare methods and rates on one workload."),
    "run": ("run", "Run your script, and record its gradients."),
    "report": ("report", "Say what happened in a run; write a page."),
    "watch": ("watch", "Show a run in the terminal as it goes on."),
    "diagnose": ("diagnose", "Say what is wrong with a model, in words."),
    "ladder": ("ladder", "Show how far each part may step."),
    "plan": ("plan", "Show how a model is split into bins."),
    "bench": ("bench", "Time a step beside a clip and AdamW."),
    "doctor": ("doctor", "Say whether all is well here, or the remedy."),
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
