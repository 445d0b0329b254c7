"""Scripts that were recorded in part, wrongly or not at all: each runs in a process and is recorded right."""

from __future__ import annotations

import numpy as np
import pytest

from gradsplit.watch.record import RunFile
from tests.watch.run.processes import run_gradsplit, run_python, without_ours

_TRAIN = """
import torch
from torch import nn
torch.manual_seed(0)
m = nn.Linear(4, 1); o = torch.optim.AdamW(m.parameters())
for i in range(20):
    o.zero_grad(); m(torch.randn(8, 4)).square().mean().backward(); o.step()
"""


def _run(folder, text, *words, expect=0):
    (folder / "train.py").write_text(text)
    done = run_gradsplit(folder, *words, "train.py")
    assert done.returncode == expect, done.stderr
    return done


def _series(folder, stream=0):
    with RunFile(folder / "run.db") as file:
        return file.series(file.streams[stream])


@pytest.mark.parametrize(
    "before",
    [
        'import importlib.util; importlib.util.find_spec("torch"); importlib.util.find_spec("torch")',
        "import importlib, importlib.util, sys; spec = importlib.util.find_spec('torch')\n"
        "module = importlib.util.module_from_spec(spec); sys.modules['torch'] = module\n"
        "spec.loader.exec_module(module)",
        "import threading; t = threading.Thread(target=__import__, args=('torch',)); t.start(); t.join()",
        "import os; os.chdir('/')",
        "import sys; sys.stderr.close()",
        "import os, sys\nif 'again' not in sys.argv: os.execv(sys.executable, [sys.executable, sys.argv[0], 'again'])",
    ],
    ids=["probe", "spec", "thread", "chdir", "closed stderr", "exec"],
)
def test_every_step_is_recorded_whatever_comes_first(tmp_path, before):
    _run(tmp_path, before + _TRAIN)
    assert _series(tmp_path).step_R.tolist() == list(range(20))


def test_a_process_that_ends_at_once_keeps_its_rows_and_its_code(tmp_path):
    done = _run(tmp_path, _TRAIN + "import os; os._exit(7)", expect=7)
    assert _series(tmp_path).num_rows == 20
    assert "gradsplit: recorded; next: gradsplit report run.db" in done.stderr


def test_one_step_is_a_recording(tmp_path):
    _run(tmp_path, _TRAIN.replace("range(20)", "range(1)"), "--fail-on", "explosion")
    assert _series(tmp_path).num_rows == 1


_HIDDEN = """
import importlib.machinery, importlib.util, sys
class Own(importlib.machinery.SourceFileLoader):
    def exec_module(self, module):
        super().exec_module(module)
    def __setattr__(self, name, value):
        if name == "exec_module":
            raise AttributeError(name)
        super().__setattr__(name, value)
class First:
    def find_spec(self, name, path=None, target=None):
        if name != "torch":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        spec.loader = Own("torch", spec.origin)
        return spec
sys.meta_path.insert(0, First())
"""


@pytest.mark.parametrize(("words", "code"), [((), 0), (("--fail-on", "explosion"), 3), (("--guard",), 3)])
def test_torch_without_us_is_said_and_fails_a_check(tmp_path, words, code):
    done = _run(tmp_path, _HIDDEN + _TRAIN, *words, expect=code)
    assert "torch was loaded but nothing was attached" in done.stderr
    assert not (tmp_path / "run.db").exists()


def test_a_check_passes_a_healthy_script_and_fails_one_that_never_steps(tmp_path):
    _run(tmp_path, _TRAIN, "--fail-on", "explosion", "--fail-on", "exception")
    (tmp_path / "run.db").unlink()
    done = _run(tmp_path, "import torch\n", "--fail-on", "explosion", expect=3)
    assert "no step of a torch.optim.Optimizer was seen; nothing was recorded" in done.stderr


_BY_HAND = """
import torch
from torch import nn
torch.manual_seed(0)
m = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 1))
for i in range(12):
    for micro in range({micro}):
        (m(torch.randn(8, 4)).square().mean() * 0 + i).backward() if {constant} else \
            m(torch.randn(8, 4)).square().mean().backward()
    print(sum(float(p.grad.double().square().sum()) for p in m.parameters()) ** 0.5)
    for p in m.parameters():
        p.data.add_(p.grad, alpha=-0.01)
        {clear}
"""


@pytest.mark.parametrize("clear", ["p.grad = None", "p.grad.zero_()", "p.grad.data.zero_()"])
@pytest.mark.parametrize("micro", [1, 3])
def test_updates_by_hand_are_rows(tmp_path, clear, micro):
    text = _BY_HAND.format(clear=clear, micro=micro, constant=False)
    done = _run(tmp_path, text)
    series = _series(tmp_path)
    assert series.stream.optimizer == "ByHand"
    assert series.num_rows == 12
    np.testing.assert_allclose(series.total_R, [float(line) for line in done.stdout.split()], rtol=1e-5)
    assert {"0.weight", "1.bias"} <= set(series.stream.outline.names_N)
    assert np.isfinite(series.loss_R).all()


def test_accumulation_and_an_optimizer_are_not_taken_for_updates_by_hand(tmp_path):
    _run(tmp_path, _TRAIN.replace("o.zero_grad();", "o.zero_grad(); m(torch.ones(8, 4)).mean().backward();"))
    with RunFile(tmp_path / "run.db") as file:
        assert [(s.optimizer, file.series(s).num_rows) for s in file.streams] == [("AdamW", 20)]


def test_steps_whose_hooks_were_taken_away_are_seen_by_their_backward_passes(tmp_path):
    text = _TRAIN.replace("for i", "torch.optim.AdamW.step = torch.optim.AdamW.step.__wrapped__\nfor i")
    _run(tmp_path, text)
    assert _series(tmp_path).num_rows == 20


_SCALED = """
import torch
from torch import nn
torch.manual_seed(0)
m = nn.Linear(4, 1); o = torch.optim.SGD(m.parameters(), 1e-3)
scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
for step in range(8):
    o.zero_grad()
    loss = m(torch.ones(2, 4)).sum() * 0 + 4.5
    scaler.scale(loss).backward()
    if step in (2, 5):
        m.weight.grad[0, 0] = float("inf")
    scaler.step(o)
    scaler.update()
"""


def test_a_scalers_skipped_steps_keep_their_numbers_and_their_losses(tmp_path):
    _run(tmp_path, _SCALED, "--fail-on", "explosion")
    series = _series(tmp_path)
    assert series.step_R.tolist() == list(range(8))
    assert series.loss_R.tolist() == [4.5] * 8
    assert series.skipped_R.tolist() == [0, 0, 1, 0, 0, 1, 0, 0]


_CLIPPED = """
import torch
from torch import nn
torch.manual_seed(0)
m = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
o = torch.optim.SGD(m.parameters(), 1e-3)
for step in range(20):
    o.zero_grad()
    (m(torch.randn(16, 4)).square().mean() * 100).backward()
    nn.utils.clip_grad_norm_(m.parameters(), 0.5)
    if step == 12:
        with torch.no_grad():
            m[2].weight.grad{data}[1, 1] = float("nan")
    o.step()
    if step == 12:
        break
"""


@pytest.mark.parametrize("data", ["", ".data"])
def test_norms_are_taken_where_the_optimizer_reads_them(tmp_path, data):
    _run(tmp_path, _CLIPPED.format(data=data))
    series = _series(tmp_path)
    assert np.isfinite(series.total_R[:12]).all()
    assert not np.isfinite(series.total_R[12])
    np.testing.assert_allclose(series.own_scale_R[:12] * series.total_R[:12], 0.5, rtol=1e-3)
    assert series.own_scale_R[12] < 1, "what the clip did is a column of its own"


_LBFGS = """
import torch
from torch import nn
torch.manual_seed(0)
m = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1))
x = torch.linspace(-1, 1, 64)[:, None]; y = torch.sin(6 * x)
o = torch.optim.LBFGS(m.parameters(), lr=1.0, max_iter=8{search})
for step in range(4):
    before = [p.detach().clone() for p in m.parameters()]
    def closure():
        o.zero_grad(); loss = (m(x) - y).square().mean(); loss.backward(); return loss
    o.step(closure)
    for p, b in zip(m.parameters(), before):
        if p.dim() > 1:
            floor = 0.01 * p.shape[1] ** 0.5
            print(float(((p.detach() - b).norm(dim=1) / b.norm(dim=1).clamp(min=floor)).max()))
"""


def test_the_cap_holds_over_all_calls_of_a_closure(tmp_path):
    done = _run(tmp_path, _LBFGS.format(search=""), "--control")
    assert max(float(line) for line in done.stdout.split()) <= 0.03 * 1.001


def test_a_bound_in_front_of_a_line_search_is_refused(tmp_path):
    done = _run(tmp_path, _LBFGS.format(search=', line_search_fn="strong_wolfe"'), "--control", expect=1)
    assert "line_search_fn=None" in done.stderr


_PAIR = """
import torch
from torch import nn
class Generator(nn.Module):
    def __init__(self):
        super().__init__(); self.main = nn.Sequential(nn.Linear(3, 5))
    def forward(self, x): return self.main(x)
class Discriminator(Generator):
    def __init__(self):
        super().__init__(); self.main = nn.Sequential(nn.Linear(5, 1))
G, D = Generator(), Discriminator()
oG, oD = torch.optim.Adam(G.parameters()), torch.optim.Adam(D.parameters())
for i in range(3):
    oD.zero_grad(); D(G(torch.randn(4, 3)).detach()).mean().backward(); oD.step()
    oG.zero_grad(); D(G(torch.randn(4, 3))).mean().backward(); oG.step()
"""


def test_two_optimizers_carry_their_owners_class(tmp_path):
    _run(tmp_path, _PAIR)
    with RunFile(tmp_path / "run.db") as file:
        first, second = (set(stream.outline.names_N) for stream in file.streams)
    assert {"Discriminator.main.0.weight", "Discriminator.main.0.bias"} <= first
    assert {"Generator.main.0.weight", "Generator.main.0.bias"} <= second


def test_two_networks_of_one_class_carry_the_scripts_own_names(tmp_path):
    text = _PAIR.replace("G, D = Generator(), Discriminator()", "G, D = (nn.Sequential(nn.Linear(3, 5)), "
                         "nn.Sequential(nn.Linear(5, 1)))")  # fmt: skip
    _run(tmp_path, text)
    with RunFile(tmp_path / "run.db") as file:
        assert ["D.0.weight" in file.streams[0].outline.names_N, "G.0.weight" in file.streams[1].outline.names_N] == [
            True,
            True,
        ]


def test_the_package_runs_as_a_module_and_a_bare_report_opens_the_newest_file(tmp_path):
    _run(tmp_path, _TRAIN)
    _run(tmp_path, _TRAIN.replace("range(20)", "range(11)"))
    told = run_python(tmp_path, "-m", "gradsplit", "report", "--no-page")
    assert told.returncode == 0, told.stderr
    assert told.stdout.startswith("run-2.db: train.py (watch, 11 steps")


_CRASH = """
import torch
from torch import nn
torch.manual_seed(0)
class Policy(nn.Module):
    def __init__(self):
        super().__init__(); self.body = nn.Linear(4, 3)
    def forward(self, x): return torch.distributions.Categorical(logits=self.body(x), validate_args=True)
m = Policy(); o = torch.optim.SGD(m.parameters(), 0.1)
for i in range(20):
    o.zero_grad()
    (-m(torch.randn(8, 4)).log_prob(torch.zeros(8)).mean()).backward()
    if i == 11:
        o.param_groups[0]["lr"] = float("inf")
    o.step()
"""


def test_a_crash_in_the_forward_pass_is_a_finding(tmp_path):
    _run(tmp_path, _CRASH, "--fail-on", "explosion", expect=1)
    told = run_python(tmp_path, "-m", "gradsplit", "report", "--no-page", "--fail-on", "explosion")
    assert told.returncode == 1
    assert "The script crashed in the forward pass after step 11, and weights were not finite then." in told.stdout
    assert "The exception arose in the module the model" in told.stdout
    assert "nothing to change" not in told.stdout


_DEEP = """
import torch
from torch import nn
class Block(nn.Module):
    def __init__(self):
        super().__init__(); self.attn = nn.Linear(4, 4); self.mlp = nn.Linear(4, 4)
    def forward(self, x): return x + self.mlp(self.attn(x))
class Net(nn.Module):
    def __init__(self):
        super().__init__(); self.h = nn.ModuleList([Block(), Block()]); self.head = nn.Linear(4, 1)
    def forward(self, x):
        for block in self.h: x = block(x)
        return self.head(x)
m = Net(); o = torch.optim.AdamW(m.parameters())
for i in range(5):
    o.zero_grad(); m(torch.randn(8, 4)).square().mean().backward(); o.step()
"""


def test_every_layer_can_be_watched_logged_and_read(tmp_path):
    _run(tmp_path, _DEEP, "--to", "jsonl:all.jsonl", "--depth", "0")
    assert '"norm/h.1.attn.weight"' in (tmp_path / "all.jsonl").read_text()
    shown = run_python(tmp_path, "-m", "gradsplit", "watch", "--once", "--module", "h.1", "--depth", "0").stdout
    assert "h.1.attn.weight" in shown and "h.0" not in shown
    with RunFile(tmp_path / "run.db") as file:
        norms = file.norms("h.1.attn")
        parts = file.norms("h.1.attn.weight"), file.norms("h.1.attn.bias")
        assert norms.dtype == np.float64 and file.steps().tolist() == [0, 1, 2, 3, 4]
        np.testing.assert_allclose(norms, np.hypot(*parts), rtol=1e-12)
        assert file.streams[0].about["forward_order"] == list(range(10))
        with pytest.raises(KeyError, match=r"norms\('h.1.atn'\).*h.1.attn"):
            file.norms("h.1.atn")
        steps, lengths = file.lengths(file.streams[0])
    assert steps.tolist() == [0, 5]
    assert lengths.shape == (2, 10)


@pytest.mark.parametrize("warnings", ["", "error"])
def test_a_place_that_cannot_be_written_to_leaves_the_script_alone(tmp_path, warnings):
    alone = "print('done')"
    spoiled = "import os; os.makedirs(os.environ['GONE'], exist_ok=True); os.rmdir(os.environ['GONE'])\n"
    gone = tmp_path / "gone"
    (tmp_path / "train.py").write_text(spoiled + _TRAIN + alone)
    done = run_gradsplit(
        tmp_path, "--record", str(gone / "run.db"), "train.py", GONE=str(gone), PYTHONWARNINGS=warnings or "default"
    )
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
    assert done.stderr.count("nothing is recorded, the training goes on") == 1
    assert "Traceback" not in without_ours(done.stderr)
