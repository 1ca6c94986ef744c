"""Do two machines agree? One file decoded under different arithmetic.

    python benchmarks/agreement.py [--data DIR] [--pictures 2]

Each file is encoded with one thread in fp32 and decoded with another number of threads, another
memory layout, oneDNN off, denormals flushed to zero, tiles in another order or two at a time, with
--compile through torch.compile, on a GPU if there is one (and made there, on the CPU), and in fp64.
Printed: whether every level's integers agree, how far the pictures are apart (PSNR of one against
the other, before rounding to 8 bits; samples that differ after it), and the largest deviations of
the network's estimates (eps, lam) from fp64 in units of their agreement margins, by arithmetic and
by level. bf16 is beyond the margin, so that decoding has to end early, with a message. Ends with
status 1 where it does not, or where anything else disagrees or is not 50 dB apart.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import click
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

import ddpm_codec
from ddpm_codec.codec import chain, codec
from ddpm_codec.codec import container as bitstream
from ddpm_codec.codec.image import load
from ddpm_codec.data import list_pictures
from ddpm_codec.network.denoiser import eps_hat
from ddpm_codec.network.modelfile import Model, get_model
from ddpm_codec.training.states import State

HERE = Path(__file__).resolve().parent
APART = 50.0  # dB between the pictures of two machines that agree


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


class Row(NamedTuple):
    """One file under one kind of arithmetic."""

    kind: str
    levels: int  # whose integers agree
    of: int
    apart: float  # dB, of the last pictures before rounding
    differ: int  # samples after it
    off: NDArray[np.float64]  # (L, 2) largest deviation of eps and lam, in margins
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


def follow(
    data: bytes, model: Model, device: str = "cpu"
) -> tuple[codec._Decoder, list[chain.Estimate]]:
    """Decode, keeping every level's estimate."""
    decoder = codec._Decoder(bitstream.parse(data), model, device)
    estimates = []
    while decoder.step():
        assert decoder.estimate is not None
        estimates.append(decoder.estimate)
    return decoder, estimates


def compare(picture: Image.Image, model: str | None, compiled: bool) -> Iterator[Row]:
    """A picture's file, encoded with one thread in fp32, under every kind of arithmetic."""
    fp32 = get_model(model)
    others = {
        kind: get_model(model, dtype=getattr(torch, kind)) for kind in ("float64", "bfloat16")
    }
    torch.set_num_threads(1)
    file = ddpm_codec.encode(picture, model=fp32)
    exact, reference = follow(file, others["float64"])
    expected = exact.chain.pixels(exact.chain.mean(exact.estimate)).astype(np.float64)
    for kind in kinds(compiled):
        with arithmetic(kind):
            plain = fp32.net.forward
            if kind == "planar memory":
                fp32.net.to(memory_format=torch.contiguous_format)
            if kind == "compiled":
                fp32.net.forward = torch.compile(plain)  # type: ignore[method-assign]
            if kind == "CPU to GPU":
                decoder, estimates = follow(file, get_model(model, device="cuda"), "cuda")
            elif kind == "GPU to CPU":
                on_gpu = get_model(model, device="cuda")
                decoder, estimates = follow(
                    ddpm_codec.encode(picture, model=on_gpu, device="cuda"), fp32
                )
            else:
                decoder, estimates = follow(file, others.get(kind, fp32))
            fp32.net.forward = plain  # type: ignore[method-assign]
            fp32.net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        got = decoder.chain.pixels(decoder.chain.mean(decoder.estimate)).astype(np.float64)
        mse = np.mean((got - expected) ** 2)
        off = np.zeros((len(fp32.ladder.snrs), 2))
        for i, (a, b) in enumerate(zip(estimates, reference, strict=False)):
            for k, field in enumerate(("eps", "lam")):
                far = float(np.abs(getattr(a, field) - getattr(b, field)).max())
                off[i, k] = far / fp32.tables.margin[i, k]
        yield Row(
            kind, len(estimates), len(reference), 10 * np.log10(255**2 / mse) if mse else np.inf,
            np.count_nonzero(np.rint(got) != np.rint(expected)), off, decoder.damage,
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
    chain.TILE = tile
    tables = get_model(model).tables
    print("picture                 arithmetic       levels  apart   samples  deviation / margin")
    by_level, bad = np.zeros((len(tables.on), 2)), 0
    for path in list_pictures([data])[:pictures]:
        for row in compare(load(path).convert("RGB"), model, compiled):
            if row.kind != "bfloat16":
                by_level = np.maximum(by_level, row.off)
            bad += not row.good
            print(
                f"{path.name:22}  {row.kind:15}  {f'{row.levels}/{row.of}':6}  {row.apart:5.1f}  "
                f"{row.differ:8}  {row.off[:, 0].max():.3f} {row.off[:, 1].max():.3f}"
                + (f"  {row.damage}" if row.damage else ""),
                flush=True,
            )
    print("\nlargest deviation by level, bfloat16 aside, and the margins")
    print("level  eps / margin     margin  lam / margin     margin")
    for i, (off, margin) in enumerate(zip(by_level, tables.margin, strict=True)):
        print(f"{i:5}  {off[0]:12.3f}  {margin[0]:9.2g}  {off[1]:12.3f}  {margin[1]:9.2g}")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
