"""The laws hold wherever they are tried, and each finds the faults that were planted for it."""

from __future__ import annotations

import contextlib
import hashlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gradsplit.resume.checkpoint as checkpoint_module
import gradsplit.resume.snapshots as restore_module
import gradsplit.resume.snapshots as snapshots_module
from gradsplit.resume import Batches
from gradsplit.resume.divergence import Divergence
from gradsplit.resume.formats import FORMATS
from gradsplit.resume.snapshots import LoweredRate
from tests.resume.laws_of_loss import (
    OPTIMIZERS,
    check_a_failed_write_leaves_the_old_file,
    check_damage_is_refused,
    check_going_back_is_exact,
    check_resuming_changes_nothing,
)


@settings(max_examples=12)
@given(every=st.integers(1, 12), bad=st.integers(1, 30), kind=st.sampled_from(sorted(OPTIMIZERS)))
def test_going_back_is_exact(every, bad, kind):
    check_going_back_is_exact(every, bad, kind)


@settings(max_examples=8)
@given(stop=st.integers(1, 18))
def test_resuming_changes_nothing(tmp_path_factory, stop):
    check_resuming_changes_nothing(stop, tmp_path_factory.mktemp("run"))


@settings(max_examples=60)
@given(share=st.floats(0, 1), bit=st.integers(0, 7))
def test_damage_is_refused(tmp_path_factory, share, bit):
    check_damage_is_refused(share, bit, tmp_path_factory.getbasetemp())


def test_a_failed_write_leaves_the_old_file(tmp_path):
    check_a_failed_write_leaves_the_old_file(tmp_path)


def _without(name):
    """`restore` that forgets one part."""
    own = restore_module.load_tree

    def forgets(tree, parts, **options):
        return own(tree, {key: part for key, part in parts.items() if key != name}, **options)

    return restore_module, "load_tree", forgets


def _aliasing(tree, into=None, **_):
    """Snapshots that share the memory of what they are to keep."""
    return tree


def _no_buffers(tree, into=None, **_):
    """Snapshots whose running statistics are those of the living model."""
    from gradsplit.resume.plain import copied

    kept = copied(tree, into)
    living = tree["parts"]["model"]
    kept["parts"]["model"].update({name: living[name] for name in living if "running" in name})
    return kept


def _never_lowered(self, optimizer, *_):
    self._before_step()


def _never_set_back(self, *_):
    self._own = []


def _only_by_patience(self, loss, zeroed):
    self.bad += not loss < 1e9
    return "bad" if self.bad >= self.patience else ""


def _from_the_beginning(self, state):
    self.epoch, self.position = state["epoch"], 0


def _other_order(self):
    if self._resumes:
        self._began = None
    self._resumes = False
    return _OWN_ITER(self)


_OWN_ITER = Batches.__iter__


def _unverified(path):
    """Read without looking at the checksum."""
    try:
        return torch.load(path, weights_only=True)
    except Exception as error:
        raise checkpoint_module.CheckpointError("torn") from error


@contextlib.contextmanager
def _in_place(path):
    """Write over the old file."""
    with open(path, "w+b") as file:
        yield file


class _Constant:
    """A checksum that never differs."""

    def update(self, data):
        pass

    def hexdigest(self):
        return "0" * 64


GOING_BACK = {
    "the optimizer is left": _without("optimizer"),
    "the model is left": _without("model"),
    "the schedule is left": _without("scheduler"),
    "snapshots share memory": (snapshots_module, "copied", _aliasing),
    "buffers are left": (snapshots_module, "copied", _no_buffers),
    "rates are not lowered": (LoweredRate, "_lower", _never_lowered),
    "rates are not set back": (LoweredRate, "_set_back", _never_set_back),
    "nan is waited out": (Divergence, "reason", _only_by_patience),
}
RESUMING = {
    "generators are not set": (checkpoint_module, "load_generators_state", lambda state: None),
    "an epoch begins anew": (Batches, "load_state_dict", _from_the_beginning),
    "another order": (Batches, "__iter__", _other_order),
}
DAMAGE = {
    "no checksum": (FORMATS["torch"], "read", _unverified),
    "a checksum that never differs": (hashlib, "sha256", lambda *_: _Constant()),
}


def _plant(monkeypatch, fault):
    owner, name, wrong = fault
    monkeypatch.setattr(owner, name, wrong)


@pytest.mark.parametrize("fault", GOING_BACK)
def test_a_fault_in_going_back_is_caught(monkeypatch, fault):
    _plant(monkeypatch, GOING_BACK[fault])
    with pytest.raises(AssertionError):
        check_going_back_is_exact(5, 13, "adamw")


@pytest.mark.parametrize("fault", RESUMING)
def test_a_fault_in_resuming_is_caught(monkeypatch, fault, tmp_path):
    _plant(monkeypatch, RESUMING[fault])
    with pytest.raises(AssertionError):
        check_resuming_changes_nothing(8, tmp_path)


@pytest.mark.parametrize("fault", DAMAGE)
def test_a_fault_in_verifying_is_caught(monkeypatch, fault, tmp_path):
    _plant(monkeypatch, DAMAGE[fault])
    with pytest.raises(AssertionError, match="was loaded"):
        for share in torch.linspace(0.05, 0.95, 19).tolist():
            check_damage_is_refused(share, 3, tmp_path)


def test_writing_in_place_is_caught(monkeypatch, tmp_path):
    _plant(monkeypatch, (checkpoint_module, "replaced", _in_place))
    with pytest.raises(AssertionError, match="the old checkpoint is gone"):
        check_a_failed_write_leaves_the_old_file(tmp_path)
