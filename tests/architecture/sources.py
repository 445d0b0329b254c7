"""What the tree contains, read from files and syntax trees; nothing here imports the package."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "gradsplit"

# Folders that tools make; looked at only where there is no git to ask (an unpacked archive).
_MADE_BY_TOOLS = {".git", ".venv", "build", "dist", "runs", "__pycache__"}


class Import(NamedTuple):
    """One imported module: its dotted name, the line, and when: at "load", at a "call", or for "types"."""

    name: str
    line: int
    when: str


@cache
def tracked_files() -> tuple[Path, ...]:
    """Every file that belongs to the repository, in order."""
    asked = subprocess.run(
        [
            "git",
            "-c",
            f"safe.directory={ROOT}",
            "ls-files",
            "-z",
            "--cached",
            "--others",
            "--exclude-standard",
        ],
        cwd=ROOT,
        capture_output=True,
        check=False,
    )
    if asked.returncode == 0:
        paths = [ROOT / name for name in asked.stdout.decode().split("\0") if name]
    else:
        paths = [path for path in ROOT.rglob("*") if not _MADE_BY_TOOLS & set(path.relative_to(ROOT).parts)]
    return tuple(sorted(path for path in set(paths) if path.is_file()))


def tracked(*suffixes: str) -> list[Path]:
    """The files with one of these suffixes."""
    return [path for path in tracked_files() if path.suffix in suffixes]


def package_files() -> list[Path]:
    """The Python files of the package."""
    return [path for path in tracked(".py") if PACKAGE in path.parents]


def relative(path: Path) -> str:
    """The path as a reader of the repository knows it."""
    return path.relative_to(ROOT).as_posix()


def module_of(path: Path) -> str:
    """`gradsplit/plan/slices.py` -> `gradsplit.plan.slices`; a package's `__init__.py` -> the package."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def unit_of(module: str) -> str:
    """The part of the package a module belongs to: `gradsplit.plan.slices` -> `plan`."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else parts[0]


def imports_of(source: str, module: str, *, is_package: bool = False) -> Iterator[Import]:
    """Every module that the source imports, inside functions and under TYPE_CHECKING too.

    `from a.b import c` is reported as `a.b.c`: a test of prefixes need not know what c is.
    """
    tree = ast.parse(source)
    when: dict[ast.AST, str] = {}
    for node in ast.walk(tree):  # outer nodes come first, so a guard inside a function has the last word
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            when.update((inner, "types") for statement in node.body for inner in ast.walk(statement))
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            when.update((inner, "call") for statement in node.body for inner in ast.walk(statement))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, when.get(node, "load"))
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                here = parts[: len(parts) - node.level + is_package]
                base = ".".join([*here, base] if base else here)
            for alias in node.names:
                yield Import(f"{base}.{alias.name}", node.lineno, when.get(node, "load"))


def imports_in(path: Path) -> list[Import]:
    """Every module that the file imports."""
    source = path.read_text(encoding="utf8")
    return list(imports_of(source, module_of(path), is_package=path.name == "__init__.py"))


@cache
def project() -> dict:
    """The tables of pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf8"))
