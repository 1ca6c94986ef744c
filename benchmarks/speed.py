"""Time, memory and overhead of the codec.

    python benchmarks/speed.py [--data DIR] [--threads 2] [--steps N] [--effort N] [--by-level]
                               [--sizes 0.1,0.4,1.6] [--megapixels 24] [--peers]

Prints means over the pictures of a folder:

- seconds to encode all levels and to decode the file cut at 0.5 bpp, in total and for each stage,
  where a stage's seconds exclude those of the stages that it calls;
- the bits written over the information sent, which is 1/2 log2(1 + D v) for each observation, in
  total, for the messages, and for the rest (header, heads of levels, checksums, gains);
- microseconds of the search for each bit of a message, on one thread;
- the peak memory of the process;
- seconds and GFLOP/s of one evaluation of the network, by the type of its convolutions.

--steps and --effort are those of `ddpmc encode`. --by-level prints seconds up to each level of the
first picture. --sizes prints seconds of --levels levels for pictures of so many megapixels (the
first picture, repeated), and the exponent e of time = c pixels^e. --megapixels prints the stages
and the peak memory for one large picture, in a process of its own. --peers prints seconds of JPEG,
WebP, AVIF and JPEG 2000 on the same pictures.
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
from typing import Any, NamedTuple

import click
import numpy as np
import torch
from photographs import PICTURES, photographs
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from ddpm_codec.codec import container, decoder, stops
from ddpm_codec.codec.chain import Chain
from ddpm_codec.codec.encoder import Encoder, make_header
from ddpm_codec.codec.header import Header
from ddpm_codec.codec.planning import evenly
from ddpm_codec.diffusion import transform
from ddpm_codec.network.exact import ExactUNet
from ddpm_codec.network.modelfile import Model, get_model
from ddpm_codec.rec import classes, search, trellis

STAGES = ("network", "transform", "trellis", "classes", "file", "rest")


class Stages:
    """Seconds of each stage, and bits. Time counts for the innermost stage that is running."""

    def __init__(self, model: Model) -> None:
        self.seconds: Counter[str] = Counter()
        self.bits: Counter[str] = Counter()
        self.running = ["rest"]  # innermost last
        self.since = time.perf_counter()
        model.net.register_forward_pre_hook(lambda *_: self.enter("network"))
        model.net.register_forward_hook(lambda *_: self.leave())
        for name in ("forward", "inverse", "across"):
            self.watch(transform, name, "transform")
        self.watch(search, "encode", "trellis", lambda got: len(got[0]))
        self.watch(trellis, "decode", "trellis")
        for name in ("_expected", "_mu", "_layout", "_merge"):
            self.watch(Chain, name, "classes")
        for name in ("shares", "fit_gains", "write_gains", "read_gains"):
            self.watch(classes, name, "classes")
        for owner, name in ((container.Writer, "level"), (container.Writer, "file")):
            self.watch(owner, name, "file")
        self.watch(container, "parse", "file")

    def watch(
        self, owner: Any, name: str, stage: str, bits: Callable[[Any], int] | None = None
    ) -> None:
        """Time an attribute of ``owner``. bits: counts the bits in what it returns."""
        plain: Callable[..., Any] = getattr(owner, name)

        def watched(*given: Any, **named: Any) -> Any:
            self.enter(stage)
            try:
                got = plain(*given, **named)
            finally:
                self.leave()
            if bits is not None:
                self.bits[stage] += bits(got)
            return got

        setattr(owner, name, watched)

    def charge(self) -> None:
        """Count the time since the last call for the running stage."""
        now = time.perf_counter()
        self.seconds[self.running[-1]] += now - self.since
        self.since = now

    def enter(self, stage: str) -> None:
        self.charge()
        self.running.append(stage)

    def leave(self) -> None:
        self.charge()
        self.running.pop()

    def take(self) -> dict[str, float]:
        """Seconds of each stage since the last call. Seconds and bits start at 0 again."""
        self.charge()
        taken = {stage: self.seconds[stage] for stage in STAGES}
        self.seconds.clear()
        self.bits.clear()
        return taken


def peak() -> float:
    """Peak memory of this process so far, GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


class How(NamedTuple):
    """The encoder's settings."""

    steps: int | None = None  # levels of the chain
    effort: int | None = None
    levels: int | None = None  # levels that are encoded; None: all

    def header(self, picture: Image.Image, model: Model) -> Header:
        return make_header(picture, model, None, 0, self.steps, self.effort)


class Row(NamedTuple):
    """The measurements of one picture."""

    encode: dict[str, float]  # seconds of each stage
    decode: dict[str, float]
    bits: dict[str, float]  # "written", "trellis" (those of messages) and "information"


def measure(picture: Image.Image, model: Model, stages: Stages, how: How) -> Row:
    """Encode a picture, and decode its file cut at 0.5 bpp."""
    stages.take()
    header = how.header(picture, model)
    encoder = Encoder(np.asarray(picture), header, model)
    for _ in range(how.levels or header.levels):
        encoder.step()
    data = encoder.file()
    bits = {"written": 8.0 * len(data), "information": encoder.chain.information}
    bits["trellis"] = stages.bits["trellis"]
    encode = stages.take()
    del encoder
    data = stops.truncate(data, bpp=0.5)
    stages.take()
    decoder.decode(data, model=model)
    return Row(encode, stages.take(), bits)


def report(name: str, rows: list[Row], how: How) -> None:
    """Print the means of some rows."""
    for way in ("encode", "decode"):
        seconds = {s: sum(getattr(r, way)[s] for r in rows) / len(rows) for s in STAGES}
        total = sum(seconds.values())
        what = f"{how.levels or 'all'} levels" if way == "encode" else "cut at 0.5 bpp"
        outside = 1 - seconds["network"] / total
        each = ", ".join(f"{s} {seconds[s]:.2f}" for s in STAGES)
        print(f"{name}: {way} {total:.2f} s ({what}), {outside:.1%} outside the network ({each})")
    written, sent, messages = (
        sum(r.bits[k] for r in rows) for k in ("written", "information", "trellis")
    )
    print(
        f"{name}: bits written over the information {written / sent:.4f}: messages "
        f"{messages / sent:.4f}, heads, checksums and gains {(written - messages) / sent:.4f}"
    )
    searching = sum(r.encode["trellis"] for r in rows)
    print(f"{name}: search {1e6 * searching / messages:.1f} us for each bit of a message, 1 thread")
    print(f"{name}: peak memory of the process {peak():.2f} GB")


def throughput(picture: Image.Image, model: Model, stages: Stages) -> None:
    """Print seconds and GFLOP/s of one evaluation, for each type of the convolutions."""
    empty = Chain(How().header(picture, model), model)
    with FlopCounterMode(display=False) as counter:
        empty.ask(empty.snrs[0])
    flops = counter.get_total_flops()  # multiplications and additions
    net = model.net
    assert isinstance(net, ExactUNet)
    chosen = net.dtype
    for dtype in (torch.bfloat16, torch.float32):
        net.compute_in(dtype)
        empty.ask(empty.snrs[0])
        stages.take()
        whole, inside = [], []
        for _ in range(5):
            empty.ask(empty.snrs[0])
            taken = stages.take()
            whole.append(sum(taken.values()))
            inside.append(taken["network"])
        print(
            f"one evaluation in {str(dtype)[6:]}{' (chosen)' * (dtype == chosen)}: "
            f"{min(whole):.3f} s, of which the network {min(inside):.3f}, "
            f"{flops / min(inside) / 1e9:.0f} GFLOP/s"
        )
    net.compute_in(chosen)


def large(picture: Image.Image, megapixels: float) -> Image.Image:
    """A 3:2 picture of so many megapixels: ``picture``, repeated or cropped."""
    height = round((megapixels * 1e6 * 2 / 3) ** 0.5)
    size = (height * 3 // 2, height)
    whole = np.asarray(picture)
    repeat = (-(-size[1] // whole.shape[0]), -(-size[0] // whole.shape[1]), 1)
    return Image.fromarray(np.tile(whole, repeat)[: size[1], : size[0]])


def scaling(
    picture: Image.Image, sizes: list[float], model: Model, stages: Stages, how: How
) -> None:
    """Print seconds for several sizes, and how they grow with the number of pixels."""
    seconds: dict[str, list[float]] = {"encode": [], "decode": []}
    print(
        f"\n| megapixels | encode {how.levels or 'all'} levels, s | decode 0.5 bpp, s | peak GB |"
    )
    print("|---|---|---|---|")
    for size in sizes:
        row = measure(large(picture, size), model, stages, how)
        for way, times in seconds.items():
            times.append(sum(getattr(row, way).values()))
        last = " | ".join(f"{times[-1]:.2f}" for times in seconds.values())
        print(f"| {size:g} | {last} | {peak():.2f} |", flush=True)
    for way, times in seconds.items():
        exponent = np.polyfit(np.log(sizes), np.log(times), 1)[0]
        print(f"{way}: time grows with pixels^{exponent:.2f}")


def level_by_level(picture: Image.Image, model: Model, stages: Stages, how: How) -> None:
    """Print seconds up to the end of each level."""
    stages.take()
    header = how.header(picture, model)
    encoder, encode, total = Encoder(np.asarray(picture), header, model), [], 0.0
    for _ in range(header.levels):
        encoder.step()
        total += sum(stages.take().values())
        encode.append(total)
    data, total = encoder.file(), 0.0
    stages.take()
    print("\n| levels | t | bpp | encode, s | decode, s |\n|---|---|---|---|---|")
    for n, level in enumerate(decoder.decode_levels(data, model=model)):
        total += sum(stages.take().values())
        bpp = 8 * level.bytes / (picture.width * picture.height)
        print(f"| {n + 1} | {level.t} | {bpp:.3f} | {encode[n]:.2f} | {total:.2f} |")
        stages.take()


def alone(folder: Path, megapixels: float, which: str | None, threads: int, how: How) -> None:
    """Measure one large picture. In a fresh process the peak memory is the codec's."""
    torch.set_num_threads(threads)
    loaded = get_model(which)
    shot = large(photographs(folder, 1)[0][1], megapixels)
    report(f"{shot.width}x{shot.height}", [measure(shot, loaded, Stages(loaded), how)], how)


def peers(shots: list[Image.Image]) -> None:
    """Print seconds of other codecs at a common setting."""
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
@click.option("--data", default=PICTURES, type=Path, help="Folder.  [default: pictures]")
@click.option("--model", default=None, help="A name or a file.")
@click.option("--threads", default=2, show_default=True)
@click.option("--pictures", default=0, help="Use the first N of --data.  [default: all]")
@click.option("--steps", type=click.IntRange(1), help="Number of levels of the chain.")
@click.option("--effort", type=click.IntRange(1, 9), help="Effort of the encoder's search.")
@click.option("--by-level", is_flag=True, help="Print seconds up to each level, too.")
@click.option("--sizes", default="", help="Megapixels, separated by commas.")
@click.option("--megapixels", default=0.0, help="Measure a large picture of this size, too.")
@click.option(
    "--levels", type=int, help="Levels encoded for --sizes and --megapixels.  [default: all]"
)
@click.option("--peers", "others", is_flag=True, help="Print other codecs' seconds, too.")
def main(
    data: Path, model: str | None, threads: int, pictures: int, steps: int | None,
    effort: int | None, by_level: bool, sizes: str, megapixels: float, levels: int | None,
    others: bool,
) -> None:  # fmt: skip
    """Measure time, memory and overhead."""
    torch.set_num_threads(threads)
    loaded = get_model(model)
    try:
        evenly(loaded, steps or 1)
    except ValueError as e:
        raise click.BadParameter(str(e), param_hint="--steps") from None
    how, stages = How(steps, effort), Stages(loaded)
    shots = [picture for _, picture in photographs(data, pictures or None)]
    print(f"{len(shots)} pictures, {shots[0].width}x{shots[0].height} the first, {threads} threads")
    measure(shots[0].resize((128, 128)), loaded, stages, how)  # so that no first use is timed
    report("mean", [measure(s, loaded, stages, how) for s in shots], how)
    if loaded.exact:
        throughput(shots[0], loaded, stages)
    if others:
        peers(shots)
    if by_level:
        level_by_level(shots[0], loaded, stages, how)
    how = how._replace(levels=levels)
    if sizes:
        scaling(shots[0], [float(s) for s in sizes.split(",")], loaded, stages, how)
    if megapixels:
        with ProcessPoolExecutor(1, get_context("spawn")) as process:
            process.submit(alone, data, megapixels, model, threads, how).result()


if __name__ == "__main__":
    main()
