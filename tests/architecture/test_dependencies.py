"""What the code imports, what pyproject.toml promises, and what the lock installs are one list."""

from __future__ import annotations

import re
import sys

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import gradsplit
from tests.architecture.sources import ROOT, imports_in, project, relative, tracked

# Where a package on the index has another name than its module.
DISTRIBUTION = {"PIL": "pillow", "sklearn": "scikit-learn", "tomli": "tomli", "_pytest": "pytest"}

# Installed without its dependencies by the Makefile; only its files are read.
DATA_ONLY = {"deepforest"}
# What adapters translate for, and whose models some benchmarks take: whoever calls them has installed it.
BROUGHT_BY_THE_USER = {"timm", "wandb", "mlflow", "jax", "tensorflow"}
# What `benchmarks/` measures beside us, or drives us with, each in an environment of its own.
MEASURED_BESIDE_US = {"adam-mini", "atheris", "heavyball", "smartclip", "timm", "torchjd", "zclip"}


# Folders of `benchmarks/` that are imported by their own names.
OUR_BENCHMARKS = {canonicalize_name(path.name) for path in (ROOT / "benchmarks").iterdir() if path.is_dir()}


def _requirements(*extras: str) -> dict[str, Requirement]:
    tables = project()["project"]
    texts = list(tables["dependencies"])
    for extra in extras:
        texts += tables["optional-dependencies"][extra]
    return {canonicalize_name(r.name): r for r in map(Requirement, texts)}


def _lock(name: str = "requirements.lock") -> list[Requirement]:
    lines = (ROOT / name).read_text(encoding="utf8").splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def _extras() -> list[str]:
    """The extras of the environment that `make venv` sets up; that of the site is another one."""
    return [name for name in project()["project"]["optional-dependencies"] if name not in {"all", "docs"}]


def _third_party(path) -> set[str]:
    tops = {name.split(".")[0] for name, _, when in imports_in(path) if when != "types"}
    return tops - set(sys.stdlib_module_names) - {"gradsplit", "tests", "benchmarks"}


@pytest.mark.parametrize("path", [p for p in tracked(".py") if _third_party(p)], ids=relative)
def test_every_import_is_declared(path):
    declared = _requirements(*_extras(), "docs")
    names = {canonicalize_name(DISTRIBUTION.get(top, top)) for top in _third_party(path)}
    missing = names - set(declared) - DATA_ONLY - BROUGHT_BY_THE_USER - {"tomli"}
    if relative(path).startswith("benchmarks/"):
        missing -= MEASURED_BESIDE_US | OUR_BENCHMARKS
    assert not missing, f"{relative(path)} imports {sorted(missing)}; add it to an extra in pyproject.toml"


def test_what_every_user_needs_is_torch_and_numpy():
    assert set(_requirements()) == {"torch", "numpy"}


def test_all_names_every_extra():
    (everything,) = map(Requirement, project()["project"]["optional-dependencies"]["all"])
    assert everything.extras == set(_extras())


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.13"])
def test_the_lock_pins_what_the_extras_ask_for(python):
    place = {"python_version": python}
    locked = {canonicalize_name(r.name): r for r in _lock() if r.marker is None or r.marker.evaluate(place)}
    for name, asked in _requirements(*_extras()).items():
        assert name in locked, f"requirements.lock has no {name} for Python {python}"
        (pin,) = locked[name].specifier
        assert pin.operator == "==", f"{locked[name]}: a lock names one version"
        assert asked.specifier.contains(Version(pin.version)), f"{asked} does not admit {locked[name]}"


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.13"])
def test_the_lock_of_the_site_pins_what_its_extra_asks_for(python):
    place = {"python_version": python}
    pins = [r for r in _lock("requirements-docs.lock") if r.marker is None or r.marker.evaluate(place)]
    locked = {canonicalize_name(r.name): r for r in pins}
    assert len(locked) == len(pins), "a package is pinned twice"
    for asked in map(Requirement, project()["project"]["optional-dependencies"]["docs"]):
        (pin,) = locked[canonicalize_name(asked.name)].specifier
        assert pin.operator == "==" and asked.specifier.contains(Version(pin.version))


def test_the_lock_has_exact_versions_from_no_particular_place():
    for pin in _lock():
        assert [s.operator for s in pin.specifier] == ["=="], str(pin)
        assert pin.url is None and "+" not in str(pin.specifier) and "*" not in str(pin.specifier), str(pin)
    seen = [(canonicalize_name(r.name), str(r.marker or Marker("python_version > '0'"))) for r in _lock()]
    assert len(seen) == len(set(seen)), "a package is pinned twice"


def test_the_lock_for_tensorflow_has_the_same_versions_where_both_name_a_package():
    ours, theirs = {}, {}
    for pins, name in ((ours, "requirements.lock"), (theirs, "requirements-tensorflow.lock")):
        for pin in _lock(name):
            pins[canonicalize_name(pin.name), str(pin.marker)] = str(pin.specifier)
    apart = {key[0] for key in ours.keys() & theirs.keys() if ours[key] != theirs[key]}
    assert apart == {"h5py"}, "TensorFlow asks for an older h5py, and for nothing else that differs"


def test_the_version_is_one_in_package_metadata_and_changelog():
    version = project()["project"]["version"]
    first = re.search(r"^## \[?(\d+\.\d+\.\d+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf8"), re.MULTILINE)
    assert first, "CHANGELOG.md has no heading with a version"
    assert first[1] == version
    assert gradsplit.__version__ == version
