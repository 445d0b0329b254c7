"""Clothes, film sentences, diffusion, PPO, adapters and experts against independent readings."""

from __future__ import annotations

import gzip
import io
import math
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from gradsplit.lab import MissingDataError, workload
from gradsplit.lab.workloads import fashion, sentences
from gradsplit.lab.workloads.adapters import LETTERS, build_adapters, trained_base
from gradsplit.lab.workloads.control import DISCOUNT, TRACE, ControlTask, advantages_of, build_control, moved
from gradsplit.lab.workloads.diffusion import build_diffusion, kept_share
from gradsplit.lab.workloads.experts import Experts, build_experts
from gradsplit.lab.workloads.text import encode


@pytest.fixture
def clothes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as the package of the system has it, with 40 and 12 images in which a pixel tells the class."""
    folder = tmp_path / "fashion-mnist"
    folder.mkdir()
    for name, count in (("train", 40), ("t10k", 12)):
        labels = np.arange(count, dtype=np.uint8) % 10
        images = np.zeros((count, 28, 28), np.uint8)
        images[np.arange(count), labels, 3] = 255
        for kind, header, values in (("images-idx3", 16, images), ("labels-idx1", 8, labels)):
            with gzip.open(folder / f"{name}-{kind}-ubyte.gz", "wb") as file:
                file.write(bytes(header) + values.tobytes())
    monkeypatch.setenv("GRADSPLIT_DATA", str(tmp_path))
    fashion.load_fashion.cache_clear()
    yield folder
    fashion.load_fashion.cache_clear()


@pytest.mark.parametrize("name", ["fashion-resnet", "fashion-vit"])
def test_clothes_are_read_scaled_mirrored_and_learned(clothes: Path, name: str) -> None:
    task = workload(name).build(0, width=32, batch=32)
    images, labels = task.batch(0)
    assert images.shape == (32, 1, 28, 28)
    bright = (images == images.amax((1, 2, 3), keepdim=True)).nonzero()
    assert torch.equal(bright[:, 2], labels), "the bright pixel's row is the class"
    assert set(bright[:, 3].tolist()) == {3, 24}, "column 3, or its mirror image"
    assert images.max().item() == pytest.approx((1 - 0.2860) / 0.3530, rel=1e-5)
    optimizer = torch.optim.Adam(task.model.parameters(), lr=2e-3)
    losses = []
    for step in range(60):
        optimizer.zero_grad()
        loss = task.loss(task.model, task.batch(step))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5])
    assert 0.0 <= task.evaluate(task.model)["accuracy"] <= 1.0
    with torch.no_grad():
        for p in task.model.parameters():
            p.fill_(math.nan)
    assert task.evaluate(task.model) == {"accuracy": 0.0}


def test_clothes_that_are_not_there_or_cut_off_are_named(clothes: Path, tmp_path: Path, monkeypatch) -> None:
    with gzip.open(clothes / "train-images-idx3-ubyte.gz", "wb") as file:
        file.write(bytes(16 + 784 * 39))
    with pytest.raises(ValueError, match=r"784 bytes for each of 40 labels in train-images.*Install the data again"):
        fashion.load_fashion()
    monkeypatch.setenv("GRADSPLIT_DATA", str(tmp_path / "elsewhere"))
    monkeypatch.setattr(fashion, "USUAL", str(tmp_path / "nowhere"))
    with pytest.raises(MissingDataError, match=r"expected fashion-mnist in the folder that GRADSPLIT_DATA names and"):
        fashion.load_fashion()


def _archive(path: Path, rows: list[str]) -> None:
    text = "\n".join(rows).encode()
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as file:
        entry = tarfile.TarInfo(sentences._RATINGS)
        entry.size = len(text)
        file.addfile(entry, io.BytesIO(text))
    held = inner.getvalue()
    with tarfile.open(path, mode="w:gz") as file:
        entry = tarfile.TarInfo(sentences._INNER)
        entry.size = len(held)
        file.addfile(entry, io.BytesIO(held))


@pytest.fixture
def rated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / sentences.ARCHIVE
    rows = [f"{n}\t{2.5 if n % 2 else -1.5}\t{'lovely' if n % 2 else 'dreadful'} film {n % 5} ." for n in range(2100)]
    _archive(path, [*rows, "2100\t0.0\tneither", "a line that is no row"])
    monkeypatch.setenv("GRADSPLIT_DATA", str(tmp_path))
    sentences.load_sentences.cache_clear()
    yield path
    sentences.load_sentences.cache_clear()


def test_sentences_are_read_cut_into_words_and_told_apart(rated: Path) -> None:
    ratings = sentences.read_ratings()
    assert len(ratings) == 2100 and ratings[0] == ("dreadful film 0 .", False)
    task = workload("sentences").build(0, width=16, heads=2)
    words, labels = task.batch(0)
    assert words.shape == (32, 32) and ((words != sentences.ENDED).sum(1) == 4).all()
    lovely = {int(word) for word in words[labels == 1][:, 0]}
    dreadful = {int(word) for word in words[labels == 0][:, 0]}
    assert len(lovely) == len(dreadful) == 1 and lovely.isdisjoint(dreadful)
    optimizer = torch.optim.Adam(task.model.parameters(), lr=1e-2)
    for step in range(25):
        optimizer.zero_grad()
        task.loss(task.model, task.batch(step)).backward()
        optimizer.step()
    assert task.evaluate(task.model)["accuracy"] > 0.95


def test_what_follows_a_sentence_does_not_move_its_answer(rated: Path) -> None:
    task = workload("sentences").build(0, width=16, heads=2)
    words, _ = task.batch(0)
    with torch.no_grad():
        long, short = task.model(words), task.model(words)
        task.model.word.weight[sentences.ENDED] += 5.0
        changed = task.model(words)
    assert torch.equal(long, short) and torch.allclose(long, changed, atol=1e-6)


def test_an_archive_that_is_not_there_or_another_is_named(rated: Path, tmp_path: Path, monkeypatch) -> None:
    rated.write_bytes(b"no archive")
    with pytest.raises(ValueError, match=r"expected .*hutto_ICWSM_2014.tar.gz in vaderSentiment.*Download it again"):
        sentences.read_ratings()
    monkeypatch.setenv("GRADSPLIT_DATA", str(tmp_path / "elsewhere"))
    with pytest.raises(MissingDataError, match=r"vaderSentiment-3.2.1.tar.gz in the folder.*pip download"):
        sentences.read_ratings()


def test_noise_and_image_have_the_shares_of_their_level() -> None:
    kept = kept_share().double()
    beta = np.linspace(1e-3, 0.2, 100)
    assert np.allclose(kept.numpy(), np.cumprod(1 - beta), rtol=1e-5)
    task = build_diffusion(0, width=8, stages=1, batch=64)
    noisy, levels, noise = task.batch(0)
    share = kept_share()[levels].view(-1, 1, 1, 1)
    image = (noisy - (1 - share).sqrt() * noise) / share.sqrt()
    known = {tuple(np.round(digit.flatten().tolist(), 3)) for digit in task.images}
    clear = levels < 60  # beyond, what is left of the image is lost in rounding
    found = torch.round(image[clear] * 8) / 8  # pixels have sixteen shades
    assert all(tuple(np.round(digit.flatten().tolist(), 3)) in known for digit in found)


def test_a_denoiser_that_says_zero_has_the_error_of_the_noise_itself() -> None:
    task = build_diffusion(0, width=8, stages=1, batch=64)  # its head starts at zero
    assert task.evaluate(task.model)["val_loss"] == pytest.approx(1.0, abs=0.02)


def test_a_pole_falls_as_its_equation_says() -> None:
    angle, speed, reward = moved(torch.tensor([0.1]), torch.tensor([0.5]), torch.tensor([5.0]))
    expected_speed = 0.5 + 0.05 * (15.0 * math.sin(0.1) + 3.0 * 2.0)  # a torque of 5 is cut to 2
    assert speed.item() == pytest.approx(expected_speed, rel=1e-6)
    assert angle.item() == pytest.approx(0.1 + 0.05 * expected_speed, rel=1e-6)
    assert reward.item() == pytest.approx(0.5 * (1 + math.cos(0.1)) - 0.002 * 0.25 - 0.001 * 4, rel=1e-6)


def test_advantages_are_the_discounted_sum_of_surprises() -> None:
    source = torch.Generator().manual_seed(0)
    rewards = torch.rand(5, 3, generator=source, dtype=torch.float64)
    values = torch.rand(6, 3, generator=source, dtype=torch.float64)
    surprise = rewards + DISCOUNT * values[1:] - values[:-1]
    expected = [sum((DISCOUNT * TRACE) ** k * surprise[at + k] for k in range(5 - at)) for at in range(5)]
    assert torch.allclose(advantages_of(rewards, values), torch.stack(expected))


def test_a_rollout_is_read_whole_four_times_and_then_played_anew() -> None:
    task = build_control(0, hidden=8)
    first = [task.batch(step) for step in range(16)]
    for epoch in range(4):
        logs = torch.cat([batch[2] for batch in first[4 * epoch : 4 * epoch + 4]])
        assert torch.equal(logs.sort()[0], task._rollout[2].sort()[0])
    mean = torch.cat([batch[3] for batch in first[:4]]).mean().item()
    assert abs(mean) < 1e-5, "advantages are centred over a rollout"
    ratio = (task.model.log_probability(task.model(first[0][0])[0], first[0][1]) - first[0][2]).exp()
    assert torch.allclose(ratio, torch.ones_like(ratio), atol=1e-4), "nothing has been learned yet"
    before = first[0][0].clone()
    assert not torch.equal(task.batch(16)[0], before)


def test_ppo_learns_to_swing_up() -> None:
    task: ControlTask = build_control(0)
    optimizer = torch.optim.Adam(task.model.parameters(), lr=5e-3)
    before = task.evaluate(task.model)["upright"]
    for step in range(320):
        optimizer.zero_grad()
        task.loss(task.model, task.batch(step)).backward()
        optimizer.step()
    assert task.evaluate(task.model)["upright"] > before + 0.1


def test_adapters_start_at_the_base_and_train_alone() -> None:
    task = build_adapters(0, rank=2, base_steps=2)
    base = trained_base(2)
    trained = {name for name, p in task.model.named_parameters() if p.requires_grad}
    assert trained and all(name.endswith((".a.weight", ".b.weight")) for name in trained)
    fresh = build_adapters(1, rank=2, base_steps=2)
    x, _ = task.batch(0)
    with torch.no_grad():
        assert torch.equal(task.model(x), fresh.model(x)), "whatever A is, B is zero"
    loss = task.loss(task.model, task.batch(0))
    loss.backward()
    assert all((p.grad is not None) == p.requires_grad for p in task.model.parameters())
    assert torch.equal(task.model.state_dict()["token.weight"], base["token.weight"])
    assert task.corpus.vocabulary == LETTERS and len(task.corpus.train) > 100_000


def test_each_place_takes_its_likeliest_expert_weighted_by_its_probability() -> None:
    torch.manual_seed(0)
    layer = Experts(6, 3, 1.0)
    torch.nn.init.normal_(layer.router.weight)
    x = torch.randn(2, 5, 6)
    made = layer(x)
    probability = (x @ layer.router.weight.T).softmax(-1)
    for place in ((0, 0), (1, 3), (1, 4)):
        expert = int(probability[place].argmax())
        inner = torch.nn.functional.gelu(layer.up[expert] @ x[place])
        expected = probability[place][expert] * (layer.down[expert] @ inner)
        torch.testing.assert_close(made[place], expected, rtol=1e-4, atol=1e-6)
    busy = torch.nn.functional.one_hot(probability.argmax(-1).flatten(), 3).double().mean(0)
    expected = 3 * (busy * probability.flatten(0, 1).mean(0)).sum()
    assert layer.imbalance.item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_hot_expert_has_the_larger_gradient() -> None:
    options = {"layers": 1, "width": 16, "heads": 2, "context": 32, "batch": 4}
    task = build_experts(0, hot=8.0, **options)
    experts = task.model.blocks[0].experts
    assert experts.up[0].norm() > 5 * experts.up[1].norm()
    with torch.no_grad():
        experts.router.weight.zero_()  # every expert is as likely; the first is taken
    task.loss(task.model, task.batch(0)).backward()
    assert experts.up.grad[0].norm() > 0


def test_letters_beyond_the_basic_plane_are_one_character() -> None:
    corpus = encode("a\U0001f600" * 40)
    assert corpus.vocabulary == "a\U0001f600" and corpus.train[:4].tolist() == [0, 1, 0, 1]
    assert corpus.train.dtype == torch.int64
