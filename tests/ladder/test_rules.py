"""Every rule against nested autograd, on 4 x 3 matrices that keep away from kinks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from gradsplit.ladder import UnsupportedOperation, rule, taylor_ladder
from gradsplit.ladder.rules import RULES
from gradsplit.ladder.rules.elementwise import multiply
from gradsplit.ladder.series import add
from gradsplit.ladder.trace import trace_loss
from tests.ladder.oracles import in_float64, nested_autograd

_IMAGE = (1, 1, 4, 3)

CASES = {
    "abs": lambda x: (x - 0.5).abs() * x,
    "add scalar": lambda x: torch.exp(x + 2),
    "addcmul": lambda x: torch.addcmul(x, x.exp(), x, value=0.5),
    "amax": lambda x: x.amax(0) ** 3,
    "amin": lambda x: x.amin((0, 1)) ** 3,
    "atan": torch.atan,
    "avg pool": lambda x: F.avg_pool2d(x.reshape(_IMAGE), 2) ** 3,
    "addbmm": lambda x: torch.addbmm(x, x.exp().expand(2, 4, 3), x[:3].expand(2, 3, 3), beta=0.5, alpha=2),
    "addmv": lambda x: torch.addmv(x[0], x[:3].exp(), x[1], beta=0.5, alpha=2),
    "acos": torch.acos,
    "acosh": lambda x: torch.acosh(x + 1.5),
    "asin": torch.asin,
    "asinh": torch.asinh,
    "atanh": torch.atanh,
    "adaptive pool": lambda x: F.adaptive_avg_pool2d(x.reshape(_IMAGE), (2, 2)) ** 3,
    "batch norm, running": lambda x: F.batch_norm(x, torch.ones(3), torch.full((3,), 2.0)) ** 3,
    "binary cross-entropy": lambda x: F.binary_cross_entropy(x, torch.full_like(x, 0.3)),
    "logits cross-entropy": lambda x: F.binary_cross_entropy_with_logits(x, torch.full_like(x, 0.3)),
    "bmm": lambda x: torch.bmm(x.expand(2, 4, 3).exp(), x.T.expand(2, 3, 4)),
    "cat with a constant": lambda x: torch.cat([x, torch.ones(1, 3)]) ** 3,
    "clamp": lambda x: x.clamp(0.25, 0.75) * x,
    "constant pad": lambda x: F.pad(x, (1, 0), value=0.5) ** 3,
    "conv, both sides move": lambda x: F.conv2d(x.reshape(_IMAGE).exp(), x[:2, :2].reshape(1, 1, 2, 2).sin()),
    "conv transpose": lambda x: F.conv_transpose1d(x.reshape(1, 4, 3), x[:, :2].reshape(4, 1, 2)) ** 2,
    "cosh": torch.cosh,
    "cross-entropy": lambda x: F.cross_entropy(x, torch.tensor([0, 2, 1, 1])),
    "cross-entropy, weights and a hole": lambda x: F.cross_entropy(
        x, torch.tensor([0, 2, -100, 1]), weight=torch.tensor([1.0, 2.0, 3.0])
    ),
    "cumsum": lambda x: x.cumsum(0) ** 3,
    "div": lambda x: x.exp() / (1 + x),
    "einsum": lambda x: torch.einsum("ij,kj->ik", x.exp(), x.sin()),
    "elu": lambda x: F.elu(x - 0.5),
    "embedding": lambda x: F.embedding(torch.tensor([0, 2, 2]), x) ** 3,
    "erfc": torch.erfc,
    "exp": torch.exp,
    "exp2": torch.exp2,
    "expm1": torch.expm1,
    "flip": lambda x: x.flip(0) * x.exp(),
    "gather": lambda x: x.gather(1, torch.tensor([[0], [2], [1], [1]])) ** 3,
    "gelu": F.gelu,
    "gelu, tanh": lambda x: F.gelu(x, approximate="tanh"),
    "glu": lambda x: F.glu(x.reshape(-1)),
    "hardswish": lambda x: F.hardswish(x),
    "hardtanh": lambda x: F.hardtanh(2 * x - 1, -0.3, 0.3) * x,
    "huber": lambda x: F.huber_loss(x, torch.zeros_like(x), delta=0.5),
    "index": lambda x: x[[0, 2]] ** 3,
    "index_put": lambda x: torch.ones_like(x).index_put((torch.tensor([0, 1]),), x[:2]) ** 3,
    "kl": lambda x: F.kl_div(x.log_softmax(0), torch.full_like(x, 0.25), reduction="sum"),
    "layer norm": lambda x: F.layer_norm(x, (3,)) ** 3,
    "leaky relu": lambda x: F.leaky_relu(x - 0.5) * x,
    "lerp": lambda x: torch.lerp(x, x.exp(), 0.3),
    "log": torch.log,
    "log_softmax": lambda x: F.log_softmax(x, 0) ** 2,
    "logsigmoid": F.logsigmoid,
    "logsumexp": lambda x: x.logsumexp(0),
    "masks": lambda x: ((x > 0.3) & ~(x > 0.6)) * x.exp(),
    "matmul": lambda x: x.tanh().T @ x.exp(),
    "max.dim": lambda x: x.max(0)[0] ** 3,
    "max pool": lambda x: F.max_pool2d(x.reshape(_IMAGE), 2) ** 3,
    "maximum": lambda x: torch.maximum(x, 1 - x) ** 3,
    "min": lambda x: x.min() ** 3,
    "mish": F.mish,
    "mv": lambda x: x.exp() @ x[0],
    "norm": lambda x: x.norm(dim=0),
    "norm of order 1": lambda x: (x - 0.5).norm(1, dim=0) ** 2,
    "norm of order 3": lambda x: (x - 0.5).norm(3),
    "norm of order inf": lambda x: (x - 0.4).norm(float("inf"), dim=0) ** 2,
    "norm of order -inf": lambda x: torch.linalg.vector_norm(x - 0.4, -float("inf"), dim=0, dtype=x.dtype) ** 2,
    "pow": lambda x: x**2.5,
    "pow 3": lambda x: x**3,
    "pow 4": lambda x: x**4,
    "pow 0 and 5": lambda x: (x - x) ** 0 + (2 * x) ** 5,
    "pow 7 at zero": lambda x: (x - (torch.arange(12).reshape(4, 3) == 5) * x + x * x - x) ** 7,
    "pow, whole tensor": lambda x: (x - 0.5) ** torch.tensor([0.0, 1.0, 3.0]),
    "pow, tensor of one value": lambda x: (x[:, :1] - 0.5) ** torch.full((3,), 3.0),
    "pow, any tensor": lambda x: (x - 2) ** torch.tensor([-1.0, 3.0, 70.0]) + x ** torch.tensor([0.5, 1.5, 2.0]),
    "pow, base": lambda x: 2**x,
    "pow, both": lambda x: x**x,
    "prod": lambda x: x.prod(0),
    "prod of all": torch.prod,
    "reciprocal": torch.reciprocal,
    "relu": lambda x: F.relu(x - 0.5) ** 3,
    "repeat": lambda x: x.repeat(2, 1) ** 3,
    "rms norm": lambda x: F.rms_norm(x, (3,)) ** 3,
    "rsqrt": torch.rsqrt,
    "rsub": lambda x: 1 / (1 - x),
    "scatter": lambda x: x.scatter(0, torch.tensor([[0, 1, 2]]), 0.3) ** 3,
    "scatter_add": lambda x: torch.zeros_like(x).scatter_add(0, torch.zeros(4, 3, dtype=torch.long), x) ** 3,
    "select and stack": lambda x: torch.stack([x[0], x[2]]) ** 3,
    "selu": lambda x: F.selu(x - 0.5),
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "sinh": torch.sinh,
    "softmax": lambda x: F.softmax(x, -1) ** 2,
    "softplus": F.softplus,
    "sort, stable": lambda x: x.sort(dim=1, stable=True, descending=True)[0] * torch.arange(3.0),
    "sort": lambda x: x.sort(0)[0][1] ** 3,
    "split": lambda x: x.split([1, 3])[1] ** 3,
    "sqrt": torch.sqrt,
    "std": torch.std,
    "tan": torch.tan,
    "topk": lambda x: x.topk(2, 0)[0] ** 3,
    "tril": lambda x: (x.exp() @ x.T).tril(),
    "upsample": lambda x: F.interpolate(x.reshape(_IMAGE), scale_factor=2, mode="nearest") ** 3,
    "var": lambda x: x.var(0),
    "where": lambda x: torch.where(x > 0.5, x.exp(), x.sin()),
}


@pytest.fixture
def point():
    # Distinct values on a grid, off by a third of a cell: none sits at a kink of the cases.
    return {"x": (torch.randperm(12).double().reshape(4, 3) + 1 / 3) / 12}


@pytest.mark.parametrize("name", CASES)
def test_the_rule_agrees_with_nested_autograd(name, point):
    direction = {"x": torch.randn(4, 3, dtype=torch.float64)}

    def loss(params):
        with in_float64():  # for autograd's sake; the ladder raises what is shorter by itself
            return CASES[name](params["x"]).sum()

    # torch's own third derivative of layer_norm is wrong (test_networks.py), and several others have none.
    order = {"layer norm": 2, "clamp": 1, "hardtanh": 1}.get(name, 4)
    found = trace_loss(loss, point).series(point, {"x": direction["x"][None]}, 4)[:, 0].numpy()
    expected = nested_autograd(loss, point, direction, order)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(found[: order + 1], expected, rtol=1e-9, atol=1e-11 * scale)


def test_an_operation_without_a_rule_is_named_and_can_be_added():
    point = {"x": torch.tensor([0.5, 1.5], dtype=torch.float64)}

    def loss(params):
        return torch.hypot(params["x"].exp(), params["x"]).sum()

    with pytest.raises(
        UnsupportedOperation,
        match=r"aten\.hypot\.default on.*@gradsplit\.ladder\.rules\.rule\(torch\.ops\.aten\.hypot\).* The place: "
        r"operation 2 of 3 in the traced loss, hypot of exp and arg0_1\.$",
    ):
        taylor_ladder(loss, point, order=3)

    aten = torch.ops.aten

    @rule(aten.hypot)
    def hypot(a, b):
        return RULES[aten.sqrt](add(multiply(a, a), multiply(b, b)))

    try:
        found = trace_loss(loss, point).series(point, {"x": torch.ones(1, 2)}, 4)[:, 0].numpy()
    finally:
        del RULES[aten.hypot]
    np.testing.assert_allclose(
        found, nested_autograd(loss, point, {"x": torch.ones(2, dtype=torch.float64)}, 4), rtol=1e-12
    )


def test_what_would_be_constant_without_a_word_is_refused():
    """A cast to complex would lose the series, and a norm of order 0 counts."""
    point = {"x": torch.tensor([0.5, 1.5], dtype=torch.float64)}
    with pytest.raises(UnsupportedOperation, match=r"a cast of a value that depends on the step to torch.complex128"):
        taylor_ladder(lambda p: (p["x"].to(torch.complex128) * 2j).imag.sum(), point, order=2)
    with pytest.raises(UnsupportedOperation, match=r"got a norm of order 0\. Add a rule"):
        taylor_ladder(lambda p: p["x"].norm(0) * p["x"].sum(), point, order=2)
