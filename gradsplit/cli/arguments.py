"""From words of the command line to values: names, numbers, options of a workload, and a model.

A model is named by ``module:factory`` in the working folder, or by the name of a workload.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["names", "numbers", "options", "layout_from", "problem_from"]


def names(text: str) -> tuple[str, ...]:
    """Names separated by commas.

    >>> names("none, clip")
    ('none', 'clip')
    """
    return tuple(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))


def numbers(text: str, option: str) -> tuple[float, ...]:
    """Numbers separated by commas, each once.

    Raises:
        ValueError: a word that is not a number; the text names the option.

    >>> numbers("1e-3,3e-3", "--lr")
    (0.001, 0.003)
    """
    try:
        return tuple(dict.fromkeys(float(word) for word in names(text)))
    except ValueError:
        raise ValueError(f"{option} {text}: expected numbers separated by commas, for example 1e-3,3e-3.") from None


def options(pairs: Sequence[str]) -> dict[str, bool | int | float | str]:
    """Options of a workload from words key=value.

    Raises:
        ValueError: a word without "=".

    >>> options(["healthy=true", "gain=0.5", "batch=8"])
    {'healthy': True, 'gain': 0.5, 'batch': 8}
    """
    made = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise ValueError(f"--option {pair}: expected key=value, for example --option batch=8.")
        made[key.strip().replace("-", "_")] = _value(value.strip())
    return made


def _value(text: str) -> bool | int | float | str:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def layout_from(place: str) -> Any:
    """The layout of the model that `place` names, made without allocating its weights where that is possible.

    Args:
        place: "module:factory", where the factory is a function without arguments that returns a model or a mapping
            {name: shape}, or is one of these itself; or the name of a workload.

    Raises:
        ValueError: no such module, no such name in it, or something that has no parameters.
    """
    import gradsplit as gs

    module_name, colon, name = place.partition(":")
    if not colon:
        from ..lab import REGISTRY

        if place not in REGISTRY:
            raise ValueError(
                f"plan {place}: expected module:factory, for example train:make_model, or one of the workloads "
                f"{', '.join(REGISTRY)}."
            )
        return gs.layout_of(REGISTRY[place].build(seed=0).model)
    return _layout(_named(place, module_name, name), place)


def problem_from(place: str) -> tuple[Any, Any, Any]:
    """The model, loss function and batch that `place` names.

    Args:
        place: "module:factory", where the factory is a function without arguments that returns (model, loss_fn, batch)
            with ``loss_fn(model, batch) -> scalar``; or the name of a workload.

    Raises:
        ValueError: no such module or name, or a factory that returns something else.
    """
    module_name, colon, name = place.partition(":")
    if not colon:
        from ..lab.registry import workload

        task = workload(place).build(seed=0)
        return task.model, task.loss, task.batch(0)
    found = _named(place, module_name, name)
    made = found() if callable(found) else found
    if not (isinstance(made, tuple) and len(made) == 3):
        raise ValueError(
            f"{place}: expected a function without arguments that returns (model, loss_fn, batch), got "
            f"{type(made).__name__}. loss_fn(model, batch) must return a scalar tensor."
        )
    return made


def _named(place: str, module_name: str, name: str) -> Any:
    """Import a module from the working folder, or an installed one, and return what a name in it is."""
    sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{place}: expected a module {module_name!r} here or installed, got: {error}. Give its dotted name "
            "without .py, from the folder it is in."
        ) from error
    if not hasattr(module, name):
        offered = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ValueError(f"{place}: expected a name in {module_name}, got none. It has {', '.join(offered[:12])}.")
    return getattr(module, name)


def _layout(found: Any, place: str) -> Any:
    import torch

    import gradsplit as gs

    if callable(found) and not isinstance(found, torch.nn.Module):
        try:
            with torch.device("meta"):  # shapes only: a model larger than memory can be planned
                found = found()
        except RuntimeError:  # it computes with its weights while it is made
            found = found()
    if isinstance(found, gs.Layout):
        return found
    if isinstance(found, dict) and all(isinstance(shape, (tuple, list)) for shape in found.values()):
        return gs.Layout.from_shapes(found)
    if not hasattr(found, "named_parameters"):
        raise ValueError(
            f"plan {place}: expected a model or a mapping {{name: shape}}, got {type(found).__name__}. Name a function "
            "without arguments that returns one."
        )
    return gs.layout_of(found)
