"""`gradsplit run --control`: what bounds each optimizer, what is recorded of it, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gradsplit as gs
from gradsplit.watch.record import RunFile
from gradsplit.watch.report.account import account_of
from gradsplit.watch.report.advice import advice_of
from gradsplit.watch.run.settings import budget_from_words, words_of_budget
from gradsplit.watch.run.track import Track
from tests.watch.run.watched import watched

SGD, ISOLATION, NOTHING = ["relative_step:tau=0.03:length=1"], ["relative:factor=1"], ["fixed:limit=inf"]
MADE = {
    "SGD": (lambda p: torch.optim.SGD(p, lr=1.0, momentum=0.9), SGD, False),
    "AdamW": (lambda p: torch.optim.AdamW(p, lr=0.1), ISOLATION, True),
    "RMSprop": (lambda p: torch.optim.RMSprop(p, lr=0.1), ISOLATION, True),
    "Adafactor": (lambda p: torch.optim.Adafactor(p, lr=0.1), ISOLATION, True),
    "LBFGS": (lambda p: torch.optim.LBFGS(p, lr=0.5, max_iter=4), NOTHING, False),
    "line search": (lambda p: torch.optim.LBFGS(p, lr=0.5, max_iter=4, line_search_fn="strong_wolfe"), NOTHING, False),
}
"""Per optimizer: how it is made, the words of its default, and whether the collective rule stands beside it."""


def made(name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 12), nn.Tanh(), nn.Linear(12, 6))
    return model, MADE[name][0](model.parameters())


def train(model, optimizer):
    """Twelve steps; in one a row is not finite, in one the whole batch is far too large."""
    for step in range(12):
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))

        def closure(x=x, step=step):
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            for p in model.parameters():
                p.grad *= 1e3 if step == 6 else 1.0
            if step == 9:
                model[0].weight.grad[2, 1] = float("nan")
            return loss

        if isinstance(optimizer, torch.optim.LBFGS):
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("name", MADE)
def test_control_bounds_what_a_splitter_at_this_optimizer_bounds(tmp_path, name):
    model, optimizer = made(name)
    gs.GradientSplitter(model, optimizer=optimizer).attach(optimizer)
    by_splitter = train(model, optimizer)
    model, optimizer = made(name)
    with watched(tmp_path / "run.db", control=True):
        by_control = train(model, optimizer)
    assert all(p.isfinite().all() for p in by_control)
    assert all(torch.equal(a, b) for a, b in zip(by_splitter, by_control, strict=True))
    with RunFile(tmp_path / "run.db") as file:
        about = file.streams[0].about
    assert about["words"] == MADE[name][1]
    assert about["collective"] is MADE[name][2]


def longest_move(tmp_path, name, *budget, **options):
    """The largest share of its length by which a row of the first weight moved in a step."""
    model, optimizer = made(name)
    shares = []

    def look(*_):
        weight = model[0].weight.detach()
        if shares:
            shares[-1] = float(((weight - shares[-1]).norm(dim=1) / shares[-1].norm(dim=1)).max())
        shares.append(weight.clone())

    tmp_path.mkdir()
    optimizer.register_step_pre_hook(look)  # a hook after the step would come before the session's own
    with watched(tmp_path / "run.db", control=True, budget=budget, **options):
        train(model, optimizer)
    look()
    return max(share for share in shares if isinstance(share, float))


def test_a_step_is_capped_where_it_is_asked_for_and_not_by_default(tmp_path):
    assert longest_move(tmp_path / "a", "AdamW", "relative_step") <= 0.03 * 1.001
    assert longest_move(tmp_path / "b", "AdamW") > 0.06
    both = longest_move(tmp_path / "c", "AdamW", "relative:factor=1", "relative_step", collective=True)
    assert both <= 0.03 * 1.001
    with RunFile(tmp_path / "c" / "run.db") as file:
        about = file.streams[0].about
    assert about["words"] == ["relative:factor=1", "relative_step:tau=0.03"]
    assert about["collective"] is True


def test_one_decision_per_step_holds_for_all_calls_of_a_closure(tmp_path, monkeypatch):
    scales = []

    def noted(track, inner=Track._measured):
        numbers = inner(track)
        scales.append((track.step, track.splitter._turn.held.scale_B.clone()))
        return numbers

    monkeypatch.setattr(Track, "_measured", noted)
    model, optimizer = made("LBFGS")
    with watched(tmp_path / "run.db", control=True, budget=("fixed:limit=0.01",)):
        train(model, optimizer)
    by_step = {}
    for step, scale_B in scales:
        by_step.setdefault(step, []).append(scale_B)
    sound = [several for step, several in by_step.items() if step < 9]
    assert max(len(several) for several in sound) > 2
    assert all(torch.equal(one, several[0]) for several in sound for one in several)
    assert not torch.equal(sound[0][0], sound[1][0])


def test_bounds_that_an_optimizer_does_not_bear_are_refused_with_the_command(tmp_path):
    for name, word, why in (
        ("line search", "fixed:limit=1", "no limit in front of a line search"),
        ("line search", "relative_step", "its line search has checked the loss"),
    ):
        model, optimizer = made(name)
        told = rf"gradsplit run --control --budget {word}: .*{why}.* takes the default that fits LBFGS"
        with watched(tmp_path / "run.db", control=True, budget=(word,)), pytest.raises(ValueError, match=told):
            train(model, optimizer)


def test_schedule_free_and_prodigy_run_under_control(tmp_path):
    prodigyopt, schedulefree = pytest.importorskip("prodigyopt"), pytest.importorskip("schedulefree")
    for kind in (prodigyopt.Prodigy, schedulefree.AdamWScheduleFree):
        model, _ = made("AdamW")
        optimizer = kind(model.parameters())
        getattr(optimizer, "train", lambda: None)()
        with watched(tmp_path / f"{kind.__name__}.db", control=True):
            assert all(p.isfinite().all() for p in train(model, optimizer))


def test_the_words_of_a_budget_make_it_again():
    for word in (
        "relative_step:tau=0.06:length=1",
        "root@fixed:limit=2",
        "ema:ratio=1.5:warmup=3",
        "relative:factor=1",
    ):
        ((level, (budget,)),) = budget_from_words([word]).items()
        again = budget_from_words([words_of_budget(level, budget)])
        assert again == {level: (budget,)}


def test_the_advice_to_widen_keeps_what_the_default_had(tmp_path):
    model, optimizer = made("AdamW")
    with watched(tmp_path / "run.db", control=True):
        for _ in range(60):
            for p in model.parameters():
                p.grad = torch.full_like(p, 10.0)
            optimizer.step()
    with RunFile(tmp_path / "run.db") as file:
        (advice,) = [one for one in advice_of(account_of(file)) if "is tight" in one.reason]
    assert "--budget relative:factor=2 --collective" in advice.command
