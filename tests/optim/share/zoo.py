"""A model with every kind of tensor, and by hand what each of them is to the share step."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from tests.optim.share.oracle import Oracle, Sheet


class Experts(nn.Module):
    """Four matrices of two rows and three columns in one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 2, 3))


class Zoo(nn.Module):
    """Its parameters matter; it computes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 4)
        self.norm = nn.LayerNorm(4)
        self.words = nn.Embedding(7, 4)
        self.tied = nn.Linear(4, 7, bias=False)
        self.tied.weight = self.words.weight
        self.bag = nn.EmbeddingBag(3, 2)
        self.conv1 = nn.Conv1d(2, 3, 3)
        self.conv2 = nn.Conv2d(2, 3, 2)
        self.conv3 = nn.Conv3d(2, 3, 2, bias=False)
        self.grouped = nn.Conv2d(4, 6, 2, groups=2, bias=False)
        self.depthwise = nn.Conv2d(4, 4, 3, groups=4, bias=False)
        self.back = nn.ConvTranspose2d(3, 2, 2, bias=False)
        self.attention = nn.MultiheadAttention(4, 2)
        self.lstm = nn.LSTM(3, 2)
        self.gru = nn.GRU(3, 2)
        self.experts = Experts()
        self.positions = nn.Parameter(torch.randn(1, 5, 4))
        self.token = nn.Parameter(torch.randn(1, 1, 4))
        self.one_row = nn.Linear(6, 1, bias=False)
        self.one_column = nn.Linear(1, 6, bias=False)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.zero = nn.Linear(4, 3)
        self.no_rows = nn.Parameter(torch.empty(0, 4))
        self.no_columns = nn.Parameter(torch.empty(3, 0))
        self.wave = nn.Parameter(torch.randn(3, 4, dtype=torch.complex64))
        self.tone = nn.Parameter(torch.randn(4, dtype=torch.complex64))
        nn.init.zeros_(self.zero.weight)


SHEETS: dict[str, Sheet] = {
    "linear.weight": Sheet("matrix", 4, 5),
    "linear.bias": Sheet("vector", 1, 4),
    "norm.weight": Sheet("vector", 1, 4),
    "norm.bias": Sheet("vector", 1, 4),
    "words.weight": Sheet("embedding", 7, 4),
    "bag.weight": Sheet("embedding", 3, 2),
    "conv1.weight": Sheet("matrix", 3, 6),
    "conv1.bias": Sheet("vector", 1, 3),
    "conv2.weight": Sheet("matrix", 3, 8),
    "conv2.bias": Sheet("vector", 1, 3),
    "conv3.weight": Sheet("matrix", 3, 16),
    "grouped.weight": Sheet("matrix", 6, 8, blocks=2),
    "depthwise.weight": Sheet("matrix", 4, 9, blocks=4),
    "back.weight": Sheet("matrix", 3, 8),
    "attention.in_proj_weight": Sheet("matrix", 12, 4, blocks=3),
    "attention.in_proj_bias": Sheet("vector", 1, 12),
    "attention.out_proj.weight": Sheet("matrix", 4, 4),
    "attention.out_proj.bias": Sheet("vector", 1, 4),
    "lstm.weight_ih_l0": Sheet("matrix", 8, 3),
    "lstm.weight_hh_l0": Sheet("matrix", 8, 2),
    "lstm.bias_ih_l0": Sheet("vector", 1, 8),
    "lstm.bias_hh_l0": Sheet("vector", 1, 8),
    "gru.weight_ih_l0": Sheet("matrix", 6, 3),
    "gru.weight_hh_l0": Sheet("matrix", 6, 2),
    "gru.bias_ih_l0": Sheet("vector", 1, 6),
    "gru.bias_hh_l0": Sheet("vector", 1, 6),
    "experts.weight": Sheet("matrix", 8, 3, blocks=4),
    "positions": Sheet("embedding", 5, 4),
    "token": Sheet("embedding", 1, 4),
    "one_row.weight": Sheet("matrix", 1, 6),
    "one_column.weight": Sheet("embedding", 6, 1),
    "scale": Sheet("vector", 1, 1),
    "zero.weight": Sheet("matrix", 3, 4),
    "zero.bias": Sheet("vector", 1, 3),
    "no_rows": Sheet("matrix", 0, 4),
    "no_columns": Sheet("matrix", 3, 0),
    "wave": Sheet("matrix", 3, 4),
    "tone": Sheet("vector", 1, 4),
}


def zoo(dtype: torch.dtype = torch.float64) -> Zoo:
    """The model; complex parameters keep the precision of ``dtype``, where there is one."""
    torch.manual_seed(0)
    model = Zoo()
    wide = torch.complex128 if dtype == torch.float64 else torch.complex64
    with torch.no_grad():
        for p in model.parameters():
            p.data = p.data.to(wide if p.is_complex() else dtype)
    return model


def gradient_of(p: Tensor, seed: int, size: float = 1.0) -> Tensor:
    """A random gradient whose rows are of very different lengths; some bind and some do not."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.complex128 if p.is_complex() else torch.float64
    made = torch.randn(p.shape, generator=generator, dtype=wide) * size
    if p.dim() > 1 and p.shape[0]:
        rows = torch.logspace(-4, 1, p.shape[0], dtype=torch.float64)[torch.randperm(p.shape[0], generator=generator)]
        made = made * rows.view(-1, *(1,) * (p.dim() - 1))
    return made.to(p.dtype)


def give(model: nn.Module, step: int, size: float = 1.0) -> None:
    """Give every parameter a gradient, in its own memory format."""
    for t, (name, p) in enumerate(model.named_parameters()):
        gradient = gradient_of(p, 1000 * step + t, size)
        if name == "words.weight":
            gradient[step % 3 :: 3] = 0  # words that the batch does not have
            gradient[5] = 0  # and one that never comes
        p.grad = torch.empty_like(p).copy_(gradient)


def arrays(tensors: list[Tensor | None]) -> list[np.ndarray | None]:
    """The tensors as float64 or complex128 arrays."""
    wide = [
        None if t is None else t.detach().to(torch.complex128 if t.is_complex() else torch.float64) for t in tensors
    ]
    return [None if t is None else t.clone(memory_format=torch.contiguous_format).numpy() for t in wide]


def oracle_of(model: nn.Module, sheets: dict[str, Sheet], **options: bool) -> Oracle:
    """The oracle of a model, which must have exactly these tensors."""
    named = dict(model.named_parameters())
    assert set(named) == set(sheets)
    weights = [w for w in arrays(list(named.values())) if w is not None]
    return Oracle([sheets[name] for name in named], weights, **options)


def follow(oracle: Oracle, model: nn.Module, **options: float) -> None:
    """Let the oracle make the step that the model's gradients ask for."""
    oracle.step(arrays([p.grad for p in model.parameters()]), **options)


def assert_follows(model: nn.Module, oracle: Oracle, step: int, rtol: float = 1e-9, atol: float = 1e-12) -> None:
    """The weights are those of the oracle."""
    for (name, p), want in zip(model.named_parameters(), oracle.weights, strict=True):
        (got,) = arrays([p])
        np.testing.assert_allclose(
            np.asarray(got).reshape(want.shape), want, rtol=rtol, atol=atol, err_msg=f"step {step}, {name}"
        )
