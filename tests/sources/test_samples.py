"""SampleSplitter beside everything else: attaching, copies, other libraries' habits, and bad input."""

from __future__ import annotations

import copy
import math
import pickle
import types
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import gradsplit as gs
from gradsplit.sources import RunningLimit, SampleSplitter, SampleWatch
from tests.sources.cases import grads, made

RULE = RunningLimit(quantile=0.5, factor=1.5)
LOOSE = RunningLimit(factor=1e12)


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def test_removing_leaves_the_model_as_it_was():
    model = _net()
    before = [dict(module.__dict__) for module in model.modules()]
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    splitter = SampleSplitter(model).attach(optimizer)
    assert any("forward" in module.__dict__ for module in model.modules())
    splitter.remove()
    splitter.remove()
    assert [dict(module.__dict__) for module in model.modules()] == before
    assert not optimizer._optimizer_step_pre_hooks


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_a_split_model_is_an_ordinary_model(copied):
    model, x = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)), torch.randn(5, 3)
    with SampleSplitter(model, RULE) as splitter:
        twin = copied(model)
        y = twin(x)
        (y * torch.tensor([1.0, 1, 1, 1, 1e4]).view(-1, 1)).sum().backward()
        assert splitter.named() == []
        assert model[0].weight.grad is None
        assert list(twin.state_dict()) == list(model.state_dict())
        again = copied(twin)
        torch.testing.assert_close(again.eval()(x), twin.eval()(x))
    weight = twin[0].weight.grad.clone()
    twin.zero_grad()
    twin.__dict__.pop("forward", None)
    twin[1].reset_running_stats()
    (twin.train()(x) * torch.tensor([1.0, 1, 1, 1, 1e4]).view(-1, 1)).sum().backward()
    torch.testing.assert_close(twin[0].weight.grad, weight)


def test_evaluation_and_frozen_layers_are_left_alone():
    model, x = _net(), torch.randn(5, 3)
    model[0].requires_grad_(False)
    with SampleSplitter(model, RULE) as splitter:
        with torch.no_grad():
            model(x)
        (model(x) * torch.tensor([1.0, 1, 1, 1, 1e4]).view(-1, 1)).sum().backward()
    assert {row.layer for row in splitter.named()} == {"2"}
    assert model[0].weight.grad is None


def test_a_layer_called_twice_is_split_in_both_calls():
    model, x = nn.Linear(3, 3).double(), torch.randn(5, 3).double()
    good = [0, 1, 3, 4]
    model(torch.tanh(model(x[good]))).square().sum().backward()
    expected = grads(model)
    x[2] = math.nan
    with SampleSplitter(model, LOOSE) as splitter:
        model(torch.tanh(model(x))).square().sum().backward()
    for key, grad in grads(model).items():
        torch.testing.assert_close(grad, expected[key])
    assert len(splitter.named()) == 2


def test_tied_weights_get_the_sum_of_both_layers():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(7, 4)
            self.head = nn.Linear(4, 7, bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids):
            return self.head(self.table(ids))

    model, ids = Tied().double(), torch.randint(7, (5, 3))
    good, weight = [0, 1, 3, 4], torch.tensor([1.0, 1, math.nan, 1, 1]).double()
    model(ids[good]).square().sum().backward()
    expected = grads(model)
    with SampleSplitter(model, LOOSE):
        (model(ids).square().flatten(1).sum(1) * weight).sum().backward()
    torch.testing.assert_close(grads(model)["table.weight"], expected["table.weight"])


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["linear", "lstm"])
def test_checkpointed_activations_give_the_same_gradient(reentrant, name):
    model, x = made(name)
    x[2] = math.nan
    x.requires_grad_()
    signal = torch.randn_like(model(x))
    signal[4] *= 50
    found = []
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=reentrant)):
        with SampleSplitter(model, RULE) as splitter:
            (run(x) * signal).sum().backward()
        found.append((grads(model), [row.sample for row in splitter.named()]))
    assert found[0][1] == found[1][1]
    for key, grad in found[0][0].items():
        torch.testing.assert_close(grad, found[1][0][key])


def test_accumulation_adds_and_counts_every_pass():
    model, x = _net(), torch.randn(8, 3)
    x[1], x[6] = math.nan, math.nan
    with SampleSplitter(model, LOOSE) as splitter:
        for part in x.split(4):
            model(part).square().sum().backward()
        assert {(row.step, row.sample) for row in splitter.named()} == {(0, 1), (1, 2)}
        assert {(row.step, row.sample) for row in splitter.named(last=True)} == {(1, 2)}
        model(x[2:4]).square().sum().backward()
        assert splitter.named(last=True) == []
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_masks_as_well(dtype):
    model, x = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)), torch.randn(5, 3)
    good = [0, 1, 3, 4]
    with torch.autocast("cpu", dtype):
        y = model(x[good])
    y.float().square().sum().backward()
    expected = grads(model)
    x[2] = math.nan
    with SampleSplitter(model, LOOSE), torch.autocast("cpu", dtype):
        y = model(x)
        y.float().square().sum().backward()
    for key, grad in grads(model).items():
        assert grad.dtype == torch.float32
        torch.testing.assert_close(grad, expected[key], rtol=0.05, atol=0.05)


def test_under_a_scaler_an_overflow_is_left_to_it_and_a_bad_input_is_masked():
    model, x = _net(), torch.randn(4, 3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    splitter = SampleSplitter(model, LOOSE, scaler=scaler).attach(optimizer)
    x[1] = math.nan
    scaler.scale(model(x).square().sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**8, "the masked sample is no overflow"
    x[1] = 0.0
    optimizer.zero_grad()
    scaler.scale(model(x).square().sum() * 3e38).backward()
    before = model[0].weight.detach().clone()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**7, "the overflow reached the scaler"
    assert torch.equal(model[0].weight, before)
    splitter.remove()


def test_the_scale_of_a_scaler_does_not_move_the_limits():
    found = []
    for size in (1.0, 2.0**10):
        model, x = _net(), torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
        scaler = torch.amp.GradScaler("cpu", init_scale=size)
        with SampleSplitter(model, RULE, scaler=scaler) as splitter:
            scaler.scale(model(x).square().sum()).backward()
        found.append(splitter.state_dict()["layers"])
    assert found[0].keys() == found[1].keys()
    for name, scale in found[0].items():
        torch.testing.assert_close(scale, found[1][name])


def test_a_saved_state_goes_on_with_the_same_limits():
    x = torch.randn(12, 6, 3)
    x[:, 2] *= 4
    straight, halves = _net(), _net()
    with SampleSplitter(straight, RULE) as splitter:
        for batch in x:
            straight(batch).square().sum().backward()
    whole = splitter.state_dict()
    state = None
    for part in x.split(6):
        with SampleSplitter(halves, RULE) as splitter:
            if state is not None:
                splitter.load_state_dict(state)
            for batch in part:
                halves(batch).square().sum().backward()
            state = copy.deepcopy(splitter.state_dict())
    assert state == whole
    for one, other in zip(straight.parameters(), halves.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_a_state_of_another_model_is_refused_and_changes_nothing():
    splitter = SampleSplitter(_net())
    state = {"layers": {"0": torch.ones(()), "nowhere": torch.ones(())}, "joints": {}, "passes": 3}
    with pytest.raises(ValueError, match="'nowhere'"):
        splitter.load_state_dict(state)
    assert splitter.state_dict() == {"layers": {}, "joints": {}, "passes": 0}


def test_a_step_without_a_sound_sample_is_passed_over_and_said_once():
    model = _net()
    optimizer = torch.optim.AdamW(model.parameters(), 0.1, weight_decay=0.5)
    splitter = SampleSplitter(model, LOOSE).attach(optimizer)
    x = torch.randn(4, 3)
    model(x).sum().backward()
    optimizer.step()
    before = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
    with pytest.warns(UserWarning, match="no sample of the batch is finite"):
        model(x * math.nan).sum().backward()
    assert all((parameter.grad.isfinite()).all() for parameter in model.parameters())
    optimizer.step()
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[0][key])
    assert optimizer.state_dict()["state"][0]["step"] == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x * math.nan).sum().backward()
    optimizer.step()
    model(x).sum().backward()
    model(x * math.nan).sum().backward()
    optimizer.step()
    assert optimizer.state_dict()["state"][0]["step"] == 2, "one of two micro-batches was sound"
    splitter.remove()


def test_a_step_in_which_one_of_two_heads_has_no_sound_sample_is_made():
    torch.manual_seed(0)
    trunk, sound, lost = nn.Linear(3, 4), nn.Linear(4, 1), nn.Linear(4, 1)
    model = nn.ModuleList([trunk, sound, lost])
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    splitter = SampleSplitter(model, LOOSE).attach(optimizer)
    h, before = trunk(torch.randn(5, 3)), copy.deepcopy(model.state_dict())
    with pytest.warns(UserWarning, match="no sample of the batch is finite"):
        (sound(h).sum() + math.nan * lost(h).sum()).backward()
    optimizer.step()
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert moved == {"0.weight", "0.bias", "1.weight", "1.bias"}
    splitter.remove()


def test_a_batch_of_one_is_bounded_by_the_ones_before():
    model = nn.Linear(2, 1, bias=False)
    with SampleSplitter(model, "regression") as splitter:
        for _ in range(3):
            model(torch.tensor([[3.0, 4.0]])).sum().backward()
        model.zero_grad()
        model(torch.tensor([[3e4, 4e4]])).sum().backward()
    torch.testing.assert_close(model.weight.grad.norm(), torch.tensor(3 * 5 * 1.25))
    assert [row.step for row in splitter.named()] == [3]


def test_an_input_without_a_batch_dimension_is_one_sample():
    model = nn.Sequential(nn.Conv1d(2, 3, 2), nn.Flatten(0), nn.Linear(9, 1))
    x = torch.randn(2, 4)
    model(x).sum().backward()
    expected = grads(model)
    with SampleSplitter(model, LOOSE) as splitter:
        model(x).sum().backward()
    for key, grad in grads(model).items():
        torch.testing.assert_close(grad, expected[key])
    x[0, 0] = math.nan
    with pytest.warns(UserWarning, match="no sample"), splitter:
        model(x).sum().backward()
    assert all(parameter.grad.abs().max() == 0 for parameter in model.parameters())
    assert {row.sample for row in splitter.named()} == {0}


def test_layers_without_a_rule_are_listed_once():
    model = nn.Sequential(nn.Linear(3, 4), nn.PReLU(), nn.BatchNorm1d(4))
    splitter = SampleSplitter(model, quarantine=())
    with pytest.warns(UserWarning, match=r"no rule for 1\.weight, 2\.weight, 2\.bias;"):
        splitter.attach()
    splitter.remove()
    with splitter:
        assert splitter.unruled == ["1.weight", "2.weight", "2.bias"]
    assert SampleSplitter(model, leave_out=["1"]).unruled == []


def test_a_module_named_in_also_is_bounded_as_a_whole():
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Parameter(torch.randn(3, 3).double())

        def forward(self, x):
            return torch.tanh(x @ self.gate)

    model, x = nn.Sequential(Own(), nn.Linear(3, 1).double()), torch.randn(5, 3).double()
    good = [0, 1, 3, 4]
    model(x[good]).sum().backward()
    expected = grads(model)
    x[2] = math.nan
    with SampleSplitter(model, LOOSE, also=["0"]) as splitter:
        model(x).sum().backward()
    assert splitter.unruled == []
    for key, grad in grads(model).items():
        torch.testing.assert_close(grad, expected[key])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kind": "detection"}, r"kind='detection'\): expected 'classification' or 'regression'"),
        ({"kind": 3}, r"kind=3\)"),
        ({"per": "row"}, r"per='row'"),
        ({"batch_dim": -1}, r"batch_dim=-1"),
        ({"quarantine": "all"}, r"quarantine='all'"),
        ({"quarantine": ["fc"]}, r"got 'fc', which the model does not have"),
        ({"also": ["00"]}, r"got '00', which the model does not have\. Nearest: '0'"),
        ({"leave_out": ["0.weigh"]}, r"got '0.weigh', which the model does not have"),
        ({"batch_dim": True}, r"batch_dim=True"),
        ({"quarantine": None}, r"quarantine=None\): expected 'auto'"),
        ({"also": "0"}, r"also='0'\): expected a list of module names"),
        ({"leave_out": "0"}, r"leave_out='0'\): expected a list"),
        ({"scaler": "amp"}, r"scaler='amp'\): expected a GradScaler"),
        ({"keep": -1}, r"keep=-1\): expected a number of notes"),
    ],
)
def test_a_bad_option_is_refused_by_name(options, said):
    model = _net()
    with pytest.raises(ValueError, match=said):
        SampleSplitter(model, **options)
    assert not any("forward" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("model", [None, "net", [nn.Linear(1, 1)]])
def test_what_is_no_model_is_refused_by_name(model):
    with pytest.raises(TypeError, match=r"SampleSplitter\(.*expected a torch.nn.Module"):
        SampleSplitter(model)


@pytest.mark.parametrize("optimizer", ["adam", torch.optim.SGD(nn.Linear(1, 1).parameters(), 0.1)])
def test_the_optimizer_of_another_model_is_refused_and_nothing_is_attached(optimizer):
    model = _net()
    with pytest.raises(ValueError, match=r"attach\(.*expected the optimizer of this model"):
        SampleSplitter(model).attach(optimizer)
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_a_model_of_which_nothing_is_split_says_so():
    for model in (_net().requires_grad_(False), nn.ReLU()):
        with pytest.warns(UserWarning, match="no layer of this model is split"), SampleSplitter(model):
            pass


def test_complex_layers_have_no_rule():
    model = nn.Sequential(nn.Linear(3, 4, dtype=torch.complex64), nn.Linear(4, 2, dtype=torch.complex64))
    with pytest.warns(UserWarning, match=r"no (rule for 0\.weight|layer of this model)"), SampleSplitter(model):
        model(torch.randn(5, 3, dtype=torch.complex64)).abs().sum().backward()
    assert model[0].weight.grad is not None


def test_transformations_of_torch_func_are_refused_by_name():
    model, x = _net(), torch.randn(5, 4, 3)
    with SampleSplitter(model):
        with pytest.raises(RuntimeError, match=r"transformation of torch\.func.*Call \.remove\(\)"):
            torch.func.vmap(model)(x)
        with torch.no_grad():
            assert torch.func.vmap(model)(x).shape == (5, 4, 2)


def test_an_empty_batch_has_no_gradient():
    model = _net()
    with SampleSplitter(model) as splitter:
        model(torch.ones(0, 3)).sum().backward()
    assert splitter.named() == [] and not any(parameter.grad.any() for parameter in model.parameters())


def test_samples_are_seen_beside_a_splitter_of_samples():
    model, x = _net(), torch.randn(6, 3)
    x[4] = math.nan
    with SampleSplitter(model) as splitter, SampleWatch(model) as watch:
        model(x).square().sum().backward()
    assert {row.sample for row in splitter.named()} == {row.sample for row in watch.read_last().rows} == {4}
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_two_splitters_on_one_model_are_refused():
    model = _net()
    with SampleSplitter(model), pytest.raises(RuntimeError, match=r"Call \.remove\(\) of the first"):
        SampleSplitter(model).attach()
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_second_derivatives_are_refused_by_name():
    model, x = _net(), torch.randn(4, 3, requires_grad=True)
    with SampleSplitter(model), pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(model(x).sum(), x, create_graph=True)


def test_compiled_models_are_refused_by_name():
    with pytest.raises(RuntimeError, match="not compiled"):
        SampleSplitter(torch.compile(_net()))
    model = _net()
    model[0].compile()
    with pytest.raises(RuntimeError, match="not compiled"):
        SampleSplitter(model)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch's compiler, of its own look
def test_a_split_model_that_is_compiled_later_runs_its_layers_eagerly_and_split():
    model, x = _net(), torch.randn(5, 3)
    x[2] = math.nan
    with SampleSplitter(model, LOOSE) as splitter:
        torch.compile(model, backend="eager")(x).square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert {row.sample for row in splitter.named()} == {2}


def test_data_parallel_is_refused_by_name():
    with pytest.raises(ValueError, match="DataParallel"):
        SampleSplitter(nn.DataParallel(_net()))


def test_packed_sequences_are_refused_by_name():
    model = nn.LSTM(3, 2)
    packed = nn.utils.rnn.pack_sequence([torch.randn(3, 3), torch.randn(2, 3)])
    with SampleSplitter(model), pytest.raises(ValueError, match="PackedSequence"):
        model(packed)


def test_another_library_that_runs_a_layer_keeps_it():
    model = _net()
    plain = model[0].forward
    model[0].forward = lambda x: plain(x) * 2
    splitter = SampleSplitter(model)
    assert splitter.unruled == ["0.weight", "0.bias"]
    x = torch.randn(4, 3)
    expected = model(x)
    with pytest.warns(UserWarning, match="no rule"):
        splitter.attach()
    torch.testing.assert_close(model(x), expected)
    splitter.remove()
    assert "forward" in model[0].__dict__


def test_a_method_in_the_place_of_forward_is_kept():
    """As accelerate wraps a model for mixed precision: a bound method that calls the class's forward."""
    model, seen = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)), []

    def forward(self, x):
        seen.append(len(x))
        return type(self).forward(self, x)

    model.forward = types.MethodType(forward, model)
    splitter = SampleSplitter(model).attach()
    twin = copy.deepcopy(model)
    for net in (model, twin):
        net(torch.randn(4, 3))
    assert seen == [4, 4]
    splitter.remove()
    model(torch.randn(5, 3))
    assert seen == [4, 4, 5]
    model.__dict__.pop("forward")
    twin.__dict__.pop("forward")
    head = nn.Linear(3, 2)
    head.forward = types.MethodType(forward, head)
    assert SampleSplitter(head).unruled == ["weight", "bias"]


def test_a_library_that_wraps_a_split_layer_keeps_it_when_the_splitter_goes():
    layer, x = nn.Linear(3, 2), torch.ones(2, 3)
    splitter = SampleSplitter(layer).attach()
    inner = layer.forward
    layer.forward = lambda x: inner(x) * 2
    expected = layer(x)
    splitter.remove()
    torch.testing.assert_close(layer(x), expected)
    (layer(x) * torch.tensor([[math.nan], [1.0]])).sum().backward()
    assert layer.weight.grad.isnan().all(), "the splitter is off"


def test_samples_terms_and_rows_are_split_together():
    """The bad sample is gone before the terms are weighed, and before the rows are bounded."""
    model, x = _net(), torch.randn(6, 3)
    good = [0, 1, 3, 4, 5]

    def terms(rows):
        y = model(rows)
        return {"one": y[:, 0].square().sum(), "other": 1e3 * y[:, 1].square().sum()}

    gs.TermSplitter(model).backward(**terms(x[good]))
    gs.GradientSplitter(model, budget=gs.Fixed(0.5)).step()
    expected = grads(model)
    x[2] = math.nan
    with SampleSplitter(model, LOOSE):
        gs.TermSplitter(model).backward(**terms(x))
    record = gs.GradientSplitter(model, budget=gs.Fixed(0.5)).step()
    assert not bool((record.decision.outcome_B == gs.Outcome.ZEROED).any())
    for key, grad in grads(model).items():
        torch.testing.assert_close(grad, expected[key])


def test_gso_trains_as_if_the_bad_sample_were_not_there():
    x = torch.randn(16, 3)
    good = [i for i in range(16) if i != 2]
    found = []
    for bad in (False, True):
        model = _net()
        optimizer = gs.GSO(model, lr=0.03)
        splitter = SampleSplitter(model, LOOSE).attach(optimizer)
        rows = x.clone() if bad else x[good]
        if bad:
            rows[2] = math.nan
        for _ in range(10):
            optimizer.zero_grad()
            (model(rows) - 1).square().sum().backward()
            optimizer.step()
        splitter.remove()
        found.append(list(model.parameters()))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
