"""gradient_chain: the gradient as the product of factors that it is, measured factor by factor."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .chain import Chain, Link
from .cut import INPUT, LOSS, Cut, CutForward, cutting, leaves_below, pull, rms
from .joints import LossFn, bare, checked_names
from .recurrent import recurrences_of


def operator_norm(
    ends: list[Tensor], leaving: list[tuple[Tensor, Tensor]], *, iterations: int = 20, tolerance: float = 1e-3
) -> float:
    """Largest singular value of the Jacobian of a factor, from below.

        v <- J^T J v / ||J^T J v||,   sigma = ||J v||

    The iteration starts at the signal that leaves the factor, so the result is at least the gain that was
    measured where the iteration converges upwards, which it does for every start.

    Args:
        ends: the factor's outputs.
        leaving: its (leaf, signal) pairs from one application of J^T.
        iterations: most rounds; each costs three passes backward.
        tolerance: stop when sigma moves by less than this share.

    Returns:
        sigma, a lower bound that converges to the operator norm; no unit.

    >>> x = torch.ones(2, requires_grad=True); y = x * torch.tensor([2.0, 7.0])
    >>> round(operator_norm([y], [(x, torch.ones(2))]), 3)
    7.0

    Source: power iteration; J v by the double vector-Jacobian product, which needs no forward mode.
    """
    leaves = [leaf for leaf, _ in leaving]
    direction = _unit([grad.detach() for _, grad in leaving])
    probes = [torch.zeros_like(end, requires_grad=True) for end in ends]
    pulled = torch.autograd.grad(ends, leaves, probes, create_graph=True, allow_unused=True)
    used = [(number, grad) for number, grad in enumerate(pulled) if grad is not None]
    sigma = 0.0
    for _ in range(iterations):
        pushed = torch.autograd.grad(
            [grad for _, grad in used], probes, [direction[number] for number, _ in used],
            retain_graph=True, allow_unused=True,
        )  # fmt: skip
        image = [torch.zeros_like(p) if g is None else g for p, g in zip(probes, pushed, strict=True)]
        new = float(sum(part.double().square().sum() for part in image) ** 0.5)
        if new == 0.0:
            return 0.0
        back = torch.autograd.grad(ends, leaves, image, retain_graph=True, allow_unused=True)
        direction = _unit([torch.zeros_like(x) if g is None else g for x, g in zip(leaves, back, strict=True)])
        if abs(new - sigma) <= tolerance * new:
            return new
        sigma = new
    return sigma


def _unit(parts: list[Tensor]) -> list[Tensor]:
    length = sum(part.double().square().sum() for part in parts) ** 0.5
    return [(part / length).to(part.dtype) for part in parts]


@dataclass
class Factor:
    """What one factor did to the signal: kept while the chain is applied."""

    cut: Cut
    signals: list[Tensor]
    leaving: list[tuple[Tensor, Tensor]]
    clean: bool


def gradient_chain(
    model: nn.Module,
    loss_fn: LossFn,
    batch: Any,
    *,
    at: list[str] | None = None,
    operator_norms: bool = False,
    through_time: bool = True,
) -> Chain:
    """Factor the gradient of one batch into the links of the backward chain.

        grad W_i = (dz_i/dW_i)^T d_i,   d_i = sum over the factors above of J^T d,   gain = ||J^T d|| / ||d||

    The product of these factors applied to the loss's signal is the gradient of autograd, exactly.

    Args:
        model: any module; its `.grad` fields and its mode are left as they are.
        loss_fn: `loss_fn(model, batch) -> scalar tensor`.
        batch: what the loss takes.
        at: modules to cut at, None for all.
        operator_norms: also measure every factor's largest singular value (power iteration, about 20 more
            passes through each factor).
        through_time: also unroll recurrent modules (`nn.RNN`, `nn.GRU`, `nn.LSTM`) for gains a time step
            and Lyapunov exponents.

    Returns:
        The chain, first link at the loss, last at the input.

    Raises:
        ValueError: a name in `at` that the model does not have; a loss without a graph, or with more than
            one entry.

    >>> layer = nn.Linear(1, 1, bias=False); _ = layer.weight.data.fill_(3.0)
    >>> model = nn.Sequential(layer, nn.Linear(1, 1, bias=False)); _ = model[1].weight.data.fill_(5.0)
    >>> chain = gradient_chain(model, lambda m, x: m(x).sum(), torch.ones(1, 1))
    >>> [(link.name, link.gain) for link in chain.links]
    [('(loss)', 1.0), ('1', 5.0), ('0', 3.0)]
    """
    model = bare(model)
    names = None if at is None else checked_names(model, at, f"gradient_chain(at={at!r})")
    recurrent = recurrences_of(model) if through_time else None
    record, loss = cut_forward(model, loss_fn, batch, names, recurrent)
    if not bool(torch.isfinite(loss)):
        return Chain(float(loss.detach()), _broken_links(record), [], {}, record.plain)
    factors, gradients = apply_factors(record, loss, list(model.parameters()))
    above = _strongest_consumers(factors)
    links = [_link(factor, operator_norms, gradients, model, above.get(factor.cut.name, "")) for factor in factors]
    top = links[0].leaving
    for link in links:
        link.cumulative = math.log10(link.signal / top) if link.signal > 0 and top > 0 else math.nan
    links[0].cumulative = 0.0
    steps = recurrent.measure(factors) if recurrent is not None else []
    bottom = _sum_of_squares([g for leaf in record.inputs for g in [_total(factors, leaf)] if g is not None])
    return Chain(float(loss.detach()), links, steps, {INPUT: bottom**0.5} if record.inputs else {}, record.plain)


def factored_gradients(model: nn.Module, loss_fn: LossFn, batch: Any) -> dict[str, Tensor]:
    """Gradients of all parameters as products of factors applied to the loss's signal.

    Equal to autograd's to rounding: this is the exact identity that makes the chain's figures mean something.

    Args:
        model: any module.
        loss_fn: `loss_fn(model, batch) -> scalar tensor`.
        batch: what the loss takes.

    Returns:
        Name of the parameter -> gradient; parameters that the loss does not reach are left out.
    """
    model = bare(model)
    record, loss = cut_forward(model, loss_fn, batch)
    _, gradients = apply_factors(record, loss, list(model.parameters()))
    return {name: gradients[id(p)] for name, p in model.named_parameters() if id(p) in gradients}


def cut_forward(
    model: nn.Module, loss_fn: LossFn, batch: Any, names: list[str] | None = None, recurrent: Any = None
) -> tuple[CutForward, Tensor]:
    """Run the loss once over a cut model.

    Raises:
        ValueError: the loss is no scalar with a graph.
    """
    with torch.enable_grad(), cutting(model, names) as record:
        if recurrent is None:
            loss = loss_fn(model, batch)
        else:
            with recurrent.listening():
                loss = loss_fn(model, batch)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"loss_fn(model, batch): expected one scalar tensor, got {got}. Reduce it with .mean().")
    if loss.grad_fn is None:
        raise ValueError(
            "loss_fn(model, batch): expected a loss that depends on the model's parameters, got one without a graph. "
            "Is it computed under torch.no_grad(), from detached outputs, or with every parameter frozen?"
        )
    return record, loss.reshape(())


def apply_factors(record: CutForward, loss: Tensor, parameters: list[Tensor]) -> tuple[list[Factor], dict[int, Tensor]]:
    """Apply the transposed factors from the loss down.

    Args:
        record: of `cut_forward`.
        loss: likewise.
        parameters: of the model.

    Returns:
        The factors in that order, and id(parameter) -> gradient.
    """
    arrived: dict[int, Tensor] = {}
    cut_ids = {id(leaf) for cut in record.cuts for leaf in cut.leaves} | {id(leaf) for leaf in record.inputs}
    gradients: dict[int, Tensor] = {}
    factors = []
    top = Cut(LOSS, LOSS, "loss", [loss], [], math.nan, True)
    for cut in [top, *reversed(record.cuts)]:
        if cut is top:
            signals = [torch.ones_like(loss)]
        else:
            signals = [arrived.pop(id(leaf), torch.zeros_like(leaf)) for leaf in cut.leaves]
        leaves = leaves_below(cut.made)
        below: list[tuple[Tensor, Tensor]] = []
        if leaves and any(bool((signal != 0).any()) for signal in signals):
            below = pull(cut.made, leaves, signals, parameters)
        for leaf, grad in below:
            store = arrived if id(leaf) in cut_ids else gradients
            store[id(leaf)] = store[id(leaf)] + grad if id(leaf) in store else grad
        clean = all(bool(torch.isfinite(signal).all()) for signal in signals)
        factors.append(Factor(cut, signals, below, clean))
    for factor in factors:
        factor.leaving = [(leaf, grad) for leaf, grad in factor.leaving if id(leaf) in cut_ids]
    return factors, gradients


def _strongest_consumers(factors: list[Factor]) -> dict[str, str]:
    """For each link the name of the factor that sends it the largest signal."""
    owner = {id(leaf): factor.cut.name for factor in factors for leaf in factor.cut.leaves}
    best: dict[str, tuple[float, str]] = {}
    for factor in factors:
        for leaf, grad in factor.leaving:
            name = owner.get(id(leaf), INPUT)
            size = float(torch.linalg.vector_norm(grad.detach().double()))
            if name not in best or size > best[name][0]:
                best[name] = (size, factor.cut.name)
    return {name: entry[1] for name, entry in best.items()}


def _link(factor: Factor, with_operator_norm: bool, gradients: dict[int, Tensor], model: nn.Module, above: str) -> Link:
    cut = factor.cut
    signal = _sum_of_squares(factor.signals) ** 0.5
    leaving = _sum_of_squares([grad for _, grad in factor.leaving]) ** 0.5
    gain = leaving / signal if factor.leaving and signal > 0 else math.nan
    sigma = math.nan
    if with_operator_norm and factor.leaving and math.isfinite(gain):
        sigma = operator_norm(cut.made, factor.leaving)
    own = model.get_submodule(cut.module).parameters(recurse=False) if cut.module != LOSS else iter(())
    squares = [gradients[id(p)] for p in own if id(p) in gradients]
    activation = rms(cut.made)
    return Link(
        name=cut.name,
        module=cut.module,
        kind=cut.kind,
        signal=signal,
        leaving=leaving,
        gain=gain,
        cumulative=math.nan,
        operator_norm=sigma,
        activation=activation,
        forward_gain=activation / cut.arrived if cut.arrived > 0 else math.nan,
        parameter_norm=_sum_of_squares(squares) ** 0.5 if squares else math.nan,
        finite_in=cut.clean,
        finite_out=math.isfinite(activation),
        signal_in_finite=factor.clean,
        signal_out_finite=all(bool(torch.isfinite(grad).all()) for _, grad in factor.leaving),
        above=above,
    )


def _broken_links(record: CutForward) -> list[Link]:
    """Links of a forward pass whose loss is not finite: no signal, only what the activations were."""
    links = []
    for cut in reversed(record.cuts):
        level = rms(cut.made)
        nan = math.nan
        ratio = level / cut.arrived if cut.arrived > 0 else nan
        links.append(
            Link(
                name=cut.name, module=cut.module, kind=cut.kind, signal=nan, leaving=nan, gain=nan,
                cumulative=nan, operator_norm=nan, activation=level, forward_gain=ratio, parameter_norm=nan,
                finite_in=cut.clean, finite_out=math.isfinite(level), signal_in_finite=True,
                signal_out_finite=True,
            )
        )  # fmt: skip
    return links


def _total(factors: list[Factor], leaf: Tensor) -> Tensor | None:
    parts = [grad for factor in factors for below, grad in factor.leaving if below is leaf]
    total = parts[0] if parts else None
    for part in parts[1:]:
        total = part if total is None else total + part
    return total


def _sum_of_squares(tensors: list[Tensor]) -> float:
    return sum(float(tensor.detach().abs().to(torch.float64).square().sum()) for tensor in tensors)
