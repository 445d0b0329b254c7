"""What the site adds to the pages of `docs/`: a home, links that lead out of that folder, and names of the code.

mkdocs calls the functions named `on_…`. The pages stay as a reader of the repository sees them.
"""

from __future__ import annotations

import ast
import os
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PAGES = {
    "README.md": "index.md",
    "README.zh-CN.md": "chinese.md",
    "docs/README.md": "contents.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
}
"""Pages of the repository that have another place in the site."""
GUIDES = [
    *(
        "choosing",
        "which-layer",
        "report",
        "guard",
        "with-your-optimizer",
        "trainers",
        "distributed",
        "gpu",
        "amp-and-compile",
    ),
    *("sources", "detection", "recurrent", "migration", "plots", "bad-values", "jax", "keras"),
]
"""The order of the guides; others follow by name."""
_FENCES = re.compile(r"^(\s*```.*?^\s*```)", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(!?\[(?:[^\[\]]|\[[^\]]*\])*\])\(([^)\s]+)\)")
_PICTURE = re.compile(
    r"<picture>.*?srcset=\"([^\"]+)\".*?<img src=\"([^\"]+)\" alt=\"([^\"]+)\">.*?</picture>", re.DOTALL
)


def place_of(path: str) -> str | None:
    """Return where a page of the repository stands in the site, None for what is no page of it."""
    if path in PAGES:
        return PAGES[path]
    return path.removeprefix("docs/") if path.startswith("docs/") and path.endswith(".md") else None


def source_of(place: str) -> str:
    """Return the path in the repository of a page of the site."""
    return next((path for path, other in PAGES.items() if other == place), f"docs/{place}")


def with_links(text: str, place: str) -> tuple[str, set[str]]:
    """Rewrite the links of a page for its place in the site.

    Returns:
        The text, and the files of the repository that it leads to and that are no pages: the site takes them along.
        A link to a folder becomes its text.
    """
    folder, taken = (ROOT / source_of(place)).parent, set()

    def moved(link: str) -> str | None:
        target, mark, fragment = link.partition("#")
        if not target or re.match(r"[a-z][a-z+.-]*:", link):
            return link
        path = Path(os.path.normpath(folder / target))
        name = path.relative_to(ROOT).as_posix()
        found = place_of(name)
        if found is None and not path.is_file():
            return None
        if found is None:
            taken.add(name)
            found = f"files/{name}"
        return os.path.relpath(found, Path(place).parent) + mark + fragment

    def replaced(match: re.Match[str]) -> str:
        link = moved(match[2])
        return f"{match[1]}({link})" if link is not None else match[1].strip("![]")

    def both(match: re.Match[str]) -> str:
        dark, light = moved(match[1]), moved(match[2])
        return f"![{match[3]}]({light}#only-light)\n![{match[3]}]({dark}#only-dark)"

    parts = _FENCES.split(text)
    parts[::2] = [_PICTURE.sub(both, _LINK.sub(replaced, part)) for part in parts[::2]]
    return "".join(parts), taken


def rooms() -> dict[str, list[str]]:
    """Return the rooms of the package with the public names that each defines."""
    tree = ast.parse((ROOT / "gradsplit/__init__.py").read_text(encoding="utf8"))
    (value,) = [
        node.value
        for node in tree.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == "_NAMES"
    ]
    return {room: list(names) for room, names in eval(compile(ast.Expression(value), "_NAMES", "eval")).items()}


def _title(place: str) -> str:
    return re.search(r"^# (.+)$", (ROOT / source_of(place)).read_text(encoding="utf8"), re.MULTILINE)[1].replace(
        "`", ""
    )


def _below(folder: str) -> list[str]:
    names = sorted(path.name for path in (ROOT / "docs" / folder).glob("*.md"))
    return [f"{folder}/{name}" for name in sorted(names, key=lambda name: name != "README.md")]


def navigation() -> list[dict[str, Any]]:
    """Return the order of all pages."""
    own = {path.stem for path in (ROOT / "docs").glob("*.md")} - {"README", "method"}
    guides = [*(name for name in GUIDES if name in own), *sorted(own - set(GUIDES))]
    return [
        {"Home": "index.md"},
        {"Your question": "contents.md"},
        {"Guides": [{_title(f"{name}.md"): f"{name}.md"} for name in guides]},
        {"Method": "method.md"},
        {"Reference": [{_title(place): place} for place in _below("reference")]},
        {"Names": [{f"gradsplit.{room}": f"names/{room}.md"} for room in rooms()]},
        {"Results": [{_title(place): place} for place in _below("results")]},
        {"Decisions": [{_title(place): place} for place in _below("decisions")]},
        {"Project": [{"Contributing": "contributing.md"}, {"Changelog": "changelog.md"}, {"中文": "chinese.md"}]},
    ]


def on_config(config: Any) -> Any:
    """Give the site its order of pages."""
    config.nav = navigation()
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages from outside of `docs/`, the pages of names, and every file that a page leads to."""
    from mkdocs.structure.files import File

    files.remove(files.get_file_from_path("README.md"))
    for path, place in PAGES.items():
        files.append(File.generated(config, place, abs_src_path=str(ROOT / path)))
    for room, names in rooms().items():
        text = f"# gradsplit.{room}\n\n" + "\n\n".join(f"::: gradsplit.{room}.{name}" for name in names) + "\n"
        files.append(File.generated(config, f"names/{room}.md", content=text))
    files.append(
        File.generated(config, "assets/iframe-worker.js", abs_src_path=str(ROOT / "docs/.site/iframe-worker.js"))
    )
    taken: set[str] = set()
    for file in files.documentation_pages():
        if not file.src_uri.startswith("names/"):
            taken |= with_links((ROOT / source_of(file.src_uri)).read_text(encoding="utf8"), file.src_uri)[1]
    for name in sorted(taken):
        files.append(File.generated(config, f"files/{name}", abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Rewrite the links of a page for its place in the site."""
    place = page.file.src_uri
    return markdown if place.startswith("names/") else with_links(markdown, place)[0]
