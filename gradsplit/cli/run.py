"""`gradsplit run`: a training script under watch or control, without a change to it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ..watch.run.settings import Settings

__all__ = ["CONTEXT", "run"]

CONTEXT = {"allow_interspersed_args": False, "ignore_unknown_options": True}
"""Everything from the script's name on belongs to the script."""


def run(
    program: Annotated[
        list[str],
        typer.Argument(metavar="SCRIPT [ARGUMENTS]…", help="Your script, -m MODULE, or a launcher such as torchrun."),
    ],
    watch: Annotated[
        bool, typer.Option("--watch", help="Only measure: the training stays the same (default).")
    ] = False,
    control: Annotated[
        bool, typer.Option("--control", help="Also bound the gradients, by what fits each optimizer.")
    ] = False,
    guard: Annotated[
        bool,
        typer.Option(
            "--guard",
            help="When the run diverges, go back to a snapshot and lower the learning rate, at most 3 times. Goes with "
            "--watch and with --control. The script's data go on: they cannot be rewound from outside.",
        ),
    ] = False,
    samples: Annotated[
        bool,
        typer.Option(
            "--samples",
            help="Also record which samples of the batch stood out where a norm or the loss left its history. The "
            "training stays the same; a step takes longer.",
        ),
    ] = False,
    plan: Annotated[
        str, typer.Option(help="With --control: what is bounded together, xsp (rows), per_tensor, tree_sp or whole.")
    ] = "xsp",
    budget: Annotated[
        list[str] | None,
        typer.Option(
            help="With --control: how large a bin may be, for example relative_step:tau=0.03. Written as "
            "[LEVEL@]NAME[:KEY=NUMBER]…; may be repeated. Without it, the default of GradientSplitter for each "
            "optimizer. Behind Adam and others relative_step caps the step, for one copy of the weights."
        ),
    ] = None,
    collective: Annotated[
        bool,
        typer.Option(
            "--collective",
            help="With --budget: also divide the whole gradient where a batch is scaled as a whole. The default in "
            "front of Adam and others does so already.",
        ),
    ] = False,
    record: Annotated[Path, typer.Option(help="The run file. If it exists, run-2.db and so on.")] = Path("run.db"),
    to: Annotated[
        list[str] | None,
        typer.Option(
            help="Also send every step to tensorboard:FOLDER, jsonl:FILE, wandb:PROJECT or mlflow:EXPERIMENT."
        ),
    ] = None,
    depth: Annotated[
        int, typer.Option(help="With --to: how many levels of modules get a curve each. 0 is every module and tensor.")
    ] = 1,
    fail_on: Annotated[
        list[str] | None,
        typer.Option(
            help="explosion, nonfinite or exception. The process ends with code 3 if that happens, or if nothing could "
            "be recorded. May be repeated."
        ),
    ] = None,
    max_nodes: Annotated[int, typer.Option(help="How many modules, tensors and blocks are recorded at most.")] = 1000,
    max_megabytes: Annotated[
        float, typer.Option(help="The largest size of the run file. Beyond it, old steps are thinned.")
    ] = 400.0,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing at the end.")] = False,
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
    if asked.max_megabytes < 1 or asked.max_nodes < 2:
        raise ValueError("gradsplit run: expected --max-megabytes >= 1 and --max-nodes >= 2.")


if __name__ == "__main__":
    from .app import run_app

    run_app({"run": ("run", "Run a training script under watch or control.")}, ["run", *__import__("sys").argv[1:]])
