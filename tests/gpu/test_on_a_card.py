"""On a graphics card: the kernels equal the definition, and no step waits. `make test-gpu` runs it.

The jobs are those of benchmarks/gpu.py, (a) and (b). Without a card every test is skipped.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu.kernels import DTYPES, STRIDES, beyond_job, decision_job, gso_job, kernel_job
from benchmarks.gpu.setting import BUDGETS, Setting
from benchmarks.gpu.steps import sync_job
from gradsplit.kernels import selfcheck

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no graphics card here")

STEPS = (
    "splitter in front of SGD",
    "splitter in front of AdamW",
    "splitter, Ema with the root",
    "splitter, eager",
    "GSO",
    "GSO, direction='adam'",
)


@pytest.fixture
def setting():
    return Setting("cuda", tiny=False, seconds=1.0)


@pytest.mark.parametrize("strides", STRIDES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ["triton", "eager"])
@pytest.mark.filterwarnings("ignore:.*falls back to eager torch")
def test_a_kernel_equals_the_definition(setting, backend, dtype, strides):
    assert "squares_ulp" in kernel_job(setting, backend, dtype, strides)


def test_a_tensor_of_more_than_two_to_the_31_elements(setting):
    found = beyond_job(setting)
    if "skipped" in found:
        pytest.skip("not run: it needs 8 GB of free memory on the card")
    assert found["elements"] > 2**31


@pytest.mark.parametrize("budget", BUDGETS)
def test_decisions_are_those_of_the_definition(setting, budget):
    found = decision_job(setting, budget)
    assert not found["self_check"], found["self_check"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gso_ends_where_the_definition_ends(setting, dtype):
    found = gso_job(setting, dtype)
    assert not found["self_check"], found["self_check"]


@pytest.mark.parametrize("name", STEPS)
def test_a_step_waits_for_nothing_and_is_captured(setting, name):
    found = sync_job(setting, name)
    assert found["waits"] == 0
    assert found["replayed"]


def test_the_self_check_found_nothing():
    assert not {key: said for key, said in selfcheck.findings().items() if said}
