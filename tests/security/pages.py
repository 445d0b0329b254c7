"""Every kind of page and picture that the package makes, from hostile names alone."""

from __future__ import annotations

import numpy as np

from gradsplit.lab.pages.comparison import comparison_page
from gradsplit.lab.pages.demo import demo_page
from gradsplit.lab.pages.rate_curve import rate_curve_svg
from gradsplit.resume.actions import GuardAction
from gradsplit.watch.record import RunFile, RunWriter, Stream
from gradsplit.watch.report.account import account_of
from gradsplit.watch.report.html import Section, page
from gradsplit.watch.report.run_page import write_run_page
from tests.security.hostile import HOSTILE
from tests.watch.record.recorded import noise, outline, rows_of

__all__ = ["MAKERS"]


def run_report(folder):
    """A recorded run whose modules, script, arguments, optimizer, budget and exception have hostile names."""
    shapes = {f"m{i}.{name}.w": (4, 2) for i, name in enumerate(HOSTILE)}
    about = {"strategy": HOSTILE[0], "budget": HOSTILE[1], "words": ["relative:factor=0.1"], "num_bins": 3}
    stream = Stream(0, HOSTILE[0], outline(shapes), controlled=True, about=about)
    norm = noise(120, stream.outline.num_leaves)
    norm[60, 3] = np.nan
    norm[40, 5] *= 1e5
    zeros = np.zeros(norm.shape, dtype=int)
    meta = {
        "argv": list(HOSTILE),
        "mode": HOSTILE[2],
        "git_commit": HOSTILE[3],
        "exception": HOSTILE[1],
        "rank": HOSTILE[4],
    }
    action = GuardAction(HOSTILE[0], 3, 0, 1e9, HOSTILE[1], 1.0, 1.0, 0.5, 1, 3, HOSTILE[2], HOSTILE[3], tuple(HOSTILE))
    writer = RunWriter(folder / "run.db", {**meta, "guard": [action.to_dict()]})
    writer.write([rows_of(stream, norm, kept_SL=np.ones(norm.shape), scaled_SL=zeros, zeroed_SL=zeros)])
    writer.close()
    with RunFile(folder / "run.db") as file:
        return write_run_page(account_of(file), folder / "run.html")


def demo(folder):
    """The demonstration with hostile labels, workloads, tensors and conditions."""
    norms = {"names": list(HOSTILE), "levels": ["tensor"] * len(HOSTILE), "steps": [0, 1],
             "before": [[1.0] * len(HOSTILE)] * 2, "after": [[0.5] * len(HOSTILE)] * 2}  # fmt: skip
    rows = [
        {"method": f"m{i}", "label": name, "lr": 0.1, "strength": 1.0, "score": 0.5, "steps_to_target": 3,
         "diverged": False, "ends_above_start": False, "steps_run": 2, "num_bins": 2, "scaled_share": 0.1,
         "zeroed_share": 0.0, "worst": [[name, 0.1]], "seconds": 1.0, "ours": i % 2 == 0, "losses": [2.0, 1.0],
         "norms": norms, "chosen_by": name, "cpu_ms_a_step": 1.0, "state_per_weight": 2.0,
         "example": {"jpeg": "", "size": [4, 2], "truth": [[0.0, 0.0, 1.0, 1.0]], "found": [[0.0, 0.0, 1e9, -1e9, 0.5]], "hit": 0}}  # noqa: E501
        for i, name in enumerate(HOSTILE)
    ]  # fmt: skip
    scene = {"workload": HOSTILE[0], "title": HOSTILE[1], "expect": HOSTILE[2], "metric": HOSTILE[3],
             "optimizer": HOSTILE[4], "steps": 2, "higher_is_better": True, "rows": rows}  # fmt: skip
    return _written(folder / "demo.html", demo_page([scene], dict.fromkeys(HOSTILE, HOSTILE[0])))


def _results():
    summary = [
        {"method": name, "summary": name, "ours": False, "strength": 1.0, "lr": 0.1, "scaled_share": 0.1,
         "steps_to_target": 3, "fresh": None, "diverged": 0, "runs": 1, "seconds": 1.0, "worst_bin": name,
         "choosing": {"median": 0.5, "min": 0.4, "max": 0.6, "lost": 0},
         "curve": [{"lr": lr, "median": 0.5, "min": 0.4, "max": 0.6, "strength": 1.0} for lr in (0.1, 1.0)]}
        for name in HOSTILE
    ]  # fmt: skip
    cells = [{"method": name, "strength": 1.0, "lr": 0.1, "losses": [2.0, 1.0], "steps_run": 2} for name in HOSTILE]
    about = {
        "name": HOSTILE[0],
        "title": HOSTILE[1],
        "metric": HOSTILE[5],
        "data_note": HOSTILE[3],
        "higher_is_better": True,
    }
    grid = {"seeds": 1, "fresh_seeds": 0, "steps": 2, "schedule": HOSTILE[4], "options": {HOSTILE[0]: HOSTILE[1]}}
    return {"workload": about, "grid": grid, "summary": summary, "cells": cells, "target_method": HOSTILE[6],
            "conditions": {"command": HOSTILE[7], HOSTILE[1]: HOSTILE[1]}}  # fmt: skip


def comparison(folder):
    """A comparison of methods with hostile names."""
    return _written(folder / "comparison.html", comparison_page(_results()))


def curve(folder):
    """The picture of a comparison, inside a page so that its scripts, if any, would run."""
    svg = rate_curve_svg(_results())
    (folder / "curve.svg").write_text(svg, encoding="utf8")
    return _written(folder / "curve.html", f"<!doctype html><meta charset='utf-8'><title>curve</title>{svg}")


def chain(folder):
    """The figure of a backward chain through modules with hostile names."""
    from gradsplit.chain.chain import Chain, Link, chain_figure

    links = [
        Link(**{**_blank(Link), "name": name, "kind": name, "above": HOSTILE[max(i - 1, 0)], "gain": 1.5, "signal": 1.0,
                "cumulative": float(i), "activation": 1.0})
        for i, name in enumerate(HOSTILE)
    ]  # fmt: skip
    drawn = chain_figure(Chain(**{**_blank(Chain), "links": links}))
    return _written(folder / "chain.html", page(HOSTILE[1], HOSTILE[0], [Section(HOSTILE[2], "", [drawn])], {}))


def _blank(kind):
    """Values for the fields that do not matter here."""
    import dataclasses

    return {one.name: None for one in dataclasses.fields(kind)}


def _written(path, text):
    path.write_text(text, encoding="utf8")
    return path


MAKERS = {made.__name__: made for made in (run_report, demo, comparison, curve, chain)}
