"""Scripts that were not written for it run unchanged under `gradsplit run`, and their recordings are right.

Each is run twice, alone and watched: same output, same weights to the last bit, same exit code.
"""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest

from gradsplit.watch.record import RunFile
from tests.watch.run.processes import run_gradsplit, run_python, without_ours
from tests.watch.run.scripts import FSDP, SCRIPTS


def _needs(script):
    for package in script.needs:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"not run: the package {package} is not installed")


def _check_recording(path, script):
    with RunFile(path) as file:
        streams = file.streams
        assert [stream.optimizer for stream in streams] == [name for name, _ in script.streams]
        series = [file.series(stream) for stream in streams]
    for one, (_, rows) in zip(series, script.streams, strict=True):
        assert one.num_rows == rows or rows < 0
        # The loss of a backward pass that GradScaler let no step follow is counted with the next step's: inf, not nan.
        assert not np.isnan(one.loss_R[one.skipped_R == 0]).any(), "the loss was seen at every step"
        assert (one.total_R[one.skipped_R == 0] > 0).all()
        assert (one.lr_R >= 0).all()
    assert set(script.names) <= set(streams[0].outline.names_N), streams[0].outline.names_N
    assert bool((series[0].own_scale_R < 1).any()) == script.own_scaled
    return series


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_runs_unchanged_and_is_recorded(name, tmp_path):
    script = SCRIPTS[name]
    _needs(script)
    (tmp_path / "train.py").write_text(script.text)
    alone = run_python(tmp_path, "train.py")
    watched = run_gradsplit(tmp_path, "--watch", "train.py")
    assert alone.returncode == 0, alone.stderr
    assert watched.returncode == 0, watched.stderr
    assert watched.stdout == alone.stdout
    assert "gradsplit: recorded; next: gradsplit report run.db" in watched.stderr
    series = _check_recording(tmp_path / "run.db", script)
    if name == "GradScaler with fused AdamW":
        assert series[0].skipped_R.tolist() == [0] * 5 + [1] + [0] * 2
        assert (series[0].total_R[series[0].skipped_R == 0] < 100).all(), "norms are those of the unscaled gradients"
    if name == "LBFGS":
        assert series[0].num_rows == int(alone.stdout.splitlines()[4]), "a row a call of the closure"
        assert series[0].step_R.max() == 3


@pytest.mark.slow
def test_two_ranks_with_sharded_parameters(tmp_path):
    """FSDP2 under torchrun: both ranks record, and both record the norms of the whole gradient."""
    (tmp_path / "train.py").write_text(FSDP.text)
    launcher = ("--standalone", "--nproc-per-node", "2", "train.py")
    alone = run_python(tmp_path, "-m", "torch.distributed.run", *launcher)
    watched = run_gradsplit(tmp_path, "--watch", "-m", "torch.distributed.run", *launcher)
    assert alone.returncode == 0, alone.stderr
    assert watched.returncode == 0, watched.stderr
    assert watched.stdout == alone.stdout
    first, second = (_check_recording(tmp_path / name, FSDP)[0] for name in ("run.db", "run.rank1.db"))
    np.testing.assert_array_equal(first.norm(), second.norm())
    assert without_ours(watched.stderr).count("Traceback") == 0


def test_control_bounds_what_watching_only_measures(tmp_path):
    (tmp_path / "train.py").write_text(SCRIPTS["plain loop with clip and accumulation"].text)
    done = run_gradsplit(tmp_path, "--control", "--budget", "fixed:limit=0.001", "train.py")
    assert done.returncode == 0, done.stderr
    with RunFile(tmp_path / "run.db") as file:
        (stream,) = file.streams
        series = file.series(stream)
    assert stream.controlled
    after = series.norm() * series.kept()
    assert after.max() <= 0.001 * 1.01
    assert series.scaled_WL.sum() > 0
