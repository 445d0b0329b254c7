"""GSO by share among PyTorch's optimizers: schedules, scalers, closures, copies, wrappers, directions, records."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

import gradsplit as gs
from gradsplit.optim.directions import DIRECTIONS, Direction, register
from tests.optim.amp_runs import assert_same, scaler_of, snapshot


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(9, 4)
        self.conv = nn.Conv1d(4, 6, 2)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 9)

    def forward(self, words):
        return self.head(self.norm(torch.tanh(self.conv(self.words(words).mT)).mean(-1)))


def net_of(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return Net().to(dtype)


def loss_of(model, step, size=1.0):
    words = torch.randint(0, 9, (8, 5), generator=torch.Generator().manual_seed(step))
    return size * nn.functional.cross_entropy(model(words), words[:, 0])


def train(model, optimizer, steps, scheduler=None):
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return [p.detach().clone() for p in model.parameters()]


def share_of_head(model, before):
    return float(((model.head.weight - before).norm(dim=1) / before.norm(dim=1)).detach().mean())


def test_it_works_at_once_and_learns():
    model = net_of()
    optimizer = gs.GSO(model, steps=150)
    first = float(loss_of(model, 1000).detach())
    train(model, optimizer, range(150))
    assert float(loss_of(model, 1000).detach()) < 0.7 * first


SCHEDULERS = {
    "linear": lambda o: lr_scheduler.LinearLR(o, 1.0, 0.0, total_iters=8),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 8),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.06, total_steps=9, cycle_momentum=False),
    "one cycle of momentum": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.06, total_steps=9),
    "warm-up": lambda o: lr_scheduler.LambdaLR(o, lambda step: min(1.0, (step + 1) / 4)),
    "steps": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_moves_the_share(name):
    model = net_of(torch.float64)
    optimizer = gs.GSO(model, weight_decay=0.0)
    scheduler, seen = SCHEDULERS[name](optimizer), set()
    for step in range(8):
        before, share = model.head.weight.detach().clone(), float(optimizer.param_groups[0]["lr"])
        train(model, optimizer, [step], scheduler)
        assert share_of_head(model, before) == pytest.approx(share, rel=1e-9)
        seen.add(round(share, 6))
    assert len(seen) > 3


def test_a_tensor_as_share_is_read_at_every_step():
    model, lr = net_of(torch.float64), torch.tensor(0.03)
    optimizer = gs.GSO(model, lr=lr, weight_decay=0.0)
    for share in (0.03, 0.01):
        lr.fill_(share)
        before = model.head.weight.detach().clone()
        train(model, optimizer, [0])
        assert share_of_head(model, before) == pytest.approx(share, rel=1e-6)


def test_steps_and_a_scheduler_exclude_each_other_and_nothing_moves():
    model = net_of()
    optimizer = gs.GSO(model, steps=10)
    scheduler = lr_scheduler.CosineAnnealingLR(optimizer, 10)
    before = copy.deepcopy(model.state_dict())
    loss_of(model, 0).backward()
    with pytest.raises(ValueError, match=r"GSO\(steps=10\): expected no scheduler beside steps=.*Leave one"):
        optimizer.step()
    assert_same(before, model.state_dict())
    assert scheduler is not None


def test_beyond_the_end_of_steps_it_warns_once_with_the_step_and_stays():
    model = net_of()
    optimizer = gs.GSO(model, steps=3)
    train(model, optimizer, range(3))
    before = copy.deepcopy(model.state_dict())
    with pytest.warns(UserWarning, match=r"GSO\(steps=3\): step 3 is beyond the end of the run.*whole length"):
        train(model, optimizer, [3])
    train(model, optimizer, [4])  # a second warning would be an error
    assert_same(before, model.state_dict())


def test_steps_go_on_after_loading():
    model, other = net_of(torch.float64), net_of(torch.float64)
    optimizer, resumed = gs.GSO(model, steps=10), gs.GSO(other, steps=10)
    train(model, optimizer, range(4))
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    before = other.head.weight.detach().clone()
    train(other, resumed, [4])
    assert share_of_head(other, before) == pytest.approx(0.03 * 0.6, rel=0.01)
    train(model, optimizer, [4])
    assert_same(list(model.parameters()), list(other.parameters()))


@pytest.mark.parametrize("scaled", ["by the scaler", "unscaled before"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_under_a_scaler_the_steps_are_those_without_one(scaled, dtype):
    model, other = net_of(dtype), net_of(dtype)
    optimizer, under, scaler = gs.GSO(model), gs.GSO(other), scaler_of()
    for step in range(5):
        train(model, optimizer, [step])
        under.zero_grad()
        scaler.scale(loss_of(other, step)).backward()
        if scaled == "unscaled before":
            scaler.unscale_(under)
        scaler.step(under)
        scaler.update()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("at", [0, 3])
def test_an_overflow_moves_nothing_and_teaches_nothing(bad, at):
    model = net_of()
    optimizer, scaler = gs.GSO(model), scaler_of()
    for step in range(5):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, step)).backward()
        if step == at:
            model.head.weight.grad[1, 2] = bad
        before = snapshot(model, optimizer)
        scaler.step(optimizer)
        scaler.update()
        if step == at:
            weights, state = snapshot(model, optimizer)
            assert_same(before[0], weights)
            if at:  # in the first step the memories are made, of zeros
                assert_same(before[1]["state"], state["state"])
            assert all((s["step"] == at).all() for s in state["state"].values())
            assert_same(before[1]["gradsplit"], state["gradsplit"])


def test_inside_backward_the_steps_are_those_outside():
    model, other = net_of(), net_of()
    optimizer, inside = gs.GSO(model, fused=False), gs.GSO(other, in_backward=True, fused=False)
    for step in range(6):
        train(model, optimizer, [step])
        loss_of(other, step).backward()
        assert all(p.grad is None for p in other.parameters())
        inside.step()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_inside_backward_a_scaled_batch_is_seen_once_enough_rows_have_come():
    """The median is over the tensors that have come: the first of them is bounded as a single row would be."""
    model = net_of(torch.float64)
    optimizer = gs.GSO(model, in_backward=True)
    for step in range(6):
        loss_of(model, step % 2, 1e4 if step == 4 else 1.0).backward()
        optimizer.step()
        factors = {part.split.plan.layout.names[0]: float(part.update.collected) for part in optimizer._parts}
        if step == 4:
            assert factors["words.weight"] < 1e-2
        else:
            assert set(factors.values()) == {1.0}


def test_steps_inside_backward_fall_as_outside():
    model = net_of(torch.float64)
    optimizer, moved = gs.GSO(model, in_backward=True, steps=4, weight_decay=0.0), []
    for step in range(4):
        before = model.head.weight.detach().clone()
        loss_of(model, step).backward()
        optimizer.step()
        moved.append(share_of_head(model, before))
    assert moved == pytest.approx([0.03, 0.0225, 0.015, 0.0075])


def test_a_closure_runs_with_gradients_and_its_loss_is_returned():
    model, other = net_of(), net_of()
    optimizer = gs.GSO(model)

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = loss_of(model, 0)
        loss.backward()
        return loss

    assert float(optimizer.step(closure).detach()) == float(loss_of(other, 0).detach())
    train(other, gs.GSO(other), [0])
    assert_same(list(model.parameters()), list(other.parameters()))


@pytest.mark.parametrize(
    "options", [{}, {"steps": 9}, {"direction": {"head.*": "adam"}}, {"blocks": {"head.weight": 3}}]
)
@pytest.mark.parametrize("way", ["pickle", "deepcopy", "state_dict", "file"])
def test_a_copy_goes_on_as_the_original_would(way, options):
    model = net_of()
    optimizer = gs.GSO(model, **options)
    train(model, optimizer, range(3))
    if way in ("pickle", "deepcopy"):
        both = (model, optimizer)
        other, copied = pickle.loads(pickle.dumps(both)) if way == "pickle" else copy.deepcopy(both)
    else:
        other = net_of(seed=1)
        other.load_state_dict(model.state_dict())
        copied = gs.GSO(other, lr=0.3, **options)
        state = copy.deepcopy(optimizer.state_dict())
        if way == "file":
            file = io.BytesIO()
            torch.save(state, file)
            file.seek(0)
            state = torch.load(file, weights_only=True)
        copied.load_state_dict(state)
    assert_same(train(other, copied, range(3, 7)), train(model, optimizer, range(3, 7)))


def test_a_function_as_direction_can_be_copied():
    model = net_of()
    optimizer = gs.GSO(model, direction=lambda name, p: "adam" if p.dim() == 3 else None)
    train(model, optimizer, range(2))
    other, copied = pickle.loads(pickle.dumps((model, optimizer)))
    assert "exp_avg_sq" in copied.state[other.conv.weight]
    assert_same(train(other, copied, range(2, 4)), train(model, optimizer, range(2, 4)))


def test_a_complex_parameter_goes_on_after_its_data_was_replaced():
    torch.manual_seed(0)
    for shape in ((3, 4), (5,), ()):
        w = nn.Parameter(torch.randn(shape, dtype=torch.complex64))
        optimizer = gs.GSO([w])
        for _ in range(2):
            before = w.detach().clone()
            w.grad = torch.randn(shape, dtype=torch.complex64)
            optimizer.step()
            assert not torch.equal(before, w.detach())
            w.data = w.data.clone()


def test_parameters_whose_data_was_replaced_are_still_moved():
    model = nn.Module()
    model.experts = nn.Parameter(torch.randn(3, 2, 4))
    model.positions = nn.Parameter(torch.randn(1, 5, 4))
    optimizer = gs.GSO(model)
    for _ in range(2):
        before = [p.detach().clone() for p in model.parameters()]
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
        assert not any(torch.equal(a, p) for a, p in zip(before, model.parameters(), strict=True))
        for p in model.parameters():
            p.data = p.data.clone()


def test_a_compiled_model_gives_plain_names_and_its_kinds():
    model = net_of()
    optimizer = gs.GSO(torch.compile(model, backend="eager"))
    assert optimizer.param_groups[0]["param_names"] == [name for name, _ in model.named_parameters()]
    assert [kind.name for kind in optimizer._kinds[0]][:2] == ["embedding", "matrix"]


def test_sinks_see_every_step_and_records_name_what_was_bounded():
    model, seen = net_of(), []
    optimizer = gs.GSO(model, sinks=[seen.append])
    assert optimizer.records == []
    for step in range(3):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        if step == 1:
            model.head.weight.grad[4] = 1e6
            model.conv.weight.grad[2, 0, 0] = float("nan")
        optimizer.step()
    assert [record.step for record in seen] == [0, 1, 2]
    worst = seen[1].worst(2)
    assert [(report.name, report.outcome.name) for report in worst] == [
        ("conv.weight[2:3]", "ZEROED"),
        ("head.weight[4:5]", "SCALED"),
    ]
    assert worst[1].norm == pytest.approx(1e6 * 6**0.5, rel=1e-6)
    assert [record.step for record in optimizer.records] == [2]


def test_betas_may_stand_third():
    model, other = net_of(), net_of()
    optimizers = gs.GSO(model, 0.02, (0.8, 0.9)), gs.GSO(other, lr=0.02, betas=(0.8, 0.9))
    assert_same(train(model, optimizers[0], range(3)), train(other, optimizers[1], range(3)))


def test_schedule_free_wraps_it():
    schedulefree = pytest.importorskip("schedulefree", reason="wrapping it needs the package schedulefree")
    model = net_of()
    optimizer = schedulefree.ScheduleFreeWrapper(gs.GSO(model), momentum=0.9)
    first = float(loss_of(model, 1000).detach())
    optimizer.train()
    train(model, optimizer, range(60))
    optimizer.eval()
    assert float(loss_of(model, 1000).detach()) < 0.9 * first
    optimizer.train()
    saved = copy.deepcopy(optimizer.state_dict())
    other = net_of(seed=1)
    other.load_state_dict(model.state_dict())
    resumed = schedulefree.ScheduleFreeWrapper(gs.GSO(other), momentum=0.9)
    resumed.train()
    resumed.load_state_dict(saved)
    assert "z" in resumed.state[other.head.weight]
    train(other, resumed, range(60, 62))


def test_maximize_ascends():
    model, other = net_of(), net_of()
    up, down = gs.GSO(model, maximize=True), gs.GSO(other)
    for step in range(4):
        train(other, down, [step])
        up.zero_grad()
        (-loss_of(model, step)).backward()
        up.step()
    assert_same(list(model.parameters()), list(other.parameters()))


# Directions.


class Sign(Direction):
    """Lion without its memory."""

    name = "sign, of a test"
    memory = ()

    def turn(self, turns):
        return [turn.gradient.sign() for turn in turns]


@pytest.fixture
def sign():
    register(Sign())
    yield Sign.name
    del DIRECTIONS[Sign.name]


def memories(optimizer, model):
    train(model, optimizer, [0])
    return {name: set(optimizer.state[p]) - {"step"} for name, p in model.named_parameters()}


ADAM, MOMENTUM = {"exp_avg", "exp_avg_sq"}, {"momentum"}


def test_auto_chooses_by_module_and_shape():
    model = net_of()
    assert memories(gs.GSO(model), model) == {
        "words.weight": ADAM,
        "conv.weight": MOMENTUM,
        "conv.bias": ADAM,
        "norm.weight": ADAM,
        "norm.bias": ADAM,
        "head.weight": MOMENTUM,
        "head.bias": ADAM,
    }


@pytest.mark.parametrize(
    "direction",
    [
        {"words.*": "orthogonal", "head.weight": "adam"},
        lambda name, p: {"words.weight": "orthogonal", "head.weight": "adam"}.get(name),
    ],
    ids=["mapping", "function"],
)
def test_a_mapping_or_a_function_overrides_by_name(direction):
    model = net_of()
    found = memories(gs.GSO(model, direction=direction), model)
    assert found["words.weight"] == MOMENTUM and found["head.weight"] == ADAM and found["conv.weight"] == MOMENTUM


def test_a_group_may_have_its_own_direction():
    model = net_of()
    optimizer = gs.GSO([{"params": [model.conv.weight], "direction": "adam"}, {"params": [model.head.weight]}])
    loss_of(model, 0).backward()
    optimizer.step()
    assert set(optimizer.state[model.conv.weight]) == {"step", *ADAM}
    assert set(optimizer.state[model.head.weight]) == {"step", *MOMENTUM}


def test_a_direction_from_outside_moves_every_row_by_its_share(sign):
    model = net_of(torch.float64)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = gs.GSO(model, direction=sign, weight_decay=0.0)
    assert memories(optimizer, model)["head.weight"] == set()
    moved = model.head.weight.detach() - before["head.weight"]
    share = 0.03 * before["head.weight"].norm(dim=1, keepdim=True) / 6**0.5
    torch.testing.assert_close(moved, -model.head.weight.grad.sign() * share)


def test_frozen_parameters_are_kept_and_thaw():
    model = net_of()
    model.head.weight.requires_grad_(False)
    optimizer = gs.GSO(model)
    before = model.head.weight.detach().clone()
    train(model, optimizer, range(2))
    assert torch.equal(before, model.head.weight)
    model.head.weight.requires_grad_(True)
    train(model, optimizer, [2])
    assert share_of_head(model, before) == pytest.approx(0.03, rel=0.02)


def test_cyclic_blocks_wrap_it():
    model = net_of()
    optimizer = gs.GSO(model)
    cyclic = gs.CyclicBlocks(optimizer, model, switch_every=1)
    before = [p.detach().clone() for p in model.parameters()]
    train(model, optimizer, range(8))
    assert not any(torch.equal(a, p) for a, p in zip(before, model.parameters(), strict=True))
    assert cyclic is not None


def test_a_convolution_with_one_output_channel_is_a_matrix_and_a_position_is_not():
    assert gs.GSO(torch.nn.Conv2d(4, 1, 3))._kinds[0][0].name == "matrix"
    positions = torch.nn.ParameterDict({"place": torch.nn.Parameter(torch.zeros(1, 5, 4))})
    kind = gs.GSO(positions)._kinds[0][0]
    assert (kind.name, kind.rows, kind.cols) == ("embedding", 5, 4)


@pytest.mark.parametrize("options", [{}, {"backend": "eager"}, {"direction": "adam"}, {"in_backward": True}], ids=str)
def test_a_conjugate_that_autograd_left_to_be_worked_out_is_a_gradient_like_any(options):
    """The gradient of Re(conj(w) c) is c itself; torch hands it over as the conjugate of something."""
    torch.manual_seed(0)
    c, start = torch.randn(4, 3, dtype=torch.complex64), torch.randn(4, 3, dtype=torch.complex64)
    ends = []
    for loss_of_w in (
        lambda w: (w.conj() * c).real.sum(),
        lambda w: (torch.view_as_real(w) * torch.view_as_real(c)).sum(),
    ):
        w = nn.Parameter(start.clone())
        optimizer = gs.GSO([("w", w)], **options)
        for _ in range(2):
            optimizer.zero_grad()
            loss_of_w(w).backward()
            optimizer.step()
        ends.append(w.detach())
    assert not torch.equal(ends[0], start)
    torch.testing.assert_close(*ends)


@pytest.mark.parametrize("options", [{}, {"backend": "eager"}, {"direction": "adam"}], ids=str)
def test_a_gradient_that_holds_the_negative_of_its_values_is_read_as_it_is(options):
    ends = []
    for way in (torch._neg_view, torch.neg):
        torch.manual_seed(0)
        w = nn.Parameter(torch.randn(4, 3))
        optimizer = gs.GSO([("w", w)], **options)
        w.grad = way(torch.randn(4, 3))
        optimizer.step()
        ends.append(w.detach())
    assert torch.equal(*ends)


def test_a_parameter_of_a_type_with_memory_elsewhere_moves_as_by_the_definition():
    from torch.testing._internal.two_tensor import TwoTensor

    torch.manual_seed(0)
    values, gradient, ends = torch.randn(4, 3), torch.randn(4, 3), []
    for make in (lambda: TwoTensor(values.clone(), torch.zeros(4, 3)), values.clone):
        w = nn.Parameter(make())
        optimizer = gs.GSO([("w", w)])
        w.grad = TwoTensor(gradient.clone(), torch.zeros(4, 3)) if isinstance(w, TwoTensor) else gradient.clone()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of falling back
            optimizer.step()
        ends.append(w.a.detach() if isinstance(w, TwoTensor) else w.detach())
    torch.testing.assert_close(*ends)
