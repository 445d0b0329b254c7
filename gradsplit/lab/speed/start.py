"""What is paid once: import, the first call with and without a compiled cache, memory over a training loop.

Each is measured in processes of its own, since a process imports, compiles and reaches its peak only once.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator

from .figures import Figure

__all__ = ["start_figures"]

_IMPORT = "import time; s = time.perf_counter(); import {what}; print(time.perf_counter() - s)"

_FIRST_STEP = """
import time, torch
torch.set_num_threads(2)
import gradsplit as gs
p = torch.nn.Parameter(torch.randn(512, 512)); p.grad = torch.randn(512, 512)
start = time.perf_counter()
{program}
print(time.perf_counter() - start)
"""

_FIRST = {
    "GradientSplitter": 'gs.GradientSplitter([("w", p)], budget=gs.Fixed(1e-3)).step()',
    "GSO": 'gs.GSO([("w", p)], lr=1e-3).step()',
}

_LOOP = """
import json, resource, sys, torch
torch.set_num_threads(2)
import gradsplit as gs
from torch import nn
torch.manual_seed(0)
class Block(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.n1, self.n2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.out = nn.Linear(d, 3*d), nn.Linear(d, d)
        self.up, self.down = nn.Linear(d, 4*d), nn.Linear(4*d, d)
    def forward(self, x):
        b, t, d = x.shape
        q, k, v = self.qkv(self.n1(x)).view(b, t, 3, 6, d // 6).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(b, t, d))
        return x + self.down(nn.functional.gelu(self.up(self.n2(x))))
class GPT(nn.Module):
    def __init__(self, v=32000, d=384, layers=6, t=128):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(v, d), nn.Embedding(t, d)
        self.h = nn.ModuleList(Block(d) for _ in range(layers))
    def forward(self, x):
        y = self.wte(x) + self.wpe.weight[: x.shape[1]]
        for block in self.h:
            y = block(y)
        return nn.functional.linear(y, self.wte.weight)
model = GPT()
kind = sys.argv[1]
if kind == "adamw":
    opt = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=False, fused=False)
else:
    opt = gs.GSO(model, lr=1e-4, second_moment="bin", in_backward=kind == "in-backward")
x = torch.randint(0, 32000, (1, 32))
def status(key):
    with open("/proc/self/status") as lines:
        return int(next(line.split()[1] for line in lines if line.startswith(key))) * 1024
if kind != "adamw":  # the compiler is no part of the loop
    w = nn.Parameter(torch.randn(64, 64))
    w.grad = torch.randn(64, 64)
    gs.GSO([("w", w)], second_moment="bin").step()
before = status("VmRSS")
losses = []
for step in range(4):
    opt.zero_grad()
    loss = nn.functional.cross_entropy(model(x).flatten(0, 1), x.flatten())
    loss.backward()
    opt.step()
    losses.append(float(loss.detach()))
    if step == 1:
        try:
            open("/proc/self/clear_refs", "w").write("5")
        except OSError:
            pass
state = sum(v.nbytes for s in opt.state.values() for v in s.values() if v.dim())
weights = sum(p.nbytes for p in model.parameters())
print(json.dumps({"peak": status("VmHWM"), "before": before, "weights": weights, "state": state, "losses": losses}))
"""


def _run(program: str, *arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"bench: a measuring process failed: {done.stderr.strip()[-800:]}")
    return done.stdout.strip().splitlines()[-1]


def start_figures(turns: int = 5) -> Iterator[Figure]:
    """Yield import, first call and memory."""
    times: dict[str, list[float]] = {"torch": [], "gradsplit": []}
    for _ in range(turns):
        for what, kept in times.items():
            kept.append(float(_run(_IMPORT.format(what=what))))
    ratio = statistics.median(a / b for a, b in zip(times["gradsplit"], times["torch"], strict=True))
    yield Figure("import gradsplit / import torch", "", ratio, 1.05, detail=times)
    for name, made in _FIRST.items():
        with tempfile.TemporaryDirectory() as folder:
            program = _FIRST_STEP.format(program=made)
            cold, *warm = [float(_run(program, NUMBA_CACHE_DIR=folder)) for _ in range(4)]
        yield Figure(f"first step of {name}, cold cache", "512 x 512", cold, 4.0, "s")
        yield Figure(f"first step of {name}, warm cache", "512 x 512", statistics.median(warm), 1.0, "s", {"s": warm})
    program = _FIRST_STEP.format(program="torch.optim.AdamW([p], lr=1e-3, fused=True).step()")
    taken_by_torch = [float(_run(program)) for _ in range(3)]
    name = "the same of torch.optim.AdamW(fused=True), which imports torch._dynamo"
    yield Figure(name, "512 x 512", statistics.median(taken_by_torch), None, "s", {"s": taken_by_torch})
    seen = {kind: json.loads(_run(_LOOP, kind)) for kind in ("adamw", "bin", "in-backward")}
    state = seen["bin"]["state"] / seen["adamw"]["state"]
    yield Figure("optimizer state, GSO per bin / AdamW", "24 M GPT", state, 0.51, "bytes ratio", seen)
    # What training takes beyond the libraries: weights, states, gradients and activations.
    taken = {kind: one["peak"] - one["before"] + one["weights"] for kind, one in seen.items()}
    ratio = taken["in-backward"] / taken["adamw"]
    yield Figure(
        "peak memory of training, GSO per bin in backward / AdamW loop", "24 M GPT", ratio, 0.65, "bytes ratio", taken
    )
