"""A sweep keeps what is finished, goes on where it stopped, and chooses by seeds that do not confirm."""

from __future__ import annotations

import csv
import json
import math

import pytest

import gradsplit.lab.sweep as sweep_module
from gradsplit.lab.cells import FIRST_TUNING_SEED, Cell, Grid, methods_of_strategies, run_cell, thinned
from gradsplit.lab.compare import compare, fresh_cells, median_score, summarise
from gradsplit.lab.evidence import conditions
from gradsplit.lab.methods import METHODS
from gradsplit.lab.optimizers import Settings
from gradsplit.lab.sweep import RawFile, finite_or_none
from gradsplit.lab.task import MissingDataError, MissingPackageError

TINY = {"depth": 2, "channels": 2, "batch": 4}


def _grid(**changes):
    given = {
        "workload": "plain-stack", "methods": ("none", "clip"), "lrs": (0.01, 0.1), "settings": Settings(4),
        "seeds": 2, "fresh_seeds": 1, "strengths": (0.1, 1.0), "options": TINY,
    }  # fmt: skip
    return Grid(**{**given, **changes})


def _row(cell, score, losses=(1.0,), diverged=False):
    return {
        "seed": cell.seed, "method": cell.method, "strength": cell.strength, "lr": cell.lr, "score": score,
        "diverged": diverged, "steps_run": len(losses), "seconds": 1.0, "num_bins": 0, "scaled_share": None,
        "zeroed_share": None, "worst": [], "metrics": {"accuracy": score}, "losses": list(losses),
    }  # fmt: skip


def test_a_comparison_writes_raw_results_with_where_they_come_from(tmp_path):
    seen = []
    results = compare(_grid(), tmp_path, jobs=0, on_cell=lambda *at: seen.append(at[2:]))
    num_cells = 2 * (2 + 4) + 2  # two seeds of (none at two rates, clip at two rates and strengths); two fresh cells
    assert seen == [(done, num_cells) for done in range(1, num_cells + 1)]
    held = json.loads((tmp_path / "results.json").read_text(encoding="utf8"))
    assert held == results and len(held["cells"]) == num_cells
    assert {"date", "hardware", "versions", "commit", "command"} <= set(held["conditions"])
    with (tmp_path / "cells.csv").open(encoding="utf8") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["score"]) for row in rows] == [cell["score"] for cell in held["cells"]]
    assert {row["accuracy"] for row in rows} == {row["score"] for row in rows}


def test_a_sweep_goes_on_where_it_stopped(tmp_path, monkeypatch):
    compare(_grid(seeds=1, fresh_seeds=0), tmp_path, jobs=0)
    lines = (tmp_path / "cells.jsonl").read_text(encoding="utf8").splitlines()
    (tmp_path / "cells.jsonl").write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:40], encoding="utf8")
    ran = []
    monkeypatch.setattr(sweep_module, "run_cell", lambda grid, cell: ran.append(cell) or run_cell(grid, cell))
    again = compare(_grid(seeds=1, fresh_seeds=0), tmp_path, jobs=0)
    assert len(ran) == 1 and len(again["cells"]) == 6, "the line that was cut off, and nothing else"
    compare(_grid(seeds=1, fresh_seeds=0), tmp_path, jobs=0)
    assert len(ran) == 1, "a line after one that was cut off is read again"
    compare(_grid(seeds=1, fresh_seeds=0, methods=("none", "clip", "default")), tmp_path, jobs=0)
    assert {cell.method for cell in ran[1:]} == {"default"} and len(ran) == 3


def test_runs_of_something_else_are_not_mixed_in(tmp_path):
    RawFile(tmp_path, _grid())
    with pytest.raises(ValueError, match=r"expected a folder of runs with steps=5, got one with steps=4\. Choose"):
        RawFile(tmp_path, _grid(settings=Settings(5)))


def test_worker_processes_give_what_this_process_gives(tmp_path):
    grid = _grid(methods=("none",), lrs=(0.1,), seeds=2, fresh_seeds=0)
    here = compare(grid, tmp_path / "here", jobs=0)["cells"]
    there = compare(grid, tmp_path / "there", jobs=1)["cells"]
    for a, b in zip(here, there, strict=True):
        assert {**a, "seconds": 0, "cpu_ms_a_step": 0} == {**b, "seconds": 0, "cpu_ms_a_step": 0}
        assert a["cpu_ms_a_step"] > 0 and a["state_per_weight"] == 1.0  # one momentum per weight


def test_a_run_that_fails_is_named_and_the_others_go_on(tmp_path, monkeypatch):
    def failing(grid, cell):
        if cell.method == "clip" and cell.lr == 0.01:
            raise ZeroDivisionError("planted")
        return _row(cell, 0.5)

    monkeypatch.setattr(sweep_module, "run_cell", failing)
    results = compare(_grid(), tmp_path, jobs=0)
    assert len(results["cells"]) == 2 * (2 + 2) + 2
    assert [(run["method"], run["lr"], run["why"]) for run in results["failed"]] == [
        ("clip", 0.01, "ZeroDivisionError: planted")
    ] * 4
    (clip,) = [entry for entry in results["summary"] if entry["method"] == "clip"]
    assert clip["lr"] == 0.1 and [point["lr"] for point in clip["curve"]] == [0.1]


def test_a_comparison_of_which_no_run_ends_says_why(tmp_path, monkeypatch):
    def failing(grid, cell):
        raise ZeroDivisionError("planted")

    monkeypatch.setattr(sweep_module, "run_cell", failing)
    with pytest.raises(
        RuntimeError, match=r"expected a run that ends, got none; the first: ZeroDivisionError: planted"
    ):
        compare(_grid(), tmp_path, jobs=0)


def test_a_method_without_its_package_is_left_out_by_name_after_one_try(tmp_path, monkeypatch):
    tried = []

    def run(grid, cell):
        tried.append(cell.method)
        if cell.method == "lamb":
            raise MissingPackageError("expected pytorch-optimizer")
        return _row(cell, 0.5)

    monkeypatch.setattr(sweep_module, "run_cell", run)
    results = compare(_grid(methods=("lamb", "none")), tmp_path, jobs=0)
    assert tried.count("lamb") == 1
    assert {run["why"] for run in results["failed"]} == {"expected pytorch-optimizer"} and len(results["failed"]) == 4
    assert [entry["method"] for entry in results["summary"]] == ["none"]


def test_missing_data_ends_the_sweep_since_no_run_has_it(tmp_path, monkeypatch):
    def run(grid, cell):
        raise MissingDataError("expected the digits")

    monkeypatch.setattr(sweep_module, "run_cell", run)
    with pytest.raises(MissingDataError, match="expected the digits"):
        compare(_grid(), tmp_path, jobs=0)


def _ends_its_worker(grid, cell):
    import os

    if cell.method == "clip" and cell.lr == 0.1:
        os._exit(3)
    return _row(cell, 0.5)


def test_a_worker_that_dies_takes_no_other_run_with_it(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep_module, "run_cell", _ends_its_worker)
    results = compare(_grid(seeds=1, fresh_seeds=0, strengths=(1.0,)), tmp_path, jobs=1)
    assert {(row["method"], row["lr"]) for row in results["cells"]} == {("none", 0.01), ("none", 0.1), ("clip", 0.01)}
    (failed,) = results["failed"]
    assert (failed["method"], failed["lr"]) == ("clip", 0.1) and "ended from outside" in failed["why"]


class _FullDisk:
    """Stands for a file on a disk that takes `room` more bytes."""

    def __init__(self, path, mode, buffering):
        self.file, self.room = open(path, mode, buffering=buffering), _FullDisk.bytes_left  # noqa: SIM115

    bytes_left = 0

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def seek(self, *where):
        return self.file.seek(*where)

    def truncate(self, end):
        return self.file.truncate(end)

    def write(self, line):
        return self.file.write(line[: self.room])


def _refuse(*_, **__):
    raise OSError(28, "No space left on device")


def test_a_disk_that_was_full_from_the_start_is_named_and_the_folder_serves_again(tmp_path, monkeypatch):
    folder = tmp_path / "out"
    with monkeypatch.context() as full:
        full.setattr(RawFile, "_write", _refuse)
        with pytest.raises(OSError, match=r"expected room for cells\.jsonl, got OSError: No space left.* Make room"):
            RawFile(folder, _grid())
    (folder / "cells.jsonl").touch()  # what a full disk leaves: the name without a line
    raw = RawFile(folder, _grid())
    cell = Cell(FIRST_TUNING_SEED, "none", None, 0.01)
    raw.add(cell, _row(cell, 0.5))
    assert set(RawFile(folder, _grid()).rows) == {cell}


def test_a_disk_without_room_for_the_results_is_named_and_the_runs_are_kept(tmp_path, monkeypatch):
    asked = _grid(methods=("none",), lrs=(0.01,), seeds=1, fresh_seeds=0)
    with monkeypatch.context() as full:
        full.setattr("pathlib.Path.write_text", _refuse)
        with pytest.raises(
            OSError, match=r"expected room for results\.json, got OSError: No space.* are in cells\.jsonl"
        ):
            compare(asked, tmp_path, jobs=0)
    assert len(RawFile(tmp_path, asked).rows) == 1


def test_a_full_disk_leaves_no_piece_of_a_line_and_the_next_run_writes_both(tmp_path, monkeypatch):
    raw = RawFile(tmp_path, _grid())
    first, second = list(_grid().cells())[:2]
    held = raw.path.read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(type(raw.path), "open", lambda path, mode, buffering: _FullDisk(path, mode, buffering))
        _FullDisk.bytes_left = 20
        raw.add(first, _row(first, 0.5))
        with open(raw.path, "rb") as file:
            assert file.read() == held
        with pytest.raises(
            OSError, match=r"expected room for every finished run, got OSError: No space left.* last 1 of 1"
        ):
            raw.check_written()
    raw.add(second, _row(second, 0.7))
    raw.check_written()
    assert set(RawFile(tmp_path, _grid()).rows) == {first, second}


def test_each_method_at_the_rate_its_authors_give():
    grid = _grid(methods=("adamw", "soap", "prodigy", "gso"), lrs=(), usual_lrs=True)
    assert {name: grid.lrs_of(name) for name in grid.methods} == {
        "adamw": (1e-3,), "soap": (3e-3,), "prodigy": (1.0,), "gso": (0.03,)
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"expected a learning rate for every method, found none for clip"):
        _grid(lrs=(), usual_lrs=True, methods=("adamw", "clip"))


def test_every_method_gets_the_same_learning_rates_and_its_own_in_addition():
    grid = _grid(methods=tuple(METHODS), strengths=None)
    assert all(grid.lrs_of(name) == (0.01, 0.1) for name in METHODS if name not in ("prodigy", "gso"))
    assert grid.lrs_of("prodigy") == (0.01, 0.1, 1.0)
    assert grid.lrs_of("gso") == (0.01, 0.03, 0.1)
    assert _grid(methods=("gso",), lrs=(0.1, 1.0)).lrs_of("gso") == (0.03, 0.1)  # a share above .5 has no meaning
    assert {len(grid.strengths_of(name)) for name in METHODS} == {1, 7}
    assert len({*grid.cells()}) == len(list(grid.cells()))


def test_the_best_cell_is_chosen_by_the_median_and_confirmed_on_other_seeds():
    grid = _grid(seeds=3, fresh_seeds=2)
    # (0.1, 0.1) has the best single run and the best mean, (1.0, 0.01) the best median.
    scores = {(None, 0.01): (0.1, 0.2, 0.3), (None, 0.1): (0.3, 0.3, 0.3), (0.1, 0.1): (0.4, 0.99, 0.4),
              (1.0, 0.01): (0.5, 0.5, 0.5)}  # fmt: skip
    rows = [
        _row(cell, scores.get((cell.strength, cell.lr), (0, 0, 0))[cell.seed - FIRST_TUNING_SEED])
        for cell in grid.cells()
    ]
    fresh = fresh_cells(grid, rows)
    assert {(c.method, c.strength, c.lr) for c in fresh} == {("none", None, 0.1), ("clip", 1.0, 0.01)}
    assert {c.seed for c in fresh}.isdisjoint({c.seed for c in grid.cells()})
    none, clip = summarise(grid, rows + [_row(cell, 0.7) for cell in fresh])
    assert (clip["strength"], clip["lr"], clip["choosing"]["median"], clip["fresh"]["median"]) == (1.0, 0.01, 0.5, 0.7)
    assert [(p["lr"], p["strength"], p["median"]) for p in clip["curve"]] == [(0.01, 1.0, 0.5), (0.1, 0.1, 0.4)]
    assert [p["median"] for p in none["curve"]] == [0.2, 0.3]


def test_where_lower_is_better_a_lost_run_is_the_worst():
    assert median_score([{"score": None}, {"score": 2.0}, {"score": None}], higher_is_better=False) == math.inf
    assert median_score([{"score": None}, {"score": 2.0}, {"score": None}], higher_is_better=True) == -math.inf
    grid = _grid(workload="lstm", methods=("none",), options={}, fresh_seeds=0)
    rows = [_row(cell, None if cell.lr == 0.01 else 2.0, diverged=cell.lr == 0.01) for cell in grid.cells()]
    (entry,) = summarise(grid, rows)
    assert entry["lr"] == 0.1 and entry["diverged"] == 0
    assert [(p["median"], p["lost"]) for p in entry["curve"]] == [(math.inf, 2), (2.0, 0)]


def test_steps_to_target_are_counted_against_the_clip_with_the_same_seed():
    grid = _grid(methods=("none", "clip"), lrs=(0.1,), strengths=(1.0,), fresh_seeds=0)
    curve = [9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 4.0, 4.0, 4.0, 4.0]
    fast = [4.0] * 10
    rows = [_row(cell, 0.5, fast if cell.method == "none" else curve) for cell in grid.cells()]
    none, clip = summarise(grid, rows)
    assert (none["steps_to_target"], clip["steps_to_target"]) == (5, 10)
    lost = [_row(cell, 0.5, curve, diverged=cell.method == "clip") for cell in grid.cells()]
    assert [entry["steps_to_target"] for entry in summarise(grid, lost)] == [None, None], "a lost clip is no target"


def test_a_grid_that_makes_no_sense_is_refused():
    for changes, message in (
        ({"workload": "gpd"}, r"workload\('gpd'\): expected one of"),
        ({"methods": ("clipp",)}, "Did you mean 'clip'"),
        ({"methods": ()}, r"expected at least one method and learning rates > 0"),
        ({"lrs": (0.0,)}, r"expected at least one method and learning rates > 0"),
        ({"seeds": 0}, r"Grid\(seeds=0, fresh_seeds=1\): expected >= 1 and >= 0"),
        ({"options": {"depht": 3}}, r"expected options of gain, depth, channels, batch, got depht"),
    ):
        with pytest.raises(ValueError, match=message):
            _grid(**changes)


def test_methods_by_strategy():
    assert methods_of_strategies(["tree_sp"]) == ("tree_sp", "tree_sp-relative")
    assert {METHODS[name].strategy for name in methods_of_strategies(["xsp", "lbf"])} == {"xsp", "lbf"}


def test_a_thinned_curve_keeps_its_mean_and_what_json_cannot_hold_is_none():
    assert thinned([float(n) for n in range(1000)], points=10) == [49.5 + 100 * n for n in range(10)]
    assert finite_or_none([1.0, math.inf, {"a": math.nan}]) == [1.0, None, {"a": None}]
    assert finite_or_none(_row(Cell(0, "none", None, 0.1), math.nan))["score"] is None


def test_conditions_name_no_machine_and_no_person():
    import getpass
    import socket

    text = json.dumps({k: v for k, v in conditions().items() if k != "command"})
    assert socket.gethostname() not in text or len(socket.gethostname()) < 3
    assert "core" in text and "torch" in text
    assert getpass.getuser() + "@" not in text
