"""The trials on ranks in the order in which they are run, the processes that run them, and their raw file."""

from __future__ import annotations

import argparse
import csv
import gc
import itertools
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks.faults.grid import RAW, append
from benchmarks.faults.methods import METHODS
from benchmarks.faults.rank_trial import PLACES, RANK_FAULTS, RANK_METHODS, RankTrial, run_on_rank
from benchmarks.faults.trial import CLEAN
from gradsplit.lab.evidence import commit

__all__ = ["RANKS_RAW", "done_on_ranks", "rank_trials"]

RANKS_RAW = RAW.with_name("faults-ranks.csv")
SEEDS = 3
MAIN = ("text", "detection", "recurrence")


def can_run(workload: str, method: str, place: str, fault: str) -> bool:
    """Whether there is such a run.

    `torch.nn.LSTM` keeps a list of its own weights, which FSDP2 does not follow; a gradient that was never averaged is
    only bounded where there is one, copies renewed where they differ; without a fault "after" is "before".
    """
    if fault == CLEAN and place != "shard":
        return place == "before"
    if method in METHODS:
        return place != "shard" or workload != "text"
    return place == {"splitter before": "before", "splitter + broadcast": "after"}[method]


def rank_trials() -> Iterator[RankTrial]:
    """NaN in one element in 5 % of the steps of two ranks; other faults; four ranks; other shares: three seeds each."""
    nan, inf, huge = ([name for name in RANK_FAULTS if name.startswith(value)] for value in ("nan", "inf", "3e38"))
    copies, shard = PLACES[:2], PLACES[2:]
    first = [([CLEAN, nan[0]], 0.05, 2, copies)]
    then = [
        ([CLEAN, nan[0]], 0.05, 2, shard),
        ([huge[0], nan[1], huge[1]], 0.05, 2, copies),
        ([huge[0], nan[1], huge[1]], 0.05, 2, shard),
    ]
    last = [
        ([CLEAN, nan[0]], 0.05, 4, copies),
        (inf, 0.05, 2, PLACES),
        (nan[:1], 0.2, 2, PLACES),
        (nan[:1], 0.01, 2, PLACES),
    ]
    for parts in (first, then, last):
        for seed, (faults, rate, ranks, places) in itertools.product(range(SEEDS), parts):
            for fault, place, workload, method in itertools.product(faults, places, MAIN, RANK_METHODS):
                if can_run(workload, method, place, fault):
                    yield RankTrial(workload, method, place, fault, 0.0 if fault == CLEAN else rate, seed, ranks)


def done_on_ranks(path: Path = RANKS_RAW) -> dict[RankTrial, dict[str, str]]:
    """The rows of the raw file by their trial."""
    if not path.is_file():
        return {}
    with path.open(encoding="utf8", newline="") as file:
        rows = list(csv.DictReader(file))
    names = ("workload", "method", "place", "fault")
    return {
        RankTrial(*(row[name] for name in names), float(row["rate"]), int(row["seed"]), int(row["ranks"])): row
        for row in rows
    }


def main(arguments: list[str]) -> None:
    """Run what is missing; ctrl-C loses the run at hand only."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--raw", type=Path, default=RANKS_RAW, help="where the rows go")
    parser.add_argument("--most", type=int, default=None, help="runs, at most")
    asked = parser.parse_args(arguments)
    known = set(done_on_ranks(asked.raw))
    wanted = [trial for trial in dict.fromkeys(rank_trials()) if trial not in known][: asked.most]
    print(f"{len(known)} runs done, {len(wanted)} to go", flush=True)
    for ranks in sorted({trial.ranks for trial in wanted}):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        ours = [trial for trial in wanted if trial.ranks == ranks]
        mp.spawn(_work, args=(ranks, port, ours, asked.raw), nprocs=ranks)


def _work(rank: int, ranks: int, port: int, trials: list[RankTrial], raw: Path) -> None:
    """One rank: every trial in turn; the first rank keeps the rows."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(ranks))
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    code = commit()
    for trial in trials:
        row = run_on_rank(trial)
        if rank == 0:
            append(row | {"commit": code}, raw)
    gc.collect()  # no DistributedDataParallel outlives the processes' connections
    dist.destroy_process_group()
