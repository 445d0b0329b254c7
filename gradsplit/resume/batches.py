"""Batches: an iterator over a loader that knows its place, can skip, and can go on where another process stopped."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from .generators import generators_state, generators_within, load_generators_state, load_state_of, state_of

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

    Every generator that the loader holds is kept and restored as well, at any depth: torch's, numpy's or Python's, in a
    sampler, in a batch sampler, in a dataset. What cannot be kept is refused when the state is asked for: a generator
    without a state, one in a dataset whose workers stay alive over epochs, and a sampler that holds an iterator.

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
        self._found: list[tuple[str, Any]] | None = None  # the loader's generators when this epoch began
        self._before_epoch: Callable[[], Any] | None = None

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        if self._before_epoch is not None:
            self._before_epoch()
        self._found = generators_within(self.loader)
        if self._resumes and self._began is not None:
            now, own = generators_state(), [state_of(one) for _, one in self._generators()]
            load_generators_state(self._began["process"])
            self._load_own(self._began["loader"])
            iterator = iter(self.loader)
            for _ in range(self.position):
                next(iterator, None)
            load_generators_state(now)
            self._load_own(own)  # the training may draw from them too
        else:
            self.position = 0
            self._began = {"process": generators_state(), "loader": [state_of(one) for _, one in self._generators()]}
            iterator = iter(self.loader)
        self._resumes = False
        for batch in iterator:
            self.position += 1
            if self._to_skip:
                self._to_skip -= 1
                continue
            yield batch
        self.epoch, self.position, self._began, self._found = self.epoch + 1, 0, None, None

    def skip(self, num: int) -> None:
        """Leave out the next ``num`` batches."""
        self._to_skip += num

    def _generators(self) -> list[tuple[str, Any]]:
        """The loader's own generators, each once, with their places."""
        return generators_within(self.loader) if self._found is None else self._found

    def _load_own(self, states: Sequence[Any]) -> None:
        before = [state_of(one) for _, one in self._generators()]
        try:
            for (_, generator), saved in zip(self._generators(), states, strict=True):
                if saved is not None:
                    load_state_of(generator, saved)
        except ValueError:
            self._load_own(before)
            raise

    def _check(self, states: list[Any]) -> None:
        """Refuse what could not go on where it was."""
        pairs = zip(self._generators(), states, strict=True)
        wrong = [f"a generator without a state at {place!r}" for (place, _), state in pairs if state is None]
        for name in ("sampler", "batch_sampler"):
            begun = generators_within(getattr(self.loader, name, None), (Iterator,))
            wrong += [f"an iterator that has begun, at '.{name}{place}'" for place, _ in begun]
        if getattr(self.loader, "persistent_workers", False):
            inside = generators_within([getattr(self.loader, name, None) for name in ("dataset", "collate_fn")])
            wrong += [f"a generator in a worker that stays alive, at {place!r}" for place, _ in inside]
        if wrong:
            raise ValueError(
                f"Batches.state_dict(): expected a loader whose state can be kept, got {' and '.join(wrong)}. Use "
                "torch.Generator or random.Random, begin iterators in __iter__, and set persistent_workers=False."
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the data position as plain data.

        Raises:
            ValueError: the loader holds a generator whose state cannot be kept.
        """
        self._check(own := [state_of(one) for _, one in self._generators()])
        return {
            "epoch": self.epoch,
            "position": self.position,
            "to_skip": self._to_skip,
            "began": self._began,
            "loader": own,
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
