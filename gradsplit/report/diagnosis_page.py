"""A diagnosis as one HTML page that works offline: the findings, worst first, and the chain they were read from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gradsplit.chain.chain import Chain
from gradsplit.chain.figure import chain_figure

from .page import Section, html_table, page, text

__all__ = ["diagnosis_page"]


def diagnosis_page(found: Mapping[str, Any], chain: Chain, evidence: Mapping[str, Any]) -> str:
    """Return the page as text.

    Args:
        found: `Diagnosis.to_dict()`.
        chain: the factored gradient.
        evidence: where the numbers come from: name -> value, shown at the end.
    """
    rows = [
        [str(number), f"{entry['kind']}: {entry['sentence']}", entry["evidence"], entry["change"]]
        for number, entry in enumerate(found["findings"], 1)
    ]
    table = html_table(["", "finding", "how it is known", "what to change"], rows)
    nothing = text("Nothing was found.")
    notes = [text(f"Note: {note}.") for note in found["notes"]]
    sections = [
        Section("What is wrong", "Worst first.", [table if rows else nothing, *notes]),
        Section("The chain", "From the loss down: what each factor makes of the signal.", [chain_figure(chain)]),
    ]
    found_here = "1 finding" if len(rows) == 1 else f"{len(rows)} findings"
    lead = f"Loss {chain.loss:.4g} on one batch, {found_here}."
    return page("gradsplit: diagnosis", lead, sections, evidence)
