"""One word, one meaning: our own names do not use the words that mean something else, or several things, elsewhere."""

from __future__ import annotations

import ast
import re

import pytest

from tests.architecture.sources import module_of, package_files, relative, unit_of

# A limit is not a threshold, a bin is not a group or a segment, and bounding is not clipping. Beside each word stand
# the parts of the package that deal with somebody else's thing of that name.
_OPTIMIZER_GROUPS = {
    *(
        "diagnose",
        "distributed",
        "hooks",
        "integrations",
        "optim",
        "rates",
        "resume",
        "split",
        "splitter",
        "optimizers",
        "update_cap",
        "watch",
    ),
}
FOREIGN = {
    "clip": {"lab", "integrations"},  # a baseline is called what its users call it, a hook what Keras calls it
    "threshold": set(),
    "segment": {"xp"},  # segment_sum, the name in numpy-like libraries
    "group": _OPTIMIZER_GROUPS | {"chain", "ladder", "lab"},  # also group norm, and groups of a convolution
}


def _defined(source: str) -> set[str]:
    """The names that the source gives: functions, classes, parameters, and variables."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


def _foreign(source: str, unit: str) -> list[str]:
    """The names with a foreign word in them that has no business in this part."""
    words = "|".join(word for word, units in FOREIGN.items() if unit not in units)
    foreign = re.compile(rf"(?:^|_)(?:{words})(?:s|ed|ped|ing|ping)?(?:_|$)")
    snake = {name: re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower() for name in _defined(source)}
    return sorted(name for name, text in snake.items() if foreign.search(text))


# The baselines in the command line are other people's methods under their own names.
@pytest.mark.parametrize("path", [p for p in package_files() if unit_of(module_of(p)) != "cli"], ids=relative)
def test_our_names_use_our_words(path):
    found = _foreign(path.read_text(encoding="utf8"), unit_of(module_of(path)))
    assert not found, f"{relative(path)}: {found}; see docs/README.md#words for ours"


@pytest.mark.parametrize(
    ("source", "unit", "found"),
    [
        ("def clip_rows(x): ...", "kernels", ["clip_rows"]),
        ("def f(threshold): ...", "budget", ["threshold"]),
        ("group = 1", "plan", ["group"]),
        ("class RowClipping: ...", "plan", ["RowClipping"]),
        ("num_segments = 1", "chain", ["num_segments"]),
        ("for group in optimizer.param_groups: ...", "optim", []),
        ("class Eclipse: ...", "plan", []),
        ("torch.clip(x)", "kernels", []),
    ],
)
def test_a_foreign_word_is_recognised(source, unit, found):
    assert _foreign(source, unit) == found
