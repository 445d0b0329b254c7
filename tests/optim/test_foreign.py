"""What comes from elsewhere is refused or served in our words: other optimizers' states, mixed dtypes, lazy modules."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gradsplit as gs
from gradsplit.kernels.addressable import FallbackWarning, remedy_of

OTHERS = {
    "SGD with momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    "RMSprop": torch.optim.RMSprop,
    "Adagrad": torch.optim.Adagrad,
    "Rprop": torch.optim.Rprop,
}


@pytest.mark.parametrize("direction", ["auto", "adam"])
@pytest.mark.parametrize("name", OTHERS)
def test_the_state_of_another_optimizer_is_refused_with_the_advice_that_fits(name, direction):
    layer = nn.Linear(3, 2)
    other = OTHERS[name](layer.parameters())
    layer(torch.ones(1, 3)).sum().backward()
    other.step()
    optimizer = gs.GSO(layer, direction=direction)
    with pytest.raises(ValueError, match=r"That is the state of another optimizer.*Start GSO without it") as said:
        optimizer.load_state_dict(other.state_dict())
    assert "second_moment" not in str(said.value) and "direction of the saved run" not in str(said.value)
    assert not optimizer.state
    optimizer.step()


def test_the_other_second_moment_keeps_its_own_advice():
    layer = nn.Linear(3, 2)
    first = gs.GSO(layer, direction="adam", second_moment="bin")
    layer(torch.ones(1, 3)).sum().backward()
    first.step()
    with pytest.raises(ValueError, match="Make GSO with second_moment='bin' as in the saved run"):
        gs.GSO(layer, direction="adam").load_state_dict(first.state_dict())


def test_mixed_dtypes_fall_back_with_the_remedy_that_fits():
    parameter = nn.Parameter(torch.ones(4, 6))
    optimizer = gs.GSO([parameter], lr=1e-2, backend="numba", direction="adam")
    parameter.grad = torch.ones(4, 6)
    optimizer.step()
    for value in optimizer.state[parameter].values():
        if value.dim() == 2:
            value.data = value.double()
    with pytest.warns(FallbackWarning, match=r"dtype is .*Give the parameter, its gradient and its moments one dtype"):
        optimizer.step()


@pytest.mark.parametrize(
    "reason, remedy",
    [
        ("its strides (10, 1) are not those of its moments", "Make the parameter contiguous, or use backend='eager'."),
        ("its dtype is torch.float8_e5m2", "Use backend='eager'."),
        ("it lives on meta", "Use backend='eager'."),
        ("its layout is torch.sparse_coo", "Use backend='eager'."),
    ],
)
def test_a_remedy_follows_from_its_reason(reason, remedy):
    assert remedy_of(reason) == remedy


MAKERS = {
    "layout_of": gs.layout_of,
    "GradientSplitter": gs.GradientSplitter,
    "GSO": gs.GSO,
    "GSO of parameters": lambda model: gs.GSO(model.parameters()),
    "GSO, adam": lambda model: gs.GSO(model, direction="adam"),
}


@pytest.mark.parametrize("name", MAKERS)
def test_a_lazy_module_is_refused_by_name_until_it_has_run(name):
    model = nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(3))
    place = "'1.weight'" if name != "GSO of parameters" else "'.*'"
    with pytest.raises(
        ValueError, match=rf"expected parameters with shapes, got a lazy one at {place}\. Run one batch"
    ):
        MAKERS[name](model)
    model(torch.ones(1, 4))
    MAKERS[name](model)


def test_a_lazy_group_is_refused_and_leaves_nothing_behind():
    optimizer = gs.GSO(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"GSO\(…\): expected parameters with shapes"):
        optimizer.add_param_group({"params": list(nn.LazyLinear(2).named_parameters())})
    assert len(optimizer.param_groups) == 1
    optimizer.step()
