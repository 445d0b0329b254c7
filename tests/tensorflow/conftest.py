"""What needs TensorFlow: run by `make test-tensorflow`, in an environment of its own."""

from __future__ import annotations

import importlib.util
import os

import pytest

_ABSENT = importlib.util.find_spec("tensorflow") is None

# Before either is imported; Keras takes its backend once a process.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
if not _ABSENT:
    os.environ.setdefault("KERAS_BACKEND", "tensorflow")


def pytest_collection_modifyitems(items):
    if _ABSENT:
        here = os.path.dirname(__file__)
        for item in items:
            if str(item.path).startswith(here):
                item.add_marker(
                    pytest.mark.skip(reason="needs TensorFlow; `make test-tensorflow` installs and runs it")
                )
