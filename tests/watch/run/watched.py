"""Training under a session in this process: what `gradsplit run --watch` records, without the start of a process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.nn.utils import clip_grad
from torch.optim import optimizer as hooks

from gradsplit.sources import TermSplitter
from gradsplit.watch.record import RunFile
from gradsplit.watch.report.account import Account, account_of
from gradsplit.watch.run.session import Session
from gradsplit.watch.run.settings import Settings

_PATCHED = (
    (torch.Tensor, "backward"),
    (TermSplitter, "backward"),
    (torch.amp.GradScaler, "scale"),
    (torch.amp.GradScaler, "step"),
    (clip_grad, "clip_grad_norm_"),
    (torch.nn.utils, "clip_grad_norm_"),
)


@contextmanager
def watched(path: Path, **options: object) -> Iterator[Session]:
    """A session that sees every optimizer of this process while the block runs, and leaves torch as it was."""
    session = Session(Settings(record=str(path), seconds=3600.0, quiet=True, **options))
    kept = [(owner, name, getattr(owner, name)) for owner, name in _PATCHED]
    before, after = dict(hooks._global_optimizer_pre_hooks), dict(hooks._global_optimizer_post_hooks)
    session.install()
    try:
        yield session
    finally:
        session.close()
        for owner, name, value in kept:
            setattr(owner, name, value)
        for table, was in ((hooks._global_optimizer_pre_hooks, before), (hooks._global_optimizer_post_hooks, after)):
            for key in set(table) - set(was):
                del table[key]


def account_at(path: Path) -> Account:
    """The account of the run file there."""
    with RunFile(path) as file:
        return account_of(file)
