"""The recurrences of the long tasks, run side by side, are the library's: autograd, `gain_penalty`, `ChainSplitter`."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.chain import record
from benchmarks.chain.long_tasks import BUILDERS, LOOK, Group, drawn, loss_gradient
from benchmarks.chain.recurrences import METHODS, Recurrences, method
from gradsplit.budget import Fixed
from gradsplit.chain import ChainSplitter, Unrolled, gain_penalty
from gradsplit.lab.workloads.recurrence import SequenceTask, TanhRNN

LENGTH, SEEDS = 12, (3, 4)


class Net(nn.Module):
    """The same recurrence by the library's cell, with the weights of a workload's model."""

    def __init__(self, model: TanhRNN) -> None:
        super().__init__()
        hidden, inputs = model.w_in.shape
        self.rnn = nn.RNN(inputs, hidden)
        self.out = nn.Linear(hidden, model.head.out_features)
        self.double()
        self.unrolled = Unrolled(self.rnn)
        with torch.no_grad():
            self.rnn.weight_ih_l0.copy_(model.w_in)
            self.rnn.weight_hh_l0.copy_(model.w_rec)
            self.rnn.bias_ih_l0.copy_(model.bias)
            self.rnn.bias_hh_l0.zero_()
            self.out.load_state_dict(model.head.state_dict())

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.unrolled(x)[0][-1])

    def owners(self) -> dict[str, nn.Parameter]:
        cell = self.rnn
        return {"w_in": cell.weight_ih_l0, "w_rec": cell.weight_hh_l0, "bias": cell.bias_ih_l0,
                "head.weight": self.out.weight, "head.bias": self.out.bias}  # fmt: skip


def library_gradients(net: Net, task: str, name: str, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """One update's gradients by the library, the step bound."""
    chain = None
    if name == "per-step bounds":
        chain = ChainSplitter(net, at=["unrolled.cells.0"], budget=Fixed(0.1), steps=True).attach()
    net.rnn.bias_hh_l0.requires_grad_(False)
    with net.unrolled.keep_signals():
        out = net(x)
        (F.mse_loss(out[:, 0], y) if task == "adding" else F.cross_entropy(out, y)).backward()
    if name == "clip + gain penalty":
        (2.0 * gain_penalty(net.unrolled)).backward()
    owners = net.owners()
    if "clip" in name:
        nn.utils.clip_grad_norm_(owners.values(), 1.0)
    if chain is not None:
        assert chain.rows()[0].bounded > 0  # else the bound is not tested
        chain.remove()
    return {key: p.grad for key, p in owners.items() if p.grad is not None}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("task", sorted(BUILDERS))
def test_runs_side_by_side_have_the_gradients_of_the_library(task: str, name: str) -> None:
    torch.manual_seed(0)
    built = [BUILDERS[task](seed, length=LENGTH) for seed in SEEDS]
    for one in built:
        one.model.double()
        with torch.no_grad():
            for p in one.model.parameters():
                p.mul_(2).add_(0.05 * torch.randn_like(p))  # past the first steps, where every bound binds
            one.model.w_rec.mul_(0.8)
    assert all(isinstance(one, SequenceTask) for one in built)
    nets = Recurrences([one.model for one in built])
    x, y = drawn(built[0], [torch.Generator().manual_seed(seed) for seed in SEEDS], 20)
    x, y = x.double(), y.double() if task == "adding" else y
    h = nets.states(x)
    with torch.no_grad():
        mine, norm_R = nets.gradients(x, h, loss_gradient(task, nets.outputs(h[-1]), y), method(name))
    for r, one in enumerate(built):
        theirs = library_gradients(Net(one.model), task, name, x[:, r], y[r])
        assert mine.keys() == theirs.keys()
        for key, grad in theirs.items():
            torch.testing.assert_close(mine[key][r], grad, rtol=1e-5, atol=1e-9)
        if name == "SGD":
            total = torch.stack([g.square().sum() for g in theirs.values()]).sum().sqrt()
            assert float(norm_R[r]) == pytest.approx(float(total), rel=1e-9)


def test_a_group_of_runs_goes_on_where_it_stopped(tmp_path: Path) -> None:
    def group(folder: str) -> Group:
        options = Namespace(rate=0.01, penalty=2.0, states=tmp_path / folder)
        return Group("temporal-order", 10, "clip + gain penalty", [0, 1], options)

    with torch.no_grad():
        whole = group("whole")
        whole.train(2 * LOOK)
        group("parts").train(LOOK)
        rest = group("parts")
        assert rest.update == LOOK
        rest.train(2 * LOOK)
    assert rest.rows == whole.rows and rest.update == whole.update == 2 * LOOK
    for name, weight in whole.nets.weights.items():
        assert torch.equal(weight, rest.nets.weights[name])


def test_rows_are_kept_as_they_come_and_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    rows = record.Rows("chain_some", "command 1", ("length", "seed"))
    assert rows.missing(20, 1)
    rows.add({"length": 20, "seed": 1, "solved": True})
    again = record.Rows("chain_some", "command 2", ("length", "seed"))
    assert not again.missing(20, 1) and again.missing(20, 2)
    again.add({"length": 20, "seed": 0, "solved": False})
    data = json.loads((tmp_path / "chain_some.json").read_text())
    assert data["command"] == "command 2" and [row["seed"] for row in data["rows"]] == [0, 1]
    assert [path.name for path in tmp_path.iterdir()] == ["chain_some.json"]
