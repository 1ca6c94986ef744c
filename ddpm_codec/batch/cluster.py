"""An executor that sends jobs to a Dask cluster: ``pip install 'ddpmc[dask]'``.

Pictures and files travel as bytes through the scheduler. Only this process reads and writes files.
So no shared file system is needed, and a file is written once even if several workers tried it.
A scheduler and its clients run each other's code: connect only to one that you trust.
"""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import os
import signal
import time
import warnings
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..errors import WorkerError
from .executors import TRIES, set_threads, shielded
from .jobs import Job, Result, Work, perform

if TYPE_CHECKING:
    from ..codec.encoder import Callback

LOCAL = "local"
AHEAD = 2  # jobs for each of the cluster's threads: one in work, one in transit
POLL = 0.05  # seconds
MEND = 5.0  # seconds between checks of a cluster that we started
CONFIG = {  # of a cluster that we start
    "distributed.scheduler.allowed-failures": TRIES - 1,
    # A worker holds one job, so that its death is not counted against another.
    "distributed.scheduler.worker-saturation": 1.0,
}


class Cluster:
    """The cluster at a scheduler's address, or a local one of ``jobs`` processes for this batch.

    Dask gives a dead worker's picture to another worker, until it fails after some deaths: after
    two in a cluster that we start, in others as distributed.scheduler.allowed-failures says.
    """

    def __init__(self, address: str, jobs: int = 1, threads: int = 1) -> None:
        """Raises ValueError for an invalid address, WorkerError if Dask is not installed."""
        if address != LOCAL and "://" not in address:
            raise ValueError(f"a scheduler is tcp://HOST:PORT or {LOCAL}, not {address!r}")
        if importlib.util.find_spec("distributed") is None:
            raise WorkerError("a scheduler needs Dask: pip install 'ddpmc[dask]'")
        self.address, self.jobs, self.threads = address, jobs, threads
        self._jobs: dict[Any, Job] = {}  # by their futures
        self._client: Any = None
        self._cluster: Any = None
        self._stack = ExitStack()

    def start(self, work: Work, progress: Callback | None) -> None:
        self._work = work

    def room(self) -> bool:
        if self._client is None:
            return True
        threads = self.jobs
        with suppress(OSError, asyncio.TimeoutError):  # submit() and result() report it
            threads = max(threads, sum(self._client.nthreads().values()))
        return len(self._jobs) < AHEAD * threads

    def submit(self, job: Job) -> None:
        """Raises WorkerError if there is no scheduler."""
        if self._client is None:
            self._connect()
        from distributed.client import ClosedClientError

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Dask warns of large arguments
            try:
                future = self._client.submit(
                    remote, __version__, self._work, job, self.threads, pure=False
                )
            except ClosedClientError:
                raise WorkerError(f"the scheduler at {self.address} is gone") from None
        self._jobs[future] = job
        self._done.add(future)

    def busy(self) -> bool:
        return bool(self._jobs)

    def result(self) -> Result:
        from distributed.scheduler import KilledWorker

        self._wait()
        future, got = next(self._done)
        job = self._jobs.pop(future)
        if isinstance(got, Result):
            return got
        if future.status != "error":
            raise WorkerError(f"the scheduler at {self.address} is gone")
        _, error, trace = got
        if isinstance(error, KilledWorker):
            text = f"the workers that worked on it died, {error.allowed_failures + 1} times"
            return Result(job.source, job.dest, error=WorkerError(text))
        if isinstance(error, ImportError):
            raise WorkerError(f"the cluster's workers lack what the work needs: {error}")
        raise error.with_traceback(trace)

    def _wait(self) -> None:
        """Wait until there is a result."""
        look = time.monotonic() + MEND
        while not self._done.has_ready():
            time.sleep(POLL)
            if self._cluster is not None and time.monotonic() > look:
                # Dask restarts a worker that dies, but not one that dies while it starts.
                self._cluster.scale(self.jobs)
                look += MEND

    def stop(self) -> None:
        """Workers of a cluster that we did not start finish their jobs; the results are dropped."""
        with suppress(Exception):  # Ctrl-C may have interrupted any step
            if self._cluster is not None and self._jobs:
                for nanny in self._cluster.workers.values():
                    nanny.auto_restart = False
                    if nanny.pid:
                        os.kill(nanny.pid, signal.SIGTERM)
        for each in (self._client, self._cluster):
            with suppress(Exception):
                if each is not None:
                    each.close()
        self._stack.close()
        self._client, self._cluster, self._jobs = None, None, {}

    def _connect(self) -> None:
        from dask import config
        from distributed import Client, LocalCluster, as_completed
        from distributed.utils import silence_logging_cmgr

        self._stack.enter_context(silence_logging_cmgr(logging.CRITICAL))
        address = self.address
        if address == LOCAL:
            self._stack.enter_context(config.set(CONFIG))
            with shielded():
                self._cluster = LocalCluster(
                    n_workers=0, threads_per_worker=1, processes=True, dashboard_address=None,
                    silence_logs=logging.CRITICAL,
                    scheduler_kwargs={"dashboard_address": "127.0.0.1:0"},  # any free port
                )  # fmt: skip
            self._cluster.scale(self.jobs)  # does not wait, so Ctrl-C can interrupt
            address = self._cluster.scheduler_address
        try:
            self._client = Client(address, set_as_default=False)
        except (OSError, ValueError) as e:
            reason = str(e).partition("\n")[0]
            raise WorkerError(f"no scheduler at {address} ({reason})") from None
        self._done = as_completed(loop=self._client.loop, with_results=True, raise_errors=False)


def remote(version: str, work: Work, job: Job, threads: int) -> Result:
    """Do a job on a worker. Raises WorkerError, which ends the batch, for another version."""
    if version != __version__:
        raise WorkerError(f"the cluster's workers have ddpmc {__version__}, not {version}")
    set_threads(threads)
    return perform(work, job)
