"""Planted faults: each breaks one rule, and the test of that rule must notice."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from gradsplit.sources import RULES, ends, layers, limits, samples, terms
from gradsplit.sources.limits import RunningLimit
from tests.sources import test_bounding, test_masking, test_quarantine, test_terms


def _law_of_masks(name: str) -> None:
    test_masking.test_bad_inputs_leave_the_gradient_of_the_batch_without_them(name)
    test_masking.test_a_bad_signal_leaves_the_gradient_of_the_batch_without_it(name, float("nan"))


def _plain_product(tensor, factor_S, sound_S, rows):
    return tensor * layers.spread(factor_S * sound_S, rows).to(tensor.dtype)


@pytest.mark.parametrize("name", ["linear", "conv2d", "layernorm", "rmsnorm"])
def test_zero_times_nan_is_noticed(name, monkeypatch):
    monkeypatch.setattr(layers, "times", _plain_product)
    with pytest.raises(AssertionError):
        _law_of_masks(name)


@pytest.mark.parametrize("name", ["linear", "conv1d", "layernorm", "lstm", "attention"])
def test_an_activation_that_is_not_masked_is_noticed(name, monkeypatch):
    for part in (layers, ends):
        monkeypatch.setattr(part, "masked", lambda tensor, sound_S, rows: tensor)
    with pytest.raises(AssertionError):
        _law_of_masks(name)


@pytest.mark.parametrize("name", ["linear", "conv2d", "gru"])
def test_a_signal_below_that_is_bounded_too_is_noticed(name, monkeypatch):
    """The mutant bounds what is passed on: `masked` of the signal scales it, or the lower end does not give it back."""
    if name == "gru":
        monkeypatch.setattr(ends._Enter, "backward", staticmethod(lambda ctx, *signals: (None, None, *signals)))
    else:
        original = layers.masked

        def bounded(tensor, sound_S, rows):
            return original(tensor, sound_S, rows) * 0.5

        monkeypatch.setattr(layers, "masked", bounded)
    with pytest.raises(AssertionError):
        test_bounding.test_the_sum_is_the_one_of_the_formula(name)


def test_a_quantile_that_counts_bad_samples_is_noticed(monkeypatch):
    original = RunningLimit.follow

    def counts_all(self, scale, norm_S, counts_S):
        return original(self, scale, norm_S, torch.ones_like(counts_S))

    monkeypatch.setattr(RunningLimit, "follow", counts_all)
    with pytest.raises(AssertionError):
        test_bounding.test_limits_follow_the_formula_over_many_batches("classification", "tensors")


@pytest.mark.parametrize("change", [{"down": 0.1}, {"growth": 1.5}, {"quantile": 0.8}])
def test_another_constant_is_noticed(change, monkeypatch):
    rule = RULES["classification"]
    original = RunningLimit.follow

    def other(self, scale, norm_S, counts_S):
        return original(dataclasses.replace(self, **change), scale, norm_S, counts_S)

    monkeypatch.setattr(RunningLimit, "follow", other)
    assert dataclasses.replace(rule, **change) != rule
    with pytest.raises(AssertionError):
        test_bounding.test_limits_follow_the_formula_over_many_batches("classification", "tensors")


def test_a_loss_that_is_not_left_out_is_noticed(monkeypatch):
    monkeypatch.setattr(samples, "_silence", lambda tensor, away_S, batch_dim: None)
    with pytest.raises(AssertionError):
        test_quarantine.test_the_bad_row_is_the_ordinary_row_before_it_without_loss("large")


def test_an_ordinary_row_with_its_graph_is_noticed(monkeypatch):
    def attached(self, x, bad_S):
        rows = layers.row_shape(x.shape, x.dim() - 1, 0)
        good = (~bad_S).to(torch.uint8).argmax()
        return torch.where(layers.spread(bad_S, rows), x[good], x)

    monkeypatch.setattr(samples.Quarantine, "_replaced", attached)
    with pytest.raises(AssertionError):
        test_quarantine.test_the_bad_row_is_the_ordinary_row_before_it_without_loss("large")


def test_a_maximum_that_a_zero_lowers_is_noticed(monkeypatch):
    def lowered(old, norm, decay, growth):
        moved = torch.minimum(torch.maximum(norm, decay * old), growth * old)
        return torch.where(old > 0, moved, norm)

    monkeypatch.setattr(limits, "_followed", lowered)
    with pytest.raises(AssertionError):
        test_terms.test_a_device_where_nobody_looks_gives_the_same_numbers()


def test_a_maximum_that_does_not_decay_is_noticed(monkeypatch):
    right = limits._followed_number
    monkeypatch.setattr(limits, "_followed_number", lambda old, norm, decay, growth: right(old, norm, 1.0, growth))
    with pytest.raises(AssertionError):
        test_terms.test_a_device_where_nobody_looks_gives_the_same_numbers()


def test_a_limit_over_terms_that_share_nothing_is_noticed(monkeypatch):
    monkeypatch.setattr(
        limits.TermLimits, "neighbours", lambda self, places: [list(range(len(self.places))) for _ in places]
    )
    with pytest.raises(AssertionError):
        test_terms.test_terms_that_share_no_parameter_do_not_bound_each_other()


@pytest.mark.parametrize("mistake", ["inverted", "squared"])
@pytest.mark.parametrize("where", ["host", "device"])
def test_a_wrong_relief_is_noticed(monkeypatch, mistake, where):
    name = "_progress_number" if where == "host" else "_progress"
    right = getattr(limits, name)
    monkeypatch.setattr(
        limits, name, lambda *a: 1 / (right(*a) + 1e-300) + 1e-300 if mistake == "inverted" else right(*a) ** 2
    )
    with pytest.raises(AssertionError):
        if where == "host":
            test_terms.test_the_limit_of_a_term_that_lags_behind_rises(10.0)
        else:
            test_terms.test_a_device_where_nobody_looks_gives_the_same_numbers()


def test_a_gradient_that_is_scaled_where_it_lies_is_noticed(monkeypatch):
    def in_place(parameters, vectors):
        (total, factor), *others = vectors
        total.mul_(factor)
        for vector, factor in others:
            total.add_(vector, alpha=factor)
        for parameter, part in zip(parameters, terms._unflatten_dense_tensors(total, parameters), strict=True):
            parameter.grad = part if parameter.grad is None else parameter.grad + part

    monkeypatch.setattr(terms, "_add", in_place)
    with pytest.raises(AssertionError):
        test_terms.test_gradients_that_share_their_memory_are_not_changed_twice()
