"""The site: every page has its place, every link leads into the site, and nothing is loaded from elsewhere.

Building it needs the packages of requirements-docs.lock, which `make site` installs in an environment of its own. What
moves the links is plain Python, and is tested here.
"""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path

import pytest

import gradsplit
from tests.architecture.sources import ROOT, relative
from tests.docs.markdown import pages


@pytest.fixture(scope="module")
def hooks():
    spec = importlib.util.spec_from_file_location("site_hooks", ROOT / "docs/.site/hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _places(hooks):
    return {place: page for page in pages() if (place := hooks.place_of(relative(page)))}


def _in(value):
    """Every place that a navigation names."""
    if isinstance(value, str):
        return {value}
    return set().union(*(_in(inner) for inner in (value.values() if isinstance(value, dict) else value)))


def test_every_page_is_in_the_navigation_once(hooks):
    names = {f"names/{room}.md" for room in hooks.rooms()}
    assert _in(hooks.navigation()) - names == set(_places(hooks))


def test_a_place_leads_back_to_its_page(hooks):
    for place, page in _places(hooks).items():
        assert ROOT / hooks.source_of(place) == page


def test_every_link_leads_to_a_page_or_a_file_of_the_site(hooks):
    places = _places(hooks)
    for place, page in places.items():
        text, taken = hooks.with_links(page.read_text(encoding="utf8"), place)
        assert all((ROOT / name).is_file() for name in taken)
        there = {*places, *(f"files/{name}" for name in taken)}
        for link in hooks._LINK.findall(re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)):
            target = link[1].partition("#")[0]
            if target and not re.match(r"[a-z][a-z+.-]*:", target):
                found = os.path.normpath(Path(place).parent / target)
                assert found in there, f"{relative(page)}: {link} leads to {found}"


def test_the_picture_of_the_readme_has_a_light_and_a_dark_form(hooks):
    text, taken = hooks.with_links((ROOT / "README.md").read_text(encoding="utf8"), "index.md")
    assert "<picture>" not in text
    assert {"light.svg#only-light)", "dark.svg#only-dark)"} <= set(re.findall(r"(?:light|dark)\.svg#only-\w+\)", text))
    assert {name for name in taken if name.endswith(".svg")}


def test_a_link_to_a_folder_becomes_its_text(hooks):
    text, taken = hooks.with_links("See [the tests](../tests/docs) and [more](method.md#laws).", "jax.md")
    assert (text, taken) == ("See the tests and [more](method.md#laws).", set())


def test_names_are_the_public_ones(hooks):
    assert {name for names in hooks.rooms().values() for name in names} == set(gradsplit.__all__) - {"__version__"}


def test_nothing_is_asked_of_a_network():
    settings = (ROOT / "mkdocs.yml").read_text(encoding="utf8")
    assert "font: false" in settings and "- offline" in settings and "strict: true" in settings
    assert not re.search(r"https?://", settings + (ROOT / "docs/.site/iframe-worker.js").read_text(encoding="utf8"))
