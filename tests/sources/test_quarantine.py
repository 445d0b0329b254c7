"""Quarantine: a bad row in front of BatchNorm touches no statistic, carries no loss and no signal, and is named."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import Tensor, nn

from gradsplit.sources import RunningLimit, SampleSplitter

LOOSE = RunningLimit(factor=1e12)


class Net(nn.Module):
    """A 0 / 0 is born in the model where a sample is constant."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(1, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.head = nn.Linear(4 * 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(1)
        x = (x - flat.mean(1).view(-1, 1, 1, 1)) / flat.std(1, correction=0).view(-1, 1, 1, 1)
        return self.head(torch.relu(self.bn(self.conv(x))).flatten(1))


def _batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(10, 1, 6, 6, generator=generator), torch.randint(3, (10,), generator=generator)


def _loss(y: Tensor, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(y, target, reduction="none").sum()


@pytest.mark.parametrize("bad", ["not finite", "large"])
def test_the_bad_row_is_the_ordinary_row_before_it_without_loss(bad):
    """The oracle: the row in front of BatchNorm replaced by hand, its loss left out by hand."""
    model, (x, target) = Net(), _batch()
    oracle = copy.deepcopy(model)
    good = [0, 1, 2, 4, 5, 6, 7, 8, 9]
    if bad == "not finite":
        x[3] = 1.0
    else:  # 0.5 in the bias-free part of the input cannot do it, a hook on the convolution can
        model.conv.register_forward_hook(lambda module, args, y: y * _at(3, 10, 1e4))
    inner = {}

    def replaced(module, args):
        rows = args[0].clone()
        rows[3] = rows[2].detach()
        inner["x"] = rows
        return rows

    oracle.bn.register_forward_pre_hook(replaced)
    clean = _batch()[0] if bad == "not finite" else x
    _loss(oracle(clean)[good], target[good]).backward()
    with SampleSplitter(model, LOOSE, quarantine="auto") as splitter:
        y = model(x)
        assert y.isfinite().all()
        _loss(y, target).backward()
    torch.testing.assert_close(model.bn.running_mean, oracle.bn.running_mean)
    torch.testing.assert_close(model.bn.running_var, oracle.bn.running_var)
    # The convolution's own sum has the signal of the bad row from nowhere: its row was replaced behind it.
    for (name, one), other in zip(model.named_parameters(), oracle.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, msg=lambda text, name=name: f"{name}: {text}")
    assert splitter.kept_S.tolist() == [i != 3 for i in range(10)]
    (row,) = [row for row in splitter.named() if row.layer == "bn"]
    assert row.sample == 3
    assert (row.ratio == "not finite") == (bad == "not finite")


def _at(place: int, size: int, value: float) -> Tensor:
    factor = torch.ones(size, 1, 1, 1)
    factor[place] = value
    return factor


def test_a_device_where_nobody_looks_gives_the_same_numbers(monkeypatch):
    found = []
    for look in (True, False):
        if not look:
            for part in ("layers", "ends", "samples"):
                monkeypatch.setattr(f"gradsplit.sources.{part}.looks", lambda tensor: False)
        model, (x, target) = Net(), _batch()
        x[3] = 1.0
        with SampleSplitter(model, LOOSE) as splitter:
            _loss(model(x), target).backward()
        found.append((model, splitter.named()))
    for one, other in zip(found[0][0].parameters(), found[1][0].parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    for one, other in zip(found[0][0].buffers(), found[1][0].buffers(), strict=True):
        torch.testing.assert_close(one, other)
    assert found[0][1] == found[1][1]


def test_without_quarantine_the_statistics_are_lost():
    model, (x, target) = Net(), _batch()
    x[3] = 1.0
    with (
        pytest.warns(UserWarning, match=r"no rule for bn\.weight, bn\.bias|no sample"),
        SampleSplitter(model, LOOSE, quarantine=()),
    ):
        _loss(model(x), target).backward()
    assert model.bn.running_mean.isnan().all()


def test_a_healthy_batch_is_left_as_it_is():
    model, (x, target) = Net(), _batch()
    plain = copy.deepcopy(model)
    _loss(plain(x), target).backward()
    with SampleSplitter(model, LOOSE) as splitter:
        _loss(model(x), target).backward()
    assert splitter.named() == []
    assert splitter.kept_S is None
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    for one, other in zip(model.buffers(), plain.buffers(), strict=True):
        assert torch.equal(one, other)


def test_only_the_first_normalisation_looks_at_lengths():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.BatchNorm1d(4))
    splitter = SampleSplitter(model)
    assert {name: joint.rule.factor for name, joint in splitter.joints.items()} == {"1": 3.0, "3": math.inf}


def test_a_joint_that_is_named_is_looked_at_behind_its_module():
    model, (x, target) = Net(), _batch()
    x[3] = 1.0
    with SampleSplitter(model, LOOSE, quarantine=["conv"], leave_out=["bn"]) as splitter:
        _loss(model(x), target).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert all(buffer.isfinite().all() for buffer in model.buffers())
    assert {row.sample for row in splitter.named()} == {3}
    assert "conv" in {row.layer for row in splitter.named()}


def test_a_batch_of_bad_rows_changes_no_statistic_and_is_passed_over():
    model, (x, target) = Net(), _batch()
    optimizer = torch.optim.AdamW(model.parameters(), 0.1)
    splitter = SampleSplitter(model, LOOSE).attach(optimizer)
    before = copy.deepcopy(model.state_dict())
    with pytest.warns(UserWarning, match="no sample of the batch"):
        _loss(model(torch.ones_like(x)), target).backward()
    optimizer.step()
    splitter.remove()
    for name, value in model.state_dict().items():
        if name != "bn.num_batches_tracked":
            assert torch.equal(value, before[name]), name


def test_evaluation_is_left_alone():
    model, (x, _) = Net(), _batch()
    model.eval()
    x[3] = 1.0
    expected = model(x)
    with SampleSplitter(model, LOOSE) as splitter:
        y = model(x)
    torch.testing.assert_close(y, expected, equal_nan=True)
    assert splitter.named() == []


def test_a_part_called_outside_the_model_says_that_its_loss_is_not_left_out():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    x = torch.randn(5, 3)
    x[2] = math.nan
    with SampleSplitter(model, LOOSE), pytest.warns(UserWarning, match="outside the model's own forward"):
        model[1](model[0](x))


def test_a_joint_whose_output_is_no_tensor_is_refused_by_name():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(3, 2, batch_first=True)

        def forward(self, x):
            return self.lstm(x)[0]

    model = Model()
    with SampleSplitter(model, quarantine=["lstm"]), pytest.raises(ValueError, match=r"quarantine=\['lstm'\].*tuple"):
        model(torch.randn(4, 3, 3))


def test_checkpointed_activations_are_replaced_in_the_same_way():
    model, (x, target) = Net(), _batch()
    x[3] = 1.0
    twin = copy.deepcopy(model)
    with SampleSplitter(model, LOOSE):
        _loss(model(x), target).backward()

    class Saved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = twin

        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(self.net, x, use_reentrant=False)

    saved = Saved()
    with SampleSplitter(saved, LOOSE):
        _loss(saved(x), target).backward()
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_has_no_quarantine(copied):
    model, (x, _) = Net(), _batch()
    x[3] = 1.0
    with SampleSplitter(model, LOOSE):
        twin = copied(model)
        assert twin(x).isnan().any()
        assert model(x).isfinite().all()


def test_scales_of_joints_are_saved():
    model, (x, target) = Net(), _batch()
    with SampleSplitter(model, LOOSE) as splitter:
        _loss(model(x), target).backward()
    state = splitter.state_dict()
    other = SampleSplitter(Net(), LOOSE)
    other.load_state_dict(state)
    assert other.state_dict() == state
    assert list(state["joints"]) == ["bn"]
