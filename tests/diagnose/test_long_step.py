"""The ladder in diagnose: exactly the guilty rows, with the radius and the safe step that their formula gives."""

from __future__ import annotations

import copy
import dataclasses
import math
import re

import pytest
import torch
from torch import Tensor, nn

import gradsplit as gs
from gradsplit.cli import main
from gradsplit.cli.diagnose import diagnosis_page
from gradsplit.diagnose import diagnose, step_trial, steps
from gradsplit.diagnose.step_trial import Part, StepTrial, next_update
from tests.chain.nets import build

GUILTY, START = (2, 3, 5), 2.0


class Rows(nn.Module):
    """Every row's own loss, a function of its sum alone: rows know nothing of each other."""

    def __init__(self, scale: Tensor, start: float, columns: int = 3) -> None:
        super().__init__()
        self.scale = scale
        self.weight = nn.Parameter((start / (scale * columns))[:, None].expand(-1, columns).clone())

    def forward(self, batch: Tensor) -> Tensor:
        return self.scale * self.weight.sum(1) + 0 * batch.sum()


def softplus_mean(model: nn.Module, batch: Tensor) -> Tensor:
    """The mean over rows of log(1 + e^x), singular at x = i pi and its repetitions."""
    return torch.log1p(torch.exp(model(batch))).mean()


def parabola(model: nn.Module, batch: Tensor) -> Tensor:
    """Sum of x^2 / 2, whose second derivative along a row is scale^2 * columns."""
    return 0.5 * model(batch).square().sum()


def planted() -> tuple[Rows, torch.optim.Optimizer, float]:
    """Eight rows that start at x = 2; three are 30 times as steep. The last is their speed dx / d(learning rate)."""
    scale = torch.ones(8, dtype=torch.float64)
    scale[list(GUILTY)] = 30.0
    model = Rows(scale, START)
    speed = 3 * 30.0**2 * (1 / (1 + math.exp(-START))) / 8
    return model, torch.optim.SGD(model.parameters(), lr=0.1), speed


def check_the_planted_rows() -> None:
    model, optimizer, speed = planted()
    (finding,) = asked(model, softplus_mean, optimizer)
    assert finding.sentence.startswith("rows 2 to 3, 5 of weight: radius ")
    assert finding.sentence.endswith("your step is 0.1")
    radius = math.hypot(START, math.pi) / speed  # from x = 2 to i pi, at that speed
    assert finding.value == pytest.approx(radius, rel=0.02)
    safe = float(re.search(r"safe step ([\d.e-]+)", finding.sentence)[1])
    assert 0.5 * radius < safe < radius
    assert f"a rate of {safe:.2g} is within" in finding.change
    still, moved = (math.log1p(math.exp(x)) for x in (START, START - 0.1 * speed))
    assert f"and the loss is {(5 * still + 3 * moved) / 8:.3g}; at 0.05" in finding.evidence


def asked(model: nn.Module, loss_fn: object, optimizer: object, batch: object = None) -> list:
    result = diagnose(model, loss_fn, torch.zeros(1) if batch is None else batch, optimizer, ladder=True)
    assert not [note for note in result.notes if "not asked" in note], result.notes
    return [finding for finding in result.findings if finding.kind == "long step"]


def test_the_guilty_rows_are_named_with_their_radius_and_the_step() -> None:
    check_the_planted_rows()


def _whole(trial: StepTrial, part: Part) -> Tensor:
    return trial.update.direction[part.tensor]


def _twice(*args: object) -> object:
    update = next_update(*args)
    return dataclasses.replace(update, direction={name: 2 * x for name, x in update.direction.items()})


FAULTS = {
    "the rows are not looked for": (StepTrial, "narrowed", lambda trial, part: part),
    "the other rows move along": (StepTrial, "direction", _whole),
    "the step is twice the optimizer's": (step_trial, "next_update", _twice),
    "any fall is enough": (step_trial, "KEPT", 0.0),
    "the loss after the step is the loss before": (StepTrial, "after", lambda trial, part, share=1.0: trial.before),
    "the order is too low for a radius": (steps, "ORDER", 2),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_of_the_finder_is_caught(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    place, name, wrong = FAULTS[fault]
    monkeypatch.setattr(place, name, wrong)
    with pytest.raises((AssertionError, ValueError, ZeroDivisionError)):
        check_the_planted_rows()


@pytest.mark.parametrize(("steps_of_safe", "found"), [(0.9, False), (1.5, False), (1.7, True), (4.0, True)])
def test_on_a_parabola_a_step_is_too_long_from_1_6_safe_steps_on(steps_of_safe: float, found: bool) -> None:
    scale = torch.ones(6, dtype=torch.float64)
    scale[4] = 10.0
    safe = 2 / (3 * 10.0**2)  # 2 / curvature
    model = Rows(scale, START)
    findings = asked(model, parabola, torch.optim.SGD(model.parameters(), lr=steps_of_safe * safe))
    assert bool(findings) == found
    for finding in findings:
        assert finding.sentence.startswith(f"row 4 of weight: radius inf, safe step {safe:.2g},")
        assert "the loss is back at its start" in finding.evidence


def test_a_vector_is_named_whole_and_a_step_that_is_not_finite_counts() -> None:
    model = nn.Linear(1, 1).double()
    with torch.no_grad():
        model.weight.zero_()
        model.bias.fill_(1.0)

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return -torch.log(1.05 - model(batch)).sum() + 3 * model(batch).square().sum()  # ends at 1.05

    up = torch.optim.SGD([model.bias], lr=1.0, maximize=True)
    assert not asked(model, loss, up, torch.zeros(1, 1, dtype=torch.float64))  # uphill promises nothing

    def wall(model: nn.Module, batch: Tensor) -> Tensor:
        return -torch.log(model(batch)).sum() + 40 * model(batch).sum()  # falls towards a wall at 0

    (finding,) = asked(model, wall, torch.optim.SGD([model.bias], lr=0.5), torch.zeros(1, 1, dtype=torch.float64))
    assert finding.sentence.startswith("bias: radius ") and finding.name == "(root)"
    assert finding.value == pytest.approx(1 / 39, rel=0.02)  # from 1 to 0 at speed 39
    assert "and the loss is nan" in finding.evidence


@pytest.mark.parametrize("name", ["residual", "two heads", "tied", "rnn"])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_sound_nets_at_usual_rates_have_no_long_step(name: str, kind: type[torch.optim.Optimizer]) -> None:
    model, loss_fn, batch = build(name)
    optimizer = kind(model.parameters(), lr=0.1 if kind is torch.optim.SGD else 1e-3)
    result = diagnose(model, loss_fn, batch, optimizer, ladder=True)
    assert not [finding for finding in result.findings if finding.kind == "long step"]
    assert any(note.startswith("the ladder: your step suits each of") for note in result.notes)


def normalised() -> tuple[nn.Module, object, tuple[Tensor, Tensor]]:
    """Two layers whose length batch normalisation divides out, and a head."""
    torch.manual_seed(0)
    layers = [
        layer for _ in range(2) for layer in (nn.Linear(8, 8, bias=False), nn.BatchNorm1d(8, eps=1e-12), nn.Tanh())
    ]
    model = nn.Sequential(*layers, nn.Linear(8, 4))
    return model, lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1]), (torch.randn(32, 8), torch.randint(4, (32,)))


def test_rows_before_a_normalisation_heal_and_are_not_accused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, loss_fn, batch = normalised()
    with torch.no_grad():
        model[0].weight.mul_(1e-3)  # a short row turns a thousand times as fast
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    result = diagnose(model, loss_fn, batch, optimizer, ladder=True)
    assert not [finding for finding in result.findings if finding.kind == "long step"]
    assert result.notes[-1].endswith("tensors, taken alone; not tried: 2 before a normalisation")
    monkeypatch.setattr(step_trial, "RADIAL", 0.0)
    accused = [finding.name for finding in diagnose(model, loss_fn, batch, optimizer, ladder=True).findings]
    assert "0" in accused


def _net() -> tuple[nn.Module, object, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.ReLU(), nn.Linear(8, 3))
    return model, lambda m, x: m(x).square().mean(), torch.randn(16, 6)


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
    "GSO": lambda p: gs.GSO(p, lr=0.01, direction="adam"),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_next_update_is_what_the_next_step_does(name: str) -> None:
    model, loss_fn, batch = _net()
    optimizer = OPTIMIZERS[name](model.parameters())
    for _ in range(3):
        optimizer.zero_grad()
        loss_fn(model, batch).backward()
        optimizer.step()
    params = dict(model.named_parameters())
    before = {key: p.detach().double() for key, p in params.items()}
    update = next_update(optimizer, params, {key: p.grad.double() for key, p in params.items()})
    assert update.source == f"{type(optimizer).__name__}'s next update"
    optimizer.step()
    for key, p in params.items():
        torch.testing.assert_close(
            p.detach().double() - before[key], update.rate[key] * update.direction[key], rtol=1e-12, atol=0
        )


def test_groups_have_their_own_rates_and_what_does_not_move_is_left_out() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    groups = [{"params": model[0].parameters(), "lr": 0.5}, {"params": model[1].parameters(), "lr": 0.0}]
    params = dict(model.named_parameters())
    update = next_update(torch.optim.SGD(groups), params, {key: torch.ones_like(p) for key, p in params.items()})
    assert update.rate == {"0.weight": 0.5, "0.bias": 0.5}
    torch.testing.assert_close(update.direction["0.bias"], -torch.ones(2, dtype=torch.float64), rtol=1e-6, atol=0)


def test_without_a_step_of_its_own_the_direction_is_minus_the_gradient_and_says_so() -> None:
    model, optimizer, _ = planted()
    lbfgs = torch.optim.LBFGS(model.parameters(), lr=0.1)
    (finding,) = asked(model, softplus_mean, lbfgs)
    (sgd,) = asked(model, softplus_mean, optimizer)
    assert finding.value == sgd.value
    assert "minus the gradient (LBFGS takes no step of its own here: TypeError)" in finding.evidence


def test_an_attached_splitter_does_not_run_and_is_mentioned() -> None:
    model, optimizer, _ = planted()
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("hook"))
    (finding,) = asked(model, softplus_mean, optimizer)
    assert not calls
    assert "SGD's next update, without the hooks on its step" in finding.evidence


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_nothing_is_left_behind(name: str) -> None:
    model, loss_fn, batch = _net()
    optimizer = OPTIMIZERS[name](model.parameters())
    loss_fn(model, batch).backward()
    optimizer.step()
    state, states = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    grads, versions = [p.grad.clone() for p in model.parameters()], [p._version for p in model.parameters()]
    random = torch.get_rng_state()
    diagnose(model, loss_fn, batch, optimizer, ladder=True)
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert str(optimizer.state_dict()) == str(states)
    assert all(torch.equal(p.grad, grad) for p, grad in zip(model.parameters(), grads, strict=True))
    assert [p._version for p in model.parameters()] == versions
    assert torch.equal(torch.get_rng_state(), random) and torch.get_default_dtype() == torch.float32
    assert model.training and all(p.dtype == torch.float32 for p in model.parameters())


def test_what_keeps_the_ladder_from_asking_is_a_note() -> None:
    model, optimizer, _ = planted()
    strange = diagnose(model, lambda m, b: torch.special.i0(m(b)).mean(), torch.zeros(1), optimizer, ladder=True)
    assert len(strange.notes) == 1
    assert strange.notes[0].startswith("the ladder was not asked: UnsupportedOperation: ")
    assert "aten.i0.default" in strange.notes[0]
    broken = diagnose(model, lambda m, b: m(b).sum() * float("nan"), torch.zeros(1), optimizer, ladder=True)
    assert broken.notes == ("the ladder was not asked: the loss or its gradient is not finite",)
    assert broken.findings[0].kind == "nonfinite"
    elsewhere = torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=0.1)
    idle = diagnose(model, softplus_mean, torch.zeros(1), elsewhere, ladder=True)
    assert idle.notes == ("the ladder was not asked: the optimizer moves no tensor of the model",)


def test_without_ladder_nothing_is_asked_and_without_an_optimizer_there_is_no_step() -> None:
    model, optimizer, _ = planted()
    quiet = diagnose(model, softplus_mean, torch.zeros(1), optimizer)
    assert not quiet.notes and not [finding for finding in quiet.findings if finding.kind == "long step"]
    with pytest.raises(ValueError, match=r"diagnose\(ladder=True\): expected an optimizer with it, got none"):
        diagnose(model, softplus_mean, torch.zeros(1), ladder=True)


def test_more_than_three_tensors_are_counted() -> None:
    model = nn.ModuleList(planted()[0] for _ in range(5))

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return torch.stack([softplus_mean(part, batch) for part in model]).sum()

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    result = diagnose(model, loss, torch.zeros(1), optimizer, ladder=True)
    assert result.notes == ("the ladder: your step is too long for 5 tensors; 3 are shown",)
    assert sum(finding.kind == "long step" for finding in result.findings) == 3


def test_a_rate_out_of_all_proportion_gets_the_rate_of_the_series() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e30)
    findings = asked(model, lambda m, x: m(x).square().mean(), optimizer, torch.randn(3, 4))
    assert findings and all(finding.severity == steps.SEVEREST for finding in findings)
    for finding in findings:
        safe = re.search(r"safe step ([\d.e+-]+),", finding.sentence)[1]
        assert "no rate from 6e+22 up keeps half" in finding.evidence
        assert finding.change.startswith(f"a rate of {safe} is within their reach")


def test_complex_parameters_are_not_taken_for_real_ones() -> None:
    model = nn.ParameterList([nn.Parameter(torch.randn(3, dtype=torch.complex64))])
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.1)  # whose sharpness is not asked
    result = diagnose(model, lambda m, x: (m[0] * x).abs().square().sum(), torch.ones(3), optimizer, ladder=True)
    assert "the ladder was not asked: it has no rules for complex parameters" in result.notes


def test_long_lists_of_rows_are_cut_short() -> None:
    assert (
        str(Part("w", ((0, 1), (2, 3), (4, 7), (8, 9), (10, 11)), 20)) == "rows 0, 2, 4 to 6, 8 and 1 ranges more of w"
    )


def test_the_page_and_the_command_show_it(tmp_path, monkeypatch, capsys) -> None:
    (tmp_path / "steep.py").write_text(
        "import torch\nfrom tests.diagnose.test_long_step import planted, softplus_mean\n"
        "def make():\n    return planted()[0], softplus_mean, torch.zeros(1)\n"
    )
    monkeypatch.chdir(tmp_path)
    page, sentence = tmp_path / "page.html", "rows 2 to 3, 5 of weight: radius 0.013"
    with pytest.raises(SystemExit) as ended:
        main(["diagnose", "steep:make", "--ladder", "--lr", "0.1", "--page", str(page)])
    assert not ended.value.code
    assert f"[long step] {sentence}" in capsys.readouterr().out
    text = page.read_text(encoding="utf8")
    assert sentence in text and "what to change" in text and "steep:make" in text


def test_the_page_trusts_no_name() -> None:
    model, optimizer, _ = planted()
    result = diagnose(model, softplus_mean, torch.zeros(1), optimizer, ladder=True)
    found = result.to_dict()
    found["findings"][0]["sentence"] = "<img src=x onerror=alert(1)>"
    found["notes"] = ["<script>1</script>"]
    text = diagnosis_page(found, result.chain, {})
    assert "<img src=x" not in text and "<script>1" not in text


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--ladder"], "expected --lr with it"), (["--lr", "1", "--optimizer", "Nosuch"], "a class of torch.optim")],
)
def test_the_command_says_what_it_needs(options: list[str], message: str, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["diagnose", "--demo", "recurrence", *options])
    assert ended.value.code
    assert message in capsys.readouterr().err
