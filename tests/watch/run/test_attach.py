"""Attaching, piece by piece, in this process: names, reading, closures, nested steps, what the script itself scales."""

from __future__ import annotations

import contextlib
import copy
import sys
import types

import numpy as np
import pytest
import torch
from torch import nn

import gradsplit as gs
from gradsplit.plan import Layout, xsp
from gradsplit.watch.record import RunFile, recording_plan
from gradsplit.watch.run.names import named_parameters_of
from gradsplit.watch.run.on_import import when_imported
from gradsplit.watch.run.patched import Losses
from gradsplit.watch.run.session import Session
from gradsplit.watch.run.settings import Settings, budget_from_words
from gradsplit.watch.run.track import BlockReader
from tests.watch.run.watched import watched


def _net():
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def _layout(tensors):
    return Layout.from_shapes({name: tensor.shape for name, tensor in tensors.items()})


def _session(tmp_path, **options):
    return Session(Settings(record=str(tmp_path / "run.db"), seconds=3600.0, quiet=True, **options))


def _series(tmp_path, session, stream=0):
    session.close()
    with RunFile(tmp_path / "run.db") as file:
        return file.series(file.streams[stream])


def _train(model, optimizer, steps, *, seed=3):
    data = torch.randn(steps, 4, 5, generator=torch.Generator().manual_seed(seed))
    for batch in data:
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()


def test_the_loss_of_a_term_splitter_is_the_weighted_sum_of_its_terms(tmp_path):
    """It makes one backward pass per term, and none by Tensor.backward."""
    ends = []
    for observed in (False, True):
        torch.manual_seed(0)
        model, x = _net(), torch.randn(4, 5)
        optimizer, losses = torch.optim.Adam(model.parameters(), 0.01), []
        terms = gs.TermSplitter(model, weights={"b": 0.5})
        with watched(tmp_path / "run.db") if observed else contextlib.nullcontext():
            for _ in range(4):
                y = model(x)
                a, b = y.square().mean(), y.abs().mean()
                losses.append((a + 0.5 * b).item())
                optimizer.zero_grad()
                terms.backward(a=a, b=b)
                optimizer.step()
            with pytest.raises(ValueError, match="got float"):
                terms.backward(a=1.0)
        ends.append([parameter.detach().clone() for parameter in model.parameters()])
    with RunFile(tmp_path / "run.db") as file:
        np.testing.assert_allclose(file.series(file.streams[0]).loss_R, losses, rtol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW", "RMSprop"])
def test_watching_leaves_every_bit(tmp_path, optimizer):
    plain = _net()
    watched = copy.deepcopy(plain)
    _train(plain, getattr(torch.optim, optimizer)(plain.parameters(), 0.01), 8)
    session, mine = _session(tmp_path), getattr(torch.optim, optimizer)(watched.parameters(), 0.01)
    mine.register_step_pre_hook(session.pre)
    _train(watched, mine, 8)
    for a, b in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a.grad, b.grad)
    assert _series(tmp_path, session).num_rows == 8


def test_norms_are_those_of_the_gradients(tmp_path):
    model = _net()
    session, optimizer = _session(tmp_path), torch.optim.SGD(model.parameters(), 0.1)
    optimizer.register_step_pre_hook(session.pre)
    _train(model, optimizer, 1)
    series = _series(tmp_path, session)
    oracle = {name: p.grad.double().norm().item() for name, p in model.named_parameters()}
    for name, norm in oracle.items():
        node = series.stream.outline.names_N.index(name)
        assert series.node_peak(node)[0] == pytest.approx(norm, rel=2**-8)
    assert series.total_R[0] == pytest.approx(np.sqrt(sum(norm**2 for norm in oracle.values())), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64])
def test_blocks_are_read_as_a_float64_oracle_reads_them(dtype):
    shapes = {"w": (37, 4, 2), "b": (11,), "s": (), "one": (1, 9), "channels": (8, 3, 2, 2)}
    tensors = {name: torch.randn(shape, dtype=torch.float64).to(dtype) for name, shape in shapes.items()}
    tensors["channels"] = tensors["channels"].to(memory_format=torch.channels_last)
    plan = recording_plan(_layout(tensors), max_nodes=30)
    squares = BlockReader(plan, torch.device("cpu")).squares(list(tensors.values()))
    for b, bin_ in enumerate(plan.bins):
        (box,) = bin_.boxes
        rows = tensors[box.tensor]
        rows = rows[box.start[0] : box.stop[0]] if rows.dim() > 1 else rows
        expected = rows.to(torch.complex128).abs().square().sum().item()
        assert squares[b].item() == pytest.approx(expected, rel=1e-5), bin_.name


def test_finite_entries_whose_squares_overflow_are_finite():
    huge = {"w": torch.full((4, 3), 1e30), "b": torch.full((5,), 3e38)}
    squares = BlockReader(xsp(_layout(huge)), torch.device("cpu")).squares(list(huge.values()))
    assert squares[:4].tolist() == pytest.approx([3e60] * 4)
    assert squares[4].item() == pytest.approx(5 * 9e76, rel=1e-6)


def test_absent_sparse_and_bad_gradients():
    table = nn.Embedding(6, 3, sparse=True)
    table(torch.tensor([1, 4, 4])).sum().backward()
    bad = torch.zeros(2, 2)
    bad[1, 0] = float("inf")
    tensors = {"t": table.weight, "none": torch.zeros(3), "bad": bad}
    before = table.weight.grad.clone()
    squares = BlockReader(xsp(_layout(tensors)), torch.device("cpu")).squares([table.weight.grad, None, bad])
    assert squares.tolist() == pytest.approx([0, 3, 0, 0, 12, 0, 0, 0, float("inf")])
    assert not table.weight.grad.is_coalesced(), "looking changes nothing"
    assert torch.equal(before.to_dense(), table.weight.grad.to_dense())


class _Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(2, 2)


class _Decoder(_Encoder):
    pass


def _wrapped():
    model = nn.Sequential(nn.Linear(2, 2))
    outer = nn.Module()
    outer.module = model
    return outer, model.parameters(), {"0.weight", "0.bias"}


def _two():
    pair = _Encoder(), _Decoder()
    names = {f"{kind}.proj.{leaf}" for kind in ("_Encoder", "_Decoder") for leaf in ("weight", "bias")}
    return pair, [p for model in pair for p in model.parameters()], names


@pytest.mark.parametrize(
    "make",
    [
        lambda: ((m := _net()), m.parameters(), {"0.weight", "0.bias", "2.weight", "2.bias"}),
        lambda: ((m := _net()), [(f"mine.{n}", p) for n, p in m.named_parameters() if n[0] == "2"],
                 {"mine.2.weight", "mine.2.bias"}),
        _wrapped,
        _two,
        lambda: (None, [nn.Parameter(torch.zeros(2)) for _ in "ab"], {"group0.param0", "group0.param1"}),
    ],
    ids=["module", "given", "wrapper", "two modules", "nobody's"],
)  # fmt: skip
def test_names_come_from_wherever_they_can_be_had(make):
    keep, parameters, names = make()
    pairs = named_parameters_of(torch.optim.SGD(parameters, 0.1))
    assert {name for name, _ in pairs} == names
    assert keep is None or pairs


def test_two_optimizers_and_a_new_parameter_make_three_streams(tmp_path):
    session, model = _session(tmp_path), _net()
    late = nn.Parameter(torch.ones(4, 5))
    first = torch.optim.SGD(model[0].parameters(), 0.1)
    second = torch.optim.SGD(model[2].parameters(), 0.1)
    for optimizer in (first, second):
        optimizer.register_step_pre_hook(session.pre)
    for step in range(4):
        if step == 2:
            first.add_param_group({"params": [late]})
        (model(late).square().mean()).backward()
        first.step()
        second.step()
    session.close()
    with RunFile(tmp_path / "run.db") as file:
        rows = [file.series(stream).num_rows for stream in file.streams]
    assert rows == [2, 4, 2]


def test_a_step_inside_another_is_not_counted(tmp_path):
    class Outer(torch.optim.Optimizer):
        def __init__(self, inner):
            super().__init__(inner.param_groups, {})
            self.inner = inner

        def step(self, closure=None):
            self.inner.step()

    session, model = _session(tmp_path), _net()
    inner = torch.optim.SGD(model.parameters(), 0.1)
    outer = Outer(inner)
    for optimizer in (inner, outer):
        optimizer.register_step_pre_hook(session.pre)
    _train(model, outer, 3)
    session.close()
    with RunFile(tmp_path / "run.db") as file:
        assert [(s.optimizer, file.series(s).num_rows) for s in file.streams] == [("Outer", 3)]


def test_a_step_that_raised_does_not_silence_the_next(tmp_path):
    class Fails(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure=None):
            raise RuntimeError("mine")

    session, model = _session(tmp_path), _net()
    fails, works = Fails(model[0].parameters(), 0.1), torch.optim.SGD(model[2].parameters(), 0.1)
    for optimizer in (fails, works):
        optimizer.register_step_pre_hook(session.pre)
    model(torch.randn(4, 5)).square().mean().backward()
    with pytest.raises(RuntimeError, match="mine"):
        fails.step()
    works.step()
    assert _series(tmp_path, session, stream=1).num_rows == 1


def _own(session, parameters, most):
    """What the script's own call does under `gradsplit run`."""
    session.before_own_bound(parameters)
    norm = nn.utils.clip_grad_norm_(parameters, most)
    session.after_own_bound(parameters, most, norm)


@pytest.mark.parametrize("control", [False, True])
def test_the_scripts_own_clip_is_seen_from_before_it(tmp_path, control):
    budget = ("fixed:limit=inf",) if control else ()
    session, model = _session(tmp_path, control=control, budget=budget), _net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    optimizer.register_step_pre_hook(session.pre)
    seen = []
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.randn(4, 5)).square().mean().backward()
        seen.append(torch.stack([p.grad.norm() for p in model.parameters()]).norm().item())
        _own(session, list(model.parameters()), 0.01)
        optimizer.step()
    series = _series(tmp_path, session)
    np.testing.assert_allclose(series.total_R[1:], seen[1:], rtol=1e-5)
    np.testing.assert_allclose(series.own_scale_R, 0.01 / np.array(seen), rtol=1e-3)
    # Before the first step it is not known whose gradients these are: that row is reckoned back.
    assert series.total_R[0] == pytest.approx(seen[0], rel=1e-3)


def test_under_control_a_nan_is_zeroed_before_the_scripts_own_clip_spreads_it(tmp_path):
    session, model = _session(tmp_path, control=True, budget=("fixed:limit=inf",)), _net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    optimizer.register_step_pre_hook(session.pre)
    for step in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 5)).square().mean().backward()
        if step == 1:
            model[0].weight.grad[3, 2] = float("nan")
        _own(session, list(model.parameters()), 0.01)
        optimizer.step()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    series = _series(tmp_path, session)
    assert series.zeroed_WL.sum(1).tolist() == [0, 1, 0]


def test_losses_are_summed_over_what_a_step_uses():
    losses = Losses()
    losses.note(torch.tensor(1.0))
    losses.note(torch.tensor([2.0]))
    losses.note(torch.tensor([2.0, 3.0]))
    assert float(losses.take()) == 3.0
    assert float(losses.take()) == 3.0, "a second optimizer steps on the same backward"
    loss = torch.tensor(5.0)
    scaled = loss * 1024
    losses.note_scaled(loss, scaled)
    losses.note(scaled)
    assert float(losses.take()) == 5.0


def test_a_failure_of_ours_is_one_warning_and_the_script_goes_on(tmp_path, monkeypatch, capsys):
    session, model = _session(tmp_path), _net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    optimizer.register_step_pre_hook(session.pre)

    def broken(*_):
        raise RuntimeError("ours")

    monkeypatch.setattr(BlockReader, "squares", broken)
    _train(model, optimizer, 3)
    assert capsys.readouterr().err.count("gradsplit: watching stopped, the training goes on") == 1
    session.close()


def test_a_module_is_waited_for_and_keeps_its_loader(tmp_path, monkeypatch):
    (tmp_path / "waited_for.py").write_text("value = 3\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    arrived = []
    when_imported("waited_for", lambda: arrived.append(sys.modules["waited_for"].value))
    assert not arrived
    module = __import__("waited_for")
    assert isinstance(module, types.ModuleType)
    assert arrived == [3]
    assert "exec_module" not in vars(module.__loader__)
    assert not any(type(finder).__name__ == "_Once" for finder in sys.meta_path)
    del sys.modules["waited_for"]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("relativ", "expected a budget of relative_step, fixed"),
        ("relative:faktor=2", "expected a key of factor, eps after 'relative', got 'faktor'"),
        ("fixed:limit=two", "expected a number for 'limit', got 'two'"),
    ],
)
def test_a_wrong_budget_is_refused(word, message):
    with pytest.raises(ValueError, match=f"--budget {word}: {message}"):
        budget_from_words([word])


@pytest.mark.parametrize("options", [{}, {"in_backward": True}, {"direction": "adam"}], ids=str)
def test_what_gso_does_is_read_now_and_then_and_changes_no_bit(tmp_path, options):
    torch.manual_seed(0)
    plain = _net()
    watched = copy.deepcopy(plain)
    _train(plain, gs.GSO(plain, **options), 30)
    session, mine = _session(tmp_path), gs.GSO(watched, **options)
    mine.register_step_pre_hook(session.pre)
    _train(watched, mine, 30)
    for a, b in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(a, b)
    session.close()
    if "in_backward" in options:  # no gradient is left at the step, so that nothing is recorded
        return
    with RunFile(tmp_path / "run.db") as file:
        turns = file.turns(file.streams[0])
    assert turns.step_K.tolist() == ([] if options else [8, 24])
    assert np.isfinite(turns.turned_KT).all() and (turns.turned_KT > 0).all() and (turns.turned_KT <= 180).all()
    assert not mine.measures


def test_a_script_that_measures_by_itself_goes_on_measuring(tmp_path):
    model = _net()
    session, optimizer = _session(tmp_path), gs.GSO(model)
    optimizer.measures = True
    optimizer.register_step_pre_hook(session.pre)
    _train(model, optimizer, 12)
    assert optimizer.measures and optimizer.records[0].cosine_B is not None
    session.close()
