"""What is no model, no loss or no joint is named, and the words say what to write."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gradsplit as gs


def loss_of(model, batch):
    return model(batch).square().mean()


X = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda m: gs.ChainSplitter(None), TypeError, r"ChainSplitter\(NoneType, …\): expected a torch.nn.Module"),
        (lambda m: gs.ChainSplitter(m, at=[]), ValueError, r"ChainSplitter\(at=\[\]\): expected 'auto', 'forks'"),
        (lambda m: gs.ChainSplitter(m, at=3), ValueError, r"ChainSplitter\(at=3\): expected 'auto', 'forks'"),
        (lambda m: gs.joints(nn.Linear, X), TypeError, r"joints\(the class Linear, …\): expected a torch.nn.Module"),
        (lambda m: gs.balance_(None, loss_of, X), TypeError, r"balance_\(NoneType, …\): expected a torch.nn.Module"),
        (
            lambda m: gs.gradient_chain([m], loss_of, X),
            TypeError,
            r"gradient_chain\(list, …\): .* Pass the model itself",
        ),
        (
            lambda m: gs.gradient_chain(m, None, X),
            TypeError,
            r"loss_fn=NoneType: expected a function of the model and a",
        ),
        (
            lambda m: gs.gradient_chain(m, lambda model, x: loss_of(model, x).detach(), X),
            ValueError,
            r"got one without a graph. Compute it outside of torch.no_grad\(\), from outputs that are not detached",
        ),
        (
            lambda m: gs.gain_penalty(nn.LSTM(1, 1)),
            TypeError,
            r"gain_penalty\(LSTM\): .* gradsplit.chain.Unrolled\(rnn\)",
        ),
        (lambda m: gs.diagnose(None, loss_of, X), TypeError, r"diagnose\(NoneType, …\): expected a torch.nn.Module"),
        (lambda m: gs.diagnose(m, 3, X), TypeError, r"diagnose\(loss_fn=int\): expected a function of the model and a"),
    ],
)
def test_it_is_refused_by_name(call, error, words):
    with pytest.raises(error, match=words):
        call(nn.Linear(3, 2))
