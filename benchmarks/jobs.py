"""Pictures a second of many: one process of two threads against one and two processes of one.

    python benchmarks/jobs.py [--data DIR] [--pictures N] [--ways 1x2,1x1,2x1] [--steps N]
                              [--scheduler local]

Runs `ddpmc encode` on a folder for each way, which is processes x threads, and prints the pictures
a second of the whole command and of the command after its first pictures (one for each process),
which leaves out the time that it takes to start. Checks that all ways give the same files.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click

from ddpm_codec.data import list_pictures

HERE = Path(__file__).resolve().parent


def encode(source: Path, dest: Path, processes: int, threads: int, more: list[str]) -> list[float]:
    """Seconds until each of the pictures was done."""
    ddpmc = [sys.executable, "-m", "ddpm_codec", "encode", "--json", *more]
    where = [str(source), "-o", f"{dest}/", "--jobs", str(processes), "--threads", str(threads)]
    begin = time.perf_counter()
    with subprocess.Popen(ddpmc + where, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        seconds = [time.perf_counter() - begin for _ in process.stdout]
    if process.returncode:
        sys.exit(process.returncode)
    return seconds


def same(a: Path, b: Path) -> bool:
    return all((b / file.name).read_bytes() == file.read_bytes() for file in a.iterdir())


@click.command()
@click.option("--data", default=HERE / "pictures", type=Path, show_default=True)
@click.option("--pictures", default=0, help="Only the first N.  [default: all]")
@click.option("--ways", default="1x2,1x1,2x1", show_default=True, help="Processes x threads.")
@click.option("--steps", type=click.IntRange(1), help="Levels of the chain.")
@click.option("--model", help="Model: a name or a file.")
@click.option("--scheduler", help="As of `ddpmc encode`.")
def main(
    data: Path, pictures: int, ways: str, steps: int | None, model: str | None,
    scheduler: str | None,
) -> None:  # fmt: skip
    """Pictures a second of many."""
    given = {"--steps": steps, "--model": model, "--scheduler": scheduler}
    more = [word for name, value in given.items() if value for word in (name, str(value))]
    with tempfile.TemporaryDirectory() as folder:
        source, made = Path(folder, "in"), []
        source.mkdir()
        for i, path in enumerate(list_pictures([data])[: pictures or None]):
            shutil.copy(path, source / f"{i:04d}{path.suffix}")
        print("| processes | threads | pictures | pictures/s | after the start |")
        print("|---|---|---|---|---|")
        for way in ways.split(","):
            processes, threads = map(int, way.split("x"))
            made.append(Path(folder, way))
            seconds = encode(source, made[-1], processes, threads, more)
            n, first = len(seconds), min(processes, len(seconds) - 1)
            later = (n - first) / (seconds[-1] - seconds[first - 1]) if first else float("nan")
            print(f"| {processes} | {threads} | {n} | {n / seconds[-1]:.4f} | {later:.4f} |")
            assert same(made[0], made[-1]), "other files"


if __name__ == "__main__":
    main()
