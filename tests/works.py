"""Work for processes of their own: a job's content says what happens to whoever takes it."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import torch

from ddpm_codec.batch.jobs import Job
from ddpm_codec.errors import ConversionWarning, ImageError, warn


def work(job: Job, _: Any) -> tuple[bytes, dict[str, Any]]:
    """``fine``, ``bad``, ``warned``, ``fault``, ``deadly``, ``slow``; ``once FILE`` dies once."""
    what, _, name = job.content.decode().partition(" ")
    if what == "bad":
        raise ImageError("a bad one")
    if what == "fault":
        raise ZeroDivisionError
    if what == "warned":
        warn("beware", ConversionWarning)
    if what == "slow":
        time.sleep(600)
    if what == "deadly" or (what == "once" and not Path(name).exists()):
        if name:
            Path(name).touch()
        time.sleep(0.5)  # not while it starts, which takes Dask some 20 s to mend
        os.kill(os.getpid(), signal.SIGKILL)
    return job.content.upper(), {"pid": os.getpid(), "threads": torch.get_num_threads()}


def jobs(*contents: str) -> list[Job]:
    return [Job(f"{i}.png", f"{i}.ddpm", c.encode()) for i, c in enumerate(contents)]
