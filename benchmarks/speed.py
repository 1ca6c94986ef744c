"""Time, memory and overhead of the codec itself.

    python benchmarks/speed.py [--data DIR] [--threads 2] [--steps] [--sizes 0.1,0.4,1.6]
                               [--megapixels 24] [--peers]

Prints, over the pictures of a folder: seconds of a full encode and of decoding the file cut at 0.5
bpp, stage by stage; bytes written over the tables' ideal length; the process's peak memory; and how
fast the network computes, beside the fastest convolution of such widths that this machine was seen
to do in the same run. A stage's seconds are its own, without those of the stages inside it.

--steps: seconds up to each level of the first picture. --sizes: seconds of --levels levels for
pictures of so many megapixels (the folder's first, repeated), and the exponent of time = c
pixels^e. --megapixels: the same stages and the peak memory for one large picture, in a process of
its own. --peers: JPEG, WebP, AVIF and JPEG 2000 on the same pictures.
"""

from __future__ import annotations

import io
import resource
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from ddpm_codec.codec import chain, codec
from ddpm_codec.codec import container as bitstream
from ddpm_codec.codec.image import load
from ddpm_codec.data import list_pictures
from ddpm_codec.diffusion import transform
from ddpm_codec.network.modelfile import Model, get_model
from ddpm_codec.rec import agree as entropy

HERE = Path(__file__).resolve().parent
STAGES = ("network", "transform", "coding", "entropy", "file", "rest")


class Stages:
    """Where the seconds go: to the innermost of the stages that are under way."""

    def __init__(self, model: Model) -> None:
        self.seconds: Counter[str] = Counter()
        self.under_way = ["rest"]
        self.since = time.perf_counter()
        model.net.register_forward_pre_hook(lambda *_: self.enter("network"))
        model.net.register_forward_hook(lambda *_: self.leave())
        for name in ("forward", "inverse"):
            self.watch(transform, name, "transform")
        for name in ("encode_level", "decode_level"):
            self.watch(chain.Nested, name, "coding")
        for coder in (entropy.Writer, entropy.Reader):
            for name in ("binary", "_piece"):
                self.watch(coder, name, "entropy")
        for name in ("write_header", "write_level", "parse", "truncate"):
            self.watch(bitstream, name, "file")

    def watch(self, owner: Any, name: str, stage: str) -> None:
        plain: Callable[..., Any] = getattr(owner, name)

        def watched(*given: Any, **named: Any) -> Any:
            self.enter(stage)
            try:
                return plain(*given, **named)
            finally:
                self.leave()

        setattr(owner, name, watched)

    def charge(self) -> None:
        now = time.perf_counter()
        self.seconds[self.under_way[-1]] += now - self.since
        self.since = now

    def enter(self, stage: str) -> None:
        self.charge()
        self.under_way.append(stage)

    def leave(self) -> None:
        self.charge()
        self.under_way.pop()

    def take(self) -> dict[str, float]:
        """Seconds of each stage since the last call."""
        self.charge()
        taken = {stage: self.seconds[stage] for stage in STAGES}
        self.seconds.clear()
        return taken


def peak() -> float:
    """Peak memory of this process so far, GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


Row = dict[str, Any]


def measure(picture: Image.Image, model: Model, stages: Stages, levels: int | None) -> Row:
    """One picture encoded to the end, and decoded from its first 0.5 bpp."""
    stages.take()
    header = codec.make_header(picture, model, "nested", None, 0)
    encoder = codec.Encoder(np.asarray(picture), header, model)
    for _ in range(levels or header.levels):
        encoder.step()
    data = encoder.bytes()
    out: Row = {"encode": stages.take(), "bytes": len(data), "ideal": encoder.ideal_bits / 8}
    del encoder
    data = bitstream.truncate(data, bpp=0.5)
    stages.take()
    codec.decode(data, model=model)
    return out | {"decode": stages.take()}


def report(name: str, rows: list[Row], levels: int | None = None) -> None:
    n = len(rows)
    for way in ("encode", "decode"):
        seconds = {s: sum(r[way][s] for r in rows) / n for s in STAGES}
        total = sum(seconds.values())
        what = f"{levels or 'all'} levels" if way == "encode" else "cut at 0.5 bpp"
        outside = 1 - seconds["network"] / total
        each = ", ".join(f"{s} {seconds[s]:.2f}" for s in STAGES)
        print(f"{name}: {way} {total:.2f} s ({what}), {outside:.1%} outside the network ({each})")
    written, ideal = (sum(r[k] for r in rows) for k in ("bytes", "ideal"))
    print(f"{name}: bytes written over ideal length {written / ideal:.4f}")
    print(f"{name}: peak memory of the process {peak():.2f} GB")


def throughput(picture: Image.Image, model: Model, stages: Stages) -> None:
    """The network's speed on one picture, and the convolutions' (multiplications and additions)."""

    def one_level() -> None:
        header = codec.make_header(picture, model, "nested", None, 0)
        encoder = codec.Encoder(np.asarray(picture), header, model)
        encoder.step()
        encoder.step()

    with FlopCounterMode(display=False) as counter:
        one_level()
    stages.take()
    one_level()
    ours = counter.get_total_flops() / stages.take()["network"] / 1e9
    best, which = 0.0, ""
    for width, side in ((64, 256), (96, 128), (160, 64), (160, 128), (256, 64)):
        x = torch.randn(1, width, side, side).contiguous(memory_format=torch.channels_last)
        w = torch.randn(width, width, 3, 3).contiguous(memory_format=torch.channels_last)
        flops, seconds = 2 * 9 * width**2 * side**2, []
        with torch.no_grad():
            for _ in range(12):
                begin = time.perf_counter()
                F.conv2d(x, w, padding=1)
                seconds.append(time.perf_counter() - begin)
        if (speed := flops / min(seconds) / 1e9) > best:
            best, which = speed, f"3x3, {width} channels, {side}x{side}"
    print(
        f"network: {ours:.0f} GFLOP/s; fastest convolution ({which}): {best:.0f} GFLOP/s, "
        f"{best / ours:.2f} times that"
    )


def large(picture: Image.Image, megapixels: float) -> Image.Image:
    """3:2, of so many megapixels: the picture, repeated or cut."""
    height = round((megapixels * 1e6 * 2 / 3) ** 0.5)
    size = (height * 3 // 2, height)
    whole = np.asarray(picture)
    repeat = (-(-size[1] // whole.shape[0]), -(-size[0] // whole.shape[1]), 1)
    return Image.fromarray(np.tile(whole, repeat)[: size[1], : size[0]])


def scaling(
    picture: Image.Image, sizes: list[float], model: Model, stages: Stages, levels: int | None
) -> None:
    """Seconds against pixels."""
    seconds: dict[str, list[float]] = {"encode": [], "decode": []}
    print(f"\n| megapixels | encode {levels or 'all'} levels, s | decode 0.5 bpp, s | peak GB |")
    print("|---|---|---|---|")
    for size in sizes:
        row = measure(large(picture, size), model, stages, levels)
        for way, times in seconds.items():
            times.append(sum(row[way].values()))
        last = " | ".join(f"{times[-1]:.2f}" for times in seconds.values())
        print(f"| {size:g} | {last} | {peak():.2f} |", flush=True)
    for way, times in seconds.items():
        exponent = np.polyfit(np.log(sizes), np.log(times), 1)[0]
        print(f"{way}: time grows with pixels^{exponent:.2f}")


def steps(picture: Image.Image, model: Model, stages: Stages) -> None:
    """Seconds up to the end of each level."""
    stages.take()
    header = codec.make_header(picture, model, "nested", None, 0)
    encoder, encode, total = codec.Encoder(np.asarray(picture), header, model), [], 0.0
    for _ in range(header.levels):
        encoder.step()
        total += sum(stages.take().values())
        encode.append(total)
    data, total = encoder.bytes(), 0.0
    print("\n| levels | t | bpp | encode, s | decode, s |\n|---|---|---|---|---|")
    for n, level in enumerate(codec.decode_levels(data, model=model)):
        total += sum(stages.take().values())
        bpp = 8 * level.nbytes / (picture.width * picture.height)
        print(f"| {n + 1} | {level.t} | {bpp:.3f} | {encode[n]:.2f} | {total:.2f} |")
        stages.take()


def alone(
    path: Path, megapixels: float, which: str | None, threads: int, levels: int | None
) -> None:
    """One large picture, in a fresh process: its peak memory is the codec's alone."""
    torch.set_num_threads(threads)
    loaded = get_model(which)
    shot = large(load(path).convert("RGB"), megapixels)
    rows = [measure(shot, loaded, Stages(loaded), levels)]
    report(f"{shot.width}x{shot.height}", rows, levels)


def peers(shots: list[Image.Image]) -> None:
    """Seconds of other codecs at a common setting."""
    print("\n| codec | encode, s | decode, s |\n|---|---|---|")
    for kind, how in (
        ("JPEG", {"quality": 75, "optimize": True}),
        ("WEBP", {"quality": 75, "method": 6}),
        ("AVIF", {"quality": 60, "speed": 4}),
        (
            "JPEG2000",
            {"irreversible": True, "mct": 1, "quality_mode": "rates", "quality_layers": [24]},
        ),
    ):
        times = np.zeros(2)
        for shot in shots:
            file, begin = io.BytesIO(), time.perf_counter()
            shot.save(file, kind, **how)
            encoded = time.perf_counter()
            Image.open(file).load()
            times += encoded - begin, time.perf_counter() - encoded
        encode, decode = times / len(shots)
        print(f"| {kind.lower()} | {encode:.3f} | {decode:.3f} |")


@click.command()
@click.option("--data", default=HERE / "pictures", type=Path, show_default=True)
@click.option("--model", default=None, help="Model: a name or a file.")
@click.option("--threads", default=2, show_default=True)
@click.option("--pictures", default=0, help="Only the first N.  [default: all]")
@click.option("--steps", "by_level", is_flag=True, help="Seconds up to each level, too.")
@click.option("--sizes", default="", help="Megapixels, by commas.")
@click.option("--megapixels", default=0.0, help="Also a large picture of this size.")
@click.option("--levels", type=int, help="Levels of --sizes and --megapixels.  [default: all]")
@click.option("--peers", "others", is_flag=True, help="Other codecs' seconds, too.")
def main(
    data: Path, model: str | None, threads: int, pictures: int, by_level: bool, sizes: str,
    megapixels: float, levels: int | None, others: bool,
) -> None:  # fmt: skip
    """Time, memory and overhead."""
    torch.set_num_threads(threads)
    loaded = get_model(model)
    stages = Stages(loaded)
    paths = list_pictures([data])[: pictures or None]
    shots = [load(p).convert("RGB") for p in paths]
    print(f"{len(shots)} pictures, {shots[0].width}x{shots[0].height} the first, {threads} threads")
    measure(shots[0].resize((128, 128)), loaded, stages, None)  # warms up
    report("small", [measure(s, loaded, stages, None) for s in shots])
    throughput(shots[0], loaded, stages)
    if others:
        peers(shots)
    if by_level:
        steps(shots[0], loaded, stages)
    if sizes:
        scaling(shots[0], [float(s) for s in sizes.split(",")], loaded, stages, levels)
    if megapixels:
        with ProcessPoolExecutor(1, get_context("spawn")) as process:
            process.submit(alone, paths[0], megapixels, model, threads, levels).result()


if __name__ == "__main__":
    main()
