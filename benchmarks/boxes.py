"""A picture of what three methods found in the same piece of a photograph, from the raw file of a demo.

    gradsplit demo --out benchmarks/results/demo
    python benchmarks/boxes.py                     # writes docs/results/boxes.svg

The photograph is one of NEON's, as the package deepforest carries it (Weinstein et al., MIT).
"""

from __future__ import annotations

import html
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gradsplit.lab.pages.demo import box_marks
from gradsplit.lab.workloads.aerial import build_aerial

ROOT = Path(__file__).resolve().parents[1]
RAW = ROOT / "benchmarks" / "results" / "demo" / "demo.json"
PICTURE = ROOT / "docs" / "results" / "boxes.svg"
SHOWN = ("SGD, global clip", "AdamW, clip, warm-up", "GSO, nothing chosen")
GAP, HEAD, LINE = 16, 66, 27


def main() -> None:
    """Draw the rows side by side; the photograph stands in the file once."""
    scenes = json.loads(RAW.read_text(encoding="utf8"))["scenes"]
    rows = {row["label"]: row for scene in scenes if scene["workload"] == "aerial" for row in scene["rows"]}
    if not all(label in rows and rows[label]["example"] for label in SHOWN):
        raise SystemExit(f"boxes.py: expected a demo with photographs in {RAW}, found none. Run gradsplit demo first.")
    task = build_aerial(0, width=4)
    jpeg = task.example(task.model)["jpeg"]
    wide, tall = rows[SHOWN[0]]["example"]["size"]
    panels = []
    for at, label in enumerate(SHOWN):
        example, score = rows[label]["example"], rows[label]["score"]
        found = f"{example['hit']} of {len(example['truth'])} trees hit, mAP50 {score:.3f}"
        name = f'<text y="{LINE}" class="label">{html.escape(label)}</text>'
        panels.append(
            f'<g transform="translate({at * (wide + GAP)} 0)">{name}<text y="{2 * LINE}">{html.escape(found)}</text>'
            f'<svg y="{HEAD}" width="{wide}" height="{tall}"><use href="#photograph"/>{box_marks(example)}</svg></g>'
        )
    whole = len(SHOWN) * (wide + GAP) - GAP
    PICTURE.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {whole} {tall + HEAD}" width="{whole}" '
        f'height="{tall + HEAD}" role="img" aria-label="Boxes found by SGD with a clip, by AdamW and by GSO">'
        "<style>text{font:24px system-ui,sans-serif;fill:#222}.label{font-weight:600}</style>"
        f'<rect width="{whole}" height="{tall + HEAD}" fill="#fff"/>'
        f'<defs><image id="photograph" width="{wide}" height="{tall}" href="data:image/jpeg;base64,{jpeg}"/></defs>'
        f"{''.join(panels)}</svg>\n",
        encoding="utf8",
    )


if __name__ == "__main__":
    main()
