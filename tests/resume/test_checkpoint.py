"""A checkpoint holds plain data only, is replaced whole, is verified, and is loaded whole or not at all."""

from __future__ import annotations

import enum
import io
import os
import pickle
import random
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import gradsplit as gs
from gradsplit.resume.checkpoint import read_tree, save_tree
from gradsplit.resume.formats import FORMATS
from gradsplit.resume.plain import plain
from tests.resume.runs import tensors_of

FORMAT = pytest.mark.parametrize("kind", FORMATS)


def _run(optimizer_of=lambda m: torch.optim.AdamW(m.parameters(), 1e-2)):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    optimizer = optimizer_of(model)
    return {"model": model, "optimizer": optimizer}


def _step(parts, steps=1):
    for _ in range(steps):
        parts["optimizer"].zero_grad()
        parts["model"](torch.randn(5, 3)).square().mean().backward()
        parts["optimizer"].step()
        if "schedule" in parts:
            parts["schedule"].step()


def _equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@FORMAT
@pytest.mark.parametrize(
    "optimizer_of",
    [
        lambda m: torch.optim.AdamW(m.parameters(), 1e-2),
        lambda m: torch.optim.SGD(m.parameters(), 1e-2, momentum=0.9),
        lambda m: gs.GSO(m, 1e-2, direction="adam"),
        lambda m: gs.GSO(m, 1e-2, second_moment="bin", budget=gs.Ema(1.5), direction="adam"),
    ],
    ids=["adamw", "sgd", "gso", "gso by bin"],
)
def test_training_goes_on_bit_for_bit(tmp_path, kind, optimizer_of):
    parts = _run(optimizer_of)
    _step(parts, 5)
    gs.save_checkpoint(tmp_path / "run.ckpt", format=kind, **parts)
    _step(parts, 5)
    again = _run(optimizer_of)
    torch.manual_seed(99)
    gs.load_checkpoint(tmp_path / "run.ckpt", **again)
    _step(again, 5)
    assert _equal(tensors_of(**again), tensors_of(**parts))


@pytest.mark.parametrize(
    "schedule_of",
    [
        lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [3, 6]),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 4),
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, 20),
        lambda o: torch.optim.lr_scheduler.SequentialLR(
            o,
            [torch.optim.lr_scheduler.ConstantLR(o, 0.1, 3), torch.optim.lr_scheduler.ExponentialLR(o, 0.9)],
            milestones=[4],
        ),
    ],
    ids=["multi-step", "cosine", "lambda", "one cycle", "sequence"],
)
def test_schedules_go_on(tmp_path, schedule_of):
    parts = _run()
    parts["schedule"] = schedule_of(parts["optimizer"])
    _step(parts, 5)
    gs.save_checkpoint(tmp_path / "run.ckpt", **parts)
    again = _run()
    again["schedule"] = schedule_of(again["optimizer"])
    gs.load_checkpoint(tmp_path / "run.ckpt", **again)
    _step(parts, 4)
    rates = parts["schedule"].get_last_lr()
    _step(again, 4)
    assert again["schedule"].get_last_lr() == rates


@FORMAT
def test_the_generators_of_the_process_go_on(tmp_path, kind):
    def drawn():
        return random.random(), np.random.rand(), torch.rand(1).item()  # noqa: NPY002

    drawn()
    gs.save_checkpoint(tmp_path / "run.ckpt", format=kind)
    first = drawn()
    drawn()
    gs.load_checkpoint(tmp_path / "run.ckpt")
    assert drawn() == first


TREES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**130), 2**130)
    | st.floats(allow_nan=False)
    | st.text(max_size=5)
    | st.builds(lambda n, d: torch.arange(n).to(d), st.integers(0, 4), st.sampled_from([torch.float16, torch.int64])),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(st.integers(0, 9) | st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)


def _alike(one, other):
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_alike(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_alike, one, other))
    return one == other


@FORMAT
@settings(max_examples=60)
@given(tree=TREES)
def test_plain_data_come_back_as_they_were(tmp_path_factory, kind, tree):
    path = tmp_path_factory.getbasetemp() / f"tree.{kind}"
    gs.save_checkpoint(path, format=kind, tree=tree)
    assert _alike(gs.load_checkpoint(path)["tree"], tree)


def test_tensors_under_keys_that_read_alike_stay_apart(tmp_path):
    tree = {1: torch.zeros(1), "1": torch.ones(1), "a.b": torch.full((1,), 2.0), "a": {"b": torch.full((1,), 3.0)}}
    gs.save_checkpoint(tmp_path / "run.ckpt", format="safetensors", tree=tree)
    assert _alike(gs.load_checkpoint(tmp_path / "run.ckpt")["tree"], tree)


def test_torch_alone_reads_the_file_and_so_does_zip(tmp_path):
    gs.save_checkpoint(tmp_path / "run.ckpt", step=7)
    assert torch.load(tmp_path / "run.ckpt", weights_only=True)["parts"] == {"step": 7}
    with zipfile.ZipFile(tmp_path / "run.ckpt") as opened:
        assert opened.testzip() is None


class Colour(str, enum.Enum):
    RED = "red"


def test_numbers_of_numpy_and_enumerations_become_what_they_are_underneath():
    made = plain({"a": np.float64(0.5), "b": np.int32(3), "c": Colour.RED, "d": np.arange(2.0), "e": True}, "part")
    assert [type(value) for value in made.values()] == [float, int, str, torch.Tensor, bool]
    assert made["c"] == "red" and made["d"].tolist() == [0.0, 1.0]


class Foreign:
    def __reduce__(self):
        return os.system, ("exit 1",)


def test_a_foreign_class_is_refused_with_its_place_and_nothing_is_written(tmp_path):
    with pytest.raises(TypeError, match=r"save_checkpoint\(config=…\)\['a'\]\[1\]: expected tensors, .*got Foreign"):
        gs.save_checkpoint(tmp_path / "run.ckpt", config={"a": [1, Foreign()]})
    assert list(tmp_path.iterdir()) == []


def test_a_pickle_that_runs_code_is_refused_even_with_a_right_checksum(tmp_path):
    save_tree(tmp_path / "run.ckpt", {"gradsplit": 1, "parts": {"a": Foreign()}, "objects": [], "generators": {}})
    with pytest.raises(gs.CheckpointError, match="got what torch refuses to load"):
        gs.load_checkpoint(tmp_path / "run.ckpt")


@FORMAT
def test_a_file_cut_or_changed_anywhere_is_refused_and_nothing_is_applied(tmp_path, kind):
    parts = _run()
    _step(parts, 2)
    gs.save_checkpoint(tmp_path / "run.ckpt", format=kind, **parts)
    whole = (tmp_path / "run.ckpt").read_bytes()
    _step(parts, 2)
    before, torn = tensors_of(**parts), tmp_path / "torn.ckpt"
    draw = random.Random(0)
    # Anywhere, and everywhere near both ends, where formats keep what they need to be read.
    for at in (*(draw.randrange(len(whole)) for _ in range(20)), *range(12), *range(len(whole) - 90, len(whole))):
        flipped = bytes([whole[at] ^ (1 << draw.randrange(8))])
        for data in (whole[:at], whole[:at] + flipped + whole[at + 1 :]):
            torn.write_bytes(data)
            with pytest.raises(gs.CheckpointError, match=r"torn\.ckpt"):
                gs.load_checkpoint(torn, **parts)
            assert _equal(tensors_of(**parts), before)


def test_a_changed_file_is_named_with_expected_and_found(tmp_path):
    path = tmp_path / "run.ckpt"
    gs.save_checkpoint(path, a=torch.zeros(100))
    data = bytearray(path.read_bytes())
    expected = bytes(data[-64:]).decode()
    data[300] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(gs.CheckpointError) as caught:
        gs.load_checkpoint(path)
    assert str(path) in str(caught.value) and f"expected SHA-256 {expected}, found " in str(caught.value)


@pytest.mark.parametrize("write", [lambda p: p.write_bytes(pickle.dumps({"a": 1})), lambda p: torch.save({"a": 1}, p)])
def test_files_of_others_are_refused(tmp_path, write):
    write(tmp_path / "other.ckpt")
    with pytest.raises(gs.CheckpointError, match=r"without one\. It was cut short"):
        gs.load_checkpoint(tmp_path / "other.ckpt")


def test_a_safetensors_file_of_others_is_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(gs.CheckpointError, match="a safetensors file without its metadata"):
        gs.load_checkpoint(tmp_path / "other.safetensors")


def test_an_absent_file_and_another_version_are_named(tmp_path):
    with pytest.raises(gs.CheckpointError, match="expected a file, got none"):
        gs.load_checkpoint(tmp_path / "none.ckpt")
    save_tree(tmp_path / "new.ckpt", {"gradsplit": 9})
    with pytest.raises(gs.CheckpointError, match="expected version 1, found version 9"):
        gs.load_checkpoint(tmp_path / "new.ckpt")


def test_an_unknown_format_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"save_checkpoint\(format='tar'\): expected one of torch, safetensors"):
        gs.save_checkpoint(tmp_path / "run.ckpt", format="tar")


def test_a_part_that_is_not_in_the_file_is_named(tmp_path):
    parts = _run()
    gs.save_checkpoint(tmp_path / "run.ckpt", model=parts["model"])
    with pytest.raises(gs.CheckpointError, match="expected a checkpoint with the state of optimizer, found model"):
        gs.load_checkpoint(tmp_path / "run.ckpt", **parts)


def test_a_state_that_does_not_fit_leaves_every_part_and_generator_as_it_was(tmp_path):
    parts = _run()
    _step(parts, 2)
    gs.save_checkpoint(tmp_path / "run.ckpt", **parts)
    other = _run()
    other["optimizer"] = torch.optim.SGD(list(other["model"].parameters())[:2], 0.1)
    _step(other, 3)
    before, drawn = tensors_of(**other), torch.get_rng_state()
    with pytest.raises(gs.CheckpointError, match=r"expected the state of this SGD as 'optimizer'.*Nothing was loaded"):
        gs.load_checkpoint(tmp_path / "run.ckpt", **other)
    assert _equal(tensors_of(**other), before) and torch.equal(torch.get_rng_state(), drawn)


@pytest.mark.parametrize("fails_in", ["write", "fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_checkpoint_and_nothing_beside_it(tmp_path, monkeypatch, fails_in):
    path = tmp_path / "run.ckpt"
    gs.save_checkpoint(path, step=1)

    def full(*_):
        raise OSError(28, "No space left on device")

    if fails_in == "write":
        monkeypatch.setattr(FORMATS["torch"], "write", full)
    else:
        monkeypatch.setattr(os, fails_in, full)
    with pytest.raises(OSError, match="No space left"):
        gs.save_checkpoint(path, step=2)
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["run.ckpt"]
    assert gs.load_checkpoint(path) == {"step": 1}


@FORMAT
@pytest.mark.parametrize("room", [10, 500, 3000])
def test_a_full_disk_is_called_so_wherever_the_writing_has_come_to(kind, room):
    class Full(io.BytesIO):
        def write(self, data):
            if self.tell() + len(data) > room:
                raise OSError(28, "No space left on device")
            return super().write(data)

    with pytest.raises(OSError, match="No space left on device"):
        FORMATS[kind].write(Full(), {"a": torch.zeros(10_000)})


def test_a_reader_finds_the_old_file_or_the_new_one_at_every_moment(tmp_path, monkeypatch):
    path, seen = tmp_path / "run.ckpt", []
    gs.save_checkpoint(path, step=1)
    for name in ("fsync", "replace", "open", "close"):
        own = getattr(os, name)

        def looked(*arguments, own=own, **more):
            seen.append(read_tree(Path(path))["parts"]["step"])
            result = own(*arguments, **more)
            seen.append(read_tree(Path(path))["parts"]["step"])
            return result

        monkeypatch.setattr(os, name, looked)
    gs.save_checkpoint(path, step=2)
    assert seen == sorted(seen) and {1, 2} == set(seen)


def test_the_file_reaches_the_disk_before_its_name_and_the_folder_after(tmp_path, monkeypatch):
    called = []
    for name in ("fsync", "replace"):
        own = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, own=own, name=name: (called.append(name), own(*a))[1])
    gs.save_checkpoint(tmp_path / "run.ckpt", step=1)
    assert called == ["fsync", "replace", "fsync"]


def test_the_file_may_be_read_by_others_as_any_file(tmp_path):
    (tmp_path / "plain").write_text("x")
    gs.save_checkpoint(tmp_path / "run.ckpt", step=1)
    assert (tmp_path / "run.ckpt").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_what_was_loaded_shares_no_memory_with_what_was_returned(tmp_path):
    parts = _run()
    _step(parts, 1)
    gs.save_checkpoint(tmp_path / "run.ckpt", **parts)
    rest = gs.load_checkpoint(tmp_path / "run.ckpt", model=parts["model"])
    assert rest["optimizer"]["state"][0]["exp_avg"].shape == (4, 3)


def test_a_part_that_cannot_be_loaded_into_and_one_that_does_not_fit_are_named_in_one_line(tmp_path):
    gs.save_checkpoint(tmp_path / "a.pt", model=nn.Linear(2, 1))
    with pytest.raises(
        gs.CheckpointError, match=r"an object with load_state_dict\(\) as 'model', got int. Leave it out"
    ):
        gs.load_checkpoint(tmp_path / "a.pt", model=3)
    with pytest.raises(gs.CheckpointError, match="found one that does not fit") as caught:
        gs.load_checkpoint(tmp_path / "a.pt", model=nn.Sequential(nn.Linear(2, 1)))
    assert "\n" not in str(caught.value)


def test_a_missing_folder_is_told_with_the_file_that_was_asked_for(tmp_path):
    place = tmp_path / "none" / "run.ckpt"
    with pytest.raises(FileNotFoundError) as told:
        gs.save_checkpoint(place, step=1)
    assert told.value.filename == str(place) and "part" not in str(told.value)
