"""Every array namespace offers the same functions, and each says so in `__all__`; read from the sources."""

from __future__ import annotations

import ast

import pytest

from gradsplit.xp import NAMESPACES
from tests.architecture.sources import PACKAGE

MODULES = sorted(set(NAMESPACES.values()))


def names(module):
    tree = ast.parse((PACKAGE / "xp" / f"{module}.py").read_text(encoding="utf8"))
    (offered,) = [n.value for n in tree.body if isinstance(n, ast.Assign) and n.targets[0].id == "__all__"]
    return ast.literal_eval(offered)


@pytest.mark.parametrize("module", MODULES)
def test_every_namespace_offers_what_numpy_s_does(module):
    assert names(module) == names("numpy_xp")
