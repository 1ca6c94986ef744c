"""Executors run a batch's jobs in this process or in several. cluster.py has one for Dask."""

from __future__ import annotations

import logging
import os
import signal
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING, Protocol

from ..errors import DdpmcWarning, WorkerError
from .jobs import Job, Result, Work, perform

if TYPE_CHECKING:
    from ..codec.encoder import Callback

TRIES = 2  # how often a picture is tried if its process dies


class Executor(Protocol):
    """Accepts jobs while it has room, and returns the results as they finish."""

    def start(self, work: Work, progress: Callback | None) -> None:
        """progress: called with the levels of a picture that this process works on."""

    def room(self) -> bool:
        """Whether another job can be submitted now."""

    def submit(self, job: Job) -> None: ...

    def busy(self) -> bool:
        """Whether there are jobs whose results have not been taken."""

    def result(self) -> Result:
        """Wait for the next result; only while busy. Faults of the program are raised."""

    def stop(self) -> None:
        """Stop at once. Jobs that are under way are dropped."""


class Serial:
    """This process, one picture at a time."""

    def __init__(self) -> None:
        self._job: Job | None = None

    def start(self, work: Work, progress: Callback | None) -> None:
        self._work, self._progress = work, progress

    def room(self) -> bool:
        return self._job is None

    def submit(self, job: Job) -> None:
        self._job = job

    def busy(self) -> bool:
        return self._job is not None

    def result(self) -> Result:
        assert self._job is not None
        job, self._job = self._job, None
        return perform(self._work, job, self._progress)

    def stop(self) -> None:
        self._job = None


# --- Processes ---------------------------------------------------------------------------------


@dataclass(eq=False)
class Worker:
    """A process, our end of the pipe to it, and the job it works on."""

    process: BaseProcess
    pipe: Connection
    job: Job | None = None
    deaths: int = 0  # how many processes have died over this job


class Processes:
    """``count`` processes of ``threads`` threads each, started as they are needed.

    A process that dies, for example for lack of memory, is replaced, and its picture is tried once
    more. (The standard library's pool would fail as a whole.) The processes end with this one,
    however it ends.
    """

    def __init__(self, count: int, threads: int = 1) -> None:
        self.count, self.threads = count, threads
        self._idle: list[Worker] = []
        self._working: list[Worker] = []

    def start(self, work: Work, progress: Callback | None) -> None:
        self._work = work

    def room(self) -> bool:
        return len(self._working) < self.count

    def submit(self, job: Job) -> None:
        self._give(self._idle.pop() if self._idle else self._hire(), job)

    def busy(self) -> bool:
        return bool(self._working)

    def result(self) -> Result:
        while True:
            ready = wait([worker.pipe for worker in self._working])[0]
            worker = next(worker for worker in self._working if worker.pipe is ready)
            self._working.remove(worker)
            job = worker.job
            assert job is not None
            try:
                got: Result | Exception = worker.pipe.recv()
            except (EOFError, OSError):
                how = _buried(worker)
                if worker.deaths + 1 < TRIES:
                    self._give(self._hire(worker.deaths + 1), job)
                    continue
                text = f"the process that worked on it died, {TRIES} times ({how})"
                return Result(job.source, job.dest, error=WorkerError(text))
            deaths, worker.deaths, worker.job = worker.deaths, 0, None
            self._idle.append(worker)
            if isinstance(got, Exception):
                raise got
            if deaths:
                note = DdpmcWarning("the process that worked on it died; another did it")
                got = replace(got, warnings=(note, *got.warnings))
            return got

    def stop(self) -> None:
        for worker in self._idle + self._working:
            worker.process.kill()  # it has written nothing
            _buried(worker)
        self._idle, self._working = [], []

    def _hire(self, deaths: int = 0) -> Worker:
        context = get_context("spawn")  # OpenMP's threads do not survive a fork
        ours, theirs = context.Pipe()
        level = logging.getLogger().level
        process = context.Process(
            target=serve, args=(theirs, self._work, self.threads, level), daemon=True
        )
        with shielded():
            process.start()
        theirs.close()  # so that its end is seen here
        return Worker(process, ours, deaths=deaths)

    def _give(self, worker: Worker, job: Job) -> None:
        worker.job = job
        self._working.append(worker)
        with suppress(OSError):  # it has died, which result() will see
            worker.pipe.send(job)


def _buried(worker: Worker) -> str:
    """Clean up after a dead process. Returns how it ended."""
    worker.pipe.close()
    worker.process.join(5)
    worker.process.kill()
    worker.process.join()
    code = worker.process.exitcode or 0
    return f"signal {-code}: out of memory?" if code < 0 else f"exit status {code}"


@contextmanager
def shielded() -> Iterator[None]:
    """Processes and threads that are started inside do not receive Ctrl-C.

    A terminal sends it to all processes of a command. This one handles it and stops the others.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    from multiprocessing import resource_tracker

    resource_tracker.ensure_running()  # started inside, it would unblock the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def serve(pipe: Connection, work: Work, threads: int, level: int) -> None:
    """The loop of a worker process: receive a job, do it, send the result."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_follow_parent, daemon=True).start()
    logging.basicConfig(level=level, format="%(message)s")
    while True:
        job: Job = pipe.recv()
        set_threads(threads)
        try:
            got: Result | Exception = perform(work, job)
        except Exception as e:  # a fault, which the main process raises without this traceback
            traceback.print_exc()
            got = e
        pipe.send(got)


def set_threads(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)


def _follow_parent() -> None:
    """Exit when the parent process has ended, because nobody would take the result."""
    parent = parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
