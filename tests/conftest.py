"""The same conditions for every test: one thread, fixed seeds, derandomised properties, nothing left over."""

from __future__ import annotations

import os
import random

# Before torch is imported: an OpenMP pool that has started keeps its size.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Keras takes its backend once a process; `make test-tensorflow` sets another.
os.environ.setdefault("KERAS_BACKEND", "torch")

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)

# derandomize: the same examples on every machine, so a failure is a change of the code and never luck.
# deadline=None: no test is timed; on a shared core a slow example is not an error.
settings.register_profile(
    "gradsplit",
    derandomize=True,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("gradsplit")


@pytest.fixture(autouse=True)
def _fixed_conditions():
    """Seed every generator a test may draw from, and fail a test that leaves torch's global state changed."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - libraries under test (scikit-learn) draw from the global generator
    torch.manual_seed(0)
    before = torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads()
    yield
    after = torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads()
    assert after == before, f"the test left torch's (default dtype, grad mode, threads) at {after}, found {before}"
