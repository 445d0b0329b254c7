"""Every link and every path that the documentation names leads somewhere."""

from __future__ import annotations

import re
from urllib.parse import unquote

import pytest

from tests.architecture.sources import ROOT, relative
from tests.docs.markdown import anchor_of, headings_of, links_of, pages, prose_of

# The history may name what is gone.
_HISTORY = {"CHANGELOG.md"}


@pytest.mark.parametrize("page", pages(), ids=relative)
def test_every_relative_link_resolves(page):
    broken = []
    for link in links_of(page):
        if re.match(r"[a-z][a-z+.-]*:", link):
            continue
        target, _, fragment = unquote(link).partition("#")
        file = (page.parent / target).resolve() if target else page
        if not file.exists():
            broken.append(f"{link}: no such file")
        elif fragment and fragment not in {anchor_of(heading.text) for heading in headings_of(file)}:
            broken.append(f"{link}: no such heading")
    assert not broken, f"{relative(page)}: {broken}"


@pytest.mark.parametrize("page", [page for page in pages() if page.name not in _HISTORY], ids=relative)
def test_every_named_path_exists(page):
    """`gradsplit/plan/slices.py` in backticks is a promise; so is a folder with its slash."""
    named = re.findall(r"`((?:\.ci|gradsplit|tests|docs|benchmarks|examples)/[\w./-]*)`", prose_of(page))
    missing = [name for name in named if not (ROOT / name).exists()]
    assert not missing, f"{relative(page)} names {missing}"


def test_every_page_is_reached_from_the_index():
    docs = ROOT / "docs"
    seen, waiting = set(), [docs / "README.md"]
    while waiting:
        page = waiting.pop()
        if page in seen or page.suffix != ".md" or not page.is_file():
            continue
        seen.add(page)
        waiting += [(page.parent / link.partition("#")[0]).resolve() for link in links_of(page) if ":" not in link]
    lost = [relative(page) for page in pages() if docs in page.parents and page not in seen]
    assert not lost, f"no link leads from docs/README.md to {lost}"


def test_everyday_questions_are_two_clicks_from_the_readme():
    """README -> docs/README.md -> the answer."""
    index = ROOT / "docs" / "README.md"
    assert "docs/README.md" in links_of(ROOT / "README.md")
    section = prose_of(index).split("\n## Everyday questions\n")[1].split("\n## ")[0]
    rows = [line.split(" | ") for line in section.splitlines() if line.startswith("| ")][1:]
    assert len(rows) >= 20
    unanswered = [question for question, answer in rows if "](" not in answer]
    assert not unanswered
