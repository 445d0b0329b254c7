"""Nine training scripts that know nothing of gradsplit, as users write them; each prints what it ended with.

They are text and not modules: they run in processes of their own, and import what a user has installed.
"""

from __future__ import annotations

from typing import NamedTuple


class Script(NamedTuple):
    """A script: its text, the packages it needs beside torch, and what its recording must show."""

    text: str
    needs: tuple[str, ...] = ()
    streams: tuple[tuple[str, int], ...] = ()  # (optimizer, rows)
    names: tuple[str, ...] = ()  # among the tensors of the first stream
    own_scaled: bool = False


_BEGIN = """
import sys, torch
from torch import nn
torch.manual_seed(0)
torch.set_num_threads(1)

def end(*models):
    for p in (p for model in models for p in model.parameters()):
        p = p.full_tensor() if hasattr(p, "full_tensor") else p
        print(p.detach().double().sum().item().hex())
"""

_MODEL = """
model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
data = torch.randn(40, 4, 6)
"""

PLAIN = Script(
    _BEGIN
    + _MODEL
    + """
optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
schedule = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=10)
for step in range(12):
    for micro in range(2):
        (model(data[2 * step + micro]).square().mean() / 2).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
end(model)
""",
    streams=(("AdamW", 12),),
    names=("0.weight", "2.bias"),
    own_scaled=True,
)

GAN = Script(
    _BEGIN
    + """
class Generator(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(3, 5)
    def forward(self, z):
        return self.body(z)

class Critic(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(5, 1)
    def forward(self, x):
        return self.body(x)

maker, critic, style = Generator(), Critic(), nn.Embedding(4, 3)
makers = torch.optim.Adam(maker.parameters(), 1e-2, betas=(0.5, 0.9))
critics = torch.optim.RMSprop(critic.parameters(), 1e-3)
styles = torch.optim.SGD(style.parameters(), 0.1)
for step in range(6):
    critic_loss = critic(torch.randn(4, 5)).square().mean() - critic(maker(torch.randn(4, 3)).detach()).mean()
    critics.zero_grad()
    critic_loss.backward()
    critics.step()
    if step % 2:
        loss = critic(maker(style(torch.tensor([0, 1])) + torch.randn(2, 3))).mean()
        makers.zero_grad(); styles.zero_grad()
        loss.backward()
        makers.step(); styles.step()
end(maker, critic, style)
""",
    streams=(("RMSprop", 6), ("Adam", 3), ("SGD", 3)),
    names=("Critic.body.weight", "Critic.body.bias"),
)

LBFGS = Script(
    _BEGIN
    + _MODEL
    + """
optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)
calls = 0
for step in range(4):
    def closure():
        global calls
        calls += 1
        optimizer.zero_grad()
        loss = model(data[step]).square().mean()
        loss.backward()
        return loss
    print(optimizer.step(closure).item().hex())
print(calls)
end(model)
""",
    streams=(("LBFGS", -1),),
    names=("0.weight",),
)

_SCALED = """
optimizer = torch.optim.AdamW(model.parameters(), 1e-2, fused={fused})
scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14, growth_interval=3)
for step in range(8):
    optimizer.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(data[step]).float().square().mean()
    if step == 5:
        loss = loss * float("inf")
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    print(scaler.get_scale())
end(model)
"""

SCALER = Script(_BEGIN + _MODEL + _SCALED.format(fused=False), streams=(("AdamW", 8),), names=("0.weight",))
FUSED = Script(_BEGIN + _MODEL + _SCALED.format(fused=True), streams=(("AdamW", 8),), names=("0.weight",))

COMPILED = Script(
    _BEGIN
    + _MODEL
    + """
compiled = torch.compile(model, backend="aot_eager")
optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
for step in range(5):
    optimizer.zero_grad()
    compiled(data[step]).square().mean().backward()
    nn.utils.clip_grad_norm_(compiled.parameters(), 1e-3)
    optimizer.step()
update = torch.compile(lambda: optimizer.step(), backend="eager")
for step in range(3):
    compiled(data[step]).square().mean().backward()
    update()
end(model)
""",
    streams=(("SGD", 8),),
    names=("0.weight",),
    own_scaled=True,
)

TRAINER = Script(
    _BEGIN
    + """
import os, tempfile
os.environ["HF_HUB_OFFLINE"] = "1"
from transformers import GPT2Config, GPT2LMHeadModel, PrinterCallback, Trainer, TrainingArguments
model = GPT2LMHeadModel(GPT2Config(vocab_size=17, n_positions=8, n_embd=8, n_layer=1, n_head=2))
rows = [{"input_ids": torch.randint(0, 17, (8,))} for _ in range(24)]
rows = [{**row, "labels": row["input_ids"]} for row in rows]
with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        folder, per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=6, max_grad_norm=0.1,
        report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=True, logging_strategy="no",
    )
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.remove_callback(PrinterCallback)  # it prints seconds
    trainer.train()
end(model)
""",
    needs=("transformers", "accelerate"),
    streams=(("AdamW", 6),),
    names=("transformer.h.0.attn.c_attn.weight",),
    own_scaled=True,
)

ACCELERATE = Script(
    _BEGIN
    + _MODEL
    + """
from accelerate import Accelerator
accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(data[:12]), batch_size=1)
wrapped, optimizer, loader = accelerator.prepare(model, optimizer, loader)
for (batch,) in loader:
    with accelerator.accumulate(wrapped):
        accelerator.backward(wrapped(batch).square().mean())
        if accelerator.sync_gradients:
            accelerator.clip_grad_norm_(wrapped.parameters(), 0.01)
        optimizer.step()
        optimizer.zero_grad()
end(model)
""",
    needs=("accelerate",),
    streams=(("AdamW", 6),),
    names=("0.weight",),
    own_scaled=True,
)

LIGHTNING = Script(
    _BEGIN
    + """
import logging, warnings
warnings.simplefilter("ignore")
logging.disable(logging.WARNING)
import lightning
class Net(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(6, 2)
    def training_step(self, batch, index):
        return self.body(batch[0]).square().mean()
    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-2)
model = Net()
loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(12, 6)), batch_size=2)
lightning.Trainer(
    max_epochs=1, gradient_clip_val=0.05, accelerator="cpu", logger=False, enable_checkpointing=False,
    enable_progress_bar=False, enable_model_summary=False,
).fit(model, loader)
end(model)
""",
    needs=("lightning",),
    streams=(("Adam", 6),),
    names=("body.weight",),
    own_scaled=True,
)

FSDP = Script(
    _BEGIN
    + _MODEL
    + """
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
dist.init_process_group("gloo")
rank = dist.get_rank()
mesh = init_device_mesh("cpu", (2,))
for layer in model:
    if isinstance(layer, nn.Linear):
        fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
for step in range(4):
    optimizer.zero_grad()
    model(data[2 * step + rank]).square().mean().backward()
    optimizer.step()
full = [p.full_tensor().detach().double().sum().item().hex() for p in model.parameters()]
if rank == 0:
    print("\\n".join(full), flush=True)
dist.destroy_process_group()
""",
    streams=(("AdamW", 4),),
    names=("0.weight", "2.bias"),
)

SCRIPTS = {
    "plain loop with clip and accumulation": PLAIN,
    "Hugging Face Trainer": TRAINER,
    "accelerate": ACCELERATE,
    "Lightning with clipping": LIGHTNING,
    "GAN with three optimizers": GAN,
    "LBFGS": LBFGS,
    "GradScaler": SCALER,
    "GradScaler with fused AdamW": FUSED,
    "compiled model and step": COMPILED,
}
"""The tenth, `FSDP`, needs a launcher."""
