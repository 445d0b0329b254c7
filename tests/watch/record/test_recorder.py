"""The recorder: what a splitter did arrives in the sinks; a sink that fails costs one warning."""

from __future__ import annotations

import json
import sqlite3

import numpy as np
import pytest
import torch
from torch import nn

import gradsplit as gs
from gradsplit.watch.loggers import SINKS, JsonLinesSink, sink_from_words
from gradsplit.watch.record import Recorder, RunFile, RunWriter


class Kept:
    """A sink that keeps everything."""

    def __init__(self):
        self.rows, self.closed = [], False

    def write(self, batch):
        self.rows += batch

    def close(self, **meta):
        self.closed = True


def _model():
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))


def _step(model, splitter, *, nan=False):
    model.zero_grad()
    model(torch.randn(3, 4)).square().sum().backward()
    if nan:
        model[0].weight.grad[2, 1] = float("nan")
    before = [
        p.grad.double().norm(dim=1).clone() if p.dim() > 1 else p.grad.double().norm() for p in model.parameters()
    ]
    return before, splitter.step()


def test_a_splitters_steps_are_recorded(tmp_path):
    model, kept = _model(), Kept()
    recorder = Recorder([kept, RunWriter(tmp_path / "run.db")], seconds=3600)
    splitter = gs.GradientSplitter(model, budget=gs.Fixed(0.05), sinks=[recorder])
    seen = [_step(model, splitter, nan=step == 3) for step in range(5)]
    recorder.close()
    assert kept.closed
    (rows,) = kept.rows
    assert rows.step_S.tolist() == [0, 1, 2, 3, 4]
    names = rows.stream.outline.leaf_names
    first = np.concatenate([values.reshape(-1).numpy() for values in seen[0][0]])
    np.testing.assert_allclose(rows.norm_SL[0], first, rtol=1e-6)
    after = seen[0][1].norm_after_B().numpy()
    np.testing.assert_allclose(rows.norm_SL[0] * rows.kept_SL[0], after, rtol=1e-5)
    assert np.isnan(rows.norm_SL[3, names.index("0.weight[2:3]")])
    assert rows.zeroed_SL[3].sum() == 1
    assert rows.kept_SL[3, names.index("0.weight[2:3]")] == 0
    with RunFile(tmp_path / "run.db") as file:
        assert file.series(file.streams[0]).num_rows == 5


def test_two_networks_of_the_same_shapes_are_two_streams():
    """As the two critics of a robot; a splitter that is made anew goes on in the stream of before."""
    kept, models = Kept(), [_model(), _model()]
    recorder = Recorder([kept], seconds=3600)
    splitters = [gs.GradientSplitter(model, budget=gs.Fixed(1.0), sinks=[recorder]) for model in models]
    for _ in range(3):
        for model, splitter in zip(models, splitters, strict=True):
            _step(model, splitter)
    again = gs.GradientSplitter(models[0], budget=gs.Fixed(1.0), sinks=[recorder])
    again.load_state_dict(splitters[0].state_dict())
    _step(models[0], again)
    recorder.close()
    assert [rows.step_S.tolist() for rows in kept.rows] == [[0, 1, 2, 3], [0, 1, 2]]


def test_many_bins_are_summed_up_by_leaf():
    model, kept = nn.Linear(10, 400, bias=False), Kept()
    recorder = Recorder([kept], seconds=0, max_nodes=12)
    splitter = gs.GradientSplitter(model, budget=gs.Fixed(0.5), sinks=[recorder])
    model(torch.randn(3, 10)).square().sum().backward()
    gradient = model.weight.grad.double().clone()
    splitter.step()
    (rows,) = kept.rows
    assert rows.stream.outline.num_leaves == 8
    np.testing.assert_allclose(rows.norm_SL[0], gradient.view(8, 50, 10).flatten(1).norm(dim=1), rtol=1e-6)
    scaled = (gradient.norm(dim=1) > 0.5).view(8, 50).sum(1)
    assert rows.scaled_SL[0].tolist() == scaled.tolist()


def test_a_sink_that_fails_is_dropped_with_one_warning():
    class Broken(Kept):
        def write(self, batch):
            raise OSError("gone")

    model, kept = _model(), Kept()
    splitter = gs.GradientSplitter(model, budget=gs.Fixed(1.0), sinks=[Recorder([Broken(), kept], seconds=0)])
    with pytest.warns(RuntimeWarning, match="Broken failed and gets no more rows") as seen:
        for _ in range(3):
            _step(model, splitter)
    assert len(seen) == 1
    assert sum(len(rows) for rows in kept.rows) == 3


def test_finite_norms_beyond_float32_stay_finite():
    model, kept = nn.Linear(1, 1, bias=False), Kept()
    splitter = gs.GradientSplitter(model, budget=gs.Fixed(1.0), sinks=[Recorder([kept], seconds=0)])
    model.weight.grad = torch.full((1, 1), 3.4e38)
    splitter.step()
    assert kept.rows[0].norm_SL[0, 0] == pytest.approx(3.4e38)
    assert kept.rows[0].kept_SL[0, 0] < 1e-30


def _recorded(sink, tmp_path):
    model = _model()
    recorder = Recorder([sink], seconds=3600)
    splitter = gs.GradientSplitter(model, budget=gs.Fixed(0.05), sinks=[recorder])
    for step in range(4):
        _step(model, splitter, nan=step == 2)
    recorder.close()


def test_json_lines(tmp_path):
    _recorded(JsonLinesSink(tmp_path / "run.jsonl"), tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "run.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert lines[0]["norm/all"] > 0
    assert {"norm/0", "norm/2"} <= set(lines[0])
    assert lines[2]["nonfinite"] == 1
    assert lines[2]["zeroed"] == 1
    assert "norm/0" not in lines[2], "a number that is none is left out"


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard", reason="the package tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _recorded(sink_from_words(f"tensorboard:{tmp_path}"), tmp_path)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [event.step for event in events.Scalars("gradsplit/norm/all")] == [0, 1, 3]
    assert [event.value for event in events.Scalars("gradsplit/zeroed")] == [0, 0, 1, 0]


def test_tensorboard_gets_the_angles_of_gso(tmp_path):
    pytest.importorskip("tensorboard", reason="the package tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    seen = _turned([sink_from_words(f"tensorboard:{tmp_path}")])
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    told = events.Scalars("gradsplit/turned/2")
    assert [event.step for event in told] == [0, 16, 32]
    assert told[1].value == pytest.approx(float(seen[16].by_tensor()[0, 2:].mean()), rel=1e-5)


def test_services_get_plain_finite_floats():
    """Weights & Biases and MLflow by their interfaces: a run and a client of the user's are used and stay open."""
    from gradsplit.watch.loggers import MlflowSink, WandbSink

    class Service:
        def __init__(self):
            self.sent = []

        def define_metric(self, *names, **options):
            pass

        def log(self, values):
            self.sent.append(values)

        def log_metrics(self, values, step):
            self.sent.append({**values, "step": step})

    for sink in (WandbSink, MlflowSink):
        service = Service()
        _recorded(sink(service), None)
        assert len(service.sent) == 4
        _turned([sink(service)])
        assert sum(any(name.endswith("turned/all") for name in line) for line in service.sent) == 3
        values = [value for line in service.sent for value in line.values()]
        assert all(type(value) in (int, float) and np.isfinite(value) for value in values)


@pytest.mark.parametrize("word", ["tensorboard", "jsonl:", "nosuch:place"])
def test_a_wrong_sink_is_refused(word):
    with pytest.raises(ValueError, match=f"--to {word}: expected NAME:PLACE with NAME of {', '.join(SINKS)}"):
        sink_from_words(word)


def _turned(sinks, *, steps=40, seconds=0.0):
    """GSO's steps in recorders; the last of them had a batch that was scaled as a whole."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 20), nn.Tanh(), nn.Linear(20, 3))
    seen, recorder = [], Recorder(sinks, seconds=seconds)
    optimizer = gs.GSO(model, lr=0.3, sinks=[seen.append, recorder])
    for step in range(steps):
        optimizer.zero_grad()
        x = torch.randn(8, 5)
        (model(x).square().mean() * (1e5 if step == 32 else 1.0)).backward()
        optimizer.step()
    recorder.close()
    return seen


def test_what_gso_did_is_recorded_now_and_then(tmp_path):
    seen = _turned([RunWriter(tmp_path / "run.db")])
    with RunFile(tmp_path / "run.db") as file:
        (stream,) = file.streams
        turns = file.turns(stream)
        assert file.series(stream).num_rows == 40
    assert stream.optimizer == "GSO" and stream.about["names"] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert turns.step_K.tolist() == [0, 16, 32]
    assert (turns.factor_K < 1).tolist() == [False, False, True]
    for k, step in enumerate(turns.step_K):
        record, plan = seen[step], seen[step].plan
        for t in range(4):
            rows = torch.from_numpy(plan.tensor_B == t)
            mean = torch.rad2deg(torch.acos(record.cosine_B[rows])).mean()
            assert turns.turned_KT[k, t] == pytest.approx(float(mean), rel=1e-4)
            assert turns.limit_KT[k, t] == pytest.approx(float(record.at_limit_B[rows].double().mean()))
            bounded = record.decision.scale_B[rows] / record.factor < 0.999
            assert turns.bounded_KT[k, t] == pytest.approx(float(bounded.double().mean()))


def test_a_file_without_turns_has_none(tmp_path):
    recorder = Recorder([RunWriter(tmp_path / "run.db")], seconds=0)
    model = _model()
    _step(model, gs.GradientSplitter(model, sinks=[recorder], budget=gs.Fixed(1.0)))
    recorder.close()
    with sqlite3.connect(tmp_path / "run.db") as connection:
        connection.execute("DROP TABLE turn")  # as in a file of a version before
    connection.close()
    with RunFile(tmp_path / "run.db") as file:
        assert len(file.turns(file.streams[0])) == 0


def test_loggers_get_the_angles_of_gso(tmp_path):
    seen = _turned([sink_from_words(f"jsonl:{tmp_path / 'run.jsonl'}")])
    lines = [json.loads(line) for line in (tmp_path / "run.jsonl").read_text().splitlines()]
    told = {line["step"]: line for line in lines if "batch_factor" in line}
    assert sorted(told) == [0, 16, 32]
    values = seen[16].by_tensor()
    assert told[16]["turned/all"] == pytest.approx(float(values[0].mean()), rel=1e-5)
    assert told[16]["turned/0"] == pytest.approx(float(values[0, :2].mean()), rel=1e-5)
    assert told[16]["at_limit/all"] == pytest.approx(float(values[1].mean()), abs=1e-6)
    assert told[32]["batch_factor"] < 1e-2


def test_every_plan_of_an_optimizer_is_a_stream(tmp_path):
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    recorder = Recorder([RunWriter(tmp_path / "run.db")], seconds=0)
    groups = [{"params": list(model[0].parameters())}, {"params": list(model[1].parameters()), "plan": "per_tensor"}]
    optimizer = gs.GSO(groups, sinks=[recorder])
    model(torch.randn(2, 5)).sum().backward()
    optimizer.step()
    recorder.close()
    with RunFile(tmp_path / "run.db") as file:
        assert [stream.outline.num_leaves for stream in file.streams] == [5, 2]
        assert all(len(file.turns(stream)) == 1 for stream in file.streams)
