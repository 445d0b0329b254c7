"""Chunks shared among threads: each is done once, by torch's own threads where they can be had."""

from __future__ import annotations

import os
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

numba = pytest.importorskip("numba", reason="needs the package numba: pip install numba")

from gradsplit.kernels import threads  # noqa: E402
from gradsplit.kernels.numba_loops import share  # noqa: E402
from gradsplit.kernels.threads import BEGUN, NEXT  # noqa: E402

BOUNDS = np.arange(501, dtype=np.int64)


@numba.njit(nogil=True)
def _count(c, worker, kind, entries, chunks, done, by):
    for e in range(chunks[c], chunks[c + 1]):
        done[e] += 1
        by[e] = worker


@numba.njit(nogil=True)
def count(work, *arguments):
    """Count every chunk once, and say which thread did it."""
    share(_count, work, arguments)


def counted(num_threads: int) -> tuple[np.ndarray, np.ndarray]:
    done, by = np.zeros(500, dtype=np.int64), np.full(500, -1)
    threads.run([(count, (np.float32(0), BOUNDS, BOUNDS, done, by))], num_threads)
    return done, by


@pytest.fixture(params=["torch's threads", "Python's threads"])
def kind_of_threads(request, monkeypatch):
    if request.param == "Python's threads":
        monkeypatch.setattr(threads, "entry_to_team", lambda: 0)
    elif not threads.entry_to_team():
        pytest.skip("not run: torch's threads cannot be entered here; the loops use Python's, which other cases run")


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_every_chunk_is_done_once(kind_of_threads, num_threads):
    for _ in range(20):
        done, by = counted(num_threads)
        assert (done == 1).all()
        assert set(by.tolist()) <= set(range(num_threads))


def test_a_table_without_chunks_is_no_work(kind_of_threads):
    done = np.zeros(1, dtype=np.int64)
    threads.run([(count, (np.float32(0), BOUNDS, np.zeros(1, dtype=np.int64), done, done))], 2)
    assert done[0] == 0


def test_several_calls_share_their_chunks_each_by_itself(kind_of_threads):
    done, by = np.zeros((2, 500), dtype=np.int64), np.zeros((2, 500), dtype=np.int64)
    threads.run([(count, (np.float32(0), BOUNDS, BOUNDS, done[i], by[i])) for i in range(2)], 2)
    assert (done == 1).all()


def test_work_says_how_many_chunks_and_threads_there_were():
    work, done = np.zeros(4, dtype=np.int64), np.zeros(500, dtype=np.int64)
    count(work, np.float32(0), BOUNDS, BOUNDS, done, done.copy())
    assert work[NEXT] == 501 and work[BEGUN] == 1  # the last one asked for was one too many


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="this system does not list a process's threads")
def test_no_thread_is_made_beside_those_that_torch_has():
    if not threads.entry_to_team():
        pytest.skip("not run: torch's threads cannot be entered here; the loops use Python's, which other cases run")
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        torch.ones(1 << 20).mul_(2.0)  # torch's own loop makes its team
        known = len(os.listdir("/proc/self/task"))
        for _ in range(5):
            counted(3)
        assert len(os.listdir("/proc/self/task")) <= known
    finally:
        torch.set_num_threads(before)


def test_from_several_threads_at_once(kind_of_threads):
    found: list[np.ndarray] = []
    workers = [threading.Thread(target=lambda: found.append(counted(2)[0])) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(found) == 4 and all((done == 1).all() for done in found)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_after_a_fork(kind_of_threads):
    counted(2)  # starts threads, which the child does not inherit
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python warns of forks beside threads: that is the point
        child = os.fork()
    if child == 0:
        done, _ = counted(2)
        os.write(writing, b"ok" if (done == 1).all() else b"no")
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reading, 2) == b"ok"


def test_a_torch_without_openmp_leaves_it_to_python_threads(monkeypatch):
    monkeypatch.setattr(torch.backends.openmp, "is_available", lambda: False)
    threads.entry_to_team.cache_clear()
    try:
        assert threads.entry_to_team() == 0
    finally:
        threads.entry_to_team.cache_clear()
