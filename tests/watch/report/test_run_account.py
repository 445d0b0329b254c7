"""The account names what was planted, and nothing where nothing was: recordings with one change each."""

from __future__ import annotations

import math

import numpy as np
import pytest

from gradsplit.watch.record import RunFile, RunWriter, Stream
from gradsplit.watch.report.account import account_of
from gradsplit.watch.report.advice import advice_of
from gradsplit.watch.report.rules import scores_of
from gradsplit.watch.report.text import findings, headline, report_text
from tests.watch.record.recorded import noise, outline, rows_of, write_run

ROWS = 200
LEAVES = outline().leaf_names


def _account(path):
    with RunFile(path) as file:
        return account_of(file)


def _leaves(tensor):
    return [leaf for leaf, name in enumerate(LEAVES) if name.split("[")[0] == tensor]


@pytest.mark.parametrize("seed", range(10))
def test_a_healthy_run_is_left_alone(tmp_path, seed):
    account = _account(write_run(tmp_path / "run.db", noise(ROWS, len(LEAVES), seed=seed)))
    assert account.first is None
    assert headline(account) == f"No norm left its own history in {ROWS} recorded steps."
    assert advice_of(account)[0].command == ""


@pytest.mark.parametrize("factor", [50.0, 1e6, math.inf, math.nan])
@pytest.mark.parametrize("step", [8, 90, ROWS - 1])
@pytest.mark.parametrize("tensor", ["enc.0.bias", "head.weight"])
def test_the_first_step_and_tensor_are_named(tmp_path, tensor, step, factor):
    norm = noise(ROWS, len(LEAVES))
    norm[step, _leaves(tensor)] *= factor
    first = _account(write_run(tmp_path / "run.db", norm)).first
    assert (first.tensor, first.step) == (tensor, step)
    assert first.num_neighbours == 0
    if math.isfinite(factor):
        assert first.times == pytest.approx(factor, rel=0.7)
    else:
        assert first.score == math.inf


def test_the_rows_are_named_where_only_a_part_rose(tmp_path):
    norm = noise(ROWS, len(LEAVES))
    norm[120, _leaves("enc.1.weight")[2]] *= 1e4
    account = _account(write_run(tmp_path / "run.db", norm))
    assert [name for name, _ in account.first.rows] == ["enc.1.weight[2:3]"]
    assert headline(account).startswith("It began at step 120 in enc.1.weight[2:3]: norm ")


def test_what_followed_is_told(tmp_path):
    norm = noise(ROWS, len(LEAVES))
    norm[100:, _leaves("head.weight")] *= 1e3
    norm[103:, _leaves("enc.1.weight")] *= 1e2
    account = _account(write_run(tmp_path / "run.db", norm))
    first = account.first
    assert (first.tensor, first.step, first.num_neighbours, first.lasting) == ("head.weight", 100, 1, 10)
    assert (first.neighbours[0].tensor, first.neighbours[0].left_at) == ("enc.1.weight", 103)
    assert any("1 of the 3 other tensors left their history" in sentence for sentence in findings(account))
    assert advice_of(account)[0].command == "gradsplit run --control train.py"


def test_everything_lost_at_once_blames_the_last_module_or_the_loss(tmp_path):
    norm = noise(ROWS, len(LEAVES))
    norm[60:] = np.nan
    account = _account(write_run(tmp_path / "run.db", norm))
    assert (account.first.tensor, account.first.step) == ("head.weight", 60)
    assert "lost it in this module, the last one, or above it" in headline(account)
    stream, loss = Stream(0, "AdamW", outline()), np.where(np.arange(ROWS) < 60, 2.0, np.nan)
    writer = RunWriter(tmp_path / "lost.db", {"argv": ["train.py"], "mode": "watch"})
    writer.write([rows_of(stream, norm, loss_S=loss)])
    writer.close()
    assert headline(_account(tmp_path / "lost.db")).startswith("At step 60 everything was lost at once")


def test_a_thinned_departure_is_still_found(tmp_path):
    shapes = {f"h.{i}.w": (64, 2) for i in range(3)}
    stream = Stream(0, "AdamW", outline(shapes))
    norm = noise(2500, stream.outline.num_leaves)
    at = [leaf for leaf, tensor in enumerate(stream.outline.tensors_L) if tensor == "h.1.w"]
    norm[701, at] *= 1e3
    writer = RunWriter(tmp_path / "run.db", max_megabytes=0.5)
    for begin in range(0, 2500, 20):
        writer.write([rows_of(stream, norm[begin : begin + 20], first_step=begin)])
    writer.close()
    first = _account(tmp_path / "run.db").first
    assert first.tensor == "h.1.w"
    assert first.step <= 701 <= first.last_step


def test_a_tensor_that_is_wild_by_nature_is_no_explosion():
    rng = np.random.default_rng(0)
    wild = np.exp(1.5 * rng.standard_normal((500, 1)))
    assert not scores_of(wild).left_WT.any()


@pytest.mark.parametrize("drift", [1.05, 0.95])
def test_a_steady_drift_is_no_explosion(drift):
    norms = drift ** np.arange(300)[:, None] * np.exp(0.2 * np.random.default_rng(1).standard_normal((300, 1)))
    assert not scores_of(norms).left_WT.any()


def test_zeros_are_no_history():
    norms = np.zeros((60, 1))
    norms[30:] = 1.0
    assert not scores_of(norms).left_WT.any()


def _controlled(path, share, *, zeroed=0, budget="bin: RelativeStep(tau=0.03, floor=0.01)", words=()):
    about = {"strategy": "xsp", "budget": budget, "words": list(words)}
    stream, rng = Stream(0, "SGD", outline(), True, about), np.random.default_rng(0)
    norm = noise(ROWS, len(LEAVES))
    scaled = (rng.random(norm.shape) < share).astype(int)
    lost = np.zeros_like(scaled)
    lost[5, :zeroed] = 1
    writer = RunWriter(path, {"argv": ["train.py", "a b"], "mode": "control"})
    writer.write([rows_of(stream, norm, kept_SL=np.where(scaled, 0.1, 1.0), scaled_SL=scaled, zeroed_SL=lost)])
    writer.close()
    return _account(path)


@pytest.mark.parametrize(
    ("share", "words", "reason", "command"),
    [
        (0.9, (), "is tight: 91%", "--plan xsp --budget relative_step:tau=0.06"),
        (0.0, (), "was never used", "--plan xsp --budget relative_step:tau=0.015"),
        (0.0, ("root@fixed:limit=4",), "was never used", "--plan xsp --budget root@fixed:limit=2"),
        (0.9, ("ema:ratio=1.5:beta=0.9",), "is tight", "--budget ema:ratio=3:beta=0.9"),
        (0.1, (), "nothing to change", ""),
    ],
)
def test_budgets_are_judged_by_their_use(tmp_path, share, words, reason, command):
    account = _controlled(tmp_path / "run.db", share, words=words)
    assert account.streams[0].scaled == pytest.approx(share, abs=0.02)
    (advice,) = advice_of(account)
    assert reason in advice.reason
    assert command in advice.command
    if command:
        assert advice.command.endswith("train.py 'a b'")


def test_norms_are_told_before_and_after(tmp_path):
    account = _controlled(tmp_path / "run.db", 1.0, zeroed=2)
    root = account.streams[0].uses[0]
    assert root.largest_after == pytest.approx(0.1 * root.largest, rel=0.01)
    assert root.zeroed == 2
    assert root.scaled == 1.0


def test_the_scripts_own_clip_is_judged(tmp_path):
    stream, norm = Stream(0, "SGD", outline()), noise(ROWS, len(LEAVES))
    writer = RunWriter(tmp_path / "run.db", {"argv": ["t.py"], "mode": "watch"})
    writer.write([rows_of(stream, norm, own_scale_S=np.where(np.arange(ROWS) % 4, 0.25, 1.0))])
    writer.close()
    account = _account(tmp_path / "run.db")
    assert account.streams[0].own_scaled == 0.75
    assert account.streams[0].own_median == 0.25
    assert "on 75% of the steps, at the median by 0.25" in advice_of(account)[0].reason


def test_the_text_is_whole(tmp_path):
    norm = noise(ROWS, len(LEAVES))
    norm[50, _leaves("head.weight")] *= 100
    path = write_run(tmp_path / "run.db", norm, exception="ValueError: x")
    told = report_text(_account(path))
    for part in (
        "train.py (watch, 200 steps",
        "head.weight",
        "ended with ValueError: x",
        "What to change",
        "usual norm",
    ):
        assert part in told
