"""What the prose says of versions and defaults is what the code has."""

from __future__ import annotations

import re

import pytest

from tests.architecture.sources import ROOT, project, relative
from tests.docs.markdown import pages, prose_of

_HISTORY = {"CHANGELOG.md"}
_PAGES = [page for page in pages() if page.name not in _HISTORY and "decisions" not in page.parts]


@pytest.mark.parametrize("page", _PAGES, ids=relative)
def test_the_python_version_is_the_one_required(page):
    required = project()["project"]["requires-python"].removeprefix(">=")
    for version in re.findall(r"Python (\d\.\d+)(?: or newer| 及以上| 或更新)", prose_of(page)):
        assert version == required, f"{relative(page)} says Python {version}"


@pytest.mark.parametrize("page", _PAGES, ids=relative)
def test_the_torch_version_is_the_one_required(page):
    (required,) = [text.partition(">=")[2] for text in project()["project"]["dependencies"] if text.startswith("torch")]
    for version in re.findall(r"(?:torch|PyTorch) (\d\.\d+)(?: or newer| 及以上| 或更新)", prose_of(page)):
        assert version == required, f"{relative(page)} says torch {version}"


def test_the_english_readme_states_both_versions():
    prose = prose_of(ROOT / "README.md")
    assert re.search(r"Python \d\.\d+ or newer", prose)
    assert re.search(r"PyTorch \d\.\d+ or newer", prose)
