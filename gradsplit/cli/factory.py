"""A model from the command line: `module:factory` in the working folder, or the name of a workload."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

__all__ = ["layout_from"]


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
        from gradsplit.workloads import REGISTRY

        if place not in REGISTRY:
            raise ValueError(
                f"plan {place}: expected module:factory, for example train:make_model, or one of the workloads "
                f"{', '.join(REGISTRY)}."
            )
        return gs.layout_of(REGISTRY[place].build(seed=0).model)
    sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"plan {place}: expected a module {module_name!r} here or installed, got: {error}. Give its dotted name "
            "without .py, from the folder it is in."
        ) from error
    if not hasattr(module, name):
        offered = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ValueError(f"plan {place}: expected a name in {module_name}, got none. It has {', '.join(offered[:12])}.")
    return _layout(getattr(module, name), place)


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
