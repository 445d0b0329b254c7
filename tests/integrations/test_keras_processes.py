"""Keras takes its backend once a process, so these run in processes of their own: JAX, and what is not installed."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

from tests.architecture.sources import ROOT

pytest.importorskip("keras")


def python(program, backend):
    """Run a program with a backend; returns the finished process."""
    return subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env={**os.environ, "KERAS_BACKEND": backend},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.skipif(
    importlib.util.find_spec("jax") is None, reason="needs jax, which is not in this environment's lock"
)
def test_bounding_accumulation_resume_and_the_callback_hold_on_the_jax_backend():
    files = [f"tests/integrations/test_keras{name}.py" for name in ("", "_training")]
    # Steps dispatched one by one are slow there: one test of each kind; the numbers in JAX are tests/functional's.
    chosen = "each_unit or sum_is_complete or (goes_on and RelativeStep) or names_the_unit"
    options = ["-q", "-n0", "-p", "no:cacheprovider", *files, "-k", chosen]
    program = f"import pytest, sys; sys.exit(pytest.main({options!r}))"
    done = python(program, "jax")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "4 passed" in done.stdout


_WITHOUT = """
import sys
sys.modules[{name!r}] = None
try:
    import gradsplit.integrations.keras
except ImportError as error:
    print(error)
"""


def test_without_keras_the_error_says_what_to_install():
    done = python(_WITHOUT.format(name="keras"), "torch")
    assert "expected the package keras. Run: pip install 'gradsplit[keras]'" in done.stdout, done.stderr


def test_without_the_backend_the_error_says_which_to_choose():
    done = python(_WITHOUT.format(name="jax"), "jax")
    assert "expected the backend that Keras is set to, got none" in done.stdout, done.stderr
    assert "set KERAS_BACKEND to tensorflow, torch or jax" in done.stdout


def test_importing_gradsplit_imports_no_keras():
    done = python("import sys, gradsplit, gradsplit.integrations; print('keras' in sys.modules)", "torch")
    assert done.stdout.strip() == "False", done.stderr
