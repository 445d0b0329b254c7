"""The example in JAX learns: after a few steps it is far below a guess among all characters."""

from __future__ import annotations

import math
import runpy

from tests.architecture.sources import ROOT


def test_the_text_example_learns_and_says_what_it_bounded(capsys):
    example = runpy.run_path(str(ROOT / "examples" / "jax_text.py"))
    loss = example["train"]("gso", steps=60, seed=0)
    assert loss < 3.1 < math.log(90)
    assert "bins scaled" in capsys.readouterr().out
