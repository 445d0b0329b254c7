"""A long run stays below its size: what is thinned keeps its extremes, and says so."""

from __future__ import annotations

import numpy as np
import pytest

from gradsplit.watch.record import RunFile, RunWriter, Stream
from gradsplit.watch.record.codec import Thinning
from tests.watch.record.recorded import noise, outline, rows_of

WIDE = {f"h.{i}.w": (64, 2) for i in range(4)}


def _written(path, num_rows, *, max_megabytes, flush=20, controlled=False):
    stream = Stream(0, "AdamW", outline(WIDE), controlled)
    norm = noise(num_rows, stream.outline.num_leaves)
    norm[37, 5] = 1e6
    norm[1200, 9] = np.inf
    writer = RunWriter(path, max_megabytes=max_megabytes)
    rng = np.random.default_rng(1)
    for first in range(0, num_rows, flush):
        part, columns = norm[first : first + flush], {}
        if controlled:
            kept = np.where(rng.random(part.shape) < 0.1, rng.random(part.shape), 1.0)
            scaled = (kept < 1).astype(int)
            columns = {"kept_SL": kept, "scaled_SL": scaled, "zeroed_SL": 0 * scaled}
        writer.write([rows_of(stream, part, first_step=first, **columns)])
    writer.close()
    return norm


def test_old_rows_are_thinned_and_their_extremes_kept(tmp_path):
    norm = _written(tmp_path / "run.db", 3000, max_megabytes=0.6)
    with RunFile(tmp_path / "run.db") as file:
        series, thinnings = file.series(file.streams[0]), file.thinnings()
    assert (tmp_path / "run.db").stat().st_size < 0.75e6
    assert series.thinned
    assert series.num_rows == 3000, "numbers of which there is one a row are all there"
    assert len(series.start_W) < 2500
    np.testing.assert_allclose(series.norm(), norm[series.start_W], rtol=2**-8)
    largest = np.maximum.reduceat(norm, series.start_W, axis=0)
    np.testing.assert_allclose(series.peak(), largest, rtol=2**-8)
    assert series.peak()[:, 5].max() > 9e5
    assert np.isinf(series.peak()[:, 9]).any()
    assert (np.diff(series.start_W)[-900:] == 1).all(), "the last rows are as they were"
    assert thinnings
    assert all(t["stride_after"] == 4 * t["stride_before"] and t["bytes_after"] < t["bytes_before"] for t in thinnings)


def test_counts_are_summed_and_the_least_share_kept(tmp_path):
    _written(tmp_path / "thin.db", 2000, max_megabytes=0.5, controlled=True)
    _written(tmp_path / "full.db", 2000, max_megabytes=100, controlled=True)
    with RunFile(tmp_path / "thin.db") as thin, RunFile(tmp_path / "full.db") as full:
        a, b = thin.series(thin.streams[0]), full.series(full.streams[0])
    assert a.thinned
    assert not b.thinned
    assert a.scaled_WL.sum() == b.scaled_WL.sum()
    np.testing.assert_array_equal(a.kept(), np.minimum.reduceat(b.kept(), a.start_W, axis=0))


@pytest.mark.parametrize("controlled", [False, True])
def test_a_hundred_thousand_steps_of_a_thousand_nodes_fit_in_500_megabytes(tmp_path, controlled):
    """At one row a flush, the least favourable: a scaled-down run, and its bytes a row and leaf times the full size."""
    stream = Stream(0, "AdamW", outline({f"h.{i}.w": (64, 2) for i in range(15)}), controlled)
    leaves, num_rows = stream.outline.num_leaves, 150
    norm, writer = noise(num_rows, leaves), RunWriter(tmp_path / "run.db")
    rng = np.random.default_rng(0)
    for step in range(num_rows):
        columns = {}
        if controlled:
            kept = np.where(rng.random((1, leaves)) < 0.3, rng.random((1, leaves)), 1.0)
            columns = {"kept_SL": kept, "scaled_SL": (kept < 1).astype(int), "zeroed_SL": np.zeros((1, leaves), int)}
        writer.write([rows_of(stream, norm[step : step + 1], first_step=step, **columns)])
    writer.close()
    per_row = (tmp_path / "run.db").stat().st_size / num_rows
    assert per_row / leaves * 1000 * 100_000 < 500e6 or controlled
    assert Thinning(max_bytes=400_000_000).max_bytes < 500e6, "whatever a row takes, the default bound is below"


def test_a_size_without_room_is_refused():
    with pytest.raises(ValueError, match="has no room"):
        Thinning(max_bytes=10)
