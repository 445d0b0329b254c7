"""The page of a run: offline, names escaped, and in a browser without errors, with hover and an unfolding tree."""

from __future__ import annotations

import html
import re
import sqlite3

import numpy as np
import pytest

from gradsplit.watch.record import RunFile, RunFileError, RunWriter, Stream, Turns
from gradsplit.watch.report.account import account_of
from gradsplit.watch.report.pictures import Line, courses
from gradsplit.watch.report.run_page import pooled, write_run_page
from gradsplit.watch.report.text import report_text
from tests.watch.record.recorded import noise, outline, rows_of
from tests.watch.report.browser import Browser, chromium

EVIL = "<img src=x onerror=document.title='owned'>"
SHAPES = {"enc.0.weight": (8, 4), "enc.1.weight": (8, 4), f"enc.{EVIL}": (4,), "head.weight": (4, 8)}


def _page(folder, *, rows=300, shapes=None, controlled=False):
    stream = Stream(0, "AdamW", outline(shapes or SHAPES), controlled)
    norm = noise(rows, stream.outline.num_leaves)
    at = [leaf for leaf, tensor in enumerate(stream.outline.tensors_L) if tensor == "head.weight"]
    norm[rows // 2, at] *= 1e4
    norm[rows // 2 + 3, 0] = np.nan
    columns = {}
    if controlled:
        zeros = np.zeros(norm.shape, dtype=int)
        columns = {"kept_SL": np.ones(norm.shape), "scaled_SL": zeros, "zeroed_SL": zeros}
    writer = RunWriter(folder / "run.db", {"argv": [f"{EVIL}.py", "</script>"], "mode": "watch"})
    writer.write([rows_of(stream, norm, **columns)])
    writer.close()
    with RunFile(folder / "run.db") as file:
        return write_run_page(account_of(file), folder / "run.html")


@pytest.mark.parametrize("controlled", [False, True])
def test_the_page_needs_no_network_and_trusts_no_name(tmp_path, controlled):
    text = _page(tmp_path, controlled=controlled).read_text(encoding="utf8")
    own = re.sub(r"<script>/\*\*.*?</script>", "", text, count=1, flags=re.DOTALL)  # without plotly's own text
    assert "<img" not in own
    assert "It began at step 150 in head.weight" in own
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", own)
    assert "&lt;img src=x" in own


def test_pooling_keeps_the_largest():
    values = np.arange(1000.0)
    values[500] = 1e6
    best, starts = pooled(values, 60)
    assert len(best) == 60
    assert best.max() == 1e6
    assert best[-1] == 999
    assert starts[0] == 0


def test_the_page_is_small_and_says_what_its_sentences_mean(tmp_path):
    text = _page(tmp_path, rows=3000).read_text(encoding="utf8")
    assert len(text) < 1_000_000
    assert 'href="#glossary"' in text and "<ul id=glossary class=words>" in text
    assert "max-width:640px" in text
    assert f"<title>gradsplit: {html.escape(EVIL)}.py</title>" in text, "the script's name, not the whole command"


def test_what_is_lost_is_marked_to_the_end_and_a_loss_over_decades_is_logarithmic():
    x, y = np.arange(9000.0), np.geomspace(1.0, 1e9, 9000)
    y[4000:] = np.nan
    drawn = courses("loss", [Line("loss", "#000", x, y)])
    (first, last) = re.findall(r'class="lost" x1="([\d.]+)" x2="([\d.]+)"', drawn)[0]
    assert float(last) > 1080 and float(first) < 560, "one bar from the first lost step to the last"
    assert ">100<" in drawn and ">1000<" in drawn.replace("1e+03", "1000"), "powers of ten"


@pytest.mark.slow
def test_in_a_browser(tmp_path):
    program = chromium()
    if program is None:
        pytest.skip("not run: no Chromium on this machine, so the page was not looked at in a browser")
    page = _page(tmp_path)
    with Browser(program) as browser:
        browser.open(page)
        browser.until("document.querySelectorAll('.course svg polyline').length >= 4")
        assert browser.run("document.title").startswith("gradsplit: <img"), "the name is text"
        _check_hover(browser)
        _check_tree(browser)
        browser.screenshot(tmp_path / "page.png")
        assert (tmp_path / "page.png").stat().st_size > 20_000
        assert browser.errors == []


def _check_hover(browser):
    x, y, width, height = browser.run(
        "(() => { const map = document.querySelector('.heat .map'); map.scrollIntoView({block: 'center'});"
        " const box = map.getBoundingClientRect(); return [box.x, box.y, box.width, box.height]; })()"
    )
    for shift in (0.4, 0.41):
        browser.move_to(x + width * shift, y + height * 0.5)
    browser.until("/, step \\d+: /.test(document.querySelector('.heat .told').textContent)")


def _check_tree(browser):
    before = browser.run("document.querySelectorAll('.tree details[open]').length")
    x, y = browser.run(
        "(() => { const shut = document.querySelector('.tree details:not([open]) > summary');"
        " shut.scrollIntoView({block: 'center'}); const box = shut.getBoundingClientRect();"
        " return [box.x + 20, box.y + box.height / 2]; })()"
    )
    browser.click(x, y)
    browser.until(f"document.querySelectorAll('.tree details[open]').length == {before + 1}")
    assert browser.run("document.querySelectorAll('.tree details').length") > before


def _page_of_gso(folder, *, turns=6):
    names = list(SHAPES)
    stream = Stream(0, "GSO", outline(SHAPES), about={"names": names})
    step_K, factor_K = np.arange(turns) * 16 + 8, np.ones(turns)
    factor_K[2] = 0.01
    turned_KT = np.tile(np.array([70.0, 30.0, np.nan, 50.0]), (turns, 1))
    limit_KT = np.linspace(0, 1, turns)[:, None] * np.array([0.0, 0.25, 0.0, 0.5])
    writer = RunWriter(folder / "run.db", {"argv": ["train.py"], "mode": "watch"})
    writer.write([rows_of(stream, noise(100, stream.outline.num_leaves))])
    writer.add_turns(Turns(stream, step_K, factor_K, turned_KT, limit_KT, np.zeros((turns, 4))))
    writer.close()
    with RunFile(folder / "run.db") as file:
        account = account_of(file)
    return account, write_run_page(account, folder / "run.html")


def test_the_report_says_and_draws_what_gso_did(tmp_path):
    account, place = _page_of_gso(tmp_path)
    told, text = report_text(account), place.read_text(encoding="utf8")
    assert "GSO: each step was turned by 50 degrees from its gradient at the median." in told
    assert "50% of the rows of head.weight stood at their growth limit at the last reading, the most of 2" in told
    assert "GSO: the batch was scaled as a whole in 1 of 6 steps that were read." in told
    section = text[text.index("<h2>What GSO did") :]
    section = section[: section.index("</section>")]
    assert section.count("<svg") == 4 and "turned by, degrees" in section and "rows at their growth limit, %" in section
    rows = re.findall(r"<tr><td>(.*?)</td>.*?class=num>(.*?)</td>.*?class=num>(.*?)</td>", section)
    assert [row[:2] for row in rows[:3]] == [("enc.0.weight", "70"), ("head.weight", "50"), ("enc.1.weight", "30")]
    assert EVIL not in section and "&lt;img src=x" in section


def test_other_optimizers_have_no_such_section(tmp_path):
    assert "What GSO did" not in _page(tmp_path).read_text(encoding="utf8")


@pytest.mark.skipif(chromium() is None, reason="looking at a page needs Chromium")
@pytest.mark.parametrize("width", [1280, 420])
def test_what_gso_did_fits_wide_and_narrow_screens(tmp_path, width):
    _, place = _page_of_gso(tmp_path)
    with Browser(chromium()) as browser:
        browser.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        browser.open(place)
        assert browser.run("document.documentElement.scrollWidth") <= width
        assert browser.errors == []


def test_a_damaged_table_of_turns_is_refused_by_name(tmp_path):
    _page_of_gso(tmp_path)
    with sqlite3.connect(tmp_path / "run.db") as connection:
        connection.execute("UPDATE turn SET at_limit = x'00000000'")
    connection.close()
    with RunFile(tmp_path / "run.db") as file, pytest.raises(RunFileError, match="one number per tensor of 4"):
        file.turns(file.streams[0])
