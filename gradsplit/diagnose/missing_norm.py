"""A missing normalisation: one block without it where its siblings have one."""

from __future__ import annotations

from collections import defaultdict

from torch import nn

from .evidence import Evidence
from .finding import Finding

SHARE = 0.65


def is_norm(module: nn.Module) -> bool:
    """Whether a module normalises, by its class's name, which covers norms that torch does not know."""
    return "norm" in type(module).__name__.lower()


def find(evidence: Evidence) -> list[Finding]:
    """Blocks of one class compared place by place, and layers of one sequence compared by what follows them."""
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
    layers = [i for i, (_, m) in enumerate(children) if _weighs(m)]
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


def _weighs(module: nn.Module) -> bool:
    return any(p.dim() >= 2 for p in module.parameters(recurse=False))
