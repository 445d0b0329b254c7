"""TermSplitter: every term of the loss is a source of the whole gradient, and none may drown the others."""

from __future__ import annotations

import difflib
import math
import re
import warnings
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from ..hooks import not_traced, users_level
from ..split import check_state
from .limits import TermLimits, looks, wide

__all__ = ["LeftOut", "TermRow", "TermSplitter"]


class LeftOut(NamedTuple):
    """A term whose gradient was not finite: the number of the call, from 0, and its name."""

    step: int
    term: str


class TermRow(NamedTuple):
    """What the last call did to one term.

    Attributes:
        term: its name.
        norm: L2 norm of its gradient over all parameters, without its weight.
        limit: the largest norm it may have: the smallest of the terms' running maxima, times its relief.
        scale: what its gradient was multiplied by, in [0, 1], without its weight.
    """

    term: str
    norm: float
    limit: float
    scale: float


class TermSplitter:
    """Replaces ``loss.backward()``: the gradient of each term of the loss is bounded before they are added.

        m_k <- min(max(n_k, decay m_k), growth m_k),  m_k = n_k at first;       n_k = ||g_k||
        v_k <- .9 v_k + .1 L_k,  V_k <- max(L_k, decay V_k),  both L_k at first;    p_k = v_k / V_k
        limit_k = (smallest m_j) min(relief, max(1, sqrt(p_k / smallest p_j)))
        gradient = sum_k w_k g_k min(1, limit_k / n_k)

    So a term that explodes keeps its direction and loses its size, and no weight has to be tuned. p_k is what is left
    of the term's value L_k: where the others have fallen and term k has not, its limit rises. Both minima are taken
    over the terms that share a parameter with term k and were seen in the last ``memory`` calls. A term whose value is
    not above zero has no relief, and gives none. A term of norm zero leaves its maximum as it is. A term that is not
    finite is left out of the call and named. The sum is added
    to ``.grad``, so accumulation works as ever, every call being one observation. One backward pass per term; terms
    may hold derivatives made with create_graph=True.

    Args:
        parameters: the parameters to be trained, or the model. With a DistributedDataParallel model each term's
            gradient is averaged over the ranks, so that the norms are those of the whole batch; all ranks must then
            call with the same terms.
        weights: term -> w_k, 1 where not named. A weight inside a term is no weight: the bound takes it out again.
        decay: what a running maximum keeps per call, in (0, 1].
        growth: largest ratio by which it rises per call, above 1.
        relief: largest factor by which the limit of a term that lags behind rises, at least 1; 1 for none.
        memory: calls after which a term that does not come again no longer counts, at least 1.
        scaler: the GradScaler of the training loop; do not call its ``scale``. A gradient that overflows although its
            term is finite is left to it.

    Raises:
        ValueError: no parameter, a constant out of range, or sharded parameters, whose gradients no single rank has.

    >>> w = nn.Parameter(torch.tensor([3.0, 4.0]))
    >>> terms = TermSplitter([w])
    >>> terms.backward(data=w[0], penalty=1e6 * w[1])
    >>> w.grad
    tensor([1., 1.])

    Source: the project's trials; Wang et al. 2021 and GradNorm change weights instead.
    """

    def __init__(
        self,
        parameters: nn.Module | Iterable[Tensor],
        *,
        weights: Mapping[str, float] | None = None,
        decay: float = 0.999,
        growth: float = 1.05,
        relief: float = 10.0,
        memory: int = 1000,
        scaler: Any = None,
    ) -> None:
        self._ranks: Any = None
        if isinstance(parameters, nn.parallel.DistributedDataParallel):
            self._ranks = parameters.process_group
        given: Any = parameters.parameters() if isinstance(parameters, nn.Module) else parameters
        self.parameters: list[Tensor] = list(given) if isinstance(given, Iterable) else [given]
        odd = [p for p in self.parameters if not isinstance(p, Tensor)]
        if odd:
            raise TypeError(
                f"TermSplitter(parameters): expected a model or its parameters, got an item of type "
                f"{type(odd[0]).__name__}. Pass the model, or model.parameters()."
            )
        numbers: dict[str, Any] = {"decay": decay, "growth": growth, "relief": relief, "memory": memory}
        for name, value in numbers.items():
            if not isinstance(value, Real):
                raise ValueError(
                    f"TermSplitter({name}={value!r}): expected a number, got {type(value).__name__}. Leave {name} out "
                    "for its default."
                )
        rules = {
            "decay": (decay, 0 < decay <= 1, "in (0, 1]"),
            "growth": (growth, growth > 1, "above 1"),
            "relief": (relief, relief >= 1, "of at least 1"),
            "memory": (memory, memory >= 1, "of at least 1"),
        }
        for name, (value, holds, rule) in rules.items():
            if not holds:
                raise ValueError(
                    f"TermSplitter({name}={value!r}): expected a number {rule}. Leave {name} out for its default."
                )
        weighted: Any = {} if weights is None else weights
        if not isinstance(weighted, Mapping):
            raise ValueError(
                f"TermSplitter(weights={weighted!r:.60}): expected a mapping from terms to numbers. Write for example "
                "{'boundary': 10.0}."
            )
        for name, weight in weighted.items():
            if not (isinstance(weight, Real) and 0 <= float(weight) < math.inf):
                raise ValueError(
                    f"TermSplitter(weights={{{name!r}: {weight!r}}}): expected finite weights of at least 0. Write "
                    "1.0 for a term as it is."
                )
        if not any(parameter.requires_grad for parameter in self.parameters):
            raise ValueError("TermSplitter(parameters): expected at least one parameter that requires a gradient.")
        if any(_is_sharded(parameter) for parameter in self.parameters):
            raise ValueError(
                "TermSplitter(parameters): expected whole parameters, got sharded ones (FSDP), whose gradients are "
                "made by hooks that one backward pass per term goes past. Use DistributedDataParallel."
            )
        self.weights = dict(weights or {})
        self.scaler = scaler
        self.limits = TermLimits(decay, growth, relief, memory)
        self._one: Tensor | None = None  # the signal at a term
        self._left_out: deque[tuple[int, str, Tensor | bool]] = deque(maxlen=10_000)
        self._last: tuple[tuple[str, ...], Any] | None = None
        self._said: set[str] = set()

    @not_traced
    def backward(self, *unnamed: Any, **terms: Tensor) -> None:
        """Add the bounded gradient of the sum of the terms to ``.grad``.

        Args:
            unnamed: nothing; a term without a name is refused.
            terms: name -> a term of the loss, a single number with a graph. A term that is not there in this step is
                left away.

        Raises:
            ValueError: no term, or one that is no single number or has no graph; nothing has been added then.

        Warns:
            UserWarning: a term without a weight, called nearly as a weight that no term has had; once per term.
        """
        if unnamed:
            given = "**terms" if isinstance(unnamed[0], Mapping) else "data=loss"
            raise ValueError(f"TermSplitter.backward(…): expected every term by its name. Write backward({given}).")
        self._check(terms)
        chosen = [k for k, parameter in enumerate(self.parameters) if parameter.requires_grad]
        parameters = tuple(self.parameters[k] for k in chosen)
        gradients: list[list[Tensor | None]] = []
        values: list[Tensor] = []
        for place, (name, term) in enumerate(terms.items(), 1):
            gradient, value = self._gradient(name, term, parameters, keep=place < len(terms))
            gradients.append(gradient)
            values.append(value)
        names = tuple(terms)
        places = self.limits.enter(names, chosen, gradients, self._compare)
        for name, place in zip(names, places, strict=True):
            if not self.limits.reaches[place]:
                self._say(
                    f"TermSplitter: the term {name!r} reaches none of the parameters, so that it adds nothing. Give "
                    "the splitter the parameters that the term depends on, or leave the term out."
                )
        follow = self._follow_numbers if all(p.is_cpu for p in parameters) else self._follow
        follow(names, places, parameters, gradients, values)
        self.limits.calls += 1

    def named(self) -> list[LeftOut]:
        """The terms that were not finite and were left out, oldest first; waits for the device."""
        return [LeftOut(step, name) for step, name, left in self._left_out if bool(left)]

    def rows(self) -> list[TermRow]:
        """What the last call did to its terms, in their order; waits for the device."""
        if self._last is None:
            return []
        names, numbers = self._last
        columns = numbers.tolist() if isinstance(numbers, Tensor) else numbers
        return [TermRow(*row) for row in zip(names, *columns, strict=True)]

    def state_dict(self) -> dict[str, Any]:
        """The running maxima, and when each term was last seen."""
        return self.limits.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a saved state.

        Raises:
            ValueError: it comes from a splitter of more parameters.
        """
        check_state(state, ("calls", "terms"), call="TermSplitter.load_state_dict(…)")
        for name, row in state["terms"].items():
            last = max(row["reaches"], default=-1)
            if last >= len(self.parameters):
                raise ValueError(
                    f"TermSplitter.load_state_dict(…): expected terms of these {len(self.parameters)} parameters, got "
                    f"{name!r}, which reaches parameter {last}. Load it into a splitter of the same model."
                )
        self.limits.load_state_dict(state, self.parameters[0].device)

    def _check(self, terms: Mapping[str, Tensor]) -> None:
        if not terms:
            raise ValueError("TermSplitter.backward(): expected at least one term, as in backward(data=loss).")
        if isinstance(terms.get("weights"), Mapping):
            raise ValueError(
                "TermSplitter.backward(weights={…}): expected terms of the loss alone. Weights belong into "
                "TermSplitter(parameters, weights={…})."
            )
        for name, term in terms.items():
            call = f"TermSplitter.backward({name}=…)"
            if not isinstance(term, Tensor) or term.numel() != 1:
                got = f"a tensor of shape {tuple(term.shape)}" if isinstance(term, Tensor) else type(term).__name__
                raise ValueError(f"{call}: expected a tensor with a single number, got {got}. Take its sum or mean.")
            if term.is_complex():
                raise ValueError(
                    f"{call}: expected a real number, got {term.dtype}. Take its real part or its modulus."
                )
            if not term.requires_grad:
                raise ValueError(
                    f"{call}: expected a term with a graph, got one without a gradient. Leave the keyword out in steps "
                    "in which the term is a constant."
                )

    def _gradient(
        self, name: str, term: Tensor, parameters: tuple[Tensor, ...], *, keep: bool
    ) -> tuple[list[Tensor | None], Tensor]:
        """The gradient and the value of one term, averaged over the ranks."""
        value = term.detach()
        term = term if self.scaler is None else self.scaler.scale(term)
        one = self._one
        if one is None or one.dtype != term.dtype or one.shape != term.shape or one.device != term.device:
            self._one = one = torch.ones_like(value)
        # What torch.autograd.grad calls: its checks cost a small network 5 % of a step, and `_check` has made them.
        engine = torch.autograd.Variable._execution_engine
        found: list[Tensor | None] = list(engine.run_backward((term,), (one,), keep, False, parameters, True, False))
        if any(gradient is not None and gradient.is_sparse for gradient in found):
            raise ValueError(f"TermSplitter.backward({name}=…): expected dense gradients. Use Embedding(sparse=False).")
        if self._ranks is None:
            return found, value
        # A term may miss a parameter on one rank and reach it on another: the flags travel with the numbers.
        reached = torch.tensor([gradient is not None for gradient in found], device=parameters[0].device)
        flat = [
            (torch.zeros_like(parameter) if gradient is None else gradient).reshape(-1)
            for gradient, parameter in zip(found, parameters, strict=True)
        ]
        dtype = torch.float64 if any(part.dtype == torch.float64 for part in flat) else torch.float32
        sent = torch.cat([*(part.to(dtype) for part in flat), value.to(dtype).reshape(1), reached.to(dtype)])
        torch.distributed.all_reduce(sent, group=self._ranks)
        count = torch.distributed.get_world_size(self._ranks)
        *parts, mean = (sent[: -len(parameters)] / count).split([*(part.numel() for part in flat), 1])
        used = (sent[-len(parameters) :] > 0).tolist()
        gradients = [
            part.view_as(parameter).to(parameter.dtype) if use else None
            for part, parameter, use in zip(parts, parameters, used, strict=True)
        ]
        return gradients, mean

    def _compare(self, name: str, names: tuple[str, ...]) -> None:
        """Warn of a new term without a weight, where a weight that no term has had is called nearly the same."""
        if name in self.weights:
            return
        unused = [key for key in self.weights if key not in self.limits.places and key not in names]
        # Names that differ in their digits alone are two terms.
        unused = [key for key in unused if re.sub(r"\d", "", key) != re.sub(r"\d", "", name)]
        for key in difflib.get_close_matches(name, unused, n=1, cutoff=0.8):
            self._say(
                f"TermSplitter.backward({name}=…): expected a weight for {name!r}, got one for {key!r} alone, so that "
                f"this term counts as 1. Write weights={{{name!r}: {self.weights[key]!r}}} if that was meant.",
            )

    def _follow(
        self,
        names: tuple[str, ...],
        places: list[int],
        parameters: Sequence[Tensor],
        gradients: list[list[Tensor | None]],
        values: Sequence[Tensor],
    ) -> None:
        """Bound the terms and add them; nothing waits for the device."""
        norm_K = torch.stack([_norm(g, v) for g, v in zip(gradients, values, strict=True)])
        value_K = torch.stack([wide(value).reshape(()).to(norm_K.device) for value in values])
        left_K = ~norm_K.isfinite()
        if self.scaler is not None:
            norm_K = norm_K / self.scaler.scale(norm_K.new_ones((), dtype=torch.float32)).to(norm_K.device)
            # What overflows although the term is finite must reach the scaler.
            left_K = ~norm_K.isfinite() & ~value_K.isfinite()
        limit_K = self.limits.observe(places, norm_K, value_K)
        scale_K = torch.where(norm_K > limit_K, limit_K / norm_K, 1.0)
        scale_K = torch.where(norm_K.isfinite(), scale_K, torch.where(left_K, 0.0, 1.0))
        self._last = names, torch.stack([norm_K, limit_K, scale_K])
        for name, found, scale, left in zip(names, gradients, scale_K.unbind(), left_K.unbind(), strict=True):
            self._left_out.append((self.limits.calls, name, left))
            factor = scale * self.weights.get(name, 1.0)
            pairs = [(p, g) for p, g in zip(parameters, found, strict=True) if g is not None]
            parts = [torch.where(left, 0.0, _times(g, factor)) for _, g in pairs]
            held = [(p.grad, part) for (p, _), part in zip(pairs, parts, strict=True) if p.grad is not None]
            if held:
                torch._foreach_add_([grad for grad, _ in held], [part for _, part in held])
            for (parameter, _), part in zip(pairs, parts, strict=True):
                if parameter.grad is None:
                    parameter.grad = part

    def _follow_numbers(
        self,
        names: tuple[str, ...],
        places: list[int],
        parameters: Sequence[Tensor],
        gradients: list[list[Tensor | None]],
        values: Sequence[Tensor],
    ) -> None:
        """The same in Python's numbers: on the CPU a call of torch costs more than the whole rule."""
        bundles = self.limits.bundles(places)
        vectors: list[list[tuple[int, Tensor]]] = [[] for _ in bundles]
        norms = []
        for k, found in enumerate(gradients):
            lengths = []
            for (members, reached), made in zip(bundles, vectors, strict=True):
                if reached[k]:
                    vector = _flatten_dense_tensors([found[j] for j in members])
                    made.append((k, vector))
                    lengths.append(_length(vector))
            gradients[k] = []  # a gradient is held once
            norms.append(math.hypot(*lengths))
        levels = [float(value) for value in values]
        lefts = [not math.isfinite(norm) for norm in norms]
        if self.scaler is not None:
            scale = float(self.scaler.scale(torch.ones(())))
            norms = [norm / scale for norm in norms]
            lefts = [left and not math.isfinite(level) for left, level in zip(lefts, levels, strict=True)]
        limits = self.limits.observe_numbers(places, norms, levels)
        scales = [
            min(1.0, limit / norm) if 0 < norm < math.inf else 0.0 if left else 1.0
            for norm, limit, left in zip(norms, limits, lefts, strict=True)
        ]
        self._last = names, (norms, limits, scales)
        factors = [scale * self.weights.get(name, 1.0) for name, scale in zip(names, scales, strict=True)]
        for (members, _), vector in zip(bundles, vectors, strict=True):
            _add([parameters[j] for j in members], [(one, factors[k]) for k, one in vector if not lefts[k]])
        if True in lefts:
            self._left_out.extend(
                (self.limits.calls, name, True) for name, left in zip(names, lefts, strict=True) if left
            )
            if all(lefts):
                self._say(
                    "TermSplitter: no term of the step has a finite gradient, so that nothing was added. Look at the "
                    "input or at the weights if this lasts."
                )

    def _say(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            warnings.warn(text, UserWarning, stacklevel=users_level())


_PART = 1 << 20


def _norm(gradients: Sequence[Tensor | None], value: Tensor) -> Tensor:
    """The L2 norm over all parameters, in float64 where the device has it."""
    found = [gradient for gradient in gradients if gradient is not None]
    if not found:
        return wide(value).new_zeros(())
    dtype = torch.float64 if looks(found[0]) or found[0].dtype == torch.float64 else torch.float32
    norms = torch._foreach_norm(found, 2, dtype)
    return wide(torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms])))


def _times(gradient: Tensor, factor: Tensor) -> Tensor:
    """The product in the gradient's dtype; halves, which hold no tiny factor, are multiplied in float32."""
    wider = torch.promote_types(gradient.dtype, torch.float32)
    return (gradient.to(wider) * factor.to(wider)).to(gradient.dtype)


def _length(vector: Tensor) -> float:
    """The L2 norm in float64, a part at a time, since torch makes a copy in that precision."""
    vector = torch.view_as_real(vector) if vector.is_complex() else vector
    if vector.shape[0] <= _PART:
        return float(torch.linalg.vector_norm(vector, dtype=torch.float64))
    return math.hypot(*map(_length, vector.split(_PART)))


def _add(parameters: Sequence[Tensor], vectors: Sequence[tuple[Tensor, float]]) -> None:
    """Add the sum of factor times vector, cut into the parameters' shapes, to ``.grad``; of halves in float32."""
    if not vectors:
        return
    (first, factor), *others = vectors
    # Several tensors were copied into one vector; a single one may share its memory with another gradient.
    wider = torch.promote_types(first.dtype, torch.float32)
    total = first.to(wider)
    if factor != 1 or len(parameters) == 1:
        total = total * factor
    for vector, factor in others:
        total.add_(vector.to(wider), alpha=factor)
    parts = _unflatten_dense_tensors(total.to(first.dtype), parameters)
    for parameter, part in zip(parameters, parts, strict=True):
        if parameter.grad is None:
            parameter.grad = part
        else:
            parameter.grad.add_(part)


def _is_sharded(parameter: Tensor) -> bool:
    return type(parameter).__name__ == "FlatParameter" or hasattr(parameter, "device_mesh")
