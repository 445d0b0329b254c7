from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradsplit.chain import joints
from gradsplit.chain.joints import layers_of, replace_tensors, tensors_in
from tests.chain.nets import Pair, Recurrent, Residual, Structured, Tied, TwoHeads


def roles(model: nn.Module, batch: object, loss_fn: object = None) -> dict[str, str]:
    return {joint.name: joint.role for joint in joints(model, batch, loss_fn) if joint.kind == "branch"}


def test_heads_that_meet_only_in_the_loss_are_tasks() -> None:
    x = torch.randn(3, 4)
    both = {"trunk.2->cls": "task", "trunk.2->box": "task"}
    assert roles(TwoHeads(), x) == both
    assert roles(TwoHeads(), x, lambda m, b: sum(part.square().mean() for part in m(b))) == both
    assert roles(TwoHeads(), x, lambda m, b: torch.stack([part.mean() for part in m(b)]).sum()) == both


def test_heads_that_meet_entry_by_entry_are_one_task() -> None:
    def likelihood(model: nn.Module, batch: Tensor) -> Tensor:
        mean, scale = model(batch)
        return (mean / (1 + scale[:, :3].square())).sum()

    assert set(roles(TwoHeads(), torch.randn(3, 4), likelihood).values()) == {"merge"}


def test_residual_adds_are_never_tasks() -> None:
    found = roles(Residual(), torch.randn(3, 4))
    assert set(found.values()) == {"residual"} and len(found) == 4


def test_a_penalty_on_an_activation_is_no_head() -> None:
    class Penalised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            return F.cross_entropy(self.b(h), torch.zeros(len(x), dtype=torch.long)) + h.square().mean()

    assert "task" not in roles(Penalised(), torch.randn(3, 4)).values()


def test_three_heads_and_a_tied_weight() -> None:
    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk = nn.Linear(4, 4)
            self.heads = nn.ModuleDict({name: nn.Linear(4, 2) for name in "abc"})

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            h = self.trunk(x)
            return {name: head(h) for name, head in self.heads.items()}

    found = roles(Three(), torch.randn(3, 4))
    assert found == {f"trunk->heads.{name}": "task" for name in "abc"}
    assert roles(Tied(), torch.randint(7, (2, 3))) == {}


def test_outputs_inside_tuples_and_dataclasses_have_places() -> None:
    names = [joint.name for joint in joints(Structured(), torch.randn(5, 4))]
    assert {"split.first", "split.second", "mix.sum", "mix.flat", "out"} <= set(names)
    lstm = joints(Recurrent(nn.LSTM), torch.randn(2, 5, 3))
    assert [j.name for j in lstm][:3] == ["rnn[0]", "rnn[1][0]", "rnn[1][1]"]
    assert "Unrolled" in lstm[0].note


def test_repeated_modules_are_time_steps() -> None:
    model = nn.Sequential(nn.Linear(4, 4))

    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = model

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(3):
                x = torch.tanh(self.cell(x))
            return x

    kinds = {joint.name: joint.role for joint in joints(Loop(), torch.randn(2, 4)) if joint.module == "cell.0"}
    assert kinds == {"cell.0": "time", "cell.0#2": "time", "cell.0#3": "time"}


def test_layers_are_the_blocks_of_a_stack() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))

    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(3, 4)
            self.h = nn.ModuleList(Block() for _ in range(3))

    outer = nn.ModuleDict({"transformer": Body(), "head": nn.Linear(4, 3)})
    expected = ["transformer.table", "transformer.h.0", "transformer.h.1", "transformer.h.2", "head"]
    assert layers_of(outer) == expected


def test_hooks_and_gradients_leave_no_trace() -> None:
    model = TwoHeads()
    joints(model, torch.randn(3, 4))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_a_batch_that_does_not_fit_is_explained() -> None:
    with pytest.raises(TypeError, match="pass loss_fn"):
        joints(TwoHeads(), (torch.randn(3, 4), torch.zeros(3)))


def test_structures_are_rebuilt_with_their_type() -> None:
    value = {"pair": Pair(torch.ones(1), torch.zeros(1)), "rest": [torch.ones(2), 5]}
    doubled = replace_tensors(value, lambda place, tensor: tensor * 2)
    assert isinstance(doubled["pair"], Pair) and doubled["pair"].label == "kept" and doubled["rest"][1] == 5
    assert [place for place, _ in tensors_in(doubled)] == [".pair.first", ".pair.second", ".rest[0]"]
    assert replace_tensors(value, lambda place, tensor: tensor) is value
