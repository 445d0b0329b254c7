"""The size and the shape of the rooms: no circles, few modules with a single importer, none of those tiny."""

from __future__ import annotations

import pytest

from tests.architecture.graph import (
    Edge,
    Source,
    circles,
    edges_of,
    edges_to_definitions,
    package_sources,
    single_importers,
)
from tests.architecture.sources import unit_of

# The rooms' bounds. The lab is left out of all of them: the command line alone uses it.
MOST_FILES = (
    # 200, the self-check of programs on a GPU, what decides by them, the records of a step, where a run began, and
    # which samples did it: seen, read, told; how many layers stand in series; how large each batch was;
    # pictures apart from the shell of a page; saved states apart from the options of GSO;
    216  # who stood out apart from what is kept
)
MOST_LINES = (
    # 27,000, the share step of GSO, what it shows and refuses, any optimizer, judging a run and its terms, GPUs, and
    # the share step in Triton, where a run began, which samples did it, copies, casts and more refusals, and
    # how many layers stand in series, changed shapes, how large each batch was, steps in foreign modes,
    # steps that run no hooks, sentences that break at the width of a terminal, wide matrices,
    # inputs that are told, endless rates, copies without their bounds,
    # options with a unit, a group and a default in the help, a diagnosis of what is installed,
    # series of a ladder whose values differ between bins, rules of sixteen more operations,
    # chains of complex numbers and of frozen recurrences, refusals of a ChainSplitter,
    # vectors that would outweigh matrices,
    # a scaler behind the bounds, gradients that stand still, default devices,
    40_060  # faults in the user's own module at the command line
)
# A room that came later: 2,000, samples only seen, refusals, terms as plain numbers, forwards of other libraries.
ROOMS_SINCE = {"sources": 2_680}
MOST_SINGLE = 0.13
FEWEST_LINES = 60  # of a module with a single importer; a shorter one belongs in its importer

# A row is a module that nobody but its registry imports: a strategy, a budget, a backend, an update, a finding, a rule,
# an array namespace, a command, a workload. Rows are left out of the count, since more rows are the point.
REGISTRIES = {
    "gradsplit.budget.registry",
    "gradsplit.cli",
    "gradsplit.diagnose.diagnosis",
    "gradsplit.kernels.kernel",
    "gradsplit.ladder.rules",
    "gradsplit.lab.registry",
    "gradsplit.optim.directions",
    "gradsplit.optim.parts",
    "gradsplit.plan.registry",
    "gradsplit.xp",
}
# Python itself imports this one, by its name.
ENTRANCES = {"gradsplit.watch.run.site.sitecustomize"}
# Shorter than FEWEST_LINES today; the list only shrinks.
STILL_TINY: set[str] = set()


# Circles that stand today; the list only shrinks.
STILL_A_CIRCLE: list[set[str]] = []


def _library() -> dict[str, Source]:
    return {name: source for name, source in package_sources().items() if unit_of(name) != "lab"}


def _lines(source: Source) -> int:
    return len(source.text.splitlines())


def _single() -> dict[str, str]:
    """The library's modules with a single importer, rows and entrances left out."""
    sources = package_sources()
    single = single_importers(edges_to_definitions(sources), sources, REGISTRIES)
    return {
        module: importer
        for module, importer in single.items()
        if unit_of(module) != "lab" and importer not in REGISTRIES | ENTRANCES
    }


def test_every_registry_is_a_module():
    assert package_sources().keys() >= REGISTRIES | ENTRANCES


def test_no_circle_of_imports_between_modules():
    """Neither while modules load nor when functions are called. What a registry names by a string is no import."""
    found = circles([edge for edge in edges_of(package_sources()) if edge.when in ("load", "call")])
    assert not found, "\n\n".join("\n".join(map(str, ring)) for ring in found)


def test_no_circle_of_imports_between_rooms():
    """For type checkers neither: a room whose types name another room knows of it."""
    between = [
        Edge(unit_of(edge.importer), unit_of(edge.module), edge.line, edge.when)
        for edge in edges_of(package_sources())
        if unit_of(edge.importer) != unit_of(edge.module) and "gradsplit" not in (edge.importer, edge.module)
    ]
    found = circles(between)
    assert not found, "\n\n".join("\n".join(map(str, ring)) for ring in found)


def test_the_library_is_no_larger_than_it_may_be():
    library = _library()
    lines = dict.fromkeys(("the house", *ROOMS_SINCE), 0)
    for name, source in library.items():
        lines[unit_of(name) if unit_of(name) in ROOMS_SINCE else "the house"] += _lines(source)
    assert len(library) <= MOST_FILES
    assert {room: n for room, n in lines.items() if n > ({"the house": MOST_LINES} | ROOMS_SINCE)[room]} == {}


def test_few_modules_have_a_single_importer():
    single = _single()
    modules = [name for name, source in _library().items() if not source.is_package]
    shown = "\n".join(f"{module} <- {importer}" for module, importer in single.items())
    assert len(single) <= MOST_SINGLE * len(modules), f"{len(single)} of {len(modules)}; join some of:\n{shown}"


def test_a_tiny_module_has_more_than_one_importer():
    library = _library()
    tiny = {
        module: f"{_lines(library[module])} lines, belongs in {importer}"
        for module, importer in _single().items()
        if _lines(library[module]) < FEWEST_LINES
    }
    assert {module: why for module, why in tiny.items() if module not in STILL_TINY} == {}


def _tree(**texts: str) -> dict[str, Source]:
    """Sources by module; `a__b` stands for `a.b`, and a module with others below it is a room."""
    names = {name.replace("__", "."): text for name, text in texts.items()}
    return {name: Source(text, any(other.startswith(f"{name}.") for other in names)) for name, text in names.items()}


@pytest.mark.parametrize(
    ("sources", "kinds", "rings"),
    [
        (_tree(p="", p__a="from . import b", p__b="from .a import f"), {"load"}, 1),
        (_tree(p="", p__a="from . import b", p__b="def f():\n    from .a import g"), {"load"}, 0),
        (_tree(p="", p__a="from . import b", p__b="def f():\n    from .a import g"), {"load", "call"}, 1),
        (_tree(p="", p__a="from . import b", p__b="import p.c", p__c="from . import a"), {"load"}, 1),
        (_tree(p="from .a import f", p__a="from . import b", p__b="from p import f"), {"load"}, 1),
        (_tree(p="from .a import f", p__a="from . import b", p__b="", p__c="from p import f"), {"load"}, 0),
    ],
)
def test_a_planted_circle_is_found(sources, kinds, rings):
    assert len(circles([edge for edge in edges_of(sources) if edge.when in kinds])) == rings


@pytest.mark.parametrize(
    ("sources", "single"),
    [
        (_tree(p="", p__a="from .b import f", p__b=""), {"p.b": "p.a"}),
        (_tree(p="", p__a="from .b import f", p__b="", p__c="def g():\n    from .b import f"), {}),
        # A re-export is no importer: the one who takes the name is.
        (_tree(p="", p__r="from .b import f", p__r__b="", q="from p.r import f"), {"p.r.b": "q"}),
        (_tree(p="", p__r="from .b import f", p__r__b=""), {}),
        # A table names its rows by strings.
        (_tree(p="", p__a='import_module(T)\nT = ".b"', p__b="", p__c="from .b import f"), {}),
        (_tree(p="", p__a='import_module(T)\nT = ".b"', p__b=""), {"p.b": "p.a"}),
    ],
)
def test_a_single_importer_is_counted(sources, single):
    assert single_importers(edges_to_definitions(sources), sources) == single
