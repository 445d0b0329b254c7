"""Scripts that were recorded in part, wrongly or not at all, are recorded right.

What depends on how a process begins or ends runs in a process of its own, as `gradsplit run` starts it. The rest runs
under a session in this process.
"""

from __future__ import annotations

import contextlib
import gc
import io

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from gradsplit.cli import watch
from gradsplit.watch.record import RunFile
from tests.watch.run.processes import run_gradsplit, run_python, without_ours
from tests.watch.run.watched import account_at, watched

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


def _run_here(folder, text, **options):
    """What the script printed; it ran in this process under the session that `gradsplit run` would start."""
    gc.collect()  # names come from living modules: those of other tests are to be gone
    told = io.StringIO()
    with watched(folder / "run.db", **options), contextlib.redirect_stdout(told):
        exec(compile(text, "train.py", "exec"), {"__name__": "script"})
    return told.getvalue()


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
        "from gradsplit.resume import Guard; import gradsplit as gs; gs.GSO",
        "import sys; sys.stderr.close()",
        "import os, sys\nif 'again' not in sys.argv: os.execv(sys.executable, [sys.executable, sys.argv[0], 'again'])",
    ],
    ids=["probe", "spec", "thread", "chdir", "ours first", "closed stderr", "exec"],
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


@pytest.mark.parametrize(("words", "code"), [((), 0), (("--fail-on", "explosion"), 3)])
def test_a_sink_that_cannot_be_made_is_told_of_at_the_end(tmp_path, words, code):
    (tmp_path / "taken").write_text("a file where a folder is needed")
    done = _run(tmp_path, _TRAIN, "--to", "jsonl:taken/norms.jsonl", *words, expect=code)
    assert "watching stopped, the training goes on (NotADirectoryError(" in done.stderr
    assert ("nothing was recorded" in done.stderr) == bool(words)
    assert "recorded; next" not in done.stderr


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
        m(torch.randn(8, 4)).square().mean().backward()
    print(sum(float(p.grad.double().square().sum()) for p in m.parameters()) ** 0.5)
    for p in m.parameters():
        p.data.add_(p.grad, alpha=-0.01)
        {clear}
"""


@pytest.mark.parametrize("clear", ["p.grad = None", "p.grad.zero_()", "p.grad.data.zero_()"])
@pytest.mark.parametrize("micro", [1, 3])
def test_updates_by_hand_are_rows(tmp_path, clear, micro):
    told = _run_here(tmp_path, _BY_HAND.format(clear=clear, micro=micro))
    series = _series(tmp_path)
    assert series.stream.optimizer == "ByHand"
    assert series.num_rows == 12
    np.testing.assert_allclose(series.total_R, [float(line) for line in told.split()], rtol=1e-5)
    assert {"0.weight", "1.bias"} <= set(series.stream.outline.names_N)
    assert np.isfinite(series.loss_R).all()


def test_a_value_lost_by_a_script_that_updates_by_hand_is_named_where_it_was_lost(tmp_path):
    text = _BY_HAND.format(clear="p.grad = None", micro=1)
    spoilt = "m(torch.randn(8, 4)).square()"
    for step, backward in ((5, False), (5, True)):
        (tmp_path / "run.db").unlink(missing_ok=True)
        lost = "m[1](m[0](torch.randn(8, 4)) + {}).square()".format(
            "torch.sqrt((m[0].weight[0, 0] * 0).abs())" if backward else "torch.log(m[0].weight[0, 0] * 0 - 1)"
        )
        _run_here(tmp_path, text.replace(spoilt, f"({lost} if i == {step} else {spoilt})"))
        first = account_at(tmp_path / "run.db").first
        assert (first.step, first.kind) == (step, "backward" if backward else "forward")
        assert first.tensor.startswith("0."), "and not the weights that were lost by the update after it"


def test_accumulation_and_an_optimizer_are_not_taken_for_updates_by_hand(tmp_path):
    _run_here(tmp_path, _TRAIN.replace("o.zero_grad();", "o.zero_grad(); m(torch.ones(8, 4)).mean().backward();"))
    with RunFile(tmp_path / "run.db") as file:
        assert [(s.optimizer, file.series(s).num_rows) for s in file.streams] == [("AdamW", 20)]


_REPLACED = """
import torch
from torch import nn
torch.manual_seed(0)
def mine(self, closure=None):
    for entry in self.param_groups:
        for p in entry["params"]:
            p.data.add_(p.grad, alpha=-0.1)
torch.optim.AdamW.step = mine
del torch.optim.Optimizer.step
m = nn.Linear(4, 1); o = torch.optim.AdamW(m.parameters())
for i in range(9):
    o.zero_grad(); loss = m(torch.randn(8, 4)).square().mean(); loss.backward(); o.step()
print(loss.item())
"""

_DELETED = """
del torch.optim.AdamW.step
for i in range(30):
    m(torch.randn(8, 4)).square().mean().backward()
    for p in m.parameters():
        p.data.add_(p.grad, alpha=-0.1); p.grad = None
print(m.weight.sum().item())
"""


def test_a_step_that_the_script_replaces_is_recorded_and_one_that_it_deletes_is_missed_aloud(tmp_path):
    for text, rows in ((_REPLACED, 9), (_TRAIN + _DELETED, 20)):
        (tmp_path / "run.db").unlink(missing_ok=True)
        done = _run(tmp_path, text)
        assert done.stdout == run_python(tmp_path, "train.py").stdout
        assert _series(tmp_path).num_rows == rows
        missed = done.stderr.count("recorded in part: the last 30 backward passes are not in it")
        assert missed == (rows == 20)


_FORKED = """
import os
child = os.fork()
for i in range(6):
    o.zero_grad(); m(torch.randn(8, 4)).square().mean().backward(); o.step()
if child == 0:
    os._exit(5)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_forked_child_records_on_its_own_and_both_go_on(tmp_path):
    by_hand = _FORKED.replace("o.step()", "[p.data.add_(p.grad, alpha=-0.1) for p in m.parameters()]")
    for text, rows in (
        (_TRAIN + _FORKED, [6, 26]),
        (_TRAIN.replace("range(20)", "range(0)") + _FORKED, [6, 6]),  # before the first step
        (
            _TRAIN.replace("range(20)", "range(0)").replace("o = ", "#")
            + by_hand.replace("o.zero_grad()", "m.zero_grad()"),
            [6, 6],
        ),
    ):
        for left in tmp_path.glob("run*"):
            left.unlink()
        done = _run(tmp_path, text)
        assert sorted(path.name for path in tmp_path.glob("run*")) == ["run-2.db", "run.db"], "both are closed"
        assert done.stdout == "5\n"
        found = []
        for name in ("run.db", "run-2.db"):
            with RunFile(tmp_path / name) as file:
                found.append(file.num_rows(0))
        assert sorted(found) == rows


_FULL = """
import resource, signal, time
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))  # what a full disk does: no file grows beyond this
import torch
from torch import nn
torch.manual_seed(0)
m = nn.Sequential(*[nn.Linear(16, 16) for _ in range(30)]); o = torch.optim.AdamW(m.parameters())
for i in range(140):
    o.zero_grad(); loss = m(torch.randn(8, 16)).square().mean(); loss.backward(); o.step()
    if i in (40, 90):
        time.sleep(1.2)  # the recording is written about once a second
print(loss.item())
"""


def test_a_full_disk_leaves_the_script_alone_and_is_said(tmp_path):
    (tmp_path / "train.py").write_text(_FULL.format(limit=20_000))
    alone = run_python(tmp_path, "train.py")
    for limit, said, there in ((20_000, "nothing is recorded, ", False), (150_000, "recorded in part: ", True)):
        done = _run(tmp_path, _FULL.format(limit=limit))
        assert (done.stdout, done.returncode) == (alone.stdout, 0)
        assert done.stderr.count(f"gradsplit: {said}") == 1, done.stderr
        assert "Traceback" not in done.stderr
        assert (tmp_path / "run.db").exists() == there, "half a file is taken away, a short one is kept"
    assert 0 < _series(tmp_path).num_rows < 140


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
    _run_here(tmp_path, _SCALED)
    assert account_at(tmp_path / "run.db").first is None
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
    _run_here(tmp_path, _CLIPPED.format(data=data))
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
    told = _run_here(tmp_path, _LBFGS.format(search=""), control=True, budget=("relative_step",))
    assert max(float(line) for line in told.split()) <= 0.03 * 1.001


def test_a_cap_behind_a_line_search_is_refused(tmp_path):
    search = ', line_search_fn="strong_wolfe"'
    with pytest.raises(ValueError, match="line_search_fn=None"):
        _run_here(tmp_path, _LBFGS.format(search=search), control=True, budget=("relative_step",))


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
    _run_here(tmp_path, _PAIR)
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
    _run_here(tmp_path, _TRAIN)
    (tmp_path / "train.py").write_text(_TRAIN.replace("range(20)", "range(11)"))
    done = run_python(tmp_path, "-m", "gradsplit", "run", "train.py")
    assert done.returncode == 0, done.stderr
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


def _watching():
    app = typer.Typer()
    app.command()(watch.run)
    return app


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
    _run_here(tmp_path, _DEEP, to=(f"jsonl:{tmp_path / 'all.jsonl'}",), depth=0)
    assert '"norm/h.1.attn.weight"' in (tmp_path / "all.jsonl").read_text()
    run = tmp_path / "run.db"
    shown = CliRunner().invoke(_watching(), [str(run), "--once", "--module", "h.1", "--depth", "0"]).stdout
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
