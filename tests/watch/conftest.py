"""Optimizers that other tests of the process left alive are none of a watched script's."""

from __future__ import annotations

import gc
from types import SimpleNamespace

import pytest
import torch

from gradsplit.watch.run import names


@pytest.fixture(autouse=True)
def _without_the_optimizers_of_other_tests(monkeypatch):
    """Hide them from the search for owners: a name begins with its owner only where several optimizers live."""
    left = {id(thing): thing for thing in gc.get_objects() if issubclass(type(thing), torch.optim.Optimizer)}

    def get_objects():
        return [thing for thing in gc.get_objects() if id(thing) not in left]

    monkeypatch.setattr(names, "gc", SimpleNamespace(get_objects=get_objects))
    yield
