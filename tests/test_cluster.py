"""Work on a Dask cluster: dead workers, dead schedulers, and files written once."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_executors import run
from works import jobs, work

import ddpm_codec
from ddpm_codec.batch import encode_all
from ddpm_codec.batch.cluster import LOCAL, Cluster, remote
from ddpm_codec.batch.jobs import Decode, Encode, perform
from ddpm_codec.errors import ImageError, WorkerError

pytest.importorskip("distributed", reason="needs Dask: pip install 'ddpmc[dask]'")

SCHEDULER = """
from distributed import LocalCluster
if __name__ == "__main__":
    cluster = LocalCluster(n_workers=0, dashboard_address=None)
    print(cluster.scheduler_address, flush=True)
    input()
"""


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Of a cluster that is not ours, with one worker."""
    from distributed import LocalCluster

    with LocalCluster(
        n_workers=1, threads_per_worker=1, dashboard_address=None, silence_logs=50
    ) as cluster:
        yield cluster.scheduler_address


def test_dead_workers(tmp_path: Path) -> None:
    """Another does their work; a second death is that picture's failure alone."""
    todo = jobs("fine", f"once {tmp_path / 'died'}", "bad", "deadly", "warned")
    results = {r.source: r for r in run(Cluster(LOCAL, 2), todo)}
    assert sorted(results) == [job.source for job in todo]
    fine, once, bad, deadly, warned = (results[job.source] for job in todo)
    assert fine.data == b"FINE" and fine.about["threads"] == 1 and not fine.error
    assert once.data is not None and once.error is None and (tmp_path / "died").exists()
    assert isinstance(bad.error, ImageError) and [str(w) for w in warned.warnings] == ["beware"]
    assert isinstance(deadly.error, WorkerError)
    assert str(deadly.error) == "the workers that worked on it died, 2 times"


def test_the_same_files(address: str, tmp_path: Path, tiny_model: Path, picture: Any) -> None:
    """The client writes them: the workers know neither folder."""
    how: dict[str, Any] = {"model": str(tiny_model), "steps": 3, "effort": 1}
    (tmp_path / "in").mkdir()
    for i in range(3):
        picture.rotate(i).save(tmp_path / "in" / f"{i}.png")
    (tmp_path / "in" / "none.png").touch()
    results = list(encode_all(tmp_path / "in", f"{tmp_path}/out/", scheduler=address, **how))
    assert sorted(r.error is None for r in results) == [False, True, True, True]
    for i in range(3):
        want = ddpm_codec.encode(tmp_path / "in" / f"{i}.png", **how)
        assert (tmp_path / "out" / f"{i}.ddpm").read_bytes() == want
    assert len(os.listdir(tmp_path / "out")) == 3


def test_a_dead_scheduler() -> None:
    """Ends the batch: nothing more would come of it."""
    from dask import config

    with subprocess.Popen(
        [sys.executable, "-c", SCHEDULER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        cluster = Cluster(address)
        cluster.start(work, None)
        cluster.submit(jobs("fine")[0])
        process.kill()
        with pytest.raises(WorkerError, match=f"the scheduler at {address} is gone"):
            cluster.result()
        with pytest.raises(WorkerError, match=f"the scheduler at {address} is gone"):
            assert cluster.room()
            cluster.submit(jobs("fine")[0])
            cluster.result()
        cluster.stop()
    with config.set({"distributed.comm.timeouts.connect": "1s"}):
        with pytest.raises(WorkerError, match=f"no scheduler at {address} "):
            cluster.submit(jobs("fine")[0])
        cluster.stop()


def test_another_version_is_refused() -> None:
    with pytest.raises(WorkerError, match=r"the cluster's workers have ddpmc .*, not 0\.0\.1"):
        remote("0.0.1", work, jobs("fine")[0], 1)


def test_a_device_that_a_worker_lacks() -> None:
    for lacking in (Encode({"device": "cuda:99"}, ""), Decode({"device": "cuda:99"})):
        result = perform(lacking, jobs("fine")[0])
        assert isinstance(result.error, WorkerError)
        assert str(result.error).startswith("device cuda:99: ")


def test_addresses() -> None:
    for address in (LOCAL, "tcp://127.0.0.1:8786", "tls://host:1"):
        assert not Cluster(address).busy()
    for address in ("", "host:8786", "elsewhere"):
        with pytest.raises(ValueError, match="a scheduler is tcp://HOST:PORT or local"):
            Cluster(address)
