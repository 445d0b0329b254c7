"""Layouts: the matrix view, what is trainable, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gradsplit as gs
from gradsplit.plan import Layout, named_trainable


@pytest.mark.parametrize(
    ("shape", "rows", "cols"),
    [
        ((), 1, 1),
        ((5,), 1, 5),
        ((0,), 1, 0),
        ((3, 4), 3, 4),
        ((64, 3, 7, 7), 64, 147),
        ((2, 3, 4), 2, 12),
        ((0, 4), 0, 4),
        ((3, 0), 3, 0),
        ((2**40, 2**40), 2**40, 2**40),
    ],
)
def test_matrix_view(shape, rows, cols):
    layout = Layout.from_shapes({"t": shape})
    assert (layout.rows, layout.cols) == ((rows,), (cols,))
    assert layout.numels == (rows * cols,)
    assert layout.num_elements == rows * cols


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 7)
        self.head.weight = self.embed.weight
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.frozen = nn.Linear(4, 4)
        self.frozen.requires_grad_(False)


def test_tied_parameters_appear_once_and_frozen_ones_and_buffers_not_at_all():
    layout = gs.layout_of(Tied())
    assert layout.names == ("embed.weight", "norm.weight", "norm.bias", "head.bias")
    pairs = list(Tied().named_parameters(remove_duplicate=False))
    assert gs.layout_of(pairs).names == layout.names
    assert gs.layout_of(dict(pairs)).names == layout.names


def test_order_and_fingerprint_follow_the_model():
    a, b = gs.layout_of(nn.Linear(3, 2)), gs.layout_of(nn.Linear(3, 2))
    assert a == b
    assert a.fingerprint == b.fingerprint
    assert a.fingerprint != gs.layout_of(nn.Linear(2, 3)).fingerprint
    assert Layout(a.names[::-1], a.shapes[::-1]).fingerprint != a.fingerprint


def test_sizes_of_other_libraries_become_python_integers():
    import numpy as np

    layout = Layout.from_shapes({"w": np.array([3, 4]), "v": torch.Size([2])})
    assert layout.shapes == ((3, 4), (2,))
    assert all(type(size) is int for shape in layout.shapes for size in shape)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: gs.layout_of(nn.ReLU()), ValueError, "expected parameters, got none from the ReLU"),
        (lambda: gs.layout_of(iter(())), ValueError, "A generator can be read only once: pass the model"),
        (lambda: gs.layout_of({}), ValueError, "got none from the mapping"),
        (
            lambda: gs.layout_of(nn.Linear(2, 2).requires_grad_(False)),
            ValueError,
            "expected a trainable parameter, got 2 frozen ones from the Linear. Set requires_grad=True",
        ),
        (
            lambda: gs.layout_of({"steps": torch.zeros(3, dtype=torch.int64)}),
            ValueError,
            "expected a trainable parameter, got 1 frozen ones",
        ),
        (
            lambda: gs.layout_of(nn.Linear(2, 2).parameters()),
            TypeError,
            "got an item of type Parameter. Pass model.named_parameters",
        ),
        (
            lambda: gs.layout_of(None),
            TypeError,
            r"layout_of\(…\): expected a model or pairs .*, got NoneType. Pass the model",
        ),
        (lambda: gs.layout_of(nn.Linear), TypeError, r"got the class Linear. .* as in model = Linear\(…\)"),
        (lambda: gs.layout_of([("w", 3)]), TypeError, "expected a tensor at 'w', got int. Pass pairs"),
        (lambda: gs.layout_of(nn.LazyLinear(2)), ValueError, "got a lazy one at 'weight'. Run one batch"),
        (
            lambda: gs.xsp(nn.Linear(2, 2)),
            TypeError,
            r"xsp\(Linear\): expected a Layout. Write xsp\(layout_of\(model\)\)",
        ),
        (lambda: gs.lbf(nn.Linear(2, 2), {}), TypeError, r"lbf\(Linear\): expected a Layout"),
        (lambda: gs.tree_sp(nn.Linear(2, 2)), TypeError, r"tree_sp\(Linear\): expected a Layout"),
        (lambda: gs.whole(nn.Linear), TypeError, r"whole\(a class\): expected a Layout"),
        (lambda: gs.per_tensor(None), TypeError, r"per_tensor\(NoneType\): expected a Layout"),
        (lambda: Layout((), ()), ValueError, "expected at least one tensor, got none"),
        (lambda: Layout(("a", "b"), ((1,),)), ValueError, "expected one shape per name, got 2 names and 1 shapes"),
        (lambda: Layout(("a", "a"), ((1,), (2,))), ValueError, "expected unique names, got 'a' twice. Prefix"),
        (lambda: Layout(("",), ((1,),)), ValueError, "expected a non-empty string as a tensor's name, got ''"),
        (lambda: Layout.from_shapes({"w": (2, -1)}), ValueError, r"integers >= 0, got \(2, -1\) at 'w'"),
        (lambda: Layout.from_shapes({"w": (2.5, 3)}), ValueError, r"integers >= 0, got \(2.5, 3\) at 'w'"),
        (lambda: Layout.from_shapes({"w": (True, 3)}), ValueError, r"integers >= 0, got \(True, 3\) at 'w'"),
    ],
)
def test_bad_input_is_named(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_a_name_given_twice_for_two_parameters_is_refused():
    pairs = [("w", nn.Parameter(torch.zeros(2))), ("w", nn.Parameter(torch.zeros(2)))]
    assert len(named_trainable(pairs)) == 2
    with pytest.raises(ValueError, match="expected unique names, got 'w' twice"):
        gs.layout_of(pairs)


def test_a_compiled_model_has_the_names_of_the_plain_one():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    assert gs.layout_of(torch.compile(model)).names == gs.layout_of(model).names
    names = gs.layout_of(model).names
    model[1] = torch.compile(model[1])
    assert gs.layout_of(model).names == names
