"""Runs that give the others as many rates and seeds as GSO: cells on seeds 0 and 1, the best ones on fresh seeds."""

from __future__ import annotations

from benchmarks.gso.plan import CHOOSING, FRESH, HOT, MAIN, MIXER, Job, cells

__all__ = ["RIVALS", "with_muon"]


def with_muon(task: str, steps: int, lr: float, seeds: tuple[int, ...], **options: object) -> list[Job]:
    """Muon with AdamW at 0.01 for the rest."""
    return cells(task, steps, "muon", lr, seeds, options=options, method_options={"adam": 1e-2})


def _aerial() -> list[Job]:
    """Photographs: decays and rates beyond the edges on seed 0, then the best cells on all fresh seeds of GSO."""
    photo = ("aerial", 500)
    jobs = cells(*photo, "adamw", 1e-2, FRESH) + cells(*photo, "soap", 1e-3, FRESH) + with_muon(*photo, 0.01, FRESH)
    for method, lr in (("adamw", 1e-2), ("soap", 1e-3)):
        jobs += cells(*photo, method, lr, FRESH, method_options={"decay": 1.0})
    for decay in (1.0, 0.1):
        for lr in (0.01, 0.03):
            jobs += cells(*photo, "muon", lr, (0,), method_options={"adam": 1e-2, "decay": decay})
    jobs += with_muon(*photo, 0.003, (0,)) + cells(*photo, "muon", 0.003, (0,), method_options={"adam": 3e-3})
    for method, lr, decay in (("soap", 1e-3, 3.0), ("soap", 1e-3, 10.0), ("adamw", 1e-2, 3.0)):
        jobs += cells(*photo, method, lr, (0,), method_options={"decay": decay})
    jobs += cells(*photo, "muon", 0.01, (0,), method_options={"adam": 1e-2, "decay": 3.0})
    jobs += cells(*photo, "sgdm", 0.1, FRESH) + cells(*photo, "split", 0.1, FRESH)
    return jobs + cells(*photo, "muon", 0.01, FRESH, method_options={"adam": 1e-2, "decay": 1.0})


def _layers_36() -> list[Job]:
    """36 layers: the best cells of seed 0 on all twelve fresh seeds of GSO; SGD with two rates more."""
    seeds, deep = (*FRESH, *range(16, 22)), {"depth": 36}
    jobs = with_muon("plain-stack", 350, 0.01, seeds, **deep)
    for method, lr in (("soap", 3e-3), ("adamw", 3e-3)):
        jobs += cells("plain-stack", 350, method, lr, seeds, options=deep)
    return jobs + [job for lr in (0.01, 0.1) for job in cells("plain-stack", 350, "sgdm", lr, (0,), options=deep)]


def _layers_146() -> list[Job]:
    """146 layers: four and five rates on seeds 0 and 1, SOAP's on 2 and 3 too. All nets stay at chance there."""
    jobs = [job for lr in (3e-3, 1e-2, 1e-3, 3e-2) for job in cells("deep-stack", 300, "soap", lr, (0, 1, 2, 3))]
    for lr in (1e-3, 3e-3, 3e-4, 1e-2, 3e-2):
        jobs += cells("deep-stack", 300, "adamw", lr, CHOOSING)
    return jobs + [job for lr in (0.01, 0.003, 0.03, 0.001) for job in with_muon("deep-stack", 300, lr, CHOOSING)]


def _fresh_146() -> list[Job]:
    """146 layers on fresh seeds: SOAP and Muon at the rates that are best with 36 layers, and AdamW."""
    jobs = cells("deep-stack", 300, "soap", 3e-3, FRESH) + cells("deep-stack", 300, "adamw", 1e-3, FRESH)
    return jobs + with_muon("deep-stack", 300, 0.01, FRESH)


def _both_seeds() -> list[Job]:
    """Seed 1 for all cells that seed 0 has seen on the photographs and on 36 layers, where seeds differ most."""
    jobs = []
    for task, steps, options in (("aerial", 500, {}), ("plain-stack", 350, {"depth": 36})):
        found: list[tuple[str, float, dict[str, float]]] = []
        found += [(method, lr, {}) for method in ("soap", "adamw") for lr in (1e-3, 3e-3, 1e-2, 3e-2)]
        found += [("muon", lr, {"adam": adam}) for lr in (0.01, 0.03, 0.1) for adam in (1e-2, 3e-3)]
        found.append(("muon", 3e-3, {"adam": 1e-2}))
        if task == "aerial":
            found += [("soap", 3e-4, {}), ("muon", 3e-3, {"adam": 3e-3})]
            found += [("soap", lr, {"decay": decay}) for decay in (1.0, 0.1) for lr in (1e-3, 3e-3, 1e-2)]
            found += [("soap", 1e-3, {"decay": 3.0}), ("soap", 1e-3, {"decay": 10.0})]
            found += [("adamw", lr, {"decay": decay}) for decay in (1.0, 0.1) for lr in (3e-3, 1e-2)]
            found += [("muon", lr, {"adam": 1e-2, "decay": decay}) for decay in (1.0, 0.1) for lr in (0.01, 0.03)]
            found += [("adamw", 1e-2, {"decay": 3.0}), ("muon", 0.01, {"adam": 1e-2, "decay": 3.0})]
        for method, lr, mine in found:
            jobs += cells(task, steps, method, lr, (1,), options=options, method_options=mine)
    return jobs


def _aerial_fresh() -> list[Job]:
    """Photographs: what both seeds prefer, on fresh seeds; a rate beyond each edge on both."""
    photo = ("aerial", 500)
    jobs = cells(*photo, "soap", 3e-2, FRESH) + cells(*photo, "muon", 0.01, FRESH, method_options={"adam": 3e-3})
    jobs += cells(*photo, "muon", 0.03, FRESH, method_options={"adam": 1e-2, "decay": 1.0})
    jobs += cells(*photo, "adamw", 3e-3, FRESH) + cells(*photo, "adamw", 3e-3, FRESH, method_options={"decay": 1.0})
    jobs += cells(*photo, "soap", 1e-1, CHOOSING)
    jobs += cells(*photo, "muon", 0.1, CHOOSING, method_options={"adam": 1e-2, "decay": 1.0})
    for method, lr in (("adamw", 1e-3), ("soap", 3e-4)):
        jobs += cells(*photo, method, lr, CHOOSING, method_options={"decay": 1.0})
    return jobs


def _fresh_36() -> list[Job]:
    """SGD on 36 layers, at the rate that seed 0 prefers."""
    return cells("plain-stack", 350, "sgdm", 0.1, FRESH, options={"depth": 36})


def _small() -> list[Job]:
    """Muon on 12 layers and on both detectors: beyond the edges on seed 0, the best on all fresh seeds; LoRA."""
    jobs = []
    for task, steps, options, best, *edges in (
        ("plain-stack", 350, {}, (0.01, 3e-3), (3e-3, 3e-3), (0.01, 1e-3)),
        ("detection", 500, {}, (0.1, 3e-3), (0.3, 3e-3), (0.1, 1e-3)),
        ("detection", 500, {"healthy": True}, (0.03, 3e-3), (0.03, 1e-3)),
    ):
        for (lr, adam), seeds in ((best, FRESH), *((edge, (0,)) for edge in edges)):
            jobs += cells(task, steps, "muon", lr, seeds, options=options, method_options={"adam": adam})
    jobs += cells("detection", 500, "soap", 1e-2, FRESH, options={"healthy": True})
    jobs += [job for lr in (0.03, 0.01, 0.1, 0.003) for job in with_muon("lora", 400, lr, (0,))]
    return jobs + [job for lr in (1e-2, 3e-3, 3e-2, 1e-1) for job in cells("lora", 400, "soap", lr, (0,))]


def _small_fresh() -> list[Job]:
    """Where a rate beyond an edge won: one beyond that, and fresh seeds; LoRA on fresh seeds."""
    jobs = []
    for lr, options in ((0.1, {}), (0.03, {"healthy": True})):
        for adam, seeds in ((1e-3, FRESH), (3e-4, (0,))):
            jobs += cells("detection", 500, "muon", lr, seeds, options=options, method_options={"adam": adam})
    jobs += with_muon("lora", 400, 0.3, (0,)) + with_muon("lora", 400, 0.1, FRESH[:3])
    return jobs + cells("lora", 400, "soap", 3e-2, FRESH[:3])


def _won_by_little() -> list[Job]:
    """Muon on the exploding detector, where a smaller rate for AdamW won."""
    jobs = []
    for adam, seeds in ((3e-4, FRESH), (1e-4, (0,))):
        jobs += cells("detection", 500, "muon", 0.1, seeds, method_options={"adam": adam})
    return jobs


def _second_146() -> list[Job]:
    """146 layers: SOAP at the rate that seeds 0 to 3 prefer, though all cells are at chance on them."""
    return cells("deep-stack", 300, "soap", 1e-2, FRESH)


def _gain_2_fresh() -> list[Job]:
    """The residual stack at gain 2 on as many fresh seeds as GSO had."""
    hot, wide = {"options": {"gain": 2.0}}, {"wide": True}
    jobs = []
    for seed in FRESH[:2]:
        jobs += cells(*HOT[:2], "muon", 0.03, (seed,), method_options={"adam": 1e-2, **wide}, **hot)
        jobs += cells(*HOT[:2], "soap", 1e-2, (seed,), method_options=wide, **hot)
        jobs += cells(*HOT[:2], "adamw", 1e-2, (seed,), method_options=wide, **hot)
    return jobs


def _gain_2() -> list[Job]:
    """The residual stack at gain 2, with the clip whose norm is computed in float64: three rates on seed 0."""
    hot, wide = {"options": {"gain": 2.0}}, {"wide": True}
    jobs = [job for lr in (3e-3, 1e-2, 3e-2) for job in cells(*HOT[:2], "adamw", lr, (0,), method_options=wide, **hot)]
    jobs += [job for lr in (1e-2, 3e-2, 3e-3) for job in cells(*HOT[:2], "soap", lr, (0,), method_options=wide, **hot)]
    for lr in (0.03, 0.01, 0.1):
        jobs += cells(*HOT[:2], "muon", lr, (0,), method_options={"adam": 1e-2, **wide}, **hot)
    return jobs


def _depth_fresh() -> list[Job]:
    """Deep GPTs on the fresh seeds that GSO has; a rate beyond SOAP's edge with 12 layers."""
    twelve, deep = {"layers": 12, "width": 48}, {"layers": 24, "width": 48}
    jobs = cells("gpt", 300, "soap", 3e-2, FRESH[:2], options=twelve) + with_muon("gpt", 300, 0.03, FRESH[:2], **twelve)
    jobs += cells("gpt", 300, "soap", 1e-1, (0,), options=twelve)
    return (
        jobs + with_muon("gpt", 300, 0.03, FRESH[:2], **deep) + cells("gpt", 300, "soap", 3e-2, FRESH[:2], options=deep)
    )


def _edges() -> list[Job]:
    """A rate beyond each edge that won elsewhere, on seed 0."""
    wide = {"wide": True}
    jobs = with_muon(*MIXER, 0.003, (0,)) + cells("gpt", 500, "soap", 1e-1, (0,), options={"zero": True})
    jobs += cells("plain-stack", 350, "sgdm", 0.3, (0,), options={"depth": 36})
    jobs += with_muon(*MAIN, 0.06, (0,), text="second")
    return jobs + cells(*HOT[:2], "soap", 1e-1, (0,), method_options=wide)


def _more_seeds() -> list[Job]:
    """As many fresh seeds as GSO has: zero-initialised GPT, mixer, second text, the stack at gains of .5, 1 and 3."""
    zero, wide = {"zero": True}, {"wide": True}
    jobs = with_muon("gpt", 500, 0.03, FRESH[:3], **zero)
    jobs += cells("gpt", 500, "soap", 3e-2, FRESH[:3], options=zero)
    for gain, lr, adamw in ((0.5, 0.03, 1e-3), (1.0, 0.01, 3e-3)):
        jobs += with_muon(*HOT[:2], lr, FRESH[:3], gain=gain)
        jobs += cells(*HOT[:2], "soap", 1e-2, FRESH[:3], options={"gain": gain})
        jobs += cells(*HOT[:2], "adamw", adamw, FRESH[:3], options={"gain": gain})
    jobs += with_muon(*MIXER, 0.01, FRESH) + cells(*MIXER, "soap", 1e-2, FRESH)
    jobs += cells(*MAIN, "schedulefree", 1e-2, FRESH[:3], options={"text": "second"})
    jobs += cells(*HOT[:2], "adamw", 1e-2, FRESH, method_options=wide)
    jobs += cells(*HOT[:2], "soap", 3e-2, FRESH, method_options=wide)
    return jobs + cells(*HOT[:2], "muon", 0.03, FRESH, method_options={"adam": 1e-2, **wide})


def _depth(layers: int) -> list[Job]:
    """A deep GPT: three rates of Muon and of SOAP on seed 0."""
    deep = {"layers": layers, "width": 48}
    jobs = [job for lr in (0.03, 0.01, 0.1) for job in with_muon("gpt", 300, lr, (0,), **deep)]
    return jobs + [job for lr in (1e-2, 3e-2, 3e-3) for job in cells("gpt", 300, "soap", lr, (0,), options=deep)]


RIVALS: dict[str, list[Job]] = {
    "proof-rivals-aerial": _aerial(),
    "proof-rivals-36": _layers_36(),
    "proof-rivals-146": _layers_146(),
    "proof-rivals-both-seeds": _both_seeds(),
    "proof-rivals-aerial-fresh": _aerial_fresh(),
    "proof-rivals-36-fresh": _fresh_36(),
    "proof-rivals-small": _small(),
    "proof-rivals-small-fresh": _small_fresh(),
    "proof-rivals-146-fresh": _fresh_146(),
    "proof-rivals-won-by-little": _won_by_little(),
    "proof-rivals-146-second": _second_146(),
    "proof-rivals-gain-2": _gain_2(),
    "proof-rivals-gain-2-fresh": _gain_2_fresh(),
    "proof-rivals-depth-12": _depth(12),
    "proof-rivals-depth-24": _depth(24),
    "proof-rivals-depth-fresh": _depth_fresh(),
    "proof-rivals-edges": _edges(),
    "proof-rivals-more-seeds": _more_seeds(),
}
