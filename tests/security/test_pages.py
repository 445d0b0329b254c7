"""No name from outside becomes part of a page: not as an element, not as an attribute, not as a script that runs."""

from __future__ import annotations

import re

import pytest

from tests.security.hostile import HOSTILE, elements_of
from tests.security.pages import MAKERS
from tests.watch.report.browser import Browser, chromium

ALLOWED = {
    *(
        "html",
        "head",
        "meta",
        "title",
        "style",
        "script",
        "body",
        "main",
        "h1",
        "h2",
        "p",
        "nav",
        "a",
        "section",
        "div",
    ),
    *("table", "thead", "tbody", "tr", "th", "td", "ul", "li", "pre", "span", "details", "summary"),
    *("svg", "rect", "text", "line", "polyline", "polygon", "circle", "path", "g"),
}


@pytest.fixture(scope="module", params=list(MAKERS))
def made(request, tmp_path_factory):
    return MAKERS[request.param](tmp_path_factory.mktemp(request.param))


def _own(page):
    """The page's text without plotly's own script, which is no name from outside."""
    return re.sub(r"<script>/\*\*.*?</script>", "", page.read_text(encoding="utf8"), count=1, flags=re.DOTALL)


def test_a_page_holds_only_elements_of_its_own(made):
    for tag, attributes in elements_of(_own(made)):
        assert tag in ALLOWED, (tag, attributes)
        assert not [name for name in attributes if name.startswith("on") or name in ("srcdoc", "autofocus")], attributes
        for name in ("href", "src", "xlink:href", "action", "data"):
            link = attributes.get(name, "#")
            assert link.startswith("#"), (tag, name, link)


def test_a_script_of_a_page_is_one_of_ours(made):
    """A script element may hold plotly's calls and data; a name inside must not have closed it."""
    scripts = re.findall(r"<script[^>]*>(.*?)</script>", _own(made), flags=re.DOTALL)
    for script in scripts:
        assert script.strip().startswith(("window.PLOTLYENV", "/**")), script[:80]
        assert "<script" not in script and "<!--" not in script
        assert "\u2028" not in script and "\u2029" not in script


def test_names_that_were_not_escaped_would_be_seen():
    assert ("img", {"src": "x", "onerror": "window.owned=3"}) in elements_of(f"<p>{HOSTILE[2]}</p>")
    assert any(tag == "script" for tag, _ in elements_of(f"<td>{HOSTILE[0]}</td>"))


@pytest.mark.slow
def test_in_a_browser_no_name_runs_becomes_an_element_or_fetches(tmp_path):
    program = chromium()
    if program is None:
        pytest.skip("not run: no Chromium on this machine, so hostile names were not looked at in a browser")
    with Watching(program) as browser:
        browser.call("Network.enable")
        planted = tmp_path / "planted.html"  # what must be noticed if it ever happens
        planted.write_text("<meta charset='utf-8'><img src=x onerror=window.owned=3>", encoding="utf8")
        browser.open(planted)
        browser.until("window.owned === 3")
        assert browser.requests[-1].endswith("/x")
        for name, make in MAKERS.items():
            browser.requests.clear()
            browser.errors.clear()
            folder = tmp_path / name
            folder.mkdir()
            page = make(folder)
            browser.open(page)
            if name not in ("curve", "run_report", "demo"):  # those draw without plotly
                browser.until("document.querySelectorAll('.js-plotly-plot .plot-container').length >= 1")
            _unfold(browser)
            assert browser.run("typeof window.owned") == "undefined", f"{name}: {browser.run('window.owned')}"
            asked = "document.querySelectorAll('{}').length"
            assert browser.run(asked.format("img, iframe, object, embed, form, base, link")) == 0, name
            assert browser.run(asked.format('body a:not([href^="#"]):not(.modebar-btn)')) == 0, name
            assert browser.requests == [page.resolve().as_uri()], f"{name} fetched something"
            assert browser.errors == [], name


def _unfold(browser):
    """Open every details element and move over every figure, so that labels of hovers are made, too."""
    browser.run("document.querySelectorAll('details').forEach(d => d.open = true)")
    boxes = browser.run(
        "[...document.querySelectorAll('.nsewdrag')].slice(0, 4).map(e => { e.scrollIntoView({block: 'center'});"
        " const b = e.getBoundingClientRect(); return [b.x, b.y, b.width, b.height]; })"
    )
    for at in range(len(boxes)):
        x, y, width, height = browser.run(
            f"(() => {{ const e = document.querySelectorAll('.nsewdrag')[{at}]; e.scrollIntoView({{block: 'center'}});"
            " const b = e.getBoundingClientRect(); return [b.x, b.y, b.width, b.height]; })()"
        )
        for share in (0.1, 0.11, 0.5, 0.51):
            browser.move_to(x + share * width, y + share * height)


class Watching(Browser):
    """A browser that remembers what its page asked for."""

    def __init__(self, program):
        self.requests = []
        super().__init__(program)

    def _note(self, message):
        super()._note(message)
        if message.get("method") == "Network.requestWillBeSent":
            url = message["params"]["request"]["url"]
            if not url.startswith("data:"):
                self.requests.append(url)
