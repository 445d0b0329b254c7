"""Sharded arrays and shard_map on a CPU mesh of four virtual devices: the numbers of one device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def found():
    """What a process with four virtual devices prints; this one has its devices already."""
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.integrations.sharded_optax"],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_there_are_four_devices(found):
    assert found["devices"] == 4


@pytest.mark.parametrize("how", ["rows", "columns"])
@pytest.mark.parametrize("what", ["relative", "tree", "gso", "share"])
def test_sharded_arrays_end_where_whole_ones_do(found, what, how):
    assert found[f"{what}, {how}"] < 1e-5


def test_one_second_moment_a_row_may_be_sharded_with_its_row(found):
    assert found["gso bin, rows"] < 1e-5


def test_the_moments_are_sharded_as_the_weights_are(found):
    assert found["moments stay spread"]


@pytest.mark.parametrize("how", ["replicated", "rows"])
def test_inside_shard_map_the_update_is_that_of_one_device(found, how):
    assert found[f"shard_map, {how}"] < 1e-6
