"""Batches: an iterator over a loader that knows its place, can skip, and can go on where another process stopped."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from .generators import generators_state, load_generators_state

__all__ = ["Batches", "Loaders"]


class Batches:
    """Hand out a loader's batches unchanged, and keep the data position.

    One ``for`` is one epoch. After `load_state_dict` the first epoch begins with the random generators as they were
    when it first began. So a shuffling loader finds the same order. The batches that had been handed out are drawn
    again and dropped. Then the generators go on from where they were before. So load a checkpoint right before the
    loop.

    Args:
        loader: a DataLoader, or any iterable that can be iterated once an epoch.

    Attributes:
        epoch: complete epochs.
        position: batches handed out or skipped in this epoch.

    Deviation: a ``torch.Generator`` given to a DataLoader or its sampler is kept and restored as well; workers with
    random states of their own (other than those that torch seeds) are not.

    >>> batches = Batches([10, 20, 30])
    >>> handed_out = iter(batches)
    >>> next(handed_out), batches.position
    (10, 1)
    >>> again = Batches([10, 20, 30])
    >>> again.load_state_dict(batches.state_dict())
    >>> list(again), again.epoch
    ([20, 30], 1)
    """

    def __init__(self, loader: Iterable[Any]) -> None:
        self.loader = loader
        self.epoch = 0
        self.position = 0
        self._to_skip = 0
        self._began: dict[str, Any] | None = None  # the generators when this epoch began
        self._resumes = False
        self._before_epoch: Callable[[], Any] | None = None

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        if self._before_epoch is not None:
            self._before_epoch()
        if self._resumes and self._began is not None:
            now = generators_state()
            load_generators_state(self._began["process"])
            self._load_own(self._began["loader"])
            iterator = iter(self.loader)
            for _ in range(self.position):
                next(iterator, None)
            load_generators_state(now)  # the loader's own are by now where they were
        else:
            self.position = 0
            self._began = {"process": generators_state(), "loader": self._own_states()}
            iterator = iter(self.loader)
        self._resumes = False
        for batch in iterator:
            self.position += 1
            if self._to_skip:
                self._to_skip -= 1
                continue
            yield batch
        self.epoch, self.position, self._began = self.epoch + 1, 0, None

    def skip(self, num: int) -> None:
        """Leave out the next ``num`` batches."""
        self._to_skip += num

    def _generators(self) -> list[torch.Generator]:
        """The loader's own generators, each once."""
        sampler = getattr(self.loader, "sampler", None)
        found = [getattr(self.loader, "generator", None), getattr(sampler, "generator", None)]
        return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())

    def _own_states(self) -> list[torch.Tensor]:
        return [generator.get_state() for generator in self._generators()]

    def _load_own(self, states: list[torch.Tensor]) -> None:
        for generator, saved in zip(self._generators(), states, strict=True):
            generator.set_state(saved)

    def state_dict(self) -> dict[str, Any]:
        """Return the data position as plain data."""
        return {
            "epoch": self.epoch,
            "position": self.position,
            "to_skip": self._to_skip,
            "began": self._began,
            "loader": self._own_states(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take a position over; the next ``for`` goes on there.

        Raises:
            ValueError: the state of something else.
        """
        missing = {"epoch", "position", "to_skip", "began", "loader"} - set(state)
        if missing:
            raise ValueError(
                f"Batches.load_state_dict(…): expected what state_dict() returned, got a mapping without "
                f"{sorted(missing)}. Load the part that was saved from a Batches."
            )
        if len(state["loader"]) != len(self._generators()):
            raise ValueError(
                f"Batches.load_state_dict(…): expected a loader with {len(state['loader'])} generators of its own, got "
                f"one with {len(self._generators())}. Make the loader as the saved run did."
            )
        self._load_own(state["loader"])
        self.epoch, self.position = int(state["epoch"]), int(state["position"])
        self._to_skip, self._began = int(state["to_skip"]), state["began"]
        self._resumes = self._began is not None


class Loaders:
    """Know every loader that batches are drawn from, and its position.

    Args:
        before_epoch: called before the first batch of every epoch.

    >>> loaders = Loaders(lambda: None)
    >>> letters = ["a", "b", "c", "d"]
    >>> for letter in loaders.batches_of(letters):
    ...     if letter == "b":
    ...         break
    >>> loaders.places, loaders.since([(0, 0)], skip=1)
    ([(0, 2)], 'epoch 0: 0 to 2')
    """

    def __init__(self, before_epoch: Callable[[], Any]) -> None:
        self._before_epoch = before_epoch
        self._known: list[Batches] = []
        self._awaited: list[dict[str, Any]] = []  # positions loaded before their loaders were known

    @property
    def places(self) -> list[tuple[int, int]]:
        """Epoch and position of every loader."""
        return [(batches.epoch, batches.position) for batches in self._known]

    def batches_of(self, loader: Iterable[Any]) -> Batches:
        """Return the batches of a loader, the same object for the same loader."""
        for known in self._known:
            if loader is known or known.loader is loader:
                return known
        batches = loader if isinstance(loader, Batches) else Batches(loader)
        batches._before_epoch = self._before_epoch
        if self._awaited:
            batches.load_state_dict(self._awaited.pop(0))
        self._known.append(batches)
        return batches

    def skip(self, count: int) -> None:
        """Leave out the next ``count`` batches of every loader."""
        for batches in self._known:
            batches.skip(count)

    def since(self, places: Sequence[tuple[int, int]], skip: int) -> str:
        """Name the batches since these places, and ``skip`` more."""
        said = []
        for batches, (epoch, position) in zip(self._known, places, strict=False):
            last = batches.position - 1 + skip
            until = f"{last}" if epoch == batches.epoch else f"epoch {batches.epoch}: {last}"
            said.append(f"epoch {epoch}: {position} to {until}")
        return "; ".join(said)

    def state_dict(self) -> list[dict[str, Any]]:
        """Return every position, in the order in which the loaders became known."""
        return [batches.state_dict() for batches in self._known] + self._awaited

    def load_state_dict(self, state: Iterable[dict[str, Any]]) -> None:
        """Set the positions; those of loaders that are not known yet wait for them."""
        places = list(state)
        for batches, place in zip(self._known, places, strict=False):
            batches.load_state_dict(place)
        self._awaited = places[len(self._known) :]
