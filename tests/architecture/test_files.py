"""The shape of the tree: names, lengths, packages, and nothing that belongs to one machine."""

from __future__ import annotations

import ast
import re

import pytest

from tests.architecture.sources import PACKAGE, ROOT, imports_in, package_files, relative, tracked, tracked_files

# A name that says nothing about the content collects whatever is left over.
FORBIDDEN_NAMES = {"utils", "util", "helpers", "helper", "common", "misc"}

# A file above LONGEST lines is entered here with its length, may only shrink, and leaves when short enough.
LONGEST = 540
LONGER_UNTIL_SPLIT: dict[str, int] = {}

# One method is the loop; if it grows, a step of the loop has lost its own module.
STEP_LINES = 20

# Written in pieces, so that this file does not find itself.
MACHINE_PATH = re.compile("(" + "|".join(["/" + "tmp/", "/" + "work/", "/" + "root/", "/" + "home/[a-z]+/"]) + ")")
UNFINISHED = re.compile(r"\b(" + "|".join(["TO" + "DO", "FIX" + "ME", "XX" + "X", "NotImplemented" + "Error"]) + r")\b")


def _numbered(path, pattern):
    text = path.read_text(encoding="utf8", errors="replace")
    return [
        f"{relative(path)}:{n}: {line.strip()[:120]}"
        for n, line in enumerate(text.splitlines(), 1)
        if pattern.search(line)
    ]


def _is_text(path):
    return b"\0" not in path.read_bytes()[:4096]


def test_no_module_is_a_catch_all():
    found = [
        relative(path)
        for path in tracked(".py")
        if FORBIDDEN_NAMES & {part.removesuffix(".py").lstrip("_") for part in path.relative_to(ROOT).parts}
    ]
    assert not found, f"name these for what they hold: {found}"


def test_every_room_and_every_module_beside_the_rooms_stands_in_the_table_of_rooms():
    below = {path.relative_to(PACKAGE).parts[0] for path in package_files()}
    units = {name if name.endswith(".py") else f"{name}/" for name in below} - {"__init__.py", "__main__.py"}
    rows = re.findall(r"^\| (`.*?) \|", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf8"), re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`([\w/.]+)`", row)}
    assert units <= named, f"describe in CONTRIBUTING.md: {sorted(units - named)}"


def test_long_files_only_shrink():
    lengths = {relative(path): len(path.read_text(encoding="utf8").splitlines()) for path in tracked(".py")}
    grown = {name: n for name, n in lengths.items() if n > LONGER_UNTIL_SPLIT.get(name, LONGEST)}
    assert not grown, f"above their allowance (lines): {grown}. Split each where a second concept begins."
    settled = {name: lengths.get(name) for name, n in LONGER_UNTIL_SPLIT.items() if lengths.get(name, 0) < n}
    assert not settled, f"lower or remove these rows of LONGER_UNTIL_SPLIT: {settled}"


def test_a_step_of_the_splitter_is_read_at_a_glance():
    tree = ast.parse((PACKAGE / "splitter.py").read_text(encoding="utf8"))
    (splitter,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "GradientSplitter"]
    (step,) = [node for node in splitter.body if isinstance(node, ast.FunctionDef) and node.name == "step"]
    length = step.end_lineno - step.body[1].lineno + 1
    assert length <= STEP_LINES, f"GradientSplitter.step has {length} lines after its docstring"


def test_no_function_beside_the_splitter_is_a_method_of_it():
    """A function that takes the splitter and reads its private parts belongs in the class."""
    tree = ast.parse((PACKAGE / "splitter.py").read_text(encoding="utf8"))
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    assert functions
    beside = [node.name for node in functions if "splitter" in {argument.arg for argument in node.args.args}]
    assert not beside, f"make these methods of GradientSplitter: {beside}"


@pytest.mark.parametrize("folder", sorted({path.parent for path in package_files()}), ids=relative)
def test_every_folder_of_the_package_is_found_by_the_build(folder):
    missing = [
        relative(parent)
        for parent in [folder, *folder.parents]
        if PACKAGE in [parent, *parent.parents] and not (parent / "__init__.py").is_file()
    ]
    assert not missing, f"without __init__.py the built wheel leaves these out: {missing}"


def test_the_package_says_that_it_is_typed():
    assert (PACKAGE / "py.typed").is_file()


def test_what_benchmarks_and_examples_import_is_there():
    """No type checker reads them, and a benchmark that has its numbers is seldom run again."""
    scripts = [path for path in tracked(".py") if path.relative_to(ROOT).parts[0] in ("benchmarks", "examples")]
    imports = {(relative(path), one.name) for path in scripts for one in imports_in(path)}
    ours = {(path, name) for path, name in imports if name.split(".")[0] in ("benchmarks", "gradsplit")}
    assert len(ours) > 100
    assert not sorted(f"{path}: {name}" for path, name in ours if not _is_there(name))


def _is_there(dotted: str) -> bool:
    """Whether it is a module, or a name in the text of one."""
    place, _, name = dotted.rpartition(".")
    if any((ROOT / dotted.replace(".", "/")).with_suffix(suffix).exists() for suffix in ("", ".py")):
        return True
    files = [ROOT / place.replace(".", "/") / "__init__.py", (ROOT / place.replace(".", "/")).with_suffix(".py")]
    return any(re.search(rf"\b{name}\b", file.read_text(encoding="utf8")) for file in files if file.is_file())


@pytest.mark.parametrize(
    ("dotted", "there"),
    [
        ("gradsplit.plan", True),
        ("gradsplit.plan.slices.xsp", True),
        ("gradsplit.lab.train.train", True),
        ("gradsplit.lab.controls.train", False),
        ("gradsplit.nothing.train", False),
    ],
)
def test_an_import_that_is_not_there_is_recognised(dotted, there):
    assert _is_there(dotted) is there


def test_no_path_of_one_machine():
    found = [
        hit
        for path in tracked_files()
        if path.suffix != ".lock" and _is_text(path)
        for hit in _numbered(path, MACHINE_PATH)
    ]
    assert not found, "\n".join(found)


def test_nothing_is_left_unfinished():
    found = [hit for path in tracked(".py") for hit in _numbered(path, UNFINISHED)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("path", [path for path in tracked(".py") if path.name.startswith("test_")], ids=relative)
def test_every_test_function_can_fail(path):
    """A test that only computes, or returns its verdict, passes whatever the code does."""
    tree = ast.parse(path.read_text(encoding="utf8"))
    tests = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
    silent = [node.name for node in tests if not _may_raise(node)]
    assert not silent, f"{relative(path)}: no assertion in {silent}"


def _may_raise(function: ast.FunctionDef) -> bool:
    for node in ast.walk(function):
        if isinstance(node, (ast.Assert, ast.Raise)):
            return True
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if re.search(r"assert|raises|warns|check|fail|^law$", name):
                return True
    return False


@pytest.mark.parametrize(
    ("source", "can_fail"),
    [
        ("def test_a():\n    assert f() == 1", True),
        ("def test_a():\n    torch.testing.assert_close(a, b)", True),
        ("def test_a():\n    with pytest.raises(ValueError):\n        f()", True),
        ("def test_a(law):\n    law(plan)", True),  # a law asserts, and its mutants prove it
        ("def test_a():\n    return np.array_equal(a, b)", False),
        ("def test_a():\n    np.array_equal(a, b)", False),
    ],
)
def test_a_test_that_cannot_fail_is_recognised(source, can_fail):
    assert _may_raise(ast.parse(source).body[0]) is can_fail
