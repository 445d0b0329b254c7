"""The self-check: what it catches, what it remembers, and what is said."""

from __future__ import annotations

import dataclasses
import warnings

import pytest
import torch

import gradsplit as gs
from gradsplit.kernels import BACKENDS, choose_backend, selfcheck
from gradsplit.kernels import kernel as kernels
from gradsplit.kernels.addressable import FallbackWarning
from gradsplit.kernels.selfcheck import SelfCheckError, is_sound

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def forgetful(monkeypatch):
    """Nothing is known before a test, and what it finds is forgotten after it."""
    monkeypatch.setattr(selfcheck, "_FOUND", {})
    monkeypatch.setattr(kernels, "_PASSED_OVER", set())


def pairs(found, wanted):
    return lambda: [("the sum", torch.as_tensor(found), torch.as_tensor(wanted))]


@pytest.mark.parametrize(
    ("found", "wanted", "sound"),
    [
        ([1.0, 2.0], [1.0, 2.0], True),
        ([1.0, 2.00001], [1.0, 2.0], True),  # float32: rounding
        ([1.0, 2.001], [1.0, 2.0], False),
        ([float("nan"), float("inf")], [float("nan"), float("inf")], True),
        ([float("nan")], [1.0], False),
        ([1.0], [float("nan")], False),
        ([float("inf")], [-float("inf")], False),
        ([3.4e38], [float("inf")], False),
        ([0.0], [1e-30], False),
        ([1.0], [1.0, 2.0], False),
        ([], [], True),
    ],
)
def test_a_deviation_beyond_rounding_is_wrong(found, wanted, sound):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        assert is_sound("p", CPU, torch.float32, pairs(found, wanted)) is sound


def test_float64_and_a_given_rounding_are_held_to_their_own_bounds():
    wanted = torch.tensor([1.0], dtype=torch.float64)
    with pytest.warns(FallbackWarning):
        assert not is_sound("tight", CPU, torch.float64, pairs(wanted * (1 + 1e-9), wanted))
    assert is_sound("loose", CPU, torch.float64, pairs(wanted * (1 + 1e-9), wanted), rounding=1e-6)


def test_one_warning_holds_both_numbers_and_the_place():
    trial = pairs([1.0, 5.0], [1.0, 4.0])
    with pytest.warns(
        FallbackWarning, match=r"'p' on cpu, torch.float32: the sum is 5.0 at 1, the definition's 4.0"
    ) as told:
        assert not is_sound("p", CPU, torch.float32, trial)
        assert not is_sound("p", CPU, torch.float32, trial)
    assert len(told) == 1


def test_the_answer_is_remembered_per_program_device_and_dtype():
    calls = []

    def trial():
        calls.append(0)
        return []

    for program, device, dtype in [("p", "cpu", torch.float32)] * 3 + [
        ("q", "cpu", torch.float32),
        ("p", "cpu", torch.float64),
    ]:
        assert is_sound(program, torch.device(device), dtype, trial)
    assert len(calls) == 3


@pytest.mark.parametrize("error", [ImportError("no libcuda"), RuntimeError("PTX: bf16 needs\n sm_80"), KeyError("x")])
def test_whatever_a_program_raises_is_wrong_and_said(error):
    def trial():
        raise error

    with pytest.warns(FallbackWarning, match=rf"it raised {type(error).__name__}: .* falls back to eager torch"):
        assert not is_sound("p", CPU, torch.bfloat16, trial)


def test_by_name_it_raises_at_every_call():
    for _ in range(2):
        with pytest.raises(SelfCheckError, match=r"the sum is 5.0 at 0, .*4.0\. Use backend='auto'"):
            is_sound("p", CPU, torch.float32, pairs([5.0], [4.0]), by_name=True)


def test_where_memory_runs_out_nothing_is_learnt():
    room = []

    def trial():
        if not room:
            raise torch.cuda.OutOfMemoryError("out of memory")
        return []

    assert not is_sound("p", CPU, torch.float32, trial)
    room.append(1)
    assert is_sound("p", CPU, torch.float32, trial)


def test_while_a_graph_is_captured_nothing_is_tried(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    cuda = torch.device("cuda")
    with pytest.warns(FallbackWarning, match="Run one step before the capture"):
        assert not is_sound("p", cuda, torch.float32, pairs([1.0], [1.0]))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert is_sound("p", cuda, torch.float32, pairs([1.0], [1.0]))


def test_a_trial_needs_no_gradient_and_leaves_the_generator_alone():
    state = torch.get_rng_state()

    def trial():
        w = torch.ones(2, requires_grad=True)
        assert not (w * 2).requires_grad
        return []

    assert is_sound("p", CPU, torch.float32, trial)
    assert torch.equal(state, torch.get_rng_state())


BROKEN = '"""A package that is installed and does not load."""\nraise OSError("libsomething.so: not found")\n'


def test_a_package_that_does_not_load_is_passed_over_once_and_refused_by_name(monkeypatch, tmp_path):
    (tmp_path / "a_broken_backend.py").write_text(BROKEN)
    monkeypatch.syspath_prepend(str(tmp_path))
    row = dataclasses.replace(
        BACKENDS["numba"], name="broken", place=("a_broken_backend", "X"), needs="a_broken_backend"
    )
    monkeypatch.setattr(kernels, "BACKENDS", {"broken": row, **BACKENDS})
    with pytest.warns(FallbackWarning, match=r"'broken' is passed over: .*OSError: libsomething.so: not found") as told:
        for _ in range(2):
            assert choose_backend("auto", CPU, call="f").name != "broken"
    assert len(told) == 1
    with pytest.raises(ValueError, match=r"f\(backend='broken'\): .*OSError: libsomething.so.* Use 'auto'"):
        choose_backend("broken", CPU, call="f")


def test_a_kernel_knows_whether_it_was_asked_for_by_name():
    named = [("w", torch.nn.Parameter(torch.ones(2, 2)))]
    assert gs.GradientSplitter(named, budget=gs.Fixed(1.0), backend="eager").kernel.by_name
    assert not gs.GradientSplitter(named, budget=gs.Fixed(1.0)).kernel.by_name


def test_triton_is_what_auto_takes_on_cuda_where_it_loads(monkeypatch):
    monkeypatch.setattr(
        type(BACKENDS["triton"]),
        "missing",
        lambda row, device: "" if device.type in row.devices or not row.devices else "elsewhere",
    )
    monkeypatch.setattr(type(BACKENDS["triton"]), "broken", lambda row: "")
    assert choose_backend("auto", torch.device("cuda"), call="f").name == "triton"
    assert choose_backend("auto", torch.device("mps"), call="f").name == "eager"
