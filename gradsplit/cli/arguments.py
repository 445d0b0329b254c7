"""From words of the command line to values: names, numbers, options of a workload, and a model.

A model is named by ``module:function`` in the working folder, or by the name of a workload.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import sys
import traceback
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


def layout_from(place: str, call: str) -> Any:
    """The layout of the model that `place` names, made without allocating its weights where that is possible.

    Args:
        place: "module:function", where the function takes no arguments and returns a model or a mapping
            {name: shape}, or is one of these itself; or the name of a workload.
        call: the command, for its errors.

    Raises:
        ValueError: no such module, no such name in it, or something that has no parameters.
    """
    import gradsplit as gs

    if ":" not in place:
        return gs.layout_of(_task(place, call, "make_model").model)
    return _layout(_named(place, call), place, call)


def problem_from(place: str, call: str) -> tuple[Any, Any, Any]:
    """The model, loss function and batch that `place` names.

    Args:
        place: "module:function", where the function takes no arguments and returns (model, loss_fn, batch)
            with ``loss_fn(model, batch) -> scalar``; or the name of a workload.
        call: the command, for its errors.

    Raises:
        ValueError: no such module or name, or a function that returns something else.
    """
    if ":" not in place:
        task = _task(place, call, "problem")
        return task.model, task.loss, task.batch(0)
    made = _made(_named(place, call), place, call)
    if not (isinstance(made, tuple) and len(made) == 3):
        raise ValueError(
            f"{call} {place}: expected a function without arguments that returns (model, loss_fn, batch), got "
            f"{type(made).__name__}. loss_fn(model, batch) must return a scalar tensor."
        )
    return made


def _task(place: str, call: str, example: str) -> Any:
    """The task of the workload that `place` names."""
    from ..lab.registry import REGISTRY

    if place not in REGISTRY:
        module = place.removesuffix(".py") if place.endswith(".py") or Path(f"{place}.py").is_file() else "train"
        raise ValueError(
            f"{call} {place}: expected MODULE:FUNCTION, for example {module}:{example}, or one of the workloads "
            f"{', '.join(REGISTRY)}."
        )
    return REGISTRY[place].build(seed=0)


def _named(place: str, call: str) -> Any:
    """Import a module from the working folder, or an installed one, and return what a name in it is."""
    module_name, _, name = place.partition(":")
    if module_name.endswith(".py") or "/" in module_name:
        dotted = module_name.removesuffix(".py").strip("./").replace("/", ".")
        raise ValueError(f"{call} {place}: expected a dotted name of a module, without .py. Write {dotted}:{name}.")
    sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and f"{module_name}.".startswith(f"{error.name}."):
            raise ValueError(
                f"{call} {place}: expected a module {module_name!r} here or installed, got none. Give its dotted name "
                "without .py, from the folder it is in."
            ) from error
        raise ValueError(f"{call} {place}: expected a module that can be imported; {_raised(error)}.") from error
    except (Exception, SystemExit) as error:
        raise ValueError(
            f"{call} {place}: expected a module that can be imported; {_raised(error)}. Put what trains under "
            'if __name__ == "__main__":.'
        ) from error
    if not hasattr(module, name):
        named = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        offered = [key for key in named if getattr(vars(module)[key], "__module__", "") == module_name] or named
        close = difflib.get_close_matches(name, offered, 1)
        meant = f" Did you mean {close[0]!r}?" if close else ""
        listed = ", ".join(offered[:12]) or "no function"
        raise ValueError(f"{call} {place}: expected a name in {module_name}, got none. It has {listed}.{meant}")
    return getattr(module, name)


def _raised(error: BaseException) -> str:
    """What was raised, and the last line of the user's own that led there."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(frame.filename).is_relative_to(Path.cwd())] or frames[-1:]
    place = f"{error.filename}:{error.lineno}" if isinstance(error, SyntaxError) else ""
    place = place or f"{own[-1].filename}:{own[-1].lineno}"
    words = " ".join(str(error).split()).rstrip(".")
    return f"it raised {type(error).__name__}{': ' * bool(words)}{words} at {place}; GRADSPLIT_DEBUG=1 shows more"


def _made(found: Any, place: str, call: str) -> Any:
    """What a function of the user returns; a thing that is no function is returned itself."""
    if not callable(found):
        return found
    try:
        inspect.signature(found).bind()
    except TypeError:
        raise ValueError(
            f"{call} {place}: expected a function without arguments, got one that needs {inspect.signature(found)}. "
            "Write a function that calls it, and name that one."
        ) from None
    except ValueError:  # its arguments cannot be told
        pass
    try:
        return found()
    except Exception as error:
        raise ValueError(f"{call} {place}: expected a function that returns; {_raised(error)}.") from error


def _layout(found: Any, place: str, call: str) -> Any:
    import torch

    import gradsplit as gs

    if callable(found) and not isinstance(found, torch.nn.Module):
        try:
            with torch.device("meta"):  # shapes only: a model larger than memory can be planned
                found = found()
        except Exception:  # it computes with its weights while it is made, or fails in any case
            found = _made(found, place, call)
    if isinstance(found, gs.Layout):
        return found
    if isinstance(found, dict) and all(isinstance(shape, (tuple, list)) for shape in found.values()):
        return gs.Layout.from_shapes(found)
    if not hasattr(found, "named_parameters"):
        raise ValueError(
            f"{call} {place}: expected a model or a mapping {{name: shape}}, got {type(found).__name__}. Name a "
            "function without arguments that returns one."
        )
    return gs.layout_of(found)
