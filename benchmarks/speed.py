"""Time, memory and overhead of the codec itself.

    python benchmarks/speed.py [--data DIR] [--threads 2] [--megapixels 24]

Prints, over the pictures of a folder: seconds of a full encode and of decoding the file cut at 0.5
bpp, the share of them outside the network, bytes written over the tables' ideal length, and the
process's peak memory. With --megapixels, the same for one large picture (the folder's first,
repeated) up to --levels levels.
"""

from __future__ import annotations

import resource
import time
from pathlib import Path

import click
import numpy as np
import torch
from PIL import Image

from ddpm_codec import bitstream, codec
from ddpm_codec.data import list_pictures
from ddpm_codec.image import load
from ddpm_codec.modelfile import Model, get_model

HERE = Path(__file__).resolve().parent


class Stopwatch:
    """Seconds spent inside the network."""

    def __init__(self, model: Model) -> None:
        self.seconds = 0.0
        model.net.register_forward_pre_hook(self.start)
        model.net.register_forward_hook(self.stop)

    def start(self, *_: object) -> None:
        self.begin = time.perf_counter()

    def stop(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self.begin


def peak() -> float:
    """Peak memory of this process so far, GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def measure(
    picture: Image.Image, model: Model, watch: Stopwatch, levels: int | None
) -> dict[str, float]:
    """One picture encoded to the end, and decoded from its first 0.5 bpp."""
    watch.seconds, begin = 0.0, time.perf_counter()
    header = codec.make_header(picture, model, "nested", None, 0)
    encoder = codec.Encoder(np.asarray(picture), header, model)
    for _ in range(levels or header.levels):
        encoder.step()
    data = encoder.bytes()
    out = {"encode": time.perf_counter() - begin, "encode network": watch.seconds}
    out["bytes"], out["ideal"] = len(data), encoder.ideal_bits / 8
    del encoder
    data = bitstream.truncate(data, bpp=0.5)
    watch.seconds, begin = 0.0, time.perf_counter()
    codec.decode(data, model=model)
    return out | {"decode": time.perf_counter() - begin, "decode network": watch.seconds}


def report(name: str, rows: list[dict[str, float]], levels: int | None = None) -> None:
    total = {k: sum(r[k] for r in rows) for k in rows[0]}
    n = len(rows)
    for stage in ("encode", "decode"):
        outside = 1 - total[f"{stage} network"] / total[stage]
        what = f"{levels or 'all'} levels" if stage == "encode" else "cut at 0.5 bpp"
        print(
            f"{name}: {stage} {total[stage] / n:.2f} s ({what}), {outside:.1%} outside the network"
        )
    print(f"{name}: bytes written over ideal length {total['bytes'] / total['ideal']:.4f}")
    print(f"{name}: peak memory of the process {peak():.2f} GB")


@click.command()
@click.option("--data", default=HERE / "pictures", type=Path, show_default=True)
@click.option("--model", default=None, help="Model: a name or a file.")
@click.option("--threads", default=2, show_default=True)
@click.option("--pictures", default=0, help="Only the first N.  [default: all]")
@click.option("--megapixels", default=0.0, help="Also a large picture of this size.")
@click.option("--levels", type=int, help="Levels of the large picture.  [default: all]")
def main(
    data: Path,
    model: str | None,
    threads: int,
    pictures: int,
    megapixels: float,
    levels: int | None,
) -> None:
    """Time, memory and overhead."""
    torch.set_num_threads(threads)
    loaded = get_model(model)
    watch = Stopwatch(loaded)
    paths = list_pictures([data])[: pictures or None]
    shots = [load(p).convert("RGB") for p in paths]
    print(f"{len(shots)} pictures, {shots[0].width}x{shots[0].height} the first, {threads} threads")
    measure(shots[0].resize((128, 128)), loaded, watch, None)  # warms up
    report("small", [measure(s, loaded, watch, None) for s in shots])
    if megapixels:
        height = round((megapixels * 1e6 * 2 / 3) ** 0.5)
        size = (height * 3 // 2, height)
        whole = np.asarray(shots[0])
        repeat = (-(-size[1] // whole.shape[0]), -(-size[0] // whole.shape[1]), 1)
        large = Image.fromarray(np.tile(whole, repeat)[: size[1], : size[0]])
        report(f"{size[0]}x{size[1]}", [measure(large, loaded, watch, levels)], levels)


if __name__ == "__main__":
    main()
