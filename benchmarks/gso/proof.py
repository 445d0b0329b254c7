"""Which runs docs/results/gso.md consists of: the optimizer that ships and every baseline's best, on fresh seeds."""

from __future__ import annotations

from benchmarks.gso.plan import CHOOSING, DETECTOR, FRESH, GPT, HOT, MAIN, MIXER, SHARE, Job, cells
from benchmarks.gso.rivals import RIVALS, with_muon

__all__ = ["PROOF"]

ADAMW_RATES = (1e-3, 3e-3, 1e-2, 3e-2)


def _main() -> list[Job]:
    """The shipped optimizer and every baseline's best cell on six fresh seeds; rates beyond an edge that won."""
    muon = {"method_options": {"adam": 1e-2}}
    jobs = cells(*MAIN, "gso", SHARE, FRESH) + cells(*MAIN, "muon", 0.03, FRESH, **muon)
    jobs += cells(*MAIN, "soap", 1e-2, FRESH) + cells(*MAIN, "adamw", 1e-2, FRESH)
    jobs += cells(*MAIN, "lamb", 1e-1, (0,)) + cells(*MAIN, "prodigy", 0.1, (0,))
    jobs += cells(*MAIN, "schedulefree", 2e-2, (0,)) + cells(*MAIN, "schedulefree", 1e-2, FRESH[:3])
    return jobs


def _text() -> list[Job]:
    text = {"text": "second"}
    jobs = cells(*MAIN, "gso", SHARE, FRESH[:3], options=text) + cells(*MAIN, "adamw", 3e-2, (0,), options=text)
    for lr, adam in ((0.02, 1e-2), (0.03, 3e-2)):
        jobs += cells(*MAIN, "muon", lr, (0,), options=text, method_options={"adam": adam})
    jobs += cells(*MAIN, "adamw", 1e-2, FRESH[:3], options=text)
    return jobs + cells(*MAIN, "muon", 0.03, FRESH[:3], options=text, method_options={"adam": 1e-2})


def _rates() -> list[Job]:
    """The right side of the README's picture: a factor of 100 in each method's own rate."""
    rates = (0.003, 0.01, 0.03, 0.1, 0.3)
    jobs = [job for lr in rates for job in cells(*GPT[:2], "gso", lr, (0,))]
    for method in ("adamw", "schedulefree"):
        jobs += [job for lr in (1e-3, 3e-3, 1e-2, 3e-2, 1e-1) for job in cells(*GPT[:2], method, lr, (0,))]
    jobs += [job for lr in rates for job in cells(*GPT[:2], "muon", lr, (0,), method_options={"adam": 1e-2})]
    jobs += [job for lr in (1e-3, *rates) for job in cells(*GPT[:2], "soap", lr, (0,))]
    return jobs + cells(*GPT[:2], "schedulefree", 3e-4, (0,))


def _elsewhere() -> list[Job]:
    """Recurrent nets and detectors: the shipped optimizer and each baseline's best on six fresh seeds."""
    jobs = cells("lstm", 500, "gso", SHARE, FRESH) + cells("lstm", 500, "adamw", 3e-2, FRESH)
    for lr, adam in ((0.03, 3e-2), (0.06, 1e-2)):
        jobs += cells("lstm", 500, "muon", lr, (0,), method_options={"adam": adam})
    jobs += [job for lr in (3e-3, 3e-2) for job in cells("lstm", 500, "soap", lr, (0,))]
    jobs += cells("lstm", 500, "muon", 0.03, FRESH, method_options={"adam": 1e-2})
    jobs += cells("lstm", 500, "soap", 1e-2, FRESH[:3])
    jobs += cells(*DETECTOR[:2], "gso", SHARE, FRESH) + cells(*DETECTOR[:2], "adamw", 3e-3, FRESH)
    jobs += [job for lr in (3e-3, 3e-2) for job in cells(*DETECTOR[:2], "soap", lr, (0,))]
    jobs += cells(*DETECTOR[:2], "soap", 1e-2, FRESH)
    healthy = {"healthy": True}
    jobs += cells(*DETECTOR[:2], "gso", SHARE, FRESH, options=healthy)
    return jobs + cells(*DETECTOR[:2], "adamw", 1e-2, FRESH, options=healthy)


def _hot() -> list[Job]:
    return cells(*HOT[:2], "gso", SHARE, FRESH)


def _gains() -> list[Job]:
    return [job for gain in (1.0, 2.0) for job in cells(*HOT[:2], "gso", SHARE, FRESH[:2], options={"gain": gain})]


def _cool() -> list[Job]:
    """The residual stack at half of He's gain."""
    cool = {"gain": 0.5}
    jobs = cells(*HOT[:2], "gso", SHARE, FRESH[:3], options=cool)
    return jobs + [job for lr in ADAMW_RATES for job in cells(*HOT[:2], "adamw", lr, (0,), options=cool)]


def _stacks() -> list[Job]:
    """Plain stacks of 12, 36 and 146 layers."""
    jobs = cells("plain-stack", 350, "gso", SHARE, FRESH) + cells("plain-stack", 350, "adamw", 1e-2, FRESH)
    jobs += [job for lr in (3e-3, 1e-2) for job in cells("plain-stack", 350, "soap", lr, (0,))]
    for task, steps, options in (("plain-stack", 350, {"depth": 36}), ("deep-stack", 300, {})):
        jobs += cells(task, steps, "gso", SHARE, FRESH[:2], options=options)
        jobs += [job for lr in ADAMW_RATES for job in cells(task, steps, "adamw", lr, (0,), options=options)]
        jobs += cells(task, steps, "sgdm", 0.03, (0,), options=options)
    jobs += cells("plain-stack", 350, "soap", 1e-2, (0,), options={"depth": 36})
    return jobs


def _small() -> list[Job]:
    """The mixer on twelve fresh seeds, since one test digit is .28 points."""
    seeds = (*FRESH, *range(16, 22))
    jobs = cells(*MIXER, "gso", SHARE, seeds) + cells(*MIXER, "adamw", 3e-3, seeds)
    jobs += with_muon(*MIXER, 0.01, seeds) + cells(*MIXER, "soap", 1e-2, seeds)
    return jobs + cells(*MIXER, "gso", 0.01, seeds)


def _zero() -> list[Job]:
    """Matrices that start at zero: adapters of low rank, and a GPT's projections and head."""
    jobs = cells("lora", 400, "gso", SHARE, FRESH[:3]) + cells("lora", 400, "adamw", 3e-2, FRESH[:3])
    jobs += cells(*GPT[:2], "gso", SHARE, FRESH[:3], options={"zero": True})
    jobs += [job for lr in (1e-3, 3e-4) for job in cells(*GPT[:2], "adamw", lr, (0,), options={"zero": True})]
    return jobs


def _faults() -> list[Job]:
    jobs = cells(*GPT[:2], "gso", SHARE, (0, 1, 2))
    for kind in ("nan", "batch", "row", "layer", "huge"):
        jobs += cells(*GPT[:2], "gso", SHARE, (0, 1, 2), fault={"kind": kind, "rate": 0.05})
    return jobs


def _depth() -> list[Job]:
    jobs = []
    for layers in (6, 24, 12):
        options = {"layers": layers, "width": 48}
        for share in (0.03, 0.02, 0.045, 0.015, 0.06):
            jobs += cells("gpt", 300, "gso", share, (0,), options=options)
        for lr in (3e-3, 1e-2, 1e-3, 3e-2):
            jobs += cells("gpt", 300, "adamw", lr, (0,), options=options)
    return jobs


def _aerial() -> list[Job]:
    jobs = cells("aerial", 500, "gso", SHARE, FRESH[:1])
    jobs += [job for lr in (3e-3, 1e-2) for job in cells("aerial", 500, "adamw", lr, (0,))]
    jobs += cells("aerial", 500, "sgdm", 0.1, (0,)) + cells("aerial", 500, "soap", 1e-2, (0,))
    return jobs


def _seconds() -> list[Job]:
    """As many steps, with a decay of their own, as fit into the CPU time of AdamW's run: see seconds.py."""
    text = {"text": "second"}
    jobs = cells("lstm", 324, "gso", SHARE, FRESH[:3]) + cells("gpt", 833, "gso", SHARE, FRESH[:2])
    jobs += cells("gpt", 841, "gso", SHARE, FRESH[:2], options=text)
    jobs += cells("gpt", 690, "soap", 1e-2, FRESH[:2]) + cells("lstm", 197, "soap", 3e-2, FRESH[:3])
    jobs += cells("lstm", 374, "muon", 0.06, FRESH[:3], method_options={"adam": 1e-1})
    return jobs + cells("gpt", 802, "muon", 0.03, FRESH[:2], method_options={"adam": 1e-2})


def _why() -> list[Job]:
    """Why deep plain stacks fail: the share, or the length to which rows may grow."""
    jobs = []
    for seed in CHOOSING:
        for options in ({"limit": 1.5}, {"limit": 2.0}, {"limit": 1.0}):
            for task, steps, depth in (("plain-stack", 350, {"depth": 36}), ("deep-stack", 300, {})):
                jobs += cells(task, steps, "reference", SHARE, (seed,), options=depth, method_options=options)
        for share in (0.015, 0.0075, 0.004, 0.002):
            for task, steps, depth in (("plain-stack", 350, {"depth": 36}), ("deep-stack", 300, {})):
                jobs += cells(task, steps, "gso", share, (seed,), options=depth)
    return jobs


def _more() -> list[Job]:
    """Where a wider grid moved the best cell, and where the default share failed: the same on fresh seeds."""
    jobs = cells("lstm", 500, "muon", 0.03, (0,), method_options={"adam": 1e-1})
    jobs += cells("lstm", 500, "muon", 0.06, (0,), method_options={"adam": 3e-2})
    jobs += cells("lstm", 500, "muon", 0.03, FRESH, method_options={"adam": 3e-2})
    jobs += cells("lstm", 500, "soap", 6e-2, (0,)) + cells("lstm", 500, "soap", 3e-2, FRESH)
    deep = {"depth": 36}
    jobs += cells("plain-stack", 350, "gso", 0.0075, FRESH, options=deep)
    jobs += cells("plain-stack", 350, "gso", SHARE, FRESH, options=deep)
    jobs += cells("plain-stack", 350, "adamw", 3e-3, FRESH, options=deep)
    jobs += [job for lr in (3e-3, 3e-2) for job in cells("plain-stack", 350, "soap", lr, (0,), options=deep)]
    jobs += cells("plain-stack", 350, "soap", 1e-2, FRESH, options=deep) + cells(
        "plain-stack", 350, "soap", 1e-2, FRESH
    )
    jobs += cells("deep-stack", 300, "gso", 0.0075, FRESH[:2])
    healthy = {"healthy": True}
    jobs += [job for lr in (3e-3, 1e-2, 3e-2) for job in cells(*DETECTOR[:2], "soap", lr, (0,), options=healthy)]
    jobs += cells(*DETECTOR[:2], "soap", 1e-2, FRESH[:3], options=healthy)
    return jobs


def _length() -> list[Job]:
    """Whether the best share of a deep net is a matter of the run's length: 400 and 1,000 steps."""
    six = {"layers": 6, "width": 48}
    jobs = [job for share in (0.03, 0.045) for job in cells("gpt", 400, "gso", share, (0,), options=six)]
    return jobs + [job for share in (0.03, 0.045) for job in cells(*MAIN, "gso", share, (0,), options=six)]


def _photographs() -> list[Job]:
    """Real photographs, where a run is cheap: every baseline over its rates, then on fresh seeds."""
    photo = ("aerial", 500)
    jobs = cells(*photo, "gso", SHARE, FRESH)
    for lr in (1e-3, 3e-3, 1e-2, 3e-2):
        jobs += cells(*photo, "adamw", lr, (0,)) + cells(*photo, "soap", lr, (0,))
    for lr in (0.03, 0.1, 0.3):
        jobs += cells(*photo, "split", lr, (0,))
        for clip in (0.1, 1.0):
            jobs += cells(*photo, "sgdm", lr, (0,), method_options={"clip": clip})
    jobs += cells(*photo, "gso", SHARE, (0,))
    jobs += cells("lstm", 500, "muon", 0.06, FRESH, method_options={"adam": 3e-2})
    jobs += cells("lstm", 500, "muon", 0.1, (0,), method_options={"adam": 3e-2})
    return jobs + cells("lstm", 500, "muon", 0.06, (0,), method_options={"adam": 1e-1})


def _trees() -> list[Job]:
    """The photographs again: each baseline's best on the same fresh seeds."""
    photo = ("aerial", 500)
    jobs = cells(*photo, "soap", 1e-3, FRESH[:5])
    for share in (0.01, 0.003):
        jobs += cells(*photo, "gso", share, CHOOSING)
    jobs += cells(*photo, "gso", SHARE, CHOOSING) + cells(*photo, "adamw", 1e-2, FRESH[:3])
    jobs += cells("plain-stack", 350, "gso", SHARE, CHOOSING, options={"depth": 36})
    return jobs + cells("plain-stack", 350, "soap", 3e-3, FRESH[:3], options={"depth": 36})


def _rivals() -> list[Job]:
    """LAMB, Prodigy and schedule-free at the cells that seed 0 chose."""
    jobs = cells(*MAIN, "lamb", 3e-2, FRESH[:3]) + cells(*MAIN, "prodigy", 0.3, FRESH[:3])
    return jobs + cells(*MAIN, "schedulefree", 1e-2, FRESH[3:])


def _depth_fresh(*layers: int) -> list[Job]:
    """The default share, the best of seed 0, and AdamW's best."""
    jobs = []
    for count in layers:
        options = {"layers": count, "width": 48}
        for share in (SHARE, 0.045):
            jobs += cells("gpt", 300, "gso", share, FRESH[:2], options=options)
        jobs += cells("gpt", 300, "adamw", 1e-2, FRESH[:2], options=options)
    return jobs


def _hot_rivals() -> list[Job]:
    """SOAP, Muon and AdamW on the residual stack at three gains: the rates of seed 0."""
    jobs = []
    for options, count in (({}, 3), ({"gain": 1.0}, 2), ({"gain": 0.5}, 2)):
        for lr in (1e-2, 3e-3, 3e-2)[:count]:
            jobs += cells(*HOT[:2], "soap", lr, (0,), options=options)
        for lr in (0.03, 0.01, 0.1)[:count]:
            jobs += cells(*HOT[:2], "muon", lr, (0,), options=options, method_options={"adam": 1e-2})
    jobs += [job for lr in ADAMW_RATES[:3] for job in cells(*HOT[:2], "adamw", lr, (0,), options={"gain": 1.0})]
    jobs += cells(*HOT[:2], "adamw", 3e-4, (0,), options={"gain": 0.5})
    return jobs + cells(*HOT[:2], "gso", SHARE, FRESH[2:3], options={"gain": 1.0})


def _hot_wide() -> list[Job]:
    """The hot stack with a clip whose norm is computed in float64: in float32 it is infinite, and nothing is left."""
    wide = {"wide": True}
    jobs = [job for lr in (1e-2, 3e-3, 3e-2) for job in cells(*HOT[:2], "adamw", lr, (0,), method_options=wide)]
    jobs += [job for lr in (1e-2, 3e-3) for job in cells(*HOT[:2], "soap", lr, (0,), method_options=wide)]
    for lr in (0.03, 0.01):
        jobs += cells(*HOT[:2], "muon", lr, (0,), method_options={"adam": 1e-2, **wide})
    jobs += cells(*HOT[:2], "adamw", 1e-2, FRESH[:3], method_options=wide)
    jobs += cells(*HOT[:2], "soap", 3e-2, (0,), method_options=wide)
    return jobs + cells(*HOT[:2], "muon", 0.1, (0,), method_options={"adam": 1e-2, **wide})


def _hot_wide_fresh() -> list[Job]:
    """The same on fresh seeds."""
    wide = {"wide": True}
    jobs = cells(*HOT[:2], "soap", 3e-2, FRESH[:3], method_options=wide)
    return jobs + cells(*HOT[:2], "muon", 0.03, FRESH[:2], method_options={"adam": 1e-2, **wide})


def _hot_fresh() -> list[Job]:
    """The best cells of seed 0 where the stack is trained by all; at gain 3 all cells of the others stay at chance."""
    jobs = []
    for options, muon, adam in (({"gain": 1.0}, 0.01, 3e-3), ({"gain": 0.5}, 0.03, 1e-3)):
        jobs += cells(*HOT[:2], "soap", 1e-2, FRESH[:2], options=options)
        jobs += cells(*HOT[:2], "muon", muon, FRESH[:2], options=options, method_options={"adam": 1e-2})
        jobs += cells(*HOT[:2], "adamw", adam, FRESH[:2], options=options)
    return jobs


def _text_soap() -> list[Job]:
    text = {"text": "second"}
    jobs = [job for lr in (1e-2, 2e-2, 3e-2) for job in cells(*MAIN, "soap", lr, (0,), options=text)]
    return jobs + cells(*MAIN, "soap", 2e-2, FRESH[:3], options=text)


def _decay() -> list[Job]:
    """Whether a stronger weight decay makes AdamW and Muon better on the GPT: ten times as much."""
    jobs = [job for lr in (1e-2, 3e-3) for job in cells(*MAIN, "adamw", lr, (0,), method_options={"decay": 0.1})]
    return jobs + cells(*MAIN, "muon", 0.03, (0,), method_options={"adam": 1e-2, "decay": 0.1})


def _edges() -> list[Job]:
    """Beyond each grid whose best cell lay at its edge."""
    jobs = cells("plain-stack", 350, "soap", 3e-2, (0,))
    jobs += cells("plain-stack", 350, "soap", 1e-3, (0,), options={"depth": 36}) + cells(
        "aerial", 500, "soap", 3e-4, (0,)
    )
    for lr, adam in ((0.1, 1e-1), (0.06, 3e-1)):
        jobs += cells("lstm", 500, "muon", lr, (0,), method_options={"adam": adam})
    return jobs + cells("lstm", 500, "muon", 0.06, FRESH[4:], method_options={"adam": 1e-1})


PLACES: tuple[tuple[str, int, dict[str, object]], ...] = (
    ("aerial", 500, {}),
    ("mixer", 600, {}),
    ("detection", 500, {"healthy": True}),
    ("detection", 500, {}),
    ("lstm", 500, {}),
    ("gpt", 500, {}),
    ("plain-stack", 350, {}),
    ("residual-stack", 900, {}),
)
"""Where a stronger decay of GSO's weights was tried."""


def _regular() -> list[Job]:
    """Weight decay on one photograph, where nets overfit, for all methods; and what GSO's does elsewhere."""
    jobs = []
    for task, steps, options in PLACES:
        for decay in (1.0, 0.3):
            extra = {"options": options, "method_options": {"weight_decay": decay}}
            jobs += cells(task, steps, "gso", SHARE, CHOOSING, **extra)
    for method, rates in (("soap", (1e-3, 3e-3, 1e-2)), ("adamw", (3e-3, 1e-2))):
        for decay in (1.0, 0.1):
            for lr in rates:
                jobs += cells("aerial", 500, method, lr, (0,), method_options={"decay": decay})
    return jobs + cells("aerial", 500, "gso", SHARE, FRESH, method_options={"weight_decay": 1.0})


def _regular_fresh() -> list[Job]:
    """A decay of 0.3 on convolutions, which seeds 0 and 1 prefer, on fresh seeds."""
    jobs = []
    for task, steps, options, seeds in (
        ("detection", 500, {}, FRESH),
        ("detection", 500, {"healthy": True}, FRESH),
        ("plain-stack", 350, {}, FRESH),
    ):
        jobs += cells(task, steps, "gso", SHARE, seeds, options=options, method_options={"weight_decay": 0.3})
    jobs += [job for steps in (75, 125, 200) for job in cells("aerial", steps, "gso", SHARE, CHOOSING)]
    for method, lr in (("soap", 1e-3), ("adamw", 1e-2)):
        jobs += cells("aerial", 500, method, lr, FRESH[:3], method_options={"decay": 1.0})
    return jobs


SHORT: tuple[tuple[str, int, dict[str, object]], ...] = (
    ("lstm", 500, {}),
    ("detection", 500, {}),
    ("detection", 500, {"healthy": True}),
    ("plain-stack", 350, {}),
    ("gpt", 300, {}),
    ("mixer", 600, {}),
    ("residual-stack", 900, {}),
    ("gpt", 1000, {}),
)
"""Where a share that depends on the number of steps must hold."""


def _share_of_steps() -> list[Job]:
    """Whether a share that is larger in short runs is better everywhere."""
    jobs = []
    for share in (SHARE, 0.045, 0.0375):
        for task, steps, options in SHORT:
            if share == SHARE or (share == 0.045 and steps < 1000) or steps <= 600:
                jobs += cells(task, steps, "gso", share, CHOOSING, options=options)
    return jobs


def _convolutions() -> list[Job]:
    """Muon, which takes convolutions as matrices, on detectors and plain stacks: the cells of seed 0."""
    jobs = []
    places = (
        *(("detection", 500, options) for options in ({}, {"healthy": True})),
        *(("plain-stack", 350, options) for options in ({}, {"depth": 36})),
        ("aerial", 500, {}),
    )
    for task, steps, options in places:
        for lr in (0.03, 0.01, 0.1):
            for adam in (1e-2, 3e-3):
                jobs += cells(task, steps, "muon", lr, (0,), options=options, method_options={"adam": adam})
    return jobs


def _adamw_fresh() -> list[Job]:
    """AdamW at the rates of seed 0 where no fresh seed of it had run."""
    jobs = cells(*GPT[:2], "adamw", 3e-3, FRESH[:3], options={"zero": True})
    jobs += cells(*HOT[:2], "adamw", 1e-3, FRESH[:3], options={"gain": 0.5})
    return jobs + cells("deep-stack", 300, "adamw", 1e-3, FRESH[:3])


def _series() -> list[Job]:
    """Layers in series: deep stacks, where the share is shortened, and what must stay as it was."""
    deep = {"depth": 36}
    jobs = cells("plain-stack", 350, "gso", SHARE, (*FRESH, *range(16, 22)), options=deep)
    jobs += cells("deep-stack", 300, "gso", SHARE, FRESH[:2])
    jobs += cells("plain-stack", 350, "gso", SHARE, FRESH[:2]) + cells("residual-stack", 900, "gso", SHARE, FRESH)
    for gain in (1.0, 2.0, 0.5):
        jobs += cells("residual-stack", 900, "gso", SHARE, FRESH[:2], options={"gain": gain})
    jobs += cells("plain-stack", 350, "gso", SHARE, FRESH, options={"depth": 24})
    jobs += cells(*DETECTOR[:2], "gso", SHARE, FRESH[:2]) + cells("lstm", 500, "gso", SHARE, FRESH[:2])
    return jobs + cells(*MIXER, "gso", SHARE, FRESH[:2]) + cells("gpt", 500, "gso", SHARE, CHOOSING)


def _balance() -> list[Job]:
    """Stacks in which vectors would outweigh the matrices, and what must stay as it was."""
    jobs = cells("deep-stack", 300, "gso", SHARE, (*FRESH, *CHOOSING))
    jobs += cells("plain-stack", 350, "gso", SHARE, (*FRESH, *range(16, 22)), options={"depth": 36})
    jobs += cells("plain-stack", 350, "gso", SHARE, FRESH, options={"depth": 24})
    jobs += cells("plain-stack", 350, "gso", SHARE, FRESH[:3]) + cells(*HOT[:2], "gso", SHARE, FRESH[:2])
    jobs += cells(*DETECTOR[:2], "gso", SHARE, FRESH[:2])
    jobs += cells(*DETECTOR[:2], "gso", SHARE, FRESH[:2], options={"healthy": True})
    jobs += cells("aerial", 500, "gso", SHARE, FRESH[:2]) + cells("lstm", 500, "gso", SHARE, FRESH[:2])
    return jobs + cells(*MIXER, "gso", SHARE, FRESH[:2]) + cells("gpt", 500, "gso", SHARE, CHOOSING)


def _positions() -> list[Job]:
    """GPTs whose table of positions takes the orthogonal direction; without it: `proof-depth-fresh`, `proof-main`."""
    ours = {"method_options": {"direction": {"position.weight": "orthogonal"}}}
    jobs = []
    for layers in (6, 12, 24):
        jobs += cells("gpt", 300, "gso", SHARE, FRESH[:2], options={"layers": layers, "width": 48}, **ours)
    return jobs + cells(*MAIN, "gso", SHARE, FRESH[:1], **ours)


def _both(task: str, steps: int, **options: object) -> list[Job]:
    """Three rates of Muon and of SOAP on seed 0."""
    jobs = [job for lr in (0.03, 0.01, 0.1) for job in with_muon(task, steps, lr, (0,), **options)]
    return jobs + [job for lr in (1e-2, 3e-3, 3e-2) for job in cells(task, steps, "soap", lr, (0,), options=options)]


def _deep_muon() -> list[Job]:
    """Muon on the plain stack of 36 layers: four rates on seed 0, the best on fresh seeds."""
    jobs = [job for lr in (0.03, 0.01, 0.1, 0.003) for job in with_muon("plain-stack", 350, lr, (0,), depth=36)]
    return jobs + with_muon("plain-stack", 350, 0.01, FRESH[:3], depth=36)


def _deepest() -> list[Job]:
    """146 layers: AdamW's best, and Muon and SOAP at the rates that are best with 36 layers."""
    jobs = cells("deep-stack", 300, "adamw", 1e-3, FRESH[:2])
    jobs += with_muon("deep-stack", 300, 0.01, (0, *FRESH[:2])) + with_muon("deep-stack", 300, 0.03, (0,))
    jobs += cells("deep-stack", 300, "soap", 3e-3, (0, *FRESH[:3]))
    return jobs + cells("deep-stack", 300, "gso", SHARE, FRESH[2:3])


def _depth_fresh_24() -> list[Job]:
    """24 layers: the default, AdamW's best, then the best share of seed 0."""
    options = {"layers": 24, "width": 48}
    jobs = cells("gpt", 300, "adamw", 3e-3, FRESH[:2], options=options)
    return jobs + [job for lr in (SHARE, 0.045) for job in cells("gpt", 300, "gso", lr, FRESH[:2], options=options)]


def _depth_6() -> list[Job]:
    """Rates of Muon and SOAP on a GPT of 6 layers, whose best a deeper one takes."""
    six = {"layers": 6, "width": 48}
    jobs = [job for lr in (0.03, 0.01) for job in with_muon("gpt", 300, lr, (0,), **six)]
    return jobs + [job for lr in (1e-2, 3e-3) for job in cells("gpt", 300, "soap", lr, (0,), options=six)]


def _mixer_fresh() -> list[Job]:
    return with_muon(*MIXER, 0.01, FRESH[:3]) + cells(*MIXER, "soap", 1e-2, FRESH[:3])


def _zero_fresh() -> list[Job]:
    zero = {"zero": True}
    return with_muon(*GPT[:2], 0.03, FRESH[:2], **zero) + cells(*GPT[:2], "soap", 3e-2, FRESH[:2], options=zero)


def _depth_12() -> list[Job]:
    """12 layers: Muon and SOAP at the rates that are best on the GPT of 1,000 steps."""
    twelve = {"layers": 12, "width": 48}
    jobs = [job for seed in (0, 10) for job in with_muon("gpt", 300, 0.03, (seed,), **twelve)]
    return jobs + [job for seed in (0, 10) for job in cells("gpt", 300, "soap", 1e-2, (seed,), options=twelve)]


def _gains_again() -> list[Job]:
    """GSO at two gains with the rule of layers in series. At gain .5 there are not enough layers."""
    jobs = cells(*HOT[:2], "gso", SHARE, FRESH[1:3], options={"gain": 1.0})
    return jobs + cells(*HOT[:2], "gso", SHARE, FRESH[:2], options={"gain": 2.0})


def _gain_edges() -> list[Job]:
    """Gains .5 and 1: the rates beyond the edge that won."""
    jobs = with_muon(*HOT[:2], 0.1, (0,), gain=0.5) + with_muon(*HOT[:2], 0.003, (0,), gain=1.0)
    for gain in (0.5, 1.0):
        jobs += cells(*HOT[:2], "soap", 3e-2, (0,), options={"gain": gain})
    return jobs


def _text_schedulefree() -> list[Job]:
    text = {"text": "second"}
    jobs = [job for lr in (1e-2, 3e-3) for job in cells(*MAIN, "schedulefree", lr, (0,), options=text)]
    jobs += cells(*MAIN, "schedulefree", 1e-2, FRESH[:2], options=text)
    return jobs + cells(*MAIN, "schedulefree", 2e-2, (0,), options=text)


PROOF: dict[str, list[Job]] = {
    "proof-main": _main(),
    "proof-text": _text(),
    "proof-rates": _rates(),
    "proof-elsewhere": _elsewhere(),
    "proof-hot": _hot(),
    "proof-gains": _gains(),
    "proof-cool": _cool(),
    "proof-stacks": _stacks(),
    "proof-balance": _balance(),
    "proof-positions": _positions(),
    "proof-small": _small(),
    "proof-zero": _zero(),
    "proof-faults": _faults(),
    "proof-depth": _depth(),
    "proof-aerial": _aerial(),
    "proof-seconds": _seconds(),
    "proof-why": _why(),
    "proof-more": _more(),
    "proof-length": _length(),
    "proof-photographs": _photographs(),
    "proof-trees": _trees(),
    "proof-rivals": _rivals(),
    "proof-depth-fresh": _depth_fresh(6, 12),
    "proof-hot-rivals": _hot_rivals(),
    "proof-text-soap": _text_soap(),
    "proof-hot-wide": _hot_wide(),
    "proof-hot-wide-fresh": _hot_wide_fresh(),
    "proof-hot-fresh": _hot_fresh(),
    "proof-convolutions": _convolutions(),
    "proof-share-of-steps": _share_of_steps(),
    "proof-depth-fresh-24": _depth_fresh_24(),
    "proof-decay": _decay(),
    "proof-edges": _edges(),
    "proof-adamw-fresh": _adamw_fresh(),
    "proof-regular-fresh": _regular_fresh(),
    "proof-regular": _regular(),
    "proof-series": _series(),
    "proof-deep-muon": _deep_muon(),
    "proof-deepest": _deepest(),
    "proof-mixer": _both(*MIXER),
    "proof-zero-fresh": _zero_fresh(),
    "proof-mixer-fresh": _mixer_fresh(),
    "proof-depth-12": _depth_12(),
    "proof-lora": _both("lora", 400),
    "proof-zero-rivals": _both(*GPT[:2], zero=True),
    "proof-depth-6": _depth_6(),
    "proof-gains-again": _gains_again(),
    "proof-gain-edges": _gain_edges(),
    "proof-text-schedulefree": _text_schedulefree(),
    **RIVALS,
}
