"""Findings that are read off the model itself: weights unlike those of their siblings, and missing normalisations."""

from __future__ import annotations

import math
from collections import defaultdict

from torch import nn

from .evidence import Evidence, WeightHeat
from .finding import Finding

ENLARGES = 1.2
"""A weight that enlarges its input by this factor or more is hot; below it the weight is only uneven."""
SHARE = 0.65
"""The share of siblings with a normalisation from which its absence is a finding."""


def hot_layer(evidence: Evidence) -> list[Finding]:
    """A weight is far hotter than its siblings of the same family, and it enlarges its input; one finding per weight.

    The finding gives the factor that mends the weight.
    """
    return [_unlike("hot layer", entry, evidence) for entry in evidence.hot if entry.enlarges >= ENLARGES]


def uneven_layer(evidence: Evidence) -> list[Finding]:
    """A weight is far hotter than its siblings, but even so it does not enlarge its input; one finding per weight."""
    return [_unlike("uneven layer", entry, evidence) for entry in evidence.hot if not entry.enlarges >= ENLARGES]


def _unlike(kind: str, entry: WeightHeat, evidence: Evidence) -> Finding:
    name = entry.module or "(root)"
    links = [link for link in evidence.chain.links if link.module == entry.module]
    measured = "; ".join(
        f"measured gain of {link.name}: backward {link.gain:.3g}, forward {link.forward_gain:.3g}"
        for link in links[:1]
        if math.isfinite(link.forward_gain) or math.isfinite(link.gain)
    )
    return Finding(
        kind,
        name,
        entry.enlarges,
        "enlargement of a random or constant input, rms out / rms in",
        f"{name}: its {entry.parameter} is {entry.ratio:.3g} times hotter than its siblings",
        f"its weights would make a random or constant input {entry.enlarges:.3g} times as large, its siblings' "
        f"{entry.reference:.3g} times" + (f"; {measured}" if measured else ""),
        f"multiply {entry.parameter} by {1 / entry.ratio:.2g}, or initialise it like its siblings",
        # It ranks above an explosion of the same size, since it is the cause and the explosion the consequence.
        math.log10(entry.ratio) + 0.5,
    )


def is_norm(module: nn.Module) -> bool:
    """Whether a module normalises, by its class's name, which covers norms that torch does not know."""
    return "norm" in type(module).__name__.lower()


def missing_norm(evidence: Evidence) -> list[Finding]:
    """One block has no normalisation where its siblings have one.

    Blocks of one class are compared place by place, and layers of one sequence by what follows them.
    """
    found: dict[str, str] = {}
    blocks: dict[str, list[tuple[str, nn.Module]]] = defaultdict(list)
    for name, module in evidence.model.named_modules():
        if isinstance(module, nn.Sequential):
            found.update(_in_sequence(name, module))
        elif name and any(True for _ in module.children()):
            blocks[type(module).__name__].append((name, module))
    for kind, members in blocks.items():
        if len(members) >= 3 and kind not in ("ModuleList", "ModuleDict"):
            found.update(_in_blocks(members))
    return [
        Finding(
            "missing normalisation",
            name,
            1.0,
            "place",
            f"{name}: normalisation is missing",
            why,
            "put the normalisation back, or initialise this layer so that its output has the size of its siblings'",
            1.6,
        )
        for name, why in found.items()
    ]


def _in_blocks(members: list[tuple[str, nn.Module]]) -> dict[str, str]:
    places: dict[str, int] = defaultdict(int)
    for _, block in members:
        for path, module in block.named_modules():
            if path and is_norm(module):
                places[path] += 1
    found = {}
    for path, count in places.items():
        if SHARE * len(members) <= count < len(members):
            for name, block in members:
                there = dict(block.named_modules()).get(path)
                if there is None or not is_norm(there):
                    has = "nothing" if there is None else type(there).__name__
                    found[f"{name}.{path}"] = f"{has} there; {count} of {len(members)} blocks like it have a norm"
    return found


def _in_sequence(name: str, sequence: nn.Sequential) -> dict[str, str]:
    children = list(sequence.named_children())
    layers = [i for i, (_, m) in enumerate(children) if any(p.dim() >= 2 for p in m.parameters(recurse=False))]
    followed: dict[int, bool] = {}
    for place, i in enumerate(layers[:-1]):
        between = [module for _, module in children[i + 1 : layers[place + 1]]]
        followed[i] = any(is_norm(module) for module in between)
    if len(followed) < 3 or sum(followed.values()) < SHARE * len(followed):
        return {}
    found = {}
    for i, ok in followed.items():
        if not ok:
            gap = next(
                (n for n, m in children[i + 1 : i + 2] if isinstance(m, nn.Identity)),
                children[i][0],
            )
            path = f"{name}.{gap}" if name else gap
            found[path] = f"no norm behind it; {sum(followed.values())} of {len(followed)} layers here have one"
    return found
