"""Every example in a docstring of the package is run and gives the answer it states."""

from __future__ import annotations

import doctest
import importlib

import pytest

from tests.architecture.sources import module_of, package_files

_FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
_MODULES = [module_of(path) for path in package_files() if path.name != "__main__.py"]

# A module that wraps an optional package can be imported only where that package is installed.
_OPTIONAL = {"tensorflow", "triton"}


@pytest.mark.parametrize("name", _MODULES)
def test_the_examples_of_a_module_are_right(name):
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        if (error.name or "").split(".")[0] not in _OPTIONAL:
            raise
        pytest.skip(f"needs {error.name}, which is not in the lock")
    result = doctest.testmod(module, optionflags=_FLAGS, verbose=False)
    assert result.failed == 0, f"{name}: {result.failed} of {result.attempted} examples differ (see above)"
