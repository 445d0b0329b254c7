"""Writes by address are known to autograd, whatever torch does with tensors that have no version."""

from __future__ import annotations

import torch

from gradsplit.kernels.addressable import bump_versions


def test_every_tensor_counts_a_write_but_those_of_inference_mode():
    plain = torch.zeros(2)
    with torch.inference_mode():
        without = torch.zeros(2)
    bump_versions([plain, without])
    assert plain._version == 1


def test_a_torch_that_refuses_tensors_of_inference_mode_is_not_asked_about_them(monkeypatch):
    bump = torch.autograd.graph.increment_version

    def older(tensors):
        if any(tensor.is_inference() for tensor in tensors):
            raise RuntimeError("Inference tensors do not track version counter.")
        bump(tensors)

    monkeypatch.setattr(torch.autograd.graph, "increment_version", older)
    plain = torch.zeros(2)
    with torch.inference_mode():
        without = torch.zeros(2)
    bump_versions([plain, without])
    assert plain._version == 1
