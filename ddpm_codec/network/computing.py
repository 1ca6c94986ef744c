"""What torch needs around whatever a network computes: memory, and processes that were forked."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..errors import LimitError

_process = 0  # the one that computed last


@contextmanager
def computing() -> Iterator[None]:
    """Memory that runs out, on whatever device, becomes a LimitError.

    In a child that was forked after its parent had computed, torch gets one thread: OpenMP's
    threads did not come along, and it would wait for them for good.
    """
    global _process
    if _process not in (0, os.getpid()):
        torch.set_num_threads(1)
    _process = os.getpid()
    try:
        yield
    except (MemoryError, RuntimeError) as e:
        # Of the processor's memory torch says so in words alone.
        ours = isinstance(e, MemoryError | torch.cuda.OutOfMemoryError) or "allocate memory" in str(
            e
        )
        if not ours:
            raise
        about = str(e).partition("\n")[0] or "an allocation failed"
        raise LimitError(f"not enough memory ({about})") from None
