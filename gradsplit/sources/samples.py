"""SampleSplitter: what one sample adds to a layer's weight gradient is masked, bounded and named.

In front of a statistic of the batch a bad row is put in quarantine:

    row i of the activation is bad if it is not finite, or ||x_i|| > 3 running medians
    x_i <- the nearest sound row before it, without its graph;   d_i <- 0 at the model's outputs and below the joint
"""

from __future__ import annotations

import difflib
import math
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..split import check_state
from .ends import WHOLE, WholeKind
from .layers import KINDS, Forward, Kind, Layer, is_own
from .limits import Rule, RunningLimit, length, looks, row_shape, rule_of, spread, wide

__all__ = ["SampleSplitter", "StoodOut"]

BATCH_NORMS = nn.modules.batchnorm._BatchNorm


class StoodOut(NamedTuple):
    """A sample that was masked or bounded.

    Attributes:
        step: number of the backward pass, from 0; with accumulation every micro-batch is one.
        sample: position in the batch.
        layer: dotted name of the module.
        ratio: its norm / the limit, or "not finite".
    """

    step: int
    sample: int
    layer: str
    ratio: float | str


class SampleSplitter:
    """Split the gradient by sample: one bad sample neither poisons nor drowns the others, and is named.

        dL/dW = sum_i a_i d_i^T in every layer;   n_i = ||a_i|| ||d_i||;   d_i <- d_i min(1, limit / n_i) in this sum
        0 where a_i or d_i is not finite, in this sum and in the signal that is passed on

    So the others get exactly the gradient of the batch without the sample that is not finite (under a mean loss
    still divided by the whole batch). The limit follows the samples' norms of the layer; see `RunningLimit`. The rules
    know Linear, Conv1d to Conv3d, Embedding, and the gains of LayerNorm and RMSNorm; RNN, GRU, LSTM and
    MultiheadAttention are bounded as a whole at their two ends. In front of BatchNorm, which mixes the samples, a bad
    row is replaced by an ordinary one and its loss is left out: quarantine. All numbers stay on their device; on
    the CPU, where a look costs nothing, a batch without bad samples takes the ordinary backward pass. Scales are those
    of this process's part of the batch.

    Args:
        model: what is trained; a DDP wrapper is seen through.
        kind: "classification" (2 x a slowly falling 90 % quantile), "regression" (3 x a running median), or a rule such
            as ``RunningLimit(quantile=0.5)``.
        batch_dim: the dimension of the samples in the inputs of layers; recurrent nets and attention say it themselves.
        per: "sample", or "token": every place of a sequence is one sample.
        quarantine: "auto" (in front of every BatchNorm; by length in front of the first alone), or names of modules
            whose outputs are looked at, or () for none.
        also: names of modules whose samples do not meet inside them, to be bounded as a whole.
        leave_out: names of modules that are left as they are, with all below them, and of parameters without a rule.
        scaler: the GradScaler of the training loop. A signal that overflows is then left to it, and only samples whose
            activation is not finite are masked.
        keep: how many notes (layer and pass) are remembered for `named`.

    Raises:
        ValueError: no model, an unknown kind or name, or another option that does not fit.
        RuntimeError: the model is compiled, or split by sample already.

    >>> model = nn.Linear(2, 1, bias=False)
    >>> x = torch.tensor([[1.0, 2.0], [math.nan, 0.0]])
    >>> with SampleSplitter(model, "regression") as splitter:
    ...     model(x).sum().backward()
    >>> model.weight.grad, splitter.named()
    (tensor([[1., 2.]]), [StoodOut(step=0, sample=1, layer='(model)', ratio='not finite')])

    Source: the project's trials; the norm of a layer's sum per sample is Goodfellow 2015, here its upper bound.
    """

    def __init__(
        self,
        model: nn.Module,
        kind: str | Rule = "classification",
        *,
        batch_dim: int = 0,
        per: str = "sample",
        quarantine: str | Sequence[str] = "auto",
        also: Sequence[str] = (),
        leave_out: Sequence[str] = (),
        scaler: Any = None,
        keep: int = 10_000,
    ) -> None:
        given: Any = model
        if not isinstance(given, nn.Module):
            what = f"the class {given.__name__}" if isinstance(given, type) else type(given).__name__
            raise TypeError(f"SampleSplitter({what}): expected a torch.nn.Module. Pass the model itself.")
        self.rule = rule_of(kind, "SampleSplitter")
        if not isinstance(keep, int) or keep < 0:
            raise ValueError(f"SampleSplitter(keep={keep!r}): expected a number of notes >= 0, for example 10000.")
        for option, listed in (("also", also), ("leave_out", leave_out), ("quarantine", quarantine)):
            if (isinstance(listed, str) and listed != "auto") or not isinstance(listed, Iterable):
                auto = "'auto' or " if option == "quarantine" else ""
                raise ValueError(
                    f"SampleSplitter({option}={listed!r}): expected {auto}a list of module names. Write "
                    f"{option}=[{str(listed)!r}]."
                )
        if per not in ("sample", "token"):
            raise ValueError(f"SampleSplitter(per={per!r}): expected 'sample' or 'token'.")
        if not isinstance(batch_dim, int) or isinstance(batch_dim, bool) or batch_dim < 0:
            raise ValueError(f"SampleSplitter(batch_dim={batch_dim!r}): expected a dimension counted from 0.")
        if scaler is not None and not callable(getattr(scaler, "scale", None)):
            raise ValueError(f"SampleSplitter(scaler={scaler!r:.80}): expected a GradScaler. Leave it out without one.")
        if isinstance(model, nn.DataParallel):
            raise ValueError(
                "SampleSplitter(model=DataParallel(…)): expected a model that runs in one thread, since its replicas "
                "are made anew at every step. Use DistributedDataParallel."
            )
        if any(m._compiled_call_impl is not None or hasattr(m, "_orig_mod") for m in model.modules()):
            raise RuntimeError(
                "SampleSplitter(model): expected a model that is not compiled, since its layers are run by the "
                "splitter. Give it the model from before torch.compile."
            )
        self.model: nn.Module = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
        self.batch_dim, self.token, self.scaler = batch_dim, per == "token", scaler
        names = {name for name, _ in self.model.named_modules()}
        parameters = {name for name, _ in self.model.named_parameters()}
        found = [] if isinstance(quarantine, str) else list(quarantine)
        for option, asked in (("quarantine", found), ("also", also), ("leave_out", leave_out)):
            for name in asked:
                if name not in (names | parameters if option == "leave_out" else names):
                    near = difflib.get_close_matches(str(name), names, cutoff=0.3) or sorted(filter(None, names))[:3]
                    raise ValueError(
                        f"SampleSplitter({option}={list(asked)!r}): expected names of modules, got {name!r}, which the "
                        f"model does not have. Nearest: {', '.join(map(repr, near))}."
                    )
        self.quarantine, self.also, self.leave_out = quarantine, tuple(also), tuple(leave_out)
        self.unruled: list[str] = []
        self.layers: dict[str, Layer] = {}
        self.joints: dict[str, Quarantine] = {}
        self._notes: deque[tuple[int, str, Tensor]] = deque(maxlen=keep)
        self._patched: list[tuple[nn.Module, Forward]] = []
        self._handle: Any = None
        self._passes, self._task = 0, -1
        self._known: dict[int, Tensor] = {}
        self._away: Tensor | None = None
        self._inside = False
        # Since the last step: a layer had no sound sample; a sound sample had a gradient. This pass, and the next one:
        # all rows are in quarantine.
        self._lost = self._lives = self._void = self._void_next = False
        self._said: set[str] = set()
        self._plan()

    def attach(self, optimizer: torch.optim.Optimizer | None = None) -> SampleSplitter:
        """Split from now on; with an optimizer, a step whose samples were all bad is passed over (on the CPU).

        Returns:
            This splitter; `.remove()` makes the model as it was.

        Raises:
            RuntimeError: a layer is split already.
            ValueError: the optimizer has no parameter of the model.
        """
        if self._patched or any(isinstance(m.__dict__.get("forward"), Forward) for m in self.model.modules()):
            raise RuntimeError(
                "SampleSplitter.attach(): expected a model that is not split by sample yet. "
                "Call .remove() of the first splitter."
            )
        modules = dict(self.model.named_modules())
        mine = {id(parameter) for parameter in self.model.parameters()}
        if optimizer is not None and not (
            isinstance(optimizer, torch.optim.Optimizer)
            and any(id(parameter) in mine for held in optimizer.param_groups for parameter in held["params"])
        ):
            raise ValueError(
                f"SampleSplitter.attach({type(optimizer).__name__}): expected the optimizer of this model, got one "
                "that has none of its parameters. Give it the optimizer that trains the model, or none."
            )
        if not any(parameter.requires_grad for name in self.layers for parameter in modules[name].parameters()):
            self._say("SampleSplitter: no layer of this model is split, since none that has a rule is trained.")
        if self.unruled:
            self._say(
                f"SampleSplitter: no rule for {', '.join(self.unruled)}; their gradients stay as they are. Name "
                "a module whose samples do not meet inside it in `also`, or name it in `leave_out` to accept this."
            )
        for name, layer in self.layers.items():
            self._patch(modules[name], layer.call)
        for name, joint in self.joints.items():
            norm = isinstance(modules[name], BATCH_NORMS)
            self._patch(modules[name], _BeforeNorm(joint) if norm else _AfterJoint(self, joint))
        if self.joints:
            self._patch(self.model, self._run_model)
        if optimizer is not None:
            self._handle = optimizer.register_step_pre_hook(self._before_step)
        return self

    def remove(self) -> None:
        """Take everything off; the model is as it was."""
        while self._patched:
            module, forward = self._patched.pop()
            forward.on = False
            if module.__dict__.get("forward") is not forward:
                continue  # another library runs the module by now, and this splitter inside
            if forward.before is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = forward.before
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def __enter__(self) -> SampleSplitter:
        return self.attach()

    def __exit__(self, *error: object) -> None:
        self.remove()

    def named(self, beyond: float = 1.0, *, last: bool = False) -> list[StoodOut]:
        """The samples that were masked, or whose ratio is above ``beyond``, oldest first; waits for the device.

        Args:
            beyond: smallest ratio of norm to limit.
            last: of the last backward pass alone.
        """
        found = []
        for step, layer, ratio_S in self._notes:
            if last and step < self._passes - 1:
                continue
            for index, ratio in enumerate(ratio_S.tolist()):
                if math.isnan(ratio) or ratio > beyond:
                    found.append(StoodOut(step, index, layer, "not finite" if math.isnan(ratio) else ratio))
        return found

    @property
    def kept_S(self) -> Tensor | None:
        """Which rows of the last forward pass are not in quarantine; None where all are kept."""
        return None if self._away is None else ~self._away

    def state_dict(self) -> dict[str, Any]:
        """The running scales by layer and joint, and the number of passes."""
        parts: dict[str, dict[str, Any]] = {"layers": dict(self.layers), "joints": dict(self.joints)}
        state: dict[str, Any] = {
            key: {
                name: torch.as_tensor(part.scale, dtype=torch.float64).clone()
                for name, part in these.items()
                if part.scale is not None
            }
            for key, these in parts.items()
        }
        return {**state, "passes": self._passes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a saved state.

        Raises:
            ValueError: it names a layer that this splitter does not have.
        """
        call = "SampleSplitter.load_state_dict(…)"
        check_state(state, ("layers", "joints", "passes"), call=call)
        parts: dict[str, dict[str, Any]] = {"layers": dict(self.layers), "joints": dict(self.joints)}
        for key, these in parts.items():
            for name in state[key]:
                if name not in these:
                    raise ValueError(
                        f"{call}: expected the state of this model's layers, got one of {name!r}, which is not split "
                        "here. Make the splitter with the model and options of the saved run."
                    )
        for key, these in parts.items():
            for name, part in these.items():
                part.scale = state[key][name].clone() if name in state[key] else None
        self._passes = int(state["passes"])

    def _plan(self) -> None:
        """Which module is run by which rule; modules with parameters of their own and no rule are listed."""
        covered: tuple[str, ...] = ()
        first = True
        for name, module in self.model.named_modules():
            if _below(name, (*covered, *self.leave_out)):
                continue
            kinds: tuple[Kind, ...] = (*WHOLE, *KINDS)
            kind: Kind | None = next((kind for kind in kinds if kind.fits(module)), None)
            if name in self.also:
                kind = WholeKind()
            if not is_own(module.__dict__.get("forward"), module):
                kind = None  # another library runs it
            if isinstance(module, BATCH_NORMS):
                if self.quarantine == "auto":
                    self.joints[name] = Quarantine(name or "(model)", self, factor=3.0 if first else math.inf)
                    first = False
                else:
                    self._list(name, module)
                continue
            if kind is not None and not any(p.is_complex() for p in module.parameters()):
                self.layers[name] = Layer(self, name or "(model)", kind)
                if isinstance(kind, WholeKind):
                    covered = (*covered, name)
            else:
                self._list(name, module)
        if not isinstance(self.quarantine, str):
            for name in self.quarantine:
                self.joints[name] = Quarantine(name or "(model)", self, self.batch_dim)

    def _list(self, name: str, module: nn.Module) -> None:
        for key, parameter in module.named_parameters(name, recurse=False):
            if parameter.requires_grad and key not in self.leave_out:
                self.unruled.append(key)

    def _patch(self, module: nn.Module, call: Callable[..., Any]) -> None:
        module.__dict__["forward"] = forward = Forward(module, call, module.__dict__.get("forward"))
        self._patched.append((module, forward))

    def _run_model(self, module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        self._away, self._inside = None, True
        try:
            outputs = forward(*args, **kwargs)
        finally:
            self._inside = False
        kept_S = self.kept_S
        if kept_S is not None:
            for tensor in tree_leaves(outputs):
                if isinstance(tensor, Tensor) and tensor.requires_grad and tensor.dim() > self.batch_dim:
                    _silence(tensor, ~kept_S, self.batch_dim)
        return outputs

    def keep(self, name: str, ratio_S: Tensor, bad_S: Tensor) -> None:
        """Called by a quarantine: note the rows, and leave their signal out at the model's outputs."""
        self._notes.append((self._passes, name, ratio_S))
        if not self._inside:
            self._say(
                f"SampleSplitter: {name!r} ran outside the model's own forward, so that the loss of the rows in "
                "quarantine is not left out. Call the model itself."
            )
        away = self._away
        self._away = bad_S if away is None or away.shape != bad_S.shape else away | bad_S
        if looks(bad_S) and bool(bad_S.all()):
            self._void_next = True
            self.lose()

    def see_pass(self) -> None:
        """Count backward passes; the engine gives every pass a number of its own."""
        task = torch._C._current_graph_task_id()
        if task != self._task:
            self._task = task
            self._passes += 1
            self._known.clear()
            self._void, self._void_next = self._void_next, False

    def sound(self, activation_S: Tensor, finite_S: Tensor) -> Tensor:
        """Which samples are not masked. Under a scaler an overflowing signal of a sound sample is let through."""
        if self.scaler is None:
            return finite_S
        bad_S = ~activation_S.isfinite()
        known = self._known.get(bad_S.numel())
        self._known[bad_S.numel()] = bad_S = bad_S if known is None else bad_S | known
        return ~bad_S

    def note(self, name: str, ratio_S: Tensor) -> None:
        """Called by a layer in the backward pass: samples stood out."""
        self._notes.append((self._passes - 1, name, ratio_S))

    def live(self) -> None:
        """A sound sample of the pass has a gradient in a layer."""
        self._lives = self._lives or not self._void

    def lose(self) -> None:
        """No sample of the pass is sound in a layer, or in front of a statistic."""
        self._lost = True
        self._say(
            "SampleSplitter: no sample of the batch is finite, so that its gradient is zero. With .attach(optimizer) "
            "a step without any other gradient is passed over; look at the input or at the weights if this lasts."
        )

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Pass over a step in which samples were lost and no sound one had a gradient: no gradient, no update."""
        if self._lost and not self._lives:
            for parameters in optimizer.param_groups:
                for parameter in parameters["params"]:
                    parameter.grad = None
        self._lost = self._lives = self._void = self._void_next = False

    def _say(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            warnings.warn(text, UserWarning, stacklevel=3)


class Quarantine:
    """The rows of one activation in front of a statistic of the batch.

    Args:
        name: of the module, for the notes.
        keeper: who leaves the rows' signal out.
        batch_dim: the dimension of the samples.
        factor: largest ratio of a row's norm to the running median; inf: rows that are not finite alone.
    """

    def __init__(self, name: str, keeper: SampleSplitter, batch_dim: int = 0, factor: float = 3.0) -> None:
        self.name, self.keeper, self.batch_dim = name, keeper, batch_dim
        self.rule = RunningLimit(quantile=0.5, factor=factor)
        self.scale: Tensor | float | None = None
        self.bad_S: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """The activation with ordinary rows in the place of bad ones."""
        self.bad_S = None
        if x.dim() < 2 or x.numel() == 0:
            return x
        rows = row_shape(x.shape, x.dim() - self.batch_dim - 1, self.batch_dim)
        norm_S = length(x, rows, again=False)
        limit: Tensor | float
        if looks(x):  # in numbers: on the CPU a call of NumPy costs a third of one of torch
            before = float(self.scale or 0.0)
            self.scale, limit, largest = self.rule.follow_numbers(before, norm_S.numpy())
            if not math.isfinite(largest):  # or beyond the range of float32
                norm_S = length(x, rows)
                self.scale, limit, largest = self.rule.follow_numbers(before, norm_S.numpy())
            if math.isfinite(largest) and largest <= limit:
                return x
            norm_S = wide(norm_S)
            finite_S = norm_S.isfinite()
        else:
            norm_S = wide(norm_S)
            finite_S = norm_S.isfinite()
            scale = torch.as_tensor(0.0 if self.scale is None else self.scale).to(norm_S)
            self.scale, limit = self.rule.follow(scale, norm_S, finite_S & (norm_S > 0))
        bad_S = ~finite_S | (norm_S > limit)
        self.bad_S = bad_S
        self.keeper.keep(self.name, torch.where(finite_S, norm_S / limit, math.nan), bad_S)
        return self._replaced(x, bad_S)

    def again(self, x: Tensor) -> Tensor:
        """The same rows replaced as in the call before: what a recomputation of activations needs."""
        return (
            x if self.bad_S is None or self.bad_S.numel() != x.shape[self.batch_dim] else self._replaced(x, self.bad_S)
        )

    def around_norm(self, norm: Any, forward: Any, x: Tensor) -> Any:
        """Run a batch normalisation whose running statistics stay as they are where no row is sound."""
        bad_S = self.bad_S
        if bad_S is None or norm.running_mean is None:
            return forward(x)
        before = norm.running_mean.clone(), norm.running_var.clone()
        y = forward(x)
        sound = ~bad_S.all()
        for now, old in zip((norm.running_mean, norm.running_var), before, strict=True):
            # Through .data: backward holds these tensors, does not read them, and would refuse a new version.
            now.data.copy_(torch.where(sound, now, old))
        return y

    def _replaced(self, x: Tensor, bad_S: Tensor) -> Tensor:
        rows = row_shape(x.shape, x.dim() - self.batch_dim - 1, self.batch_dim)
        place_S = torch.arange(bad_S.numel(), device=x.device)
        first = (~bad_S).to(torch.uint8).argmax()
        nearest_S = torch.where(bad_S, -1, place_S).cummax(0).values
        nearest_S = torch.where(nearest_S < 0, first, nearest_S)
        ordinary = x.detach().index_select(self.batch_dim, nearest_S)
        ordinary = torch.where(bad_S.all(), torch.zeros((), dtype=x.dtype, device=x.device), ordinary)
        return torch.where(spread(bad_S, rows), ordinary, x)


class _BeforeNorm:
    """Quarantine for the input of a batch normalisation."""

    def __init__(self, joint: Quarantine) -> None:
        self.joint = joint

    def __call__(
        self, module: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if not module.training:
            return forward(*args, **kwargs)
        (x,) = [*args, *kwargs.values()]
        x = self.joint(x) if torch._C._current_graph_task_id() < 0 else self.joint.again(x)
        return self.joint.around_norm(module, forward, x)


class _AfterJoint:
    """Quarantine for the output of a module that was named."""

    def __init__(self, splitter: SampleSplitter, joint: Quarantine) -> None:
        self.splitter, self.joint = splitter, joint

    def __call__(self, module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        y = forward(*args, **kwargs)
        if not self.splitter.model.training:
            return y
        if not isinstance(y, Tensor):
            raise ValueError(
                f"SampleSplitter(quarantine=[{self.joint.name!r}]): expected a module whose output is one tensor, got "
                f"{type(y).__name__}. Name the module inside it that makes the tensor."
            )
        return self.joint(y) if torch._C._current_graph_task_id() < 0 else self.joint.again(y)


def _below(name: str, parents: Sequence[str]) -> bool:
    return any(name == parent or name.startswith(f"{parent}.") for parent in parents)


def _silence(tensor: Tensor, away_S: Tensor, batch_dim: int) -> None:
    """Leave the signal of rows in quarantine out where it enters the model."""
    if tensor.shape[batch_dim] != away_S.numel():
        return
    rows = [size if dim == batch_dim else 1 for dim, size in enumerate(tensor.shape)]
    tensor.register_hook(
        lambda d: torch.where(spread(away_S, rows), torch.zeros((), dtype=d.dtype, device=d.device), d)
    )
