"""Loaders: the data that a guard hands out, where each stands, and what is left out of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ..checkpoint.batches import Batches

__all__ = ["Loaders"]


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
