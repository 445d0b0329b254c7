"""`gradsplit run`: a training script under watch or control, without a change to it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .app import flag, option

if TYPE_CHECKING:
    from ..watch.run.settings import Settings

__all__ = ["CONTEXT", "run"]

CONTEXT = {"allow_interspersed_args": False, "ignore_unknown_options": True}
"""Everything from the script's name on belongs to the script."""

# Groups of options.
_DONE, _BOUNDS, _KEPT, _END = "What is done", "Bounds (with --control)", "What is recorded", "At the end"


def run(
    program: Annotated[
        list[str],
        typer.Argument(
            metavar="SCRIPT [ARGUMENTS]…",
            help="Your script, -m MODULE, or a launcher such as torchrun. What stands after it belongs to it.",
        ),
    ],
    watch: Annotated[bool, flag("--watch", "Only measure; training stays the same (default).", _DONE)] = False,
    control: Annotated[
        bool, flag("--control", "Also bound the gradients, by what fits each optimizer.", _DONE)
    ] = False,
    guard: Annotated[
        bool,
        flag(
            "--guard",
            "When the run diverges, go back to a snapshot and lower the learning rate, at most 3 times. Goes with "
            "--watch and with --control. The script's data go on: they cannot be rewound from outside.",
            _DONE,
        ),
    ] = False,
    samples: Annotated[
        bool,
        flag(
            "--samples",
            "Also record which samples of a batch stood out when a norm or the loss was unusual. A step takes longer; "
            "training stays the same.",
            _DONE,
        ),
    ] = False,
    plan: Annotated[
        str, option("NAME", "What is bounded together: xsp (rows), per_tensor, tree_sp or whole.", _BOUNDS)
    ] = "xsp",
    budget: Annotated[
        list[str] | None,
        option(
            "RULE",
            "How large a bin may be, as [LEVEL@]NAME[:KEY=NUMBER]…, for example relative_step:tau=0.03. Behind Adam "
            "and others relative_step bounds the step, and takes a copy of the weights. May be repeated.",
            _BOUNDS,
            "what fits each optimizer",
        ),
    ] = None,
    collective: Annotated[
        bool,
        flag(
            "--collective",
            "With --budget: also divide the whole gradient when all rows of a batch are larger than usual by a like "
            "factor. The default for Adam and others does so already.",
            _BOUNDS,
        ),
    ] = False,
    record: Annotated[Path, option("FILE", "The run file; if it exists, run-2.db and so on.", _KEPT)] = Path("run.db"),
    to: Annotated[
        list[str] | None,
        option(
            "NAME:PLACE",
            "Also send every step to tensorboard:FOLDER, jsonl:FILE, wandb:PROJECT or mlflow:EXPERIMENT. May be "
            "repeated.",
            _KEPT,
            "none",
        ),
    ] = None,
    depth: Annotated[
        int,
        option("LEVELS", "With --to: how many levels of modules get a curve each; 0: every module and tensor.", _KEPT),
    ] = 1,
    max_nodes: Annotated[int, option("COUNT", "The most modules and tensors that are recorded.", _KEPT)] = 1000,
    max_megabytes: Annotated[
        float, option("MEGABYTES", "The largest size of the run file. Beyond it, old steps are thinned.", _KEPT)
    ] = 400.0,
    fail_on: Annotated[
        list[str] | None,
        option(
            "EVENT",
            "explosion, nonfinite or exception: end with code 3 if that happens, or if nothing could be recorded. May "
            "be repeated.",
            _END,
            "none",
        ),
    ] = None,
    quiet: Annotated[bool, flag("--quiet", "Print nothing at the end.", _END)] = False,
) -> None:
    """Run your training script unchanged, and record the gradient of every optimizer step in a run file.

    Example: gradsplit run --watch train.py --epochs 3
    """
    from ..watch.run.launch import launch
    from ..watch.run.settings import Settings

    if watch and control:
        raise ValueError("gradsplit run --watch --control: expected one of the two. --control measures, too.")
    settings = Settings(
        record=str(record),
        control=control,
        guard=guard,
        samples=samples,
        plan=plan,
        budget=tuple(budget or ()),
        collective=collective,
        max_nodes=max_nodes,
        max_megabytes=max_megabytes,
        to=tuple(to or ()),
        depth=depth,
        fail_on=tuple(fail_on or ()),
        quiet=quiet,
    )
    _check(settings)
    launch(program, settings)


def _check(asked: Settings) -> None:
    """Refuse values that would fail in the script; imports torch only for values that need it for the check."""
    if (asked.budget or asked.plan != "xsp") and not asked.control:
        raise ValueError("gradsplit run --plan/--budget: expected --control beside it, since --watch bounds nothing.")
    if asked.collective and not asked.budget:
        raise ValueError(
            "gradsplit run --collective: expected --budget beside it. Without one, --control takes the rule where it "
            "fits the optimizer."
        )
    if asked.plan != "xsp":
        from ..plan.registry import strategy_named

        strategy_named(asked.plan, call=f"gradsplit run --plan {asked.plan}")
    if asked.budget:
        from ..watch.run.settings import budget_from_words

        budget_from_words(asked.budget)
    for word in asked.to:
        from ..watch.loggers import check_words

        check_words(word)
    for word in asked.fail_on:
        if word not in ("explosion", "nonfinite", "exception"):
            raise ValueError(
                f"gradsplit run --fail-on {word}: expected one of explosion, nonfinite, exception. Write for example "
                "--fail-on explosion."
            )
    if asked.depth < 0:
        raise ValueError(f"gradsplit run --depth {asked.depth}: expected 0 (every module and tensor), 1, 2 and so on.")
    for word, value, least in (("megabytes", asked.max_megabytes, 1), ("nodes", asked.max_nodes, 2)):
        if value < least:
            raise ValueError(
                f"gradsplit run --max-{word} {value:g}: expected --max-{word} >= {least}. Leave it out for the default."
            )


if __name__ == "__main__":
    from .app import run_app

    run_app({"run": ("run", "Run a training script under watch or control.")}, ["run", *__import__("sys").argv[1:]])
