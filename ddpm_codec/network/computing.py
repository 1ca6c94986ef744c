"""A context for torch's computations: it handles exhausted memory and forked processes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..errors import LimitError

_process = 0  # id of the process that computed last


@contextmanager
def computing() -> Iterator[None]:
    """Memory that runs out, on whatever device, becomes a LimitError.

    In a child that was forked after its parent had computed, torch gets one thread: OpenMP's other
    threads stayed with the parent, and torch would wait for them for ever.
    """
    global _process
    if _process not in (0, os.getpid()):
        torch.set_num_threads(1)
    _process = os.getpid()
    try:
        yield
    except (MemoryError, RuntimeError) as e:
        # When the processor's memory runs out, only the text of torch's RuntimeError shows it.
        exhausted = isinstance(e, MemoryError | torch.cuda.OutOfMemoryError)
        if not (exhausted or "allocate memory" in str(e)):
            raise
        about = str(e).partition("\n")[0] or "an allocation failed"
        raise LimitError(f"not enough memory ({about})") from None
