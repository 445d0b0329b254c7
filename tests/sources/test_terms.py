"""TermSplitter: bounded terms add up to the gradient of the formula, whatever they are made of."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from torch import Tensor, nn

from gradsplit.sources import TermSplitter


def oracle(history: list[dict[str, Tensor]], decay: float = 0.999, growth: float = 1.05) -> list[dict[str, float]]:
    """The scale of every term in every call, for terms that are all there and share their parameters."""
    maxima: dict[str, float] = {}
    found = []
    for gradients in history:
        norms = {name: math.sqrt(float(g.double().square().sum())) for name, g in gradients.items()}
        for name, norm in norms.items():
            old = maxima.get(name, 0.0)
            if math.isfinite(norm) and norm > 0:
                maxima[name] = min(max(norm, decay * old), growth * old) if old else norm
        limit = min(maxima.values())
        found.append({name: min(1.0, limit / n) if n else 1.0 for name, n in norms.items()})
    return found


def _weight(size: int = 4) -> nn.Parameter:
    return nn.Parameter(torch.zeros(size, dtype=torch.float64))


def _linear(w: Tensor, gradient: Tensor) -> Tensor:
    """A term with the given gradient."""
    return (w * gradient).sum()


def test_many_calls_follow_the_formula():
    w = _weight()
    splitter = TermSplitter([w])
    history = [
        {
            "a": torch.randn(4).double(),
            "b": torch.randn(4).double() * 10 ** (2 * math.sin(t)),
            "c": torch.ones(4).double(),
        }
        for t in range(15)
    ]
    for gradients, scales in zip(history, oracle(history), strict=True):
        w.grad = None
        splitter.backward(**{name: _linear(w, g) for name, g in gradients.items()})
        expected = torch.stack([scales[name] * g for name, g in gradients.items()]).sum(0)
        torch.testing.assert_close(w.grad, expected, rtol=1e-12, atol=0)
        assert [row.scale for row in splitter.rows()] == pytest.approx([scales[name] for name in gradients])


def relief_oracle(history: list[dict[str, float]], relief: float, decay: float = 0.999) -> list[dict[str, float]]:
    """The factor on the limit of every term in every call, from the terms' values."""
    level: dict[str, float] = {}
    worst: dict[str, float] = {}
    found = []
    for values in history:
        for name, value in values.items():
            if not math.isfinite(value):
                continue
            level[name] = 0.9 * level[name] + 0.1 * value if worst.get(name, 0.0) > 0 else value
            worst[name] = max(value, decay * worst.get(name, 0.0))
        left = {name: level[name] / worst[name] for name in values if level[name] > 0 and worst[name] > 0}
        found.append(
            {
                name: min(relief, max(1.0, math.sqrt(left[name] / min(left.values())))) if name in left else 1.0
                for name in values
            }
        )
    return found


def values_of_terms() -> list[dict[str, float]]:
    """One term that is solved, one that is stuck, one that becomes positive, one that is not finite once."""
    return [
        {
            "solved": 0.4**t,
            "stuck": 1.0 + 0.1 * math.sin(t),
            "paid": -1.0 if t < 5 else 0.3,
            "bad": math.nan if t == 3 else 2.0,
        }
        for t in range(60)
    ]


@pytest.mark.parametrize("relief", [1.0, 2.0, 10.0])
def test_the_limit_of_a_term_that_lags_behind_rises(relief: float):
    w = _weight(3)
    splitter = TermSplitter([w], relief=relief)
    reliefs = relief_oracle(values_of_terms(), relief)
    for values, factors in zip(values_of_terms(), reliefs, strict=True):
        w.grad = None
        splitter.backward(**{name: (w - 0.0).sum() * 10.0**k + value for k, (name, value) in enumerate(values.items())})
        for k, found in enumerate(splitter.rows()):
            limit = math.sqrt(3.0) * factors[found.term]
            assert found.limit == pytest.approx(limit, rel=1e-12)
            assert found.scale == pytest.approx(min(1.0, limit / (math.sqrt(3.0) * 10.0**k)), rel=1e-12)
    assert max(factors["stuck"] for factors in reliefs) == relief
    assert all(factors["paid"] == 1.0 for factors in reliefs[:5])


def test_a_lagging_term_goes_on_after_loading():
    w = _weight(2)
    whole, parts = TermSplitter([w]), TermSplitter([w])
    for t in range(12):
        for splitter in (whole, parts):
            w.grad = None
            splitter.backward(a=w.sum() + 0.5**t, b=100 * w.sum() + 1.0)
        assert parts.rows() == whole.rows()
        after = TermSplitter([w])
        after.load_state_dict(copy.deepcopy(parts.state_dict()))
        parts = after
    assert whole.rows()[1].limit > 1.5 * whole.rows()[0].limit


def test_one_term_is_the_ordinary_backward():
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    model(x).square().sum().backward()
    expected = model.weight.grad.clone()
    model.zero_grad()
    TermSplitter(model).backward(loss=model(x).square().sum())
    torch.testing.assert_close(model.weight.grad, expected, rtol=0, atol=0)


def test_weights_are_shares_after_the_bound():
    w = _weight(2)
    splitter = TermSplitter([w], weights={"b": 0.25})
    splitter.backward(a=w[0], b=1e6 * w[1])
    assert w.grad.tolist() == [1.0, 0.25]


def test_a_term_that_is_not_finite_is_left_out_and_named():
    w = _weight(2)
    splitter = TermSplitter([w])
    splitter.backward(a=w[0], b=2 * w[1])
    before = splitter.state_dict()["terms"]["b"]["scale"]
    for value in (math.nan, math.inf):
        w.grad = None
        splitter.backward(a=w[0], b=value * w[1])
        assert w.grad.tolist() == [1.0, 0.0]
    assert [(row.step, row.term) for row in splitter.named()] == [(1, "b"), (2, "b")]
    assert splitter.state_dict()["terms"]["b"]["scale"] == before


def test_a_call_without_a_finite_term_adds_nothing_and_is_said_once():
    w = _weight(2)
    splitter = TermSplitter([w])
    with pytest.warns(UserWarning, match="no term of the step has a finite gradient"):
        splitter.backward(a=math.nan * w[0])
    assert w.grad is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        splitter.backward(a=math.nan * w[0])


def test_a_finite_gradient_whose_float32_norm_overflows_is_bounded():
    w = nn.Parameter(torch.zeros(2))
    TermSplitter([w]).backward(a=w[0], b=3e30 * w[1])
    torch.testing.assert_close(w.grad, torch.ones(2))


def test_a_term_of_zero_drowns_nobody():
    w = _weight(2)
    splitter = TermSplitter([w], decay=0.5)
    for _ in range(20):
        w.grad = None
        splitter.backward(a=w[0], b=0.0 * w[1])
    assert w.grad.tolist() == [1.0, 0.0]
    splitter.backward(a=0.0 * w[0], b=w[1])
    assert splitter.rows()[1].scale == 1.0


def test_terms_come_and_go():
    w = _weight(2)
    splitter = TermSplitter([w], memory=3)
    splitter.backward(a=w[0])
    w.grad = None
    splitter.backward(b=100 * w[1])
    assert w.grad.tolist() == [0.0, 1.0], "a was seen in the call before"
    for _ in range(3):
        w.grad = None
        splitter.backward(b=100 * w[1])
    assert w.grad.tolist() == [0.0, 100.0], "a is forgotten"


def test_terms_that_share_no_parameter_do_not_bound_each_other():
    v, w, both = _weight(1), _weight(1), _weight(1)
    splitter = TermSplitter([v, w, both])
    splitter.backward(a=v.sum(), b=100 * w.sum())
    assert (v.grad.item(), w.grad.item()) == (1.0, 100.0)
    assert both.grad is None
    for p in (v, w, both):
        p.grad = None
    splitter = TermSplitter([v, w, both])
    splitter.backward(a=(v + both).sum(), b=100 * (w + both).sum())
    assert w.grad.item() == pytest.approx(1.0)


def test_negative_terms_are_bounded_as_positive_ones():
    w = _weight(2)
    TermSplitter([w]).backward(a=w[0], b=-100 * w[1])
    assert w.grad.tolist() == [1.0, -1.0]


def test_accumulation_adds_to_what_is_there():
    w = _weight(2)
    w.grad = torch.tensor([5.0, 5.0]).double()
    splitter = TermSplitter([w])
    for _ in range(2):
        splitter.backward(a=w[0], b=100 * w[1])
    assert w.grad.tolist() == [7.0, 7.0]


def test_derivatives_inside_the_terms():
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    x = torch.linspace(-1, 1, 9).view(-1, 1).double().requires_grad_()

    def terms() -> dict[str, Tensor]:
        u = net(x)
        slope = torch.autograd.grad(u.sum(), x, create_graph=True)[0]
        curve = torch.autograd.grad(slope.sum(), x, create_graph=True)[0]
        return {"residual": (curve + 100 * u).square().mean(), "boundary": u[[0, -1]].square().mean()}

    alone = {}
    for name in terms():
        found = torch.autograd.grad(terms()[name], list(net.parameters()), allow_unused=True)
        filled = [torch.zeros_like(p) if g is None else g for g, p in zip(found, net.parameters(), strict=True)]
        alone[name] = torch.cat([g.flatten() for g in filled])
    (scales,) = oracle([alone])
    assert min(scales.values()) < 0.1, "the residual drowns the boundary"
    TermSplitter(net).backward(**terms())
    found = torch.cat([p.grad.flatten() for p in net.parameters()])
    torch.testing.assert_close(found, sum(scales[name] * g for name, g in alone.items()))


def test_frozen_parameters_get_nothing():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    model[0].requires_grad_(False)
    TermSplitter(model).backward(a=model(torch.ones(1, 2)).sum())
    assert model[0].weight.grad is None
    assert model[1].weight.grad is not None


def test_under_a_scaler_the_bound_is_the_same_and_an_overflow_reaches_it():
    w = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([w], 1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    splitter = TermSplitter([w], scaler=scaler)
    splitter.backward(a=w[0], b=100 * w[1])
    assert [row.norm for row in splitter.rows()] == [1.0, 100.0]
    scaler.step(optimizer)
    scaler.update()
    torch.testing.assert_close(w.detach(), torch.tensor([-1.0, -1.0]))
    assert scaler.get_scale() == 2.0**10
    optimizer.zero_grad()
    splitter.backward(a=w[0], b=1e37 * w[1])
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**9
    torch.testing.assert_close(w.detach(), torch.tensor([-1.0, -1.0]))
    optimizer.zero_grad()
    splitter.backward(a=w[0], b=math.nan * w[1])
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**9, "a bad term is no overflow"
    torch.testing.assert_close(w.detach(), torch.tensor([-2.0, -1.0]))


def test_saving_in_the_middle_changes_nothing():
    generator = torch.Generator().manual_seed(2)
    calls = [{n: torch.randn(4, generator=generator).double() * 9**k for k, n in enumerate("ab")} for _ in range(8)]
    found = []
    for cut in (None, 4):
        w = _weight()
        splitter = TermSplitter([w])
        for place, gradients in enumerate(calls):
            if place == cut:
                state = copy.deepcopy(splitter.state_dict())
                splitter = TermSplitter([w])
                splitter.load_state_dict(state)
            splitter.backward(**{name: _linear(w, g) for name, g in gradients.items()})
        found.append(w.grad)
    assert torch.equal(*found)


def _unseen(splitter: TermSplitter) -> TermSplitter:
    """The splitter as it runs where looking would wait for the device."""
    splitter._follow_numbers = splitter._follow
    return splitter


def test_a_device_where_nobody_looks_gives_the_same_numbers():
    """Many calls with terms that come and go, lag, are zero, negative, huge or not finite, and reach other parts."""
    generator = torch.Generator().manual_seed(5)
    twins = [[_weight(3), nn.Parameter(torch.zeros(2)), _weight(1)] for _ in range(2)]
    splitters = [TermSplitter(twins[0], memory=6), _unseen(TermSplitter(twins[1], memory=6))]
    for call in range(40):
        sizes = (10 ** torch.randn(6, generator=generator).double()).tolist()
        values = {"a": 0.8**call, "b": 1.0, "c": -1.0 if call < 9 else 0.5, "d": math.nan if call % 7 == 3 else 1.0}
        there = {"a", "c"} if call % 5 == 2 else {"b"} if call % 11 == 6 else {"a", "b", "c", "d"}
        for (u, v, w), splitter in zip(twins, splitters, strict=True):
            terms = {
                "a": sizes[0] * u.sum() + sizes[1] * v.sum() + values["a"],
                "b": sizes[2] * (u * torch.arange(3)).sum() + values["b"],
                "c": sizes[3] * w.sum() * (call % 4 > 0) + values["c"],
                "d": sizes[4] * v.sum() + (values["d"] if call % 2 else values["d"] * v[0] * 1e30) + w.sum(),
            }
            splitter.backward(**{name: term for name, term in terms.items() if name in there})
        for one, other in zip(*(splitter.rows() for splitter in splitters), strict=True):
            assert one.term == other.term
            assert one[1:] == pytest.approx(other[1:], rel=1e-12, nan_ok=True)
        assert splitters[0].named() == splitters[1].named()
        one, other = (splitter.state_dict() for splitter in splitters)
        torch.testing.assert_close(one, other, rtol=1e-12, atol=0)
        for one, other in zip(*twins, strict=True):
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-6, atol=0)
    assert len(splitters[0].named()) == 3


def test_nothing_is_copied_to_the_device_while_the_terms_stay_the_same(monkeypatch):
    """Such a copy waits for the device."""
    w, made, tensor = _weight(2), [], torch.tensor
    splitter = _unseen(TermSplitter([w]))

    def seen(*args, **kwargs):
        made.append(args[0])
        return tensor(*args, **kwargs)

    monkeypatch.setattr(torch, "tensor", seen)
    counts = []
    for names in ("ab", "ab", "ab", "b", "b", "abc", "abc"):
        splitter.backward(**{name: w.sum() for name in names})
        counts.append(made.count([ord(name) - ord("a") for name in names]))
    assert counts == [1, 1, 1, 1, 1, 1, 1]


def test_a_state_passes_between_host_and_device():
    """A model that is moved in the middle goes on with the same numbers."""
    w = [_weight(2) for _ in range(2)]
    straight, moved = TermSplitter([w[0]]), TermSplitter([w[1]])
    numbers = moved._follow_numbers
    for call in range(8):
        moved._follow_numbers = moved._follow if 2 <= call < 5 else numbers
        for weight, splitter in zip(w, (straight, moved), strict=True):
            splitter.backward(a=weight.sum() + 0.5**call, b=(10 + call) * weight.sum() + 1.0)
        for one, other in zip(straight.rows(), moved.rows(), strict=True):
            assert one[1:] == pytest.approx(other[1:], rel=1e-12)
    torch.testing.assert_close(w[0].grad, w[1].grad, rtol=1e-12, atol=0)


def test_gradients_that_share_their_memory_are_not_changed_twice():
    v, w = _weight(2), _weight(2)
    terms = TermSplitter([v, w])
    held = torch.ones(2).double()
    terms.backward(a=(v * held).sum() + (w * held).sum(), b=1e3 * (v + w).sum())
    assert held.tolist() == [1.0, 1.0]
    assert v.grad.tolist() == w.grad.tolist() == [2.0, 2.0]
    v.grad.add_(1.0)
    assert w.grad.tolist() == [2.0, 2.0]
    alone = _weight(1)
    terms = TermSplitter([alone])
    terms.backward(a=alone.sum())
    alone.grad.mul_(7)
    terms.backward(a=alone.sum())
    assert alone.grad.tolist() == [8.0]


def test_parameters_of_several_dtypes_and_complex_ones():
    a, b = nn.Parameter(torch.ones(2, dtype=torch.bfloat16)), nn.Parameter(torch.ones(2, dtype=torch.complex64))
    TermSplitter([a, b]).backward(small=3 * a.sum().float() + 4 * b.real.sum(), large=1e3 * a.sum().float())
    assert a.grad.dtype == torch.bfloat16 and b.grad.dtype == torch.complex64
    norm = math.sqrt(2 * 9 + 2 * 16)
    torch.testing.assert_close(a.grad.float(), torch.full((2,), 3 + norm / math.sqrt(2)), rtol=0.01, atol=0)
    torch.testing.assert_close(b.grad.real, torch.full((2,), 4.0))


@pytest.mark.parametrize("unseen", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_multiplied_in_float32(dtype, unseen):
    w = nn.Parameter(torch.zeros(3, dtype=dtype))
    splitter = _unseen(TermSplitter([w])) if unseen else TermSplitter([w])
    splitter.backward(a=1e-3 * w.sum(), b=(w * torch.full((3,), 6e4, dtype=dtype)).sum())
    torch.testing.assert_close(w.grad.double(), torch.full((3,), 2e-3).double(), rtol=0.01, atol=0)


def test_a_large_vector_is_measured_in_parts(monkeypatch):
    from gradsplit.sources import terms

    monkeypatch.setattr(terms, "_PART", 3)
    w, signal = _weight(8), torch.arange(8.0).double()
    splitter = TermSplitter([w])
    splitter.backward(a=(w * signal).sum())
    assert splitter.rows()[0].norm == pytest.approx(float(signal.norm()), rel=1e-14)


@pytest.mark.parametrize(
    ("terms", "said"),
    [
        ({}, "at least one term"),
        ({"a": 1.0}, r"backward\(a=…\).*got float"),
        ({"a": torch.ones(3, requires_grad=True)}, r"shape \(3,\)"),
        ({"a": torch.ones(())}, "without a gradient"),
        (
            {"a": torch.ones((), dtype=torch.complex64, requires_grad=True)},
            r"expected a real number, got torch\.complex64",
        ),
        ({"a": torch.empty(0, requires_grad=True)}, r"shape \(0,\)"),
        ({"weights": {"a": 0.1}}, r"Weights belong into TermSplitter\(parameters, weights="),
    ],
)
def test_a_bad_term_is_refused_and_nothing_is_added(terms, said):
    w = _weight(2)
    splitter = TermSplitter([w])
    with pytest.raises(ValueError, match=said):
        splitter.backward(good=w[0], **terms) if terms else splitter.backward()
    assert w.grad is None
    assert splitter.state_dict() == {"calls": 0, "terms": {}}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"decay": 0.0}, "decay=0.0"),
        ({"growth": 1.0}, "growth=1.0"),
        ({"memory": 0}, "memory=0"),
        ({"weights": {"a": -1.0}}, "'a': -1.0"),
        ({"weights": {"a": math.nan}}, "'a': nan"),
    ],
)
def test_a_bad_option_is_refused_by_name(options, said):
    with pytest.raises(ValueError, match=said):
        TermSplitter([_weight()], **options)


@pytest.mark.parametrize(("unnamed", "said"), [(1.0, r"data=loss"), ({"a": 1.0}, r"\*\*terms")])
def test_terms_without_a_name_are_refused(unnamed, said):
    with pytest.raises(ValueError, match=rf"expected every term by its name\. Write backward\({said}\)"):
        TermSplitter([_weight()]).backward(unnamed)


def test_a_term_that_reaches_none_of_the_parameters_is_named_once():
    w, other = _weight(2), _weight()
    splitter = TermSplitter([w])
    with pytest.warns(UserWarning, match="the term 'lost' reaches none of the parameters"):
        splitter.backward(good=w.sum(), lost=other.sum())
    splitter.backward(good=w.sum(), lost=other.sum())
    assert w.grad is not None and other.grad is None


def test_a_misspelt_weight_is_named_once_and_in_the_users_line():
    w = _weight()
    splitter = TermSplitter([w], weights={"boundry": 10.0, "data": 2.0})
    with pytest.warns(UserWarning, match=r"a weight for 'boundary', got one for 'boundry' alone") as caught:
        splitter.backward(boundary=w.sum(), data=w.sum())
    assert len(caught) == 1 and caught[0].filename == __file__
    splitter.backward(boundary=w.sum(), data=w.sum())


@pytest.mark.parametrize(
    ("weights", "names"),
    [
        ({"boundary": 10.0}, ["boundary", "data"]),
        ({"penalty": 10.0}, ["data"]),  # it may come later
        ({"scale10": 10.0}, ["scale20"]),  # two terms that are counted
        ({"boundary_x": 10.0, "boundary_y": 1.0}, ["boundary_y"]),
    ],
)
def test_a_weight_without_a_misspelt_term_says_nothing(weights, names):
    w = _weight()
    with warnings.catch_warnings(record=True) as caught:
        TermSplitter([w], weights=weights).backward(**{name: w.sum() for name in names})
    assert not caught


def test_what_is_no_parameter_is_refused():
    with pytest.raises(TypeError, match=r"TermSplitter\(parameters\): expected a model or its parameters"):
        TermSplitter("net")


def test_parameters_without_gradients_are_refused():
    with pytest.raises(ValueError, match="at least one parameter"):
        TermSplitter([torch.zeros(2)])
    with pytest.raises(ValueError, match="at least one parameter"):
        TermSplitter([])


def test_sparse_gradients_are_refused_by_name():
    table = nn.Embedding(5, 2, sparse=True)
    with pytest.raises(ValueError, match=r"backward\(a=…\): expected dense"):
        TermSplitter(table).backward(a=table(torch.tensor([1, 2])).sum())
    assert table.weight.grad is None


def test_a_state_of_a_larger_model_is_refused_and_changes_nothing():
    v, w = _weight(), _weight()
    large = TermSplitter([v, w])
    large.backward(a=w.sum())
    small = TermSplitter([v])
    with pytest.raises(
        ValueError, match=r"expected terms of these 1 parameters, got .* which reaches parameter 1\. Load it"
    ):
        small.load_state_dict(large.state_dict())
    assert small.state_dict() == {"calls": 0, "terms": {}}
