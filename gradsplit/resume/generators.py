"""Random generators as plain data: a process's own (Python's, numpy's and torch's), and those that someone made."""

from __future__ import annotations

import contextlib
import functools
import json
import random
from collections import deque
from collections.abc import Iterator, Mapping
from types import BuiltinMethodType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch

__all__ = ["generators_state", "generators_within", "load_generators_state", "load_state_of", "state_of"]


def generators_state() -> dict[str, Any]:
    """Return what the next random number depends on, as tensors, numbers, strings and lists.

    Generators that a user made (``torch.Generator()``) are not among them; see `generators_within`.

    >>> before = generators_state()
    >>> first = random.random(), torch.rand(()).item()
    >>> load_generators_state(before)
    >>> first == (random.random(), torch.rand(()).item())
    True
    """
    version, words, gauss = random.getstate()
    legacy: dict[str, Any] = dict(np.random.get_state(legacy=False))  # noqa: NPY002 - the one that others draw from
    state = {
        "python": [version, torch.tensor(words, dtype=torch.int64), gauss],
        "numpy": [
            legacy["bit_generator"],
            torch.from_numpy(legacy["state"]["key"].astype(np.int64)),
            int(legacy["state"]["pos"]),
            int(legacy["has_gauss"]),
            float(legacy["gauss"]),
        ],
        "torch": torch.get_rng_state(),
        "cuda": [],
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def load_generators_state(state: Mapping[str, Any]) -> None:
    """Go on drawing where `generators_state` left off; devices that are absent now are left out."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    name, key, *numbers = state["numpy"]
    np.random.set_state((name, key.numpy().astype(np.uint32), *numbers))  # noqa: NPY002
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"][: torch.cuda.device_count()])


MADE = (torch.Generator, random.Random, np.random.Generator, np.random.RandomState)
_GLOBAL = {id(random._inst), id(np.random.mtrand._rand)}  # kept with the process
_ENDS = (str, bytes, int, float, complex, type(None), torch.Tensor, np.ndarray, np.generic, ModuleType, CodeType)
_MOST = 20_000  # objects that are looked at
_LONG = 2_000  # entries of a container from which on it is data


def generators_within(root: Any, kinds: tuple[type, ...] = MADE) -> list[tuple[str, Any]]:
    """Return the generators (or other ``kinds``) that an object holds, at any depth, each once, with its place.

    It follows attributes, entries (up to 2,000), what functions enclose, and global generators that functions name.

    >>> class Sampler:
    ...     def __init__(self):
    ...         self.inner = [random.Random(0)]
    >>> [place for place, _ in generators_within(Sampler())]
    ['.inner[0]']
    """
    found = []
    seen: dict[int, Any] = {}  # objects and not ids alone: an attribute may be made when it is read
    queue = deque([("", root)])
    while queue and len(seen) < _MOST:
        place, value = queue.popleft()
        if isinstance(value, _ENDS) or id(value) in seen or id(value) in _GLOBAL:
            continue
        seen[id(value)] = value
        if isinstance(value, kinds) and value is not root:
            found.append((place, value))
        else:
            queue.extend((place + step, below) for step, below in _held_by(value))
    return found


def _held_by(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and len(value) <= _LONG:
        yield from ((f"[{key!r}]", below) for key, below in list(value.items()))
    elif isinstance(value, (list, tuple, set, frozenset, deque)) and len(value) <= _LONG:
        yield from ((f"[{i}]", below) for i, below in enumerate(value))
    elif isinstance(value, (MethodType, BuiltinMethodType)):
        yield from (("", value.__self__), ("", getattr(value, "__func__", None)))
    elif isinstance(value, FunctionType):
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            with contextlib.suppress(ValueError):  # an empty cell
                yield f" {name}", cell.cell_contents
        yield from _globals_of(value, value.__code__)
    elif isinstance(value, functools.partial):
        yield from ((".func", value.func), (".args", value.args), (".keywords", value.keywords))
    elif not isinstance(value, (type, dict, list, tuple, set, frozenset, deque)):
        yield from ((f".{name}", below) for name, below in list((getattr(value, "__dict__", None) or {}).items()))
        for kind in type(value).__mro__:
            slots = vars(kind).get("__slots__", ())
            for name in (slots,) if isinstance(slots, str) else slots:
                if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                    yield f".{name}", getattr(value, name)
            if kind.__module__.partition(".")[0] not in ("torch", "numpy", "builtins", "collections"):
                for method in vars(kind).values():
                    if isinstance(method, FunctionType):
                        yield from _globals_of(method, method.__code__)


def _globals_of(function: FunctionType, code: CodeType) -> Iterator[tuple[str, Any]]:
    for name in code.co_names:
        if isinstance(function.__globals__.get(name), MADE):
            yield f" {name}", function.__globals__[name]
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _globals_of(function, inner)


def state_of(generator: Any) -> Any:
    """Return the state of a generator that someone made, as plain data; None if it has none, as a ``SystemRandom``."""
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        return None if isinstance(generator, random.SystemRandom) else {"python": json.dumps(generator.getstate())}
    old = isinstance(generator, np.random.RandomState)
    state = generator.get_state(legacy=False) if old else generator.bit_generator.state
    return {"numpy": json.dumps(state, default=lambda array: array.tolist())}  # numbers of 128 bits, which JSON holds


def load_state_of(generator: Any, state: Any) -> None:
    """Let a generator go on drawing where `state_of` left off; the state of another kind is a ValueError."""
    kind = "python" if isinstance(generator, random.Random) else "numpy"
    if isinstance(generator, torch.Generator) and isinstance(state, torch.Tensor):
        generator.set_state(state.cpu())
    elif isinstance(generator, torch.Generator) or isinstance(state, torch.Tensor) or kind not in state:
        raise ValueError(
            f"load_state_of({type(generator).__name__}, …): expected the state of such a generator, got that of "
            "another kind of generator. Make the generators as the saved run did."
        )
    elif isinstance(generator, random.Random):
        version, words, gauss = json.loads(state["python"])
        generator.setstate((version, tuple(words), gauss))
    elif isinstance(generator, np.random.RandomState):
        generator.set_state(json.loads(state["numpy"]))
    else:
        generator.bit_generator.state = json.loads(state["numpy"])
