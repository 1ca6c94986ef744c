"""Do two machines agree? One file decoded under different arithmetic.

    python benchmarks/agreement.py [--data DIR] [--pictures 2]

Each file is encoded with one thread in fp32 and decoded with another number of threads, another
memory layout, oneDNN off, denormals flushed to zero, tiles in another order or two at a time, with
--compile through torch.compile, and in fp64. Printed: whether every level's integers agree, how far
the pictures are apart (PSNR of one against the other, before rounding to 8 bits; samples that
differ after it), and the largest deviations of the network's estimates (eps, lam) from fp64 in
units of their agreement margins, by arithmetic and by level. bf16 is beyond the margin, so that
decoding has to end early, with a message.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import numpy as np
import torch

import ddpm_codec
from ddpm_codec import bitstream, chain, codec
from ddpm_codec.data import list_pictures
from ddpm_codec.denoiser import eps_hat
from ddpm_codec.image import load
from ddpm_codec.modelfile import Model, get_model
from ddpm_codec.states import State

HERE = Path(__file__).resolve().parent


def in_pairs(net: torch.nn.Module, state: State, prediction: str) -> tuple[torch.Tensor, ...]:
    """A tile's estimate, evaluated beside a mirrored copy of it."""
    pair = State(*(torch.cat([x.flip(-1), x]) for x in state))
    return tuple(x[1:] for x in eps_hat(net, pair, prediction))


@contextmanager
def arithmetic(kind: str) -> Iterator[None]:
    """Compute otherwise for a while."""
    original = chain.tiles, chain.eps_hat
    torch.set_num_threads(1)
    torch.set_flush_denormal(kind == "denormals off")
    with torch.backends.mkldnn.flags(enabled=kind != "oneDNN off"):
        if kind == "2 threads":
            torch.set_num_threads(2)
        if kind == "tiles reversed":
            chain.tiles = lambda *a: reversed(list(original[0](*a)))  # type: ignore[assignment]
        if kind == "batches of two":
            chain.eps_hat = in_pairs
        try:
            yield
        finally:
            chain.tiles, chain.eps_hat = original
            torch.set_num_threads(1)
            torch.set_flush_denormal(False)


def follow(data: bytes, model: Model) -> tuple[codec._Decoder, list[chain.Estimate]]:
    """Decode, keeping every level's estimate."""
    decoder = codec._Decoder(bitstream.parse(data), model, "cpu")
    estimates = []
    while decoder.step():
        assert decoder.estimate is not None
        estimates.append(decoder.estimate)
    return decoder, estimates


@click.command()
@click.option("--data", default=HERE / "pictures", type=Path, show_default=True)
@click.option("--model", default=None, help="Model: a name or a file.")
@click.option("--pictures", default=2, show_default=True)
@click.option(
    "--tile", default=256, show_default=True, help="Side of a tile here, to have several."
)
@click.option("--compile", "compiled", is_flag=True, help="Also torch.compile; minutes.")
def main(data: Path, model: str | None, pictures: int, tile: int, compiled: bool) -> None:
    """One file, several kinds of arithmetic."""
    warnings.simplefilter("ignore")
    chain.TILE = tile
    fp32 = get_model(model)
    models = {
        kind: get_model(model, dtype=getattr(torch, kind)) for kind in ("float64", "bfloat16")
    }
    margins = fp32.tables.margin.tolist()
    print("agreement margins {:g} (eps), {:g} (lam)".format(*margins))
    print("picture                 arithmetic       levels  apart   samples  deviation / margin")
    kinds = [
        "1 thread", "2 threads", "tiles reversed", "batches of two", "oneDNN off", "planar memory",
        "denormals off", *["compiled"] * compiled, "float64", "bfloat16",
    ]  # fmt: skip
    by_level = np.zeros((fp32.ladder.levels, 2))
    for path in list_pictures([data])[:pictures]:
        picture = load(path).convert("RGB")
        torch.set_num_threads(1)
        file = ddpm_codec.encode(picture, model=fp32)
        exact, reference = follow(file, models["float64"])
        expected = exact.chain.pixels(exact.chain.mean(exact.estimate)).astype(np.float64)
        for kind in kinds:
            with arithmetic(kind):
                plain = fp32.net.forward
                if kind == "planar memory":
                    fp32.net.to(memory_format=torch.contiguous_format)
                if kind == "compiled":
                    fp32.net.forward = torch.compile(plain)  # type: ignore[method-assign]
                decoder, estimates = follow(file, models.get(kind, fp32))
                fp32.net.forward = plain  # type: ignore[method-assign]
                fp32.net.to(memory_format=torch.channels_last)
            got = decoder.chain.pixels(decoder.chain.mean(decoder.estimate)).astype(np.float64)
            mse = np.mean((got - expected) ** 2)
            apart = 10 * np.log10(255**2 / mse) if mse else np.inf
            differ = np.count_nonzero(np.rint(got) != np.rint(expected))
            off = np.zeros_like(by_level)
            for i, (a, b) in enumerate(zip(estimates, reference, strict=False)):
                for k, field in enumerate(("eps", "lam")):
                    far = float(np.abs(getattr(a, field) - getattr(b, field)).max())
                    off[i, k] = far / margins[k]
            if kind != "bfloat16":
                by_level = np.maximum(by_level, off)
            good = f"{len(estimates)}/{len(reference)}"
            print(
                f"{path.name:22}  {kind:15}  {good:6}  {apart:5.1f}  {differ:8}  "
                f"{off[:, 0].max():.3f} {off[:, 1].max():.3f}"
                + (f"  {decoder.damage}" if decoder.damage else ""),
                flush=True,
            )
    print("\nlargest deviation / margin by level, bfloat16 aside\nlevel  eps    lam")
    for i, (eps, lam) in enumerate(by_level.tolist()):
        print(f"{i:5}  {eps:.3f}  {lam:.3f}")


if __name__ == "__main__":
    main()
