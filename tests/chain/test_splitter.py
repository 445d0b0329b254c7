from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import nn

from gradsplit.budget import Fixed, Relative
from gradsplit.budget.running_median import RunningMedian
from gradsplit.chain import ChainSplitter
from gradsplit.chain.chain_splitter import modules_with_parameters
from gradsplit.chain.signal_limits import JointMemory, SignalGuard
from gradsplit.xp import torch_xp
from tests.chain.nets import Recurrent, Residual, TwoHeads, build


def signals(model: nn.Module, loss_fn: object, batch: torch.Tensor, module: str) -> torch.Tensor:
    """The signal at the output of a module, as the modules below it see it."""
    kept: list[torch.Tensor] = []

    def keep(m: nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
        return Probe.apply(output, kept)

    handle = model.get_submodule(module).register_forward_hook(keep, prepend=True)
    loss_fn(model, batch).backward()
    handle.remove()
    return kept[0]


class Probe(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, kept):
        ctx.kept = kept
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.kept.append(grad.clone())
        return grad, None


def two(scale: float) -> object:
    def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        cls, box = model(batch)
        return cls.square().mean() + scale * box.square().mean()

    return loss


def test_fixed_limits_hold_at_every_joint() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x = torch.randn(6, 4).double()
    with ChainSplitter(model, at=["0", "2"], budget=Fixed(1e-3)) as chain:
        for name in ("0", "2"):
            assert float(signals(model, lambda m, b: 100 * m(b).square().sum(), x, name).norm()) <= 1e-3 * (1 + 1e-6)
    assert chain.rows()[-1].bounded == 2  # the joint below meets a signal that is bounded already


def test_within_the_limit_nothing_changes_by_a_bit() -> None:
    model, loss_fn, batch = build("residual")
    loss_fn(model, batch).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with ChainSplitter(model):
        for _ in range(3):
            model.zero_grad()
            loss_fn(model, batch).backward()
    assert all(torch.equal(p.grad, e) for p, e in zip(model.parameters(), expected, strict=True))


def test_a_sudden_explosion_is_bounded_at_three_medians_and_moves_the_median_little() -> None:
    model = nn.Linear(4, 1).double()
    net = nn.Sequential(model, nn.Identity())
    x = torch.ones(1, 4).double()
    with ChainSplitter(net, at=["0"]) as chain:
        for scale in [1.0] * 40 + [1e6]:
            net.zero_grad()
            (scale * net(x).sum()).backward()
        bounded = model.bias.grad.item()
        (row,) = chain.rows()
    assert row.norm == pytest.approx(1e6) and row.bounded == 1
    assert bounded == pytest.approx(row.limit, rel=1e-6) and 2.5 < row.limit < 3.5
    median, *_ = chain.state_dict()["joints"]["0"]["state"]
    assert 0.8 < float(median) < 1.2


def test_the_fork_rule_gives_both_heads_the_smaller_signal() -> None:
    torch.manual_seed(0)
    model, x = TwoHeads().double(), torch.randn(6, 4).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    cls = signals(model, lambda m, b: m(b)[0].square().mean(), x, "trunk.2")
    box = signals(model, lambda m, b: m(b)[1].square().mean(), x, "trunk.2")
    chain = ChainSplitter(model, at="forks").attach(optimizer)
    got = signals(model, two(1e3), x, "trunk.2")
    rows = {row.name: row for row in chain.rows()}
    chain.remove()
    small, large = rows["trunk.2->cls"], rows["trunk.2->box"]
    assert small.bounded == 0 and large.bounded == 1 and large.limit == pytest.approx(small.norm)
    # the rectifier lies between the fork and trunk.2; its derivative is 0 or 1, so the parts keep their proportion
    torch.testing.assert_close(got, cls + box * 1e3 * (small.norm / large.norm), rtol=1e-5, atol=1e-9)


def test_a_branch_that_is_not_finite_is_left_out_and_counted() -> None:
    torch.manual_seed(0)
    model, x = TwoHeads().double(), torch.randn(6, 4).double()
    cls = signals(model, lambda m, b: m(b)[0].square().mean(), x, "trunk.2")
    chain = ChainSplitter(model, at="forks").attach(torch.optim.SGD(model.parameters(), lr=0.0))

    def broken(m: nn.Module, b: torch.Tensor) -> torch.Tensor:
        first, second = m(b)
        return first.square().mean() + (second - second.detach()).abs().sqrt().sum()  # sqrt(0): inf * 0 on the way back

    got = signals(model, broken, x, "trunk.2")
    chain.remove()
    torch.testing.assert_close(got, cls)
    assert {row.name: row.nonfinite for row in chain.rows()} == {"trunk.2->cls": 0, "trunk.2->box": 1}


def test_signals_that_are_not_finite_are_zeroed_where_they_arise() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).double()
    with ChainSplitter(model, at="layers") as chain:
        (model(torch.ones(2, 3).double()) * float("nan")).sum().backward()
    assert all(bool((p.grad == 0).all()) for p in model[0].parameters())
    assert chain.worst(1)[0].nonfinite == 1 and chain.worst(1)[0].name == "1"


def test_per_sample_bounds_the_samples_one_by_one() -> None:
    model = nn.Linear(3, 3, bias=False).double()
    net = nn.Sequential(model, nn.Identity())
    x = torch.randn(4, 3).double()
    weights = torch.tensor([1.0, 1.0, 1e3, 1.0]).double()[:, None]
    with ChainSplitter(net, at=["0"], budget=Fixed(2.0), per_sample=True):
        signal = signals(net, lambda m, b: (weights * m(b)).sum(), x, "0")
    torch.testing.assert_close(signal.norm(dim=1), torch.tensor([3**0.5, 3**0.5, 2.0, 3**0.5]).double())


def test_norms_of_huge_float32_entries_do_not_overflow() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Identity())
    with ChainSplitter(net, at=["0"], budget=Fixed(1.0)):
        signal = signals(net, lambda m, b: (m(b) * 3e30).sum(), torch.ones(1, 2), "0")
    assert float(signal.norm()) == pytest.approx(1.0, rel=1e-5)


def test_time_steps_are_off_by_default() -> None:
    model, loss_fn, batch = build("residual")
    with ChainSplitter(model, at=["body"], budget=Fixed(1e-9)) as chain:
        loss_fn(model, batch).backward()
        model.zero_grad()
        loss_fn(model, batch).backward()
        assert all(row.bounded == 0 for row in chain.rows())
    with ChainSplitter(model, at=["body"], budget=Fixed(1e-9), steps=True) as chain:
        loss_fn(model, batch).backward()
    assert {row.name: row.bounded for row in chain.rows()} == {"body": 1, "body#2": 1}


def test_residual_adds_have_no_fork_rule() -> None:
    model = Residual()
    with ChainSplitter(model) as chain:
        model(torch.randn(3, 4)).sum().backward()
    assert {row.role for row in chain.rows()} == {"layer"}


@pytest.mark.parametrize("name", ["lstm", "checkpointed", "checkpointed, reentrant", "structured"])
def test_every_kind_of_net_can_be_guarded(name: str) -> None:
    model, loss_fn, batch = build(name)
    with ChainSplitter(model) as chain:
        for _ in range(2):
            loss_fn(model, batch).backward()
    assert chain.rows() and all(math.isfinite(row.norm) for row in chain.rows())


def test_hooks_of_a_removed_splitter_do_nothing() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)).double()
    x = torch.ones(1, 2).double()
    chain = ChainSplitter(model, at="layers", budget=Fixed(1e-6)).attach()
    loss = model(x).sum()  # an aborted step: the graph outlives the splitter
    chain.remove()
    loss.backward()
    assert float(model[1].bias.grad) == 1.0 and not chain.guard.memories
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_an_aborted_step_and_an_evaluation_do_not_count_as_time_steps() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    with ChainSplitter(model, at="layers") as chain:
        model(torch.ones(1, 2))  # aborted
        with torch.no_grad():
            model(torch.ones(1, 2))
        model(torch.ones(1, 2)).sum().backward()
    assert not chain.guard.repeated and len(chain.rows()) == 2


def test_saving_in_the_middle_changes_nothing() -> None:
    torch.manual_seed(0)
    model = TwoHeads()
    batches = torch.randn(8, 6, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    whole = ChainSplitter(model).attach(optimizer)
    for batch in batches:
        two(30.0)(model, batch).backward()
    whole.remove()
    first = ChainSplitter(model).attach(optimizer)
    for batch in batches[:4]:
        two(30.0)(model, batch).backward()
    first.remove()
    second = ChainSplitter(model)
    second.load_state_dict(first.state_dict())
    second.attach(optimizer)
    for batch in batches[4:]:
        two(30.0)(model, batch).backward()
    second.remove()
    assert second.rows() == whole.rows()


def test_module_limits_come_with_a_fork() -> None:
    model, x = TwoHeads().double(), torch.randn(6, 4).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chain = ChainSplitter(model).attach(optimizer)
        for _ in range(4):
            optimizer.zero_grad()
            two(1e4)(model, x).backward()
            optimizer.step()
        chain.remove()
    owners = modules_with_parameters(model)
    for own in owners.values():
        norm = torch.stack([p.grad.norm() for p in own]).norm()
        assert float(norm) <= 1 / math.sqrt(len(owners)) * (1 + 1e-6)
    assert float(chain.module_norms.amax()) > 1


@pytest.mark.parametrize("at, bounded", [("auto", False), ("forks", True), ("layers", False)])
def test_in_front_of_adam_task_forks_are_bounded_only_if_asked_for(at: str, bounded: bool) -> None:
    torch.manual_seed(0)
    model, x = TwoHeads().double(), torch.randn(6, 4).double()
    chain = ChainSplitter(model, at=at)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # a splitter that has bounded forks before, and their modules, keeps nothing of that under Adam
        for optimizer in (torch.optim.SGD(model.parameters(), lr=0.0), torch.optim.AdamW(model.parameters(), lr=0.0)):
            chain.attach(optimizer)
            for _ in range(3):
                optimizer.zero_grad()
                two(1e4)(model, x).backward()
                before = [p.grad.clone() for p in model.parameters()]
                optimizer.step()
            chain.remove()
    counts = {row.name: row.bounded for row in chain.rows() if row.role == "task"}
    assert ("trunk.2->box" in counts) == (at != "layers")
    assert max(counts.values(), default=0) == {"auto": 3, "forks": 6, "layers": 0}[at]
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True)) != bounded


def test_closures_are_bounded_after_their_backward_pass() -> None:
    model, x = TwoHeads().double(), torch.randn(6, 4).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    chain = ChainSplitter(model).attach(optimizer)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = two(1e4)(model, x)
        loss.backward()
        return loss

    optimizer.step(closure)
    chain.remove()
    assert float(torch.stack([p.grad.norm() for p in model.parameters()]).norm()) <= 1 + 1e-6


def test_a_fork_without_module_limits_warns() -> None:
    model, x = TwoHeads(), torch.randn(6, 4)

    class Clip:
        class plan:
            num_bins = 1

    for parameters in (None, Clip()):
        with pytest.warns(UserWarning, match="without per-module limits"), ChainSplitter(model, parameters=parameters):
            two(1.0)(model, x).backward()
    with pytest.warns(UserWarning, match="attach"), ChainSplitter(model):
        for _ in range(4):
            two(1.0)(model, x).backward()


def test_declared_forks_and_their_errors() -> None:
    model = Residual()
    with ChainSplitter(model, at="layers", forks=["stem"], parameters="modules") as chain:
        model(torch.randn(3, 4)).sum().backward()
    assert {row.role for row in chain.rows()} == {"layer", "task"}
    with pytest.raises(ValueError, match="several consumers"), ChainSplitter(model, forks=["out"]):
        model(torch.randn(3, 4)).sum().backward()
    model(torch.randn(3, 4))  # the hooks of the failed block are gone


def test_bad_arguments_are_explained() -> None:
    model = Recurrent(nn.GRU)
    with pytest.raises(ValueError, match=r"got 'rmn', which Recurrent does not have\. Nearest: rnn"):
        ChainSplitter(model, at=["rmn"])
    with pytest.raises(ValueError, match="expected 'auto', 'forks', 'layers'"):
        ChainSplitter(model, at="everywhere")
    with pytest.raises(ValueError, match="a joint has no weights"):
        ChainSplitter(model, budget=Relative(0.1))
    with pytest.raises(ValueError, match="expected a factor >= 1"):
        RunningMedian(0.5)
    with pytest.raises(ValueError, match="on_nonfinite='ignore'"):
        ChainSplitter(model, on_nonfinite="ignore")
    chain = ChainSplitter(model).attach()
    with pytest.raises(RuntimeError, match=r"Call \.remove\(\) first"):
        chain.attach()
    chain.remove()


@pytest.mark.parametrize("scales", [[1.0, 1.0, 50.0, 1.0, 1e-3], [1.0, math.nan, 2.0, math.inf, 100.0]])
def test_the_path_for_the_cpu_decides_as_the_one_for_devices(scales: list[float]) -> None:
    signal = torch.randn(4, 3)
    on_cpu, on_device = (SignalGuard(RunningMedian(3.0), False, False, True) for _ in range(2))
    zero = torch.zeros(1)
    memory = JointMemory(RunningMedian(3.0).init(torch_xp, zero), zero, zero, zero, zero)
    for scale in scales:
        ours = on_cpu._bound("a", signal * scale)
        theirs = on_device.on_device(memory, signal * scale)
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs)
    assert float(on_cpu.memories["a"].bounded[0]) == float(memory.bounded[0])
    assert float(on_cpu.memories["a"].nonfinite[0]) == float(memory.nonfinite[0])


def test_a_state_without_its_forks_is_refused_and_nothing_of_it_is_taken_over() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1))
    with ChainSplitter(model, at="layers") as chain:
        model(torch.ones(1, 2)).sum().backward()
    before, broken = chain.rows(), chain.state_dict()
    broken["joints"].pop("0")
    del broken["forks"]
    with pytest.raises(KeyError, match="forks"):
        chain.load_state_dict(broken)
    assert chain.rows() == before and [row.name for row in before] == ["0", "2"]


def test_complex_signals_are_bounded_by_their_true_norm():
    """The signal at a is (3 + 4i) / 1 for each of two samples: norm 5 each, and 5 sqrt 2 together."""
    model = nn.Sequential(nn.Identity(), nn.Linear(1, 1, bias=False, dtype=torch.complex64))
    nn.init.ones_(model[1].weight)
    for per_sample, norm, kept in ((False, 5 * 2**0.5, 0.5**0.5), (True, 5.0, 1.0)):
        model.zero_grad()
        x = torch.tensor([[1.0 + 0j], [1.0 + 0j]])
        with ChainSplitter(model, at=["1"], budget=Fixed(1.0), per_sample=per_sample) as chain:
            (model(x) * torch.tensor(3.0 - 4j)).real.sum().backward()
        assert chain.rows()[0].norm == pytest.approx(norm)
        assert model[1].weight.grad.abs().item() == pytest.approx(2 * kept)


@pytest.mark.parametrize("per_sample", [False, True])
def test_a_batch_without_samples_teaches_nothing(per_sample):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    with ChainSplitter(model, at="layers", per_sample=per_sample) as chain:
        model(torch.ones(3, 2)).sum().backward()
        before = chain.state_dict()["joints"]["0"]["state"]
        model(torch.ones(0, 2)).sum().backward()
        after = chain.state_dict()["joints"]["0"]["state"]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


class _Switched(nn.Module):
    """Two heads on the stem, or one after the other; both graphs have as many operations."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)
        self.apart = True

    def forward(self, x):
        h = self.stem(x)
        return (self.a(h), self.b(h).tanh()) if self.apart else (self.b(self.a(h).tanh()),)


def test_a_module_that_no_longer_forks_is_guarded_again():
    model = _Switched()
    with ChainSplitter(model, at="auto", parameters=None) as chain, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for model.apart in (True, False):
            sum(part.sum() for part in model(torch.ones(1, 2))).backward()
        assert "stem" in {row.name for row in chain.rows()}
