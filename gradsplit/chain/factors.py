"""gradient_chain: the gradient as a product of factors, measured factor by factor.

In the forward pass every output of a module is replaced by a detached leaf. The following modules read a clone of the
leaf, so that later operations in place stay legal. Each call of a module then owns a graph of its own, from the leaves
that it reads to the output that it makes: one factor of the chain. The values of the forward pass do not change.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from .chain import Chain, Link
from .joints import LossFn, bare, carries_signal, checked_names, replace_tensors, tensors_in
from .recurrent import recurrences_of

INPUT = "(input)"
LOSS = "(loss)"


@dataclass
class Factor:
    """One factor of the chain: one call of a module, with a graph of its own.

    Attributes:
        name: the module, with "#2" for its second call.
        module: dotted name of the module.
        kind: class of the module.
        outputs: the tensors that the call made, as ends of this factor's graph.
        leaves: the same tensors as the following factors read them.
        input_rms: root mean square of the floating inputs of the call, NaN without any.
        inputs_finite: whether every floating input was finite.
    """

    name: str
    module: str
    kind: str
    outputs: list[Tensor]
    leaves: list[Tensor]
    input_rms: float
    inputs_finite: bool


@dataclass
class FactoredForward:
    """A forward pass as factors.

    Attributes:
        factors: the calls with an output that carries a signal, oldest first.
        calls: (module, inputs finite, output finite) of every call of a leaf module, oldest first.
        inputs: the leaves that replace the floating inputs of the model.
    """

    factors: list[Factor] = field(default_factory=list)
    calls: list[tuple[str, bool, bool]] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)


@contextmanager
def factoring(model: nn.Module, names: list[str] | None = None) -> Iterator[FactoredForward]:
    """Split the forward passes inside the context into factors, at the outputs of the model's modules.

    Args:
        model: the module whose passes are split.
        names: modules whose calls end a factor; None: every module but the root. A module that returns the output of
            another one (a container, an identity) gets no factor of its own.

    Yields:
        The factors, which the passes fill in.
    """
    forward = FactoredForward()
    known: dict[int, Tensor] = {}  # the tensor is kept, so that no other gets its id
    calls: dict[str, int] = {}

    def fresh(tensor: Tensor) -> tuple[Tensor, Tensor]:
        leaf = tensor.detach().requires_grad_()
        alias = leaf.clone()
        known[id(alias)] = alias
        return leaf, alias

    def enter_root(module: nn.Module, args: Any, kwargs: Any) -> Any:
        def change(place: str, tensor: Tensor) -> Tensor:
            if not tensor.is_floating_point() or tensor.requires_grad or not torch.is_grad_enabled():
                return tensor
            leaf, alias = fresh(tensor)
            forward.inputs.append(leaf)
            return alias

        return replace_tensors(args, change), replace_tensors(kwargs, change)

    # The hooks go before any backward pass, since a checkpointed block that runs again must make no new factors.
    with ExitStack() as hooks:
        hooks.callback(model.register_forward_pre_hook(enter_root, with_kwargs=True).remove)
        for name, module in model.named_modules():
            if not name or (names is not None and name not in names):
                continue

            def leave(module: nn.Module, args: Any, kwargs: Any, output: Any, name: str = name) -> Any:
                input_rms, inputs_finite = _level((args, kwargs))
                if not any(True for _ in module.children()):
                    forward.calls.append((name, inputs_finite, _level(output)[1]))
                if not torch.is_grad_enabled():
                    return None
                factor = Factor("", name, type(module).__name__, [], [], input_rms, inputs_finite)
                given: dict[int, Tensor] = {}  # a tensor that is returned twice is one joint

                def change(place: str, tensor: Tensor) -> Tensor:
                    if not carries_signal(tensor) or id(tensor) in known:
                        return tensor
                    if id(tensor) not in given:
                        leaf, given[id(tensor)] = fresh(tensor)
                        factor.outputs.append(tensor)
                        factor.leaves.append(leaf)
                    return given[id(tensor)]

                changed = replace_tensors(output, change)
                if not factor.outputs:
                    return None
                calls[name] = calls.get(name, 0) + 1
                factor.name = name if calls[name] == 1 else f"{name}#{calls[name]}"
                forward.factors.append(factor)
                return changed

            hooks.callback(module.register_forward_hook(leave, with_kwargs=True).remove)
        yield forward


def _nodes_below(ends: list[Tensor]) -> list[Any]:
    """All nodes of the graph below some tensors, each once."""
    seen: dict[Any, None] = {}
    stack = [end.grad_fn for end in ends if end.grad_fn is not None]
    while stack:
        node = stack.pop()
        if node not in seen:
            seen[node] = None
            stack.extend(below for below, _ in node.next_functions if below is not None)
    return list(seen)


def leaves_below(ends: list[Tensor]) -> list[Tensor]:
    """The leaves that a factor's graph reads: parameters, and outputs of other factors."""
    leaves = [node.variable for node in _nodes_below(ends) if hasattr(node, "variable")]
    leaves += [end for end in ends if end.grad_fn is None and end.requires_grad]
    return list({id(leaf): leaf for leaf in leaves}.values())


def pull(
    ends: list[Tensor], leaves: list[Tensor], signals: list[Tensor], parameters: list[Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """Apply the transposed factor to the signals at its ends.

    Nothing is accumulated in `.grad`, and no hook on an accumulated gradient runs. So an optimizer that steps inside
    the backward pass does not step here. Reentrant checkpoints are the exception, because they allow no other way.

    Args:
        ends: outputs of the factor.
        leaves: `leaves_below(ends)`.
        signals: one signal per end.
        parameters: parameters of the model; a reentrant checkpoint reads some that the graph does not show.

    Returns:
        (leaf, gradient) for every leaf that the signals reach.
    """
    if not any(type(node).__name__ == "CheckpointFunctionBackward" for node in _nodes_below(ends)):
        grads = torch.autograd.grad(ends, leaves, signals, retain_graph=True, allow_unused=True)
        return [(leaf, grad) for leaf, grad in zip(leaves, grads, strict=True) if grad is not None]
    every = list({id(tensor): tensor for tensor in [*leaves, *parameters]}.values())
    before = [tensor.grad for tensor in every]
    for tensor in every:
        tensor.grad = None
    try:
        torch.autograd.backward(ends, signals, retain_graph=True)
        return [(tensor, tensor.grad) for tensor in every if tensor.grad is not None]
    finally:
        for tensor, grad in zip(every, before, strict=True):
            tensor.grad = grad


def rms(tensors: list[Tensor]) -> float:
    """Root mean square over all entries of some tensors, NaN without entries."""
    number = sum(tensor.numel() for tensor in tensors)
    if not number:
        return float("nan")
    total = sum(float(tensor.detach().abs().to(torch.float64).square().sum()) for tensor in tensors)
    return float((total / number) ** 0.5)


def _level(value: Any) -> tuple[float, bool]:
    floating = [t for _, t in tensors_in(value) if t.is_floating_point() and t.numel()]
    return rms(floating), all(bool(torch.isfinite(t.detach()).all()) for t in floating)


def operator_norm(
    ends: list[Tensor], leaving: list[tuple[Tensor, Tensor]], *, iterations: int = 20, tolerance: float = 1e-3
) -> float:
    """Largest singular value of the Jacobian of a factor, from below.

        v <- J^T J v / ||J^T J v||,   sigma = ||J v||

    The iteration starts near the signal that leaves the factor, and it converges upwards. A fixed random part of a
    tenth leads it out of a subspace in which the factor keeps that signal, such as the places that a pool picks. The
    result is at least the measured gain. Complex entries count as pairs of real ones.

    Args:
        ends: the factor's outputs.
        leaving: its (leaf, signal) pairs from one application of J^T.
        iterations: the largest number of rounds; each costs three backward passes.
        tolerance: stop when sigma moves by less than this share.

    Returns:
        sigma, a lower bound that converges to the operator norm; no unit.

    >>> x = torch.ones(2, requires_grad=True); y = x * torch.tensor([2.0, 7.0])
    >>> round(operator_norm([y], [(x, torch.ones(2))]), 3)
    7.0

    Source: power iteration. J v is computed by the double vector-Jacobian product, which needs no forward mode.
    """
    leaves = [leaf for leaf, _ in leaving]
    generator = torch.Generator().manual_seed(0)
    noise = _unit([torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device) for x in leaves])
    signal = _unit([grad.detach() for _, grad in leaving])
    direction = _unit([part + 0.1 * other for part, other in zip(signal, noise, strict=True)])
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
        new = _sum_of_squares(image) ** 0.5
        if new == 0.0:
            return 0.0
        back = torch.autograd.grad(ends, leaves, image, retain_graph=True, allow_unused=True)
        direction = _unit([torch.zeros_like(x) if g is None else g for x, g in zip(leaves, back, strict=True)])
        if abs(new - sigma) <= tolerance * new:
            return new
        sigma = new
    return sigma


def _unit(parts: list[Tensor]) -> list[Tensor]:
    length = _sum_of_squares(parts) ** 0.5 or 1.0
    return [part / length for part in parts]


@dataclass
class AppliedFactor:
    """What one factor did to the signal.

    Attributes:
        factor: the factor.
        signals: the signal that entered, one tensor per output.
        leaving: (leaf, signal) for every joint below that the factor sends a signal.
        signals_finite: whether the entering signal was finite.
    """

    factor: Factor
    signals: list[Tensor]
    leaving: list[tuple[Tensor, Tensor]]
    signals_finite: bool


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

    The product of these factors, applied to the loss's signal, is exactly the gradient of autograd.

    Args:
        model: any module; its `.grad` fields and its mode are left as they are.
        loss_fn: `loss_fn(model, batch) -> scalar tensor`.
        batch: what the loss takes.
        at: modules whose calls end a factor, None for all.
        operator_norms: whether to measure every factor's largest singular value too (power iteration, about 20 more
            passes through each factor).
        through_time: whether to unroll recurrent modules (`nn.RNN`, `nn.GRU`, `nn.LSTM`) too, for gains per time step
            and Lyapunov exponents.

    Returns:
        The chain; its first link is at the loss, and its last at the input.

    Raises:
        ValueError: a name in `at` that the model does not have; a loss without a graph, or with more than one entry.

    >>> layer = nn.Linear(1, 1, bias=False); _ = layer.weight.data.fill_(3.0)
    >>> model = nn.Sequential(layer, nn.Linear(1, 1, bias=False)); _ = model[1].weight.data.fill_(5.0)
    >>> chain = gradient_chain(model, lambda m, x: m(x).sum(), torch.ones(1, 1))
    >>> [(link.name, link.gain) for link in chain.links]
    [('(loss)', 1.0), ('1', 5.0), ('0', 3.0)]
    """
    model = bare(model, call="gradient_chain")
    names = None if at is None else checked_names(model, at, f"gradient_chain(at={at!r})")
    recurrent = recurrences_of(model) if through_time else None
    forward, loss = factored_forward(model, loss_fn, batch, names, recurrent)
    if not bool(torch.isfinite(loss)):
        return Chain(float(loss.detach()), _broken_links(forward), [], {}, forward.calls)
    factors, gradients = apply_factors(forward, loss, list(model.parameters()))
    above = _strongest_consumers(factors)
    links = [_link(applied, operator_norms, gradients, model, above) for applied in factors]
    top = links[0].leaving
    for link in links:
        link.cumulative = math.log10(link.signal / top) if link.signal > 0 and top > 0 else math.nan
    links[0].cumulative = 0.0
    signals = {applied.factor.name: applied.signals for applied in factors}
    steps = recurrent.measure(signals) if recurrent is not None else []
    arrived = [_total(factors, leaf) for leaf in forward.inputs]
    bottom = _sum_of_squares([signal for signal in arrived if signal is not None])
    return Chain(float(loss.detach()), links, steps, {INPUT: bottom**0.5} if forward.inputs else {}, forward.calls)


def factored_forward(
    model: nn.Module, loss_fn: LossFn, batch: Any, names: list[str] | None = None, recurrent: Any = None
) -> tuple[FactoredForward, Tensor]:
    """Run the loss once, and split its forward pass into factors.

    Raises:
        ValueError: the loss is not a scalar with a graph.
    """
    if not callable(loss_fn):
        raise TypeError(
            f"loss_fn={type(loss_fn).__name__}: expected a function of the model and a batch. Write for example lambda "
            "model, batch: model(batch).square().mean()."
        )
    with torch.enable_grad(), factoring(model, names) as forward:
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
            "Compute it outside of torch.no_grad(), from outputs that are not detached, with a trainable parameter."
        )
    return forward, loss.reshape(())


def apply_factors(
    forward: FactoredForward, loss: Tensor, parameters: list[Tensor]
) -> tuple[list[AppliedFactor], dict[int, Tensor]]:
    """Apply the transposed factors from the loss down.

    Args:
        forward: from `factored_forward`.
        loss: from the same call.
        parameters: parameters of the model.

    Returns:
        The factors in that order, and id(parameter) -> gradient.
    """
    arrived: dict[int, Tensor] = {}
    at_joints = [*forward.inputs, *(leaf for factor in forward.factors for leaf in factor.leaves)]
    joint_ids = {id(leaf) for leaf in at_joints}
    gradients: dict[int, Tensor] = {}
    done = []
    top = Factor(LOSS, LOSS, "loss", [loss], [], math.nan, True)
    for factor in [top, *reversed(forward.factors)]:
        if factor is top:
            signals = [torch.ones_like(loss)]
        else:
            signals = [arrived.pop(id(leaf), torch.zeros_like(leaf)) for leaf in factor.leaves]
        leaves = leaves_below(factor.outputs)
        below: list[tuple[Tensor, Tensor]] = []
        if leaves and any(bool((signal != 0).any()) for signal in signals):
            below = pull(factor.outputs, leaves, signals, parameters)
        for leaf, grad in below:
            store = arrived if id(leaf) in joint_ids else gradients
            store[id(leaf)] = store[id(leaf)] + grad if id(leaf) in store else grad
        leaving = [(leaf, grad) for leaf, grad in below if id(leaf) in joint_ids]
        done.append(AppliedFactor(factor, signals, leaving, all(bool(torch.isfinite(s).all()) for s in signals)))
    return done, gradients


def _strongest_consumers(factors: list[AppliedFactor]) -> dict[str, str]:
    """For each link, the name of the factor that sends it the largest signal."""
    owner = {id(leaf): applied.factor.name for applied in factors for leaf in applied.factor.leaves}
    best: dict[str, tuple[float, str]] = {}
    for applied in factors:
        for leaf, grad in applied.leaving:
            name = owner.get(id(leaf), INPUT)
            size = _sum_of_squares([grad])
            if name not in best or size > best[name][0]:
                best[name] = (size, applied.factor.name)
    return {name: entry[1] for name, entry in best.items()}


def _link(
    applied: AppliedFactor,
    with_operator_norm: bool,
    gradients: dict[int, Tensor],
    model: nn.Module,
    above: dict[str, str],
) -> Link:
    factor = applied.factor
    signal = _sum_of_squares(applied.signals) ** 0.5
    leaving = _sum_of_squares([grad for _, grad in applied.leaving]) ** 0.5
    gain = leaving / signal if applied.leaving and signal > 0 else math.nan
    sigma = math.nan
    if with_operator_norm and applied.leaving and math.isfinite(gain):
        sigma = max(gain, operator_norm(factor.outputs, applied.leaving))
    own = model.get_submodule(factor.module).parameters(recurse=False) if factor.module != LOSS else iter(())
    squares = [gradients[id(p)] for p in own if id(p) in gradients]
    activation = rms(factor.outputs)
    return Link(
        name=factor.name,
        module=factor.module,
        kind=factor.kind,
        signal=signal,
        leaving=leaving,
        gain=gain,
        cumulative=math.nan,
        operator_norm=sigma,
        activation=activation,
        forward_gain=activation / factor.input_rms if factor.input_rms > 0 else math.nan,
        parameter_norm=_sum_of_squares(squares) ** 0.5 if squares else math.nan,
        finite_in=factor.inputs_finite,
        finite_out=math.isfinite(activation),
        signal_in_finite=applied.signals_finite,
        signal_out_finite=all(bool(torch.isfinite(grad).all()) for _, grad in applied.leaving),
        above=above.get(factor.name, ""),
    )


def _broken_links(forward: FactoredForward) -> list[Link]:
    """Links of a forward pass whose loss is not finite: they have activations, but no signal."""
    links = []
    for factor in reversed(forward.factors):
        level = rms(factor.outputs)
        nan = math.nan
        ratio = level / factor.input_rms if factor.input_rms > 0 else nan
        links.append(
            Link(
                name=factor.name, module=factor.module, kind=factor.kind, signal=nan, leaving=nan, gain=nan,
                cumulative=nan, operator_norm=nan, activation=level, forward_gain=ratio, parameter_norm=nan,
                finite_in=factor.inputs_finite, finite_out=math.isfinite(level), signal_in_finite=True,
                signal_out_finite=True,
            )
        )  # fmt: skip
    return links


def _total(factors: list[AppliedFactor], leaf: Tensor) -> Tensor | None:
    parts = [grad for applied in factors for below, grad in applied.leaving if below is leaf]
    return reduce(torch.add, parts) if parts else None


def _sum_of_squares(tensors: list[Tensor]) -> float:
    return sum(float(tensor.detach().abs().to(torch.float64).square().sum()) for tensor in tensors)
