"""Every array namespace offers the functions of numpy's, under the same names and with the same arguments."""

from __future__ import annotations

import ast

import pytest

from gradsplit.xp import NAMESPACES, numpy_xp
from tests.architecture.sources import PACKAGE

MODULES = sorted(set(NAMESPACES.values()))


def offered(module):
    """Read from the sources, since not every framework is installed: name -> arguments; None where it is imported."""
    tree = ast.parse((PACKAGE / "xp" / f"{module}.py").read_text(encoding="utf8"))
    imports = [name for node in tree.body if isinstance(node, ast.ImportFrom) for name in node.names]
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")]
    made = {name.asname or name.name: None for name in imports}
    return made | {f.name: [a.arg for a in (*f.args.args, *f.args.kwonlyargs)] for f in functions}


@pytest.mark.parametrize("module", MODULES)
def test_every_namespace_offers_what_numpy_s_does(module):
    ours, numpys = offered(module), offered("numpy_xp")
    assert set(numpy_xp.__all__) <= set(ours)
    assert {name for name, arguments in ours.items() if arguments is not None} <= set(numpy_xp.__all__)
    different = [name for name in numpys if ours.get(name) and numpys[name] and ours[name] != numpys[name]]
    assert different == []
