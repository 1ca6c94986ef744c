"""Do two machines agree? One file decoded under different arithmetic.

    python benchmarks/agreement.py [--data DIR] [--pictures 2]

Each file is encoded with one thread in fp32 and decoded with another number of threads, another
memory layout, oneDNN off, denormals flushed to zero, tiles in another order or two at a time, with
--compile through torch.compile, on a GPU if there is one (and made there, on the CPU), and in fp64.
Printed: at how many levels the classes agree that the network's log-scales make (the level is
decoded, and nothing is wrong), how far the pictures are apart (PSNR of one against the other,
before rounding to 8 bits; samples that differ after it), and the largest deviations of the
network's estimates (x0_hat, in units of the level's noise, and log-scale) from fp64 in units of
their agreement margins, by arithmetic and by level. bf16 is beyond the margin, so that decoding has
to end early, with a message. Ends with status 1 where it does not, or where anything else disagrees
or is not 50 dB apart.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import click
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from ddpm_codec.codec import chain, container
from ddpm_codec.codec.chain import Chain, Estimate
from ddpm_codec.codec.decoder import Decoder
from ddpm_codec.codec.encoder import encode
from ddpm_codec.codec.image import load
from ddpm_codec.data import list_pictures
from ddpm_codec.network import tiles
from ddpm_codec.network.denoiser import State, eps_hat
from ddpm_codec.network.modelfile import Model, get_model

HERE = Path(__file__).resolve().parent
APART = 50.0  # dB between the pictures of two machines that agree


def in_pairs(net: torch.nn.Module, state: State, prediction: str) -> tuple[torch.Tensor, ...]:
    """A tile's estimate, evaluated beside a mirrored copy of it."""
    pair = State(*(torch.cat([x.flip(-1), x]) for x in state))
    return tuple(x[1:] for x in eps_hat(net, pair, prediction) if x is not None)


def reversed_ask(self: Chain, snr: float) -> Estimate:
    """Chain.ask, the last tile first; messages stay in their order."""
    other = self.fork()
    other.tiles = self.tiles[::-1]
    return plain_ask(other, snr)


plain_ask = Chain.ask


@contextmanager
def arithmetic(kind: str) -> Iterator[None]:
    """Compute otherwise for a while."""
    torch.set_num_threads(2 if kind == "2 threads" else 1)
    torch.set_flush_denormal(kind == "denormals off")
    ask = reversed_ask if kind == "tiles reversed" else plain_ask
    estimate = in_pairs if kind == "batches of two" else eps_hat
    with (
        torch.backends.mkldnn.flags(enabled=kind != "oneDNN off"),
        mock.patch.object(Chain, "ask", ask),
        mock.patch.object(chain, "eps_hat", estimate),
    ):
        try:
            yield
        finally:
            torch.set_num_threads(1)
            torch.set_flush_denormal(False)


class Row(NamedTuple):
    """One file under one kind of arithmetic."""

    kind: str
    levels: int  # whose classes agree
    of: int
    apart: float  # dB, of the last pictures before rounding
    differ: int  # samples after it
    off: NDArray[np.float64]  # (K, 2) largest deviation of x0_hat and log-scale, in margins
    damage: str | None

    @property
    def good(self) -> bool:
        """All agrees; or, where it cannot, decoding ended early with a message."""
        if self.kind == "bfloat16":
            return self.levels < self.of and self.damage is not None
        return self.levels == self.of and self.apart >= APART


def kinds(compiled: bool) -> list[str]:
    """The kinds of arithmetic that this machine has."""
    return [
        "1 thread", "2 threads", "tiles reversed", "batches of two", "oneDNN off", "planar memory",
        "denormals off", *["compiled"] * compiled,
        *["CPU to GPU", "GPU to CPU"] * torch.cuda.is_available(), "float64", "bfloat16",
    ]  # fmt: skip


def follow(data: bytes, model: Model, device: str = "cpu") -> tuple[Decoder, list[Estimate]]:
    """Decode, keeping the estimate after each level that agreed."""
    decoder = Decoder(container.parse(data), model, device)
    estimates = []
    while decoder.step():
        if not decoder.partial:
            estimates.append(decoder.estimate)
    return decoder, estimates


def deviation(
    model: Model, of: Chain, mine: list[Estimate], theirs: list[Estimate]
) -> NDArray[np.float64]:
    """(K, 2): the largest of x0_hat and log-scale, in margins, by the level's row in the tables."""
    off = np.zeros_like(model.tables.margin)
    for level, (a, b) in enumerate(zip(mine, theirs, strict=False)):
        assert a.scale is not None and b.scale is not None
        at = of.row(level)
        far = np.abs(a.x0_hat - b.x0_hat).max() * of.snrs[level] ** 0.5
        off[at] = [far, np.abs(a.scale - b.scale).max()] / model.tables.margin[at]
    return off


def compare(
    picture: Image.Image, which: str | Path | None, compiled: bool, tile: int
) -> Iterator[Row]:
    """A picture's file, encoded with one thread in fp32, under every kind of arithmetic.

    tile: side of one, pixels.
    """
    fp32 = get_model(which)
    others = {
        name: get_model(which, dtype=getattr(torch, name)) for name in ("float64", "bfloat16")
    }
    cuda = get_model(which, device="cuda") if torch.cuda.is_available() else fp32
    with mock.patch.object(tiles, "TILE", tile):  # after loading: part of what a digest covers
        torch.set_num_threads(1)
        file = encode(picture, model=fp32)
        expected = follow(file, others["float64"])
        for kind in kinds(compiled):
            with arithmetic(kind):
                if kind == "GPU to CPU":  # another file: other messages serve as well
                    theirs = encode(picture, model=cuda, device="cuda")
                    yield row(kind, fp32, follow(theirs, fp32), follow(theirs, others["float64"]))
                    continue
                plain = fp32.net.forward
                if kind == "planar memory":
                    fp32.net.to(memory_format=torch.contiguous_format)
                if kind == "compiled":
                    fp32.net.forward = torch.compile(plain)  # type: ignore[method-assign]
                if kind == "CPU to GPU":
                    got = follow(file, cuda, "cuda")
                else:
                    got = follow(file, others.get(kind, fp32))
                fp32.net.forward = plain  # type: ignore[method-assign]
                fp32.net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            yield row(kind, fp32, got, expected)


def row(
    kind: str, model: Model, got: tuple[Decoder, list[Estimate]],
    expected: tuple[Decoder, list[Estimate]],
) -> Row:  # fmt: skip
    """How one decoding of a file differs from another."""
    (decoder, mine), (exact, theirs) = got, expected
    a, b = (d.chain.pixels(d.estimate.x0_hat).astype(np.float64) for d in (decoder, exact))
    mse = np.mean((a - b) ** 2)
    return Row(
        kind, len(mine), len(exact.stream.levels), 10 * np.log10(255**2 / mse) if mse else np.inf,
        np.count_nonzero(np.rint(a) != np.rint(b)), deviation(model, exact.chain, mine, theirs),
        decoder.damage,
    )  # fmt: skip


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
    loaded = get_model(model)
    if not loaded.net.cfg.precisions:
        raise click.UsageError(f"model {loaded.name} makes no classes to agree upon")
    margin = loaded.tables.margin
    print("picture                 arithmetic       levels  apart   samples  deviation / margin")
    by_level, bad = np.zeros(margin.shape), 0
    for path in list_pictures([data])[:pictures]:
        for got in compare(load(path).convert("RGB"), model, compiled, tile):
            if got.kind != "bfloat16":
                by_level = np.maximum(by_level, got.off)
            bad += not got.good
            print(
                f"{path.name:22}  {got.kind:15}  {f'{got.levels}/{got.of}':6}  {got.apart:5.1f}  "
                f"{got.differ:8}  {got.off[:, 0].max():.3f} {got.off[:, 1].max():.3f}"
                + (f"  {got.damage}" if got.damage else ""),
                flush=True,
            )
    print("\nlargest deviation by level, bfloat16 aside, and the margins")
    print("     SNR  x0_hat / margin     margin  log-scale / margin     margin")
    for snr, off, far in zip(loaded.ladder.snrs, by_level, margin, strict=True):
        if off.any():
            print(f"{snr:8.3f}  {off[0]:15.3f}  {far[0]:9.2g}  {off[1]:18.3f}  {far[1]:9.2g}")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
