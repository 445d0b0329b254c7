"""Every example in a docstring of the package is run and gives the answer it states."""

from __future__ import annotations

import doctest
import importlib

import pytest

from tests.architecture.sources import module_of, package_files

_FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
_MODULES = [
    module_of(path)
    for path in package_files()
    if path.name != "__main__.py" and ">>>" in path.read_text(encoding="utf8")
]


@pytest.mark.parametrize("name", _MODULES)
def test_the_examples_of_a_module_are_right(name):
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        if error.name != "triton":
            raise
        pytest.skip("not run: Triton has no build for this system")
    result = doctest.testmod(module, optionflags=_FLAGS, verbose=False)
    assert result.failed == 0, f"{name}: {result.failed} of {result.attempted} examples differ (see above)"
