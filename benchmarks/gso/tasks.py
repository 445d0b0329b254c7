"""The tasks of GSO's trials: the registry's, three that only the trials need, and faults in gradients."""

from __future__ import annotations

import math
import os
import pydoc_data.topics
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from benchmarks.gso.plan import Job
from benchmarks.gso.reference import GSOReference
from gradsplit.lab import evidence, workload
from gradsplit.lab import task as tasks
from gradsplit.lab.workloads import digits

__all__ = ["build", "evidence", "faulty", "inject", "tasks"]

CACHE = Path(os.environ.get("GSO_CACHE", str(Path(tempfile.gettempdir()) / "gso-trials")))


class Mixer(nn.Module):
    """Patches of 2 x 2 pixels, blocks that mix patches and channels, mean, linear head; small data, so it overfits."""

    def __init__(self, width: int = 64, blocks: int = 4, patches: int = 16) -> None:
        super().__init__()
        self.stem = nn.Linear(4, width)
        self.mixers = nn.ModuleList(
            nn.ModuleList(
                [
                    nn.LayerNorm(width),
                    nn.Sequential(nn.Linear(patches, 2 * patches), nn.GELU(), nn.Linear(2 * patches, patches)),
                    nn.LayerNorm(width),
                    nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)),
                ]
            )
            for _ in range(blocks)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, 10) of images (n, 1, 8, 8)."""
        h = self.stem(nn.functional.unfold(x, 2, stride=2).mT)
        for norm1, patches, norm2, channels in self.mixers:
            h = h + patches(norm1(h).mT).mT
            h = h + channels(norm2(h))
        return self.head(self.norm(h).mean(1))


class MixerTask(tasks.Task):
    """Classify handwritten digits with a mixer."""

    def __init__(self, seed: int, batch: int = 64) -> None:
        with tasks.seeded(seed):
            model = Mixer()
        super().__init__(model, seed)
        self.batch_size = batch
        self.images, self.labels, self.test_images, self.test_labels = digits.load_digits()

    def draw(self, step: int) -> tuple[Tensor, ...]:
        """Images drawn with replacement from the training digits."""
        source = tasks.generator(self.seed, tasks.BATCHES, step)
        picks = torch.randint(len(self.labels), (self.batch_size,), generator=source)
        return self.images[picks][:, None], self.labels[picks]

    def loss(self, model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        """Mean cross-entropy, nats."""
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Accuracy and loss on the 360 test digits."""
        with tasks.evaluating(model):
            logits = model(self.test_images[:, None])
        right = (logits.argmax(-1) == self.test_labels).float().mean()
        return {"accuracy": float(right), "val_loss": float(nn.functional.cross_entropy(logits, self.test_labels))}


def second_text() -> Path:
    """The sources of the standard library's modules in alphabetical order, the first 600,000 ASCII characters."""
    path = CACHE / "second.txt"
    if not path.is_file():
        CACHE.mkdir(parents=True, exist_ok=True)
        files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
        text = "\n".join(file.read_text(encoding="utf8", errors="replace") for file in files)
        kept = "".join(character for character in text if character == "\n" or " " <= character <= "~")[:600_000]
        scratch = path.with_suffix(f".{os.getpid()}")
        scratch.write_text(kept, encoding="utf8")
        scratch.replace(path)
    return path


class LoRA(nn.Module):
    """A frozen linear layer plus (x A^T) B^T of rank 4; B starts at zero."""

    def __init__(self, base: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.base = base.requires_grad_(requires_grad=False)
        self.a = nn.Linear(base.in_features, rank, bias=False)
        self.b = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.b.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map (…, in) to (…, out)."""
        return self.base(x) + self.b(self.a(x))


def build_lora(seed: int) -> tasks.Task:
    """A GPT trained for 600 steps on the second text gets LoRA for the reference, without letters it does not know."""
    text = second_text().read_text(encoding="utf8")
    other = "\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    letters = sorted(set(text))
    target = CACHE / f"lora-target-{os.getpid()}.txt"
    target.write_text("".join(letters) + "".join(c for c in other if c in set(letters)), encoding="utf8")
    task = workload("gpt").build(seed=seed, text_file=target)
    target.unlink()
    base = CACHE / "lora-base.pt"
    if not base.is_file():
        first = workload("gpt").build(seed=100, text_file=second_text())
        optimizer = GSOReference(first.model, limit=3.0)
        schedule = LambdaLR(optimizer, lambda step: 1 - step / 600)
        for step in range(600):
            optimizer.zero_grad()
            first.loss(first.model, first.batch(step)).backward()
            optimizer.step()
            schedule.step()
        scratch = base.with_suffix(f".{os.getpid()}")
        torch.save(first.model.state_dict(), scratch)
        scratch.replace(base)
    task.model.load_state_dict(torch.load(base))
    task.model.requires_grad_(requires_grad=False)
    with tasks.seeded(seed):
        for block in task.model.blocks:
            for name in ("qkv", "out", "up", "down"):
                setattr(block, name, LoRA(getattr(block, name)))
    return task


def zero_projections(task: tasks.Task) -> None:
    """Start a GPT's residual projections and its head at zero."""
    for name, p in task.model.named_parameters():
        if name.endswith(("out.weight", "down.weight", "head.weight")):
            nn.init.zeros_(p)


def build(job: Job) -> tuple[tasks.Task, str]:
    """The task of a job, and the name of its metric."""
    options = dict(job.options)
    if job.task == "mixer":
        return MixerTask(job.seed), "accuracy"
    if job.task == "lora":
        return build_lora(job.seed), "val_loss"
    if options.pop("text", None) == "second":
        options["text_file"] = second_text()
    zero = options.pop("zero", False)
    row = workload(job.task)
    task = row.build(seed=job.seed, **options)
    if zero:
        zero_projections(task)
    return task, row.metric


def inject(kind: str, model: nn.Module, source: torch.Generator) -> None:
    """Spoil the gradients of one step in place: "nan", "row", "layer", "batch" or "huge"."""
    parameters = [p for p in model.parameters() if p.grad is not None]

    def pick(count: int) -> int:
        return int(torch.randint(count, (1,), generator=source))

    if kind.startswith("batch"):  # "batch": x 1e3, "batch10": x 10
        for p in parameters:
            p.grad.mul_(float(kind[5:] or 1e3))
    elif kind == "layer":
        layers = [m for m in model.modules() if any(p.grad is not None for p in m.parameters(recurse=False))]
        for p in layers[pick(len(layers))].parameters(recurse=False):
            p.grad.mul_(1e3)
    elif kind == "row":
        matrices = [p for p in parameters if p.ndim >= 2]
        grad = matrices[pick(len(matrices))].grad
        grad[pick(len(grad))] *= 1e6
    else:
        grad = parameters[pick(len(parameters))].grad
        grad.view(-1)[pick(grad.numel())] = {"nan": math.nan, "huge": 3e38}[kind]


def faulty(fault: dict[str, Any], step: int, source: torch.Generator) -> bool:
    """Whether a step is spoiled: each with probability `rate`, or the first `first` steps."""
    return step < fault.get("first", 0) or float(torch.rand((), generator=source)) < fault.get("rate", 0.0)
