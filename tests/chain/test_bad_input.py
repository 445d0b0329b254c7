"""What is no model, no loss or no joint is named, and the words say what to write."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gradsplit as gs
from gradsplit.chain import ChainSplitter


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


def test_a_chain_splitter_says_what_it_does_not_take_and_sets_no_hook():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    with pytest.raises(ValueError, match=r"parameters='module'\): expected 'modules', None, or"):
        ChainSplitter(model, parameters="module")
    for total in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=rf"total={total}\): expected an L2 norm above 0"):
            ChainSplitter(model, total=total)
    with pytest.raises(ValueError, match=r"ChainSplitter\(Linear, at='layers'\): expected a model with modules inside"):
        ChainSplitter(nn.Linear(2, 2), at="layers")
    splitter = ChainSplitter(model, at="layers")
    with pytest.raises(TypeError, match=r"ChainSplitter.attach\(str\): expected a torch.optim.Optimizer"):
        splitter.attach("SGD")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with splitter:
        model(torch.ones(1, 2)).sum().backward()
    before = splitter.rows()
    with pytest.raises(KeyError, match=r"expected what its state_dict\(\) gave, got one without 'forks'"):
        splitter.load_state_dict({"joints": {}, "repeated": []})
    assert splitter.rows() == before
