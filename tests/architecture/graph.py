"""Who imports whom, module by module, read from syntax trees; what follows from it: circles and single importers.

An edge says that one module of the package imports another, and when:

- `load`: while the module is loaded;
- `call`: inside a function;
- `types`: under TYPE_CHECKING, for a type checker alone;
- `table`: a registry names the module by a string, and loads it when it is asked for.
"""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator, Mapping
from functools import cache
from typing import NamedTuple

from tests.architecture.sources import imports_of, module_of, package_files


class Source(NamedTuple):
    """The text of one module, and whether it is the `__init__.py` of a room."""

    text: str
    is_package: bool = False


class Edge(NamedTuple):
    """The importer, what it imports, the line, and when."""

    importer: str
    module: str
    line: int
    when: str

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} -> {self.module} ({self.when})"


@cache
def package_sources() -> Mapping[str, Source]:
    """Every module of the package."""
    return {
        module_of(path): Source(path.read_text(encoding="utf8"), path.name == "__init__.py") for path in package_files()
    }


def _longest(name: str, sources: Mapping[str, Source]) -> str:
    """`a.b.c` -> the module that it names or stands in: `a.b.c`, else `a.b`, else `a`; empty if none is ours."""
    while name and name not in sources:
        name = name.rpartition(".")[0]
    return name


def edges_of(sources: Mapping[str, Source]) -> list[Edge]:
    """Every import between the modules, as it is written: a name taken from a room is an import of the room."""
    found = []
    for module, source in sources.items():
        for name, line, when in imports_of(source.text, module, is_package=source.is_package):
            target = _longest(name, sources)
            if target and target != module:
                found.append(Edge(module, target, line, when))
    return found


def _named_by_strings(module: str, source: Source, sources: Mapping[str, Source]) -> Iterator[Edge]:
    """Modules beside or below a registry that it names by a string, such as `".numba_cpu"` or `"torch_xp"`."""
    if "import_module(" not in source.text and "COMMANDS" not in source.text:
        return
    room = module if source.is_package else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(source.text)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            target = f"{room}.{node.value.lstrip('.')}"
            if target in sources and target != module:
                yield Edge(module, target, node.lineno, "table")


def edges_to_definitions(sources: Mapping[str, Source]) -> list[Edge]:
    """Every import, led through re-exports to the module that defines the name, and what registries name by strings."""
    imports = {
        module: list(imports_of(source.text, module, is_package=source.is_package))
        for module, source in sources.items()
    }

    def definer(name: str, seen: frozenset[str] = frozenset()) -> str:
        module = _longest(name, sources)
        taken = name[len(module) + 1 :].split(".")[0] if module else ""
        if taken and sources[module].is_package and name not in seen:
            for imported in imports[module]:
                if imported.name.rpartition(".")[2] == taken and imported.name != name:
                    further = definer(imported.name, seen | {name})
                    if further and further != module:
                        return further
        return module

    found = []
    for module, source in sources.items():
        for name, line, when in imports[module]:
            target = definer(name)
            if target and target != module:
                found.append(Edge(module, target, line, when))
        found.extend(_named_by_strings(module, source, sources))
    return found


def circles(edges: list[Edge]) -> list[list[Edge]]:
    """The groups of modules that import one another in a circle, each with the edges inside it."""
    below: dict[str, set[str]] = {}
    for edge in edges:
        below.setdefault(edge.importer, set()).add(edge.module)

    @cache
    def reached(start: str) -> frozenset[str]:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            for module in below.get(waiting.pop(), ()):
                if module not in seen:
                    seen.add(module)
                    waiting.append(module)
        return frozenset(seen)

    rings = {
        frozenset(other for other in reached(module) if module in reached(other))
        for module in below
        if module in reached(module)
    }
    return [
        [edge for edge in edges if {edge.importer, edge.module} <= ring]
        for ring in sorted(rings, key=lambda ring: sorted(ring))
    ]


def single_importers(
    edges: list[Edge], sources: Mapping[str, Source], registries: Collection[str] = ()
) -> dict[str, str]:
    """Module -> its importer, where exactly one module imports it.

    A room's `__init__.py` is neither, unless it is a registry: then it counts as an importer.
    """
    importers: dict[str, set[str]] = {}
    for edge in edges:
        importing = edge.importer in registries or not sources[edge.importer].is_package
        if importing and not sources[edge.module].is_package:
            importers.setdefault(edge.module, set()).add(edge.importer)
    return {module: min(names) for module, names in sorted(importers.items()) if len(names) == 1}
