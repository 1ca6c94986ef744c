"""Many pictures: the loop that reads sources, gives them to an executor, and writes the results."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import files
from .executors import Executor, Processes, Serial
from .jobs import Decode, Encode, Job, Result, Work
from .record import Record, sha256

if TYPE_CHECKING:
    from ..codec.encoder import Callback

Names = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


class Batch:
    """Sources and the work to be done on them. Iterating over a batch, once, does the work.

    It yields a :class:`Result` for each source, in the order in which they finish. Errors of one
    do not stop the others. Files appear whole, before their result is yielded.
    """

    def __init__(
        self, pairs: Sequence[tuple[str, str]], work: Work, executor: Executor | None = None,
        force: bool = False, record: Record | None = None, read: bool = True,
    ) -> None:  # fmt: skip
        """pairs: of source and destination. force: overwrite. record: skip what it lists as done.

        read: if False, the work, which is then done in this process, reads its source itself.
        """
        self.pairs, self.work, self.force, self.record = pairs, work, force, record
        self.read = read
        self.executor: Executor = executor or Serial()
        self._under_way: dict[str, tuple[str, bool]] = {}  # by destination: digest, overwriting

    def __len__(self) -> int:
        return len(self.pairs)

    def __iter__(self) -> Iterator[Result]:
        return self.results()

    def results(self, progress: Callback | None = None) -> Generator[Result, None, None]:
        """progress: called with how many are done; for a single one, done here, with its levels."""
        pairs, total, done = iter(self.pairs), len(self.pairs), 0
        try:
            self.executor.start(self.work, progress if total == 1 else None)
            while True:
                if self.executor.room() and (pair := next(pairs, None)):
                    next_one = self._prepared(*pair)
                    if isinstance(next_one, Job):
                        self.executor.submit(next_one)
                        continue
                elif self.executor.busy():
                    next_one = self._written(self.executor.result())
                else:
                    break
                yield next_one
                done += 1
                if progress and (total > 1 or not next_one.error):
                    progress(done, total)
        finally:
            self.executor.stop()

    def _prepared(self, source: str, dest: str) -> Job | Result:
        """The job for a source; or the result, if there is nothing to do or an error."""
        try:
            force = self.force or (self.record is not None and self.record.made(dest))
            files.check_output(dest or "-", force)
            job = Job(source, dest, files.read(source) if self.read else b"")
            digest = sha256(job.content)
            if self.record is not None and self.record.done(dest, digest):
                return Result(source, dest, skipped=True)
        except FileExistsError as e:
            text = (
                "exists, but no run with --skip-existing made it as it is (--force overwrites it)"
            )
            return Result(
                source, dest, error=FileExistsError(None, text, dest) if self.record else e
            )
        except (OSError, MemoryError) as e:
            return Result(source, dest, error=e)
        self._under_way[dest] = digest, force
        return job

    def _written(self, result: Result) -> Result:
        """Write a result's file; returns the result without it. Raises OSError of stdout."""
        data, result = result.data, replace(result, data=None)
        digest, force = self._under_way.pop(result.dest)
        if result.error is not None or data is None:
            return result
        try:
            if self.record is not None:
                self.record.add(result.dest, data, digest, result.damaged)
            files.write(result.dest, data, force)
        except OSError as e:
            if e.filename == files.STDOUT:
                raise
            return replace(result, about={}, error=e)
        return result


def encode_all(
    sources: Names, output: str | os.PathLike[str], *, jobs: int = 1, scheduler: str | None = None,
    threads: int | None = None, skip_existing: bool = False, force: bool = False, **how: Any,
) -> Batch:  # fmt: skip
    """Compress pictures, and all pictures below folders, into a folder.

    how: keywords of :func:`ddpm_codec.encode`. output: a folder, which ends in a slash or exists,
    or for a single picture a file. jobs: how many pictures at a time; several have a process each,
    of ``threads`` threads (1). scheduler: a Dask cluster that does it instead, ``tcp://HOST:PORT``,
    or ``local`` for one of ``jobs`` processes. skip_existing: skip outputs that an earlier such
    run made from the same pictures with the same options.

    A script must do this below ``if __name__ == "__main__"``, because processes are started.
    Raises ValueError for impossible names, DataError for a folder without pictures, ModelError,
    OSError, WorkerError; what is wrong with a picture is in its :class:`Result`.
    """
    from ..network.modelfile import Model, find, read_metadata

    pairs = _pairs(sources, output, ".ddpm", files.PICTURES)
    executor = _executor(jobs, scheduler, threads)
    model = how.get("model")
    digest = model.id.hex() if isinstance(model, Model) else read_metadata(find(model))["digest"]
    what = {"command": "encode", **how, "model": digest}
    record = _record(pairs, output, what) if skip_existing else None
    files.make_folders(os.fspath(output), pairs)
    return Batch(pairs, Encode(how, digest), executor, force, record)


def decode_all(
    sources: Names, output: str | os.PathLike[str], *, suffix: str | None = None, jobs: int = 1,
    scheduler: str | None = None, threads: int | None = None, skip_existing: bool = False,
    force: bool = False, **how: Any,
) -> Batch:  # fmt: skip
    """Decode files, and all .ddpm files below folders: the counterpart of :func:`encode_all`.

    suffix: of the pictures' format (png). how: keywords of :func:`ddpm_codec.decode`.
    """
    pairs = _pairs(sources, output, f".{suffix or 'png'}", (".ddpm",))
    executor = _executor(jobs, scheduler, threads)
    what = {"command": "decode", **how, "suffix": suffix, "model": None}  # the file names it
    record = _record(pairs, output, what) if skip_existing else None
    files.make_folders(os.fspath(output), pairs)
    return Batch(pairs, Decode(how, suffix), executor, force, record)


def _pairs(
    sources: Names, output: str | os.PathLike[str], suffix: str, wanted: tuple[str, ...]
) -> list[tuple[str, str]]:
    given = [sources] if isinstance(sources, str | os.PathLike) else sources
    return files.destinations([os.fspath(s) for s in given], os.fspath(output), suffix, wanted)


def _executor(jobs: int, scheduler: str | None, threads: int | None) -> Executor:
    """Raises ValueError, WorkerError."""
    if jobs < 1:
        raise ValueError(f"jobs must be at least 1, not {jobs}")
    if scheduler is not None:
        from .cluster import LOCAL, Cluster

        if scheduler != LOCAL and jobs > 1:
            raise ValueError("the number of jobs is the cluster's own")
        return Cluster(scheduler, jobs, threads or 1)
    return Processes(jobs, threads or 1) if jobs > 1 else Serial()


def _record(
    pairs: Sequence[tuple[str, str]], output: str | os.PathLike[str], what: dict[str, Any]
) -> Record:
    """The record of the output folder. Raises ValueError if the output is not a file."""
    (_, dest), *_ = pairs
    if dest == "-" or files.special(dest):
        raise ValueError("only files can be left out because they exist")
    folder = Path(output) if files.is_folder(os.fspath(output)) else Path(dest).parent
    # The device does not change the result. An option that is not given counts as absent.
    options = {k: v for k, v in what.items() if k != "device" and v not in (None, False)}
    return Record(folder, options)
