"""Who does the work: all jobs once, several at a time, whatever dies."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from works import jobs, work

from ddpm_codec.batch.executors import Executor, Processes, Serial
from ddpm_codec.batch.jobs import Job, Result
from ddpm_codec.errors import WorkerError

ORPHANS = """
import sys
from ddpm_codec.batch.executors import Processes
from works import jobs, work

if __name__ == "__main__":
    two = Processes(2)
    two.start(work, None)
    for job in jobs("slow", "slow"):
        two.submit(job)
    print(*[worker.process.pid for worker in two._working], flush=True)
    two.result()
"""


def run(executor: Executor, todo: list[Job]) -> Iterator[Result]:
    waiting = iter(todo)
    executor.start(work, None)
    try:
        while True:
            while executor.room() and (job := next(waiting, None)):
                executor.submit(job)
            if not executor.busy():
                return
            yield executor.result()
    finally:
        executor.stop()


def alive(pid: int) -> bool:
    with suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False


def test_serial_keeps_the_order() -> None:
    results = list(run(Serial(), jobs("fine", "bad", "warned")))
    assert [r.source for r in results] == ["0.png", "1.png", "2.png"]
    assert results[0].about["pid"] == os.getpid()


def test_processes(tmp_path: Path) -> None:
    """One that dies over a job is replaced: the job is tried once more."""
    todo = jobs("fine", "bad", f"once {tmp_path / 'died'}", "warned", "deadly", "fine")
    two = Processes(2, threads=1)
    results = {r.source: r for r in run(two, todo)}
    assert sorted(results) == [job.source for job in todo]
    fine, bad, once, warned, deadly, last = (results[job.source] for job in todo)
    assert fine.data == last.data == b"FINE" and fine.about["threads"] == 1
    assert fine.about["pid"] != os.getpid()
    assert str(bad.error) == "a bad one" and [str(w) for w in warned.warnings] == ["beware"]
    assert once.error is None and once.data is not None
    assert [str(w) for w in once.warnings] == ["the process that worked on it died; another did it"]
    assert isinstance(deadly.error, WorkerError) and deadly.error.exit_status == 9
    text = "the process that worked on it died, 2 times (signal 9: out of memory?)"
    assert str(deadly.error) == text
    assert not alive(fine.about["pid"]) and not alive(last.about["pid"])


def test_a_fault_is_raised_here(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ZeroDivisionError):
        list(run(Processes(1), jobs("fault")))
    assert "tests/works.py" in capfd.readouterr().err  # where it came from


@pytest.mark.skipif(os.name != "posix", reason="kills")
def test_they_end_with_the_process_that_started_them() -> None:
    """However it ends: here it is killed."""
    arguments = [sys.executable, "-c", ORPHANS]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        pids = [int(pid) for pid in process.stdout.readline().split()]
        process.kill()
    assert len(pids) == 2
    end = time.monotonic() + 60
    while any(map(alive, pids)):
        assert time.monotonic() < end, "they live on"
        time.sleep(0.05)
