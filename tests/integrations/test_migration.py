"""Each row of docs/migration.md and docs/reference/equalities.md is run as it stands there.

Theirs is the package itself, or its formula.
"""

from __future__ import annotations

import jax
import keras
import numpy as np
import optax
import pytest
import torch
from pytorch_optimizer import AdamMini, Lamb
from pytorch_optimizer.optimizer.agc import agc
from torch import nn

import gradsplit as gs
from gradsplit.integrations.keras import split
from gradsplit.integrations.optax import gso, split_gradients
from tests.architecture.sources import ROOT
from tests.integrations import peer_rules as rules

STEPS = 60
NAMES = {"torch": torch, "agc": agc, "AdamMini": AdamMini, "Lamb": Lamb, "gs": gs}

BOUNDS = {
    "adaptive_clip_grad(model.parameters(), clip_factor=0.01, eps=1e-3)": lambda: rules.agc_of_rows(0.01, 1e-3),
    'dispatch_clip_grad(model_parameters(model, exclude_head=True), 0.01, mode="agc")': lambda: rules.agc_of_rows(
        0.01, leave_out=2
    ),
    "optax.adaptive_grad_clip(0.01)": lambda: rules.agc_of_kernels(0.01),
    "optax.clip_by_global_norm(1.0)": lambda: rules.global_clip(1.0),
    "keras.optimizers.SGD(0.1, clipnorm=1.0)": lambda: rules.clip_each(1.0),
    "keras.optimizers.SGD(0.1, global_clipnorm=1.0)": lambda: rules.global_clip(1.0),
    "ZClip(alpha=0.97, z_thresh=2.5, max_grad_norm=None).step(model)": rules.ZClip,
    "ZClip(alpha=0.97, z_thresh=2.5, max_grad_norm=1.0).step(model)": lambda: rules.ZClip(max_grad_norm=1.0),
    "AutoClip(percentile=10).step(model)": rules.AutoClip,
}
"""Their line, where the package is not at hand -> the rule written out."""

OPTIMIZERS = {
    "Adam_mini(model.named_parameters(), lr=1e-3, weight_decay=0.0)": lambda model: rules.AdamMini(model, 1e-3),
    "BlockOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-3), list(model.named_parameters()), "
    'switch_block_every=50, switch_mode="ascending")': lambda model: rules.BAdam(model, 1e-3, 50),
}


def rows(heading):
    """(theirs, ours, results) of the table below a heading of one of the two pages."""
    text = "\n".join(
        (ROOT / "docs" / page).read_text(encoding="utf8") for page in ("migration.md", "reference/equalities.md")
    )
    section = text.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| `")]
    cells = [line.strip("| ").split(" | ") for line in lines]
    return [(theirs.split("`")[1], ours.strip("`"), results) for theirs, ours, results in cells]


def model_of():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(16, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def model_without_biases():
    torch.manual_seed(0)
    layers = nn.Flatten(), nn.Linear(32, 5, bias=False), nn.Tanh(), nn.Linear(5, 3, bias=False)
    return nn.Sequential(*layers).double()


def backward(model, step):
    """Gradients of very different lengths over time and over layers; every tenth step is a spike."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(4, 2, 4, 4, generator=generator, dtype=torch.float64).to(next(model.parameters()).dtype)
    model.zero_grad()
    loss = (model(x) * (30.0 if step % 10 == 9 else 1.0)).square().mean() * 10.0 ** (0.3 * np.sin(step))
    loss.backward()


def ours_of(line, model):
    names = {**NAMES, "model": model}
    exec(line, names)
    return names["splitter"] if "splitter" in names else names["optimizer"]


def apply(rule, model):
    """Let a rule in NumPy bound the gradients."""
    pairs = list(model.named_parameters())
    arrays = [p.detach().numpy() for _, p in pairs], [p.grad.numpy() for _, p in pairs]
    for (_, p), bounded in zip(pairs, rule([n for n, _ in pairs], *arrays), strict=True):
        p.grad = torch.from_numpy(np.ascontiguousarray(bounded))


def theirs_of(line, model):
    """What their line does to the gradients, once."""
    if line in BOUNDS:
        rule = BOUNDS[line]()
        return lambda: apply(rule, model)

    @torch.no_grad()
    def act():
        exec(line, {**NAMES, "model": model})

    return act


def norms_of(model):
    return [float(p.grad.norm()) for p in model.parameters()]


def both(theirs, ours):
    """Run both on the same gradients and yield the two models after each step, and the norms before."""
    one, other = model_of(), model_of()
    act, splitter = theirs_of(theirs, one), ours_of(ours, other)
    for step in range(STEPS):
        backward(one, step)
        backward(other, step)
        before = norms_of(one)
        act()
        splitter.step()
        yield one, other, before


EQUAL = [row[:2] for row in rows("Bounding gradients") if row[2].startswith("equal")]


@pytest.mark.parametrize(("theirs", "ours"), EQUAL, ids=[f"{i}-{a[:30]}" for i, (a, _) in enumerate(EQUAL)])
def test_gradients_are_equal_where_the_page_says_so(theirs, ours):
    scaled = 0
    for one, other, before in both(theirs, ours):
        for p, q in zip(one.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(q.grad, p.grad, rtol=2e-5 if "ZClip" in theirs else 2e-6, atol=0)
        scaled += norms_of(one) != before
    assert scaled >= 2, "nothing was bounded, so nothing was compared"
    assert "ZClip" not in theirs or scaled < STEPS


def test_zclips_second_limit_is_kept_too_but_enters_our_history():
    (row,) = [row for row in rows("Bounding gradients") if "max_grad_norm=1.0" in row[0]]
    assert row[2].startswith("not equal")
    differs = 0
    for one, other, _ in both(*row[:2]):
        a, b = np.linalg.norm(norms_of(one)), np.linalg.norm(norms_of(other))
        assert max(a, b) <= 1 + 1e-6
        differs += abs(a - b) > 1e-3
    assert differs


def test_percentile_settles_at_autoclips_limit():
    """Norms with a standard deviation of a third in logarithms, 4,000 steps; the tracker wavers by its step."""
    (row,) = [row for row in rows("Bounding gradients") if "AutoClip" in row[0]]
    assert row[2].startswith("not equal")
    model = nn.Linear(1, 1, bias=False)
    rule, splitter = rules.AutoClip(10), ours_of(row[1], model)
    norms, limits = np.exp(np.random.default_rng(0).normal(0.0, 1 / 3, 4000)), []
    for norm in norms:
        model.weight.grad = torch.full((1, 1), norm)
        limits.append(float(splitter.step().decision.limit_B))
    rule.norms = list(norms)
    rule(["w"], [np.ones(1)], [np.ones(1)])
    assert np.median(limits[2000:]) == pytest.approx(np.percentile(rule.norms, 10), rel=0.05)


@pytest.mark.parametrize("name", ["ZClip", "AutoClip"])
def test_one_nan_ends_their_bound_and_not_ours(name):
    """Ours by rows: the row that holds it is zeroed, the others and the history go on."""
    theirs, ours = next(row[:2] for row in rows("Bounding gradients") if row[0].startswith(name))
    one, other = model_of(), model_of()
    act, splitter = theirs_of(theirs, one), ours_of(ours.replace('"whole"', '"xsp"'), other)
    for step in range(40):
        for model in (one, other):
            backward(model, step)
            if step == 30:
                model[2].weight.grad[1, 2] = torch.nan
            if step == 39:
                for p in model.parameters():
                    p.grad *= 1e6
        before = norms_of(one)
        act()
        record = splitter.step()
    assert norms_of(one) == before, "their bound lets a factor of a million through"
    assert (record.decision.scale_B < 1e-3).all()


def train(model, optimizer):
    for step in range(2 * STEPS):
        backward(model, step)
        optimizer.step()


@pytest.mark.parametrize(("theirs", "ours", "results"), rows("Optimizers"), ids=lambda text: text[:24])
def test_weights_are_equal_after_120_steps_of_both_optimizers(theirs, ours, results):
    assert results.startswith("equal")
    make = model_without_biases if "biases" in results else model_of
    dtype = torch.float32 if "AdamMini" in theirs else torch.float64  # its moments are float32 whatever the weights
    one, other = make().to(dtype), make().to(dtype)
    optimizer = OPTIMIZERS[theirs](one) if theirs in OPTIMIZERS else eval(theirs, {**NAMES, "model": one})
    mine = ours_of(ours, other)
    start = [p.detach().clone() for p in one.parameters()]
    train(one, optimizer)
    train(other, mine)
    for s, p, q in zip(start, one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-6 if dtype == torch.float64 else 1e-4, atol=1e-7)
        assert not torch.equal(s, p)


def made_of(line, model):
    """The optimizer that a line makes, with the packages it needs."""
    names = {**NAMES, "model": model}
    for package, found in (("prodigyopt", "Prodigy"), ("schedulefree", "AdamWScheduleFree ScheduleFreeWrapper")):
        for name in found.split():
            if name in line:
                names[name] = getattr(pytest.importorskip(package, reason=f"the row needs {package}"), name)
    exec(line if line.startswith("optimizer =") else f"optimizer = {line}", names)
    return names["optimizer"]


def losses_of(optimizer, model):
    """The loss of a regression before and after 200 steps, in the optimizer's mode of evaluation."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 32, generator=generator)
    y = torch.randn(64, 3, generator=generator)
    loss = nn.functional.mse_loss
    before = loss(model(x), y).item()
    getattr(optimizer, "train", lambda: None)()
    for _ in range(200):
        optimizer.zero_grad()
        loss(model(x), y).backward()
        optimizer.step()
    getattr(optimizer, "eval", lambda: None)()
    return before, loss(model(x), y).item()


MOVING = sorted({line for row in rows("From an optimizer to GSO") for line in row[:2]})


@pytest.mark.parametrize("line", MOVING, ids=lambda text: text[:48])
def test_both_sides_of_a_move_to_gso_train(line):
    model = model_without_biases().float()
    before, after = losses_of(made_of(line, model), model)
    assert after < (0.7 if "gs.GSO" in line else 1.0) * before


def layers_of_tree(seed):
    """A kernel (in, out), its bias and a convolution (height, width, in, out), float32, their lengths far apart."""
    random = np.random.default_rng(seed)
    shapes = {"kernel": (4, 3), "bias": (3,), "conv": (2, 2, 3, 4)}
    scales = np.exp(random.normal(0.0, 2.0, len(shapes)))
    return {
        name: (scale * random.standard_normal(shape)).astype(np.float32)
        for (name, shape), scale in zip(shapes.items(), scales, strict=True)
    }


STAYING = [row for row in rows("Staying in optax or Keras") if row[2] == "equal"]


@pytest.mark.parametrize(("theirs", "ours"), [r[:2] for r in STAYING if "optax" in r[0]], ids=lambda text: text[:28])
def test_updates_in_optax_are_equal(theirs, ours):
    names = {"gs": gs, "optax": optax, "split_gradients": split_gradients, "gso": gso}
    one, other = eval(theirs, names), eval(ours, names)
    params = layers_of_tree(0)
    a, b = one.init(params), other.init(params)
    theirs_once, ours_once, changed = jax.jit(one.update), jax.jit(other.update), 0
    for step in range(1, 12):
        gradients = layers_of_tree(step)
        expected, a = theirs_once(gradients, a, params)
        found, b = ours_once(gradients, b, params)
        for name in params:
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=1e-9, err_msg=name)
            changed += not np.array_equal(expected[name], gradients[name])
    assert changed >= 5, "nothing was bounded, so nothing was compared"


@pytest.mark.parametrize(("theirs", "ours"), [r[:2] for r in STAYING if "keras" in r[0]], ids=lambda text: text[:40])
def test_weights_in_keras_are_equal(theirs, ours):
    names = {"gs": gs, "keras": keras, "split": split}
    trained = []
    for line in (theirs, ours):
        weights = [keras.Variable(value, name=name) for name, value in layers_of_tree(0).items()]
        optimizer = eval(line, names)
        for step in range(1, 12):
            optimizer.apply([keras.ops.convert_to_tensor(g) for g in layers_of_tree(step).values()], weights)
        trained.append([keras.ops.convert_to_numpy(w) for w in weights])
    for start, expected, found in zip(layers_of_tree(0).values(), *trained, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
        assert not np.array_equal(found, start)
