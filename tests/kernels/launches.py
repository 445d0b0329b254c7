"""What a step asks of the device: dispatched operations without views, copies from the host, values brought back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

import gradsplit as gs

VIEWS = frozenset(
    [
        "_reshape_alias",
        "_unsafe_view",
        "alias",
        "as_strided",
        "detach",
        "diagonal",
        "expand",
        "narrow",
        "permute",
        "reshape",
        "select",
        "slice",
        "split",
        "split_with_sizes",
        "squeeze",
        "t",
        "transpose",
        "unbind",
        "unsqueeze",
        "view",
        "view_as_real",
    ]
)
"""Operations that move nothing."""

MADE = frozenset(("empty", "empty_like", "empty_strided", "new_empty"))
"""Operations that take memory and launch nothing."""

WAITS = frozenset(("_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select", "_unique2"))
"""Operations that bring a value, or a shape that depends on values, to the host."""


class Operations(TorchDispatchMode):
    """Counts the operations of a step by name; what runs on the host alone, such as a table that is sent, is left out.

    Attributes:
        seen: operations on tensors of the device.
        sent: copies from the host that make it wait for the device.
        brought: operations that bring something to the host.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device
        self.seen: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()
        self.brought: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        here = [x.device.type for x in _tensors((args, kwargs))]
        there = [x.device.type for x in _tensors(made)]
        if name in WAITS:
            self.brought[name] += 1
        if self.device in (*here, *there) and name not in VIEWS | MADE:
            self.seen[name] += 1
        moved = name in ("_to_copy", "copy_") and {*here, *there} == {"cpu", self.device} != {"cpu"}
        if moved and not (kwargs or {}).get("non_blocking", False):
            self.sent[name] += 1
        if name == "lift_fresh":  # torch.tensor(…): a number of the host, which a GPU would be sent
            self.sent[name] += 1
        return made

    def total(self) -> int:
        """All operations."""
        return sum(self.seen.values())


def _tensors(values: Any) -> list[torch.Tensor]:
    return [x for x in torch.utils._pytree.tree_leaves(values) if isinstance(x, torch.Tensor)]


def gpt(width: int, vocabulary: int, context: int, blocks: int = 12) -> dict[str, tuple[int, ...]]:
    """The shapes of GPT-2: 148 tensors in 12 blocks."""
    shapes: dict[str, tuple[int, ...]] = {"wte.weight": (vocabulary, width), "wpe.weight": (context, width)}
    for i in range(blocks):
        of_block = {
            "ln_1": (width,),
            "attn.c_attn": (3 * width, width),
            "attn.c_proj": (width, width),
            "ln_2": (width,),
            "mlp.c_fc": (4 * width, width),
            "mlp.c_proj": (width, 4 * width),
        }
        for name, shape in of_block.items():
            shapes[f"h.{i}.{name}.weight"], shapes[f"h.{i}.{name}.bias"] = shape, shape[:1]
    return shapes | {"ln_f.weight": (width,), "ln_f.bias": (width,)}


TINY = gpt(8, 17, 5)
FULL = gpt(768, 50_257, 1_024)


def named(shapes: dict[str, tuple[int, ...]], device: str) -> list[tuple[str, Parameter]]:
    """Parameters with gradients."""
    torch.manual_seed(0)
    made = [(name, Parameter(torch.randn(shape, device=device))) for name, shape in shapes.items()]
    for _, p in made:
        p.grad = torch.randn_like(p)
    return made


Pairs = list[tuple[str, Parameter]]

SPLITTERS: dict[str, Callable[[Pairs, str], gs.GradientSplitter]] = {
    "the default": lambda pairs, backend: gs.GradientSplitter(pairs, backend=backend, budget=gs.Relative(0.2)),
    "in front of SGD": lambda pairs, backend: gs.GradientSplitter(
        pairs, backend=backend, optimizer=torch.optim.SGD([p for _, p in pairs], lr=0.1, momentum=0.9)
    ),
    "in front of AdamW": lambda pairs, backend: gs.GradientSplitter(
        pairs, backend=backend, optimizer=torch.optim.AdamW([p for _, p in pairs])
    ),
    "Ema with the root": lambda pairs, backend: gs.GradientSplitter(
        pairs, backend=backend, budget={"bin": gs.Ema(), "root": gs.Ema(2.0)}
    ),
    "nearest": lambda pairs, backend: gs.GradientSplitter(
        pairs, backend=backend, budget={"bin": gs.Ema(), "root": gs.Fixed(1.0)}, rule="nearest"
    ),
}
"""What is counted."""
