"""Do two machines agree? Files are decoded with different arithmetic and compared.

    python benchmarks/agreement.py [--data DIR] [--pictures 2] [--compile]

Each file is encoded with one thread and the convolutions' fastest type. It is decoded with the
other types, another number of threads, another memory layout, without oneDNN, with denormals
flushed to zero, with tiles in another order or two at a time, inside torch.autocast, with another
default type, and with --compile through torch.compile. If there is a GPU, the file is decoded there
as well, and another one is encoded there and decoded on the CPU. Each row has the number of levels
after which M is the same to the bit, the same for the scale indices, the number of samples of the
decoded picture that differ, and seconds. The exit status is 1 if anything differs.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import click
import numpy as np
import torch
from numpy.typing import NDArray
from photographs import PICTURES, photographs
from PIL import Image

from ddpm_codec.codec import container
from ddpm_codec.codec.chain import Chain, Estimate
from ddpm_codec.codec.decoder import Decoder
from ddpm_codec.codec.encoder import encode
from ddpm_codec.network import tiles
from ddpm_codec.network.exact import Convolution, ExactUNet, Inputs, Outputs
from ddpm_codec.network.modelfile import Model, get_model

TYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}


def reversed_ask(self: Chain, snr: float) -> Estimate:
    """Chain.ask with the tiles in reverse order. The order of messages stays."""
    other = self.fork()
    other.tiles = self.tiles[::-1]
    return plain_ask(other, snr)


plain_ask = Chain.ask


def in_pairs(net: ExactUNet) -> Any:
    """Its forward function, computed for a batch of the tile and its mirror image."""
    plain = net.forward

    def forward(x: Inputs) -> Outputs:
        pair = Inputs(*(torch.cat([part.flip(-1), part]) for part in x))
        return Outputs(*(part[1:] for part in plain(pair)))

    return forward


def planar(net: ExactUNet) -> None:
    """Store the convolutions' weights in planar order in place of channels-last."""
    for layer in net.modules():
        if isinstance(layer, Convolution) and layer.frozen is not None:
            layer.frozen = layer.frozen[0].contiguous(), layer.frozen[1]


@contextmanager
def arithmetic(kind: str, net: ExactUNet) -> Iterator[None]:
    """Compute with one kind of arithmetic, see :func:`kinds`, and restore the usual at the end."""
    usual = {m: m.frozen for m in net.modules() if isinstance(m, Convolution)}
    torch.set_num_threads(2 if kind == "2 threads" else 1)
    torch.set_flush_denormal(kind == "denormals off")
    torch.set_default_dtype(torch.float64 if kind == "default float64" else torch.float32)
    with ExitStack() as stack:
        stack.enter_context(torch.backends.mkldnn.flags(enabled=kind != "oneDNN off"))
        if kind == "autocast":
            stack.enter_context(torch.autocast("cpu", dtype=torch.bfloat16))
        if kind == "tiles reversed":
            stack.enter_context(mock.patch.object(Chain, "ask", reversed_ask))
        if kind == "batches of two":
            stack.enter_context(mock.patch.object(net, "forward", in_pairs(net)))
        if kind == "compiled":
            # Without this the compiler skips roundings that the program asks for.
            patched = mock.patch("torch._inductor.config.emulate_precision_casts", True)
            stack.enter_context(patched)
            compiled = torch.compile(net.forward)
            stack.enter_context(mock.patch.object(net, "forward", compiled))
        if kind in TYPES:
            net.compute_in(TYPES[kind])
        if kind == "planar memory":
            planar(net)
        try:
            yield
        finally:
            for layer, frozen in usual.items():
                layer.frozen = frozen
            torch.set_num_threads(1)
            torch.set_flush_denormal(False)
            torch.set_default_dtype(torch.float32)


def kinds(compiled: bool) -> list[str]:
    """The kinds of arithmetic that this machine has."""
    return [
        "1 thread", "2 threads", *TYPES, "tiles reversed", "batches of two", "oneDNN off",
        "planar memory", "denormals off", "autocast", "default float64", *["compiled"] * compiled,
        *["CPU to GPU", "GPU to CPU"] * torch.cuda.is_available(),
    ]  # fmt: skip


class Followed(NamedTuple):
    """One decoding of a file."""

    m: list[NDArray[np.float32]]  # after each level
    scales: list[NDArray[np.int8]]  # indices, after each level
    picture: NDArray[np.uint8]
    levels: int  # of the file
    seconds: float


def follow(data: bytes, model: Model, device: str = "cpu") -> Followed:
    """Decode a file and keep the state after each level."""
    begin = time.perf_counter()
    decoder = Decoder(container.parse(data), model, device)
    m, index = [], []
    while decoder.step():
        m.append(decoder.chain.m.copy())
        assert decoder.estimate.index is not None
        index.append(decoder.estimate.index)
    seconds = time.perf_counter() - begin
    return Followed(m, index, decoder.picture(), len(decoder.stream.levels), seconds)


class Row(NamedTuple):
    """The comparison for one file and one kind of arithmetic."""

    kind: str
    states: int  # levels after which M is the same
    indices: int  # levels after which the scale indices are the same
    levels: int  # of the file
    differ: int  # samples of the picture
    seconds: float

    @property
    def good(self) -> bool:
        return self.states == self.indices == self.levels and not self.differ


def row(kind: str, got: Followed, expected: Followed) -> Row:
    """Compare one decoding of a file with another."""
    pairs = list(zip(got.m, expected.m, strict=False))
    states = sum(np.array_equal(a, b) for a, b in pairs)
    indices = sum(np.array_equal(a, b) for a, b in zip(got.scales, expected.scales, strict=False))
    differ = int(np.count_nonzero(got.picture != expected.picture))
    return Row(kind, states, indices, expected.levels, differ, got.seconds)


def compare(
    picture: Image.Image, which: str | Path | None, compiled: bool, tile: int
) -> Iterator[Row]:
    """Encode a picture with one thread, and decode it with every kind of arithmetic.

    tile: side of a tile, pixels.
    """
    model = get_model(which)
    assert isinstance(model.net, ExactUNet)
    cuda = get_model(which, device="cuda") if torch.cuda.is_available() else model
    with mock.patch.object(tiles, "TILE", tile):  # after loading, since the model's digest has it
        torch.set_num_threads(1)
        file = encode(picture, model=model)
        expected = follow(file, model)
        for kind in kinds(compiled):
            with arithmetic(kind, model.net):
                if kind == "GPU to CPU":
                    theirs = encode(picture, model=cuda, device="cuda")
                    got = follow(theirs, model)
                else:
                    on = (cuda, "cuda") if kind == "CPU to GPU" else (model, "cpu")
                    got = follow(file, *on)
            yield row(kind, got, expected)


@click.command()
@click.option("--data", default=PICTURES, type=Path, help="Folder.  [default: pictures]")
@click.option("--model", default=None, help="A name or a file.")
@click.option("--pictures", default=2, show_default=True, help="Use the first N of --data.")
@click.option("--crop", default=0, help="Use the middle NxN pixels of each picture.")
@click.option("--tile", default=256, show_default=True, help="Side of a tile, in pixels.")
@click.option("--compile", "compiled", is_flag=True, help="Also use torch.compile (minutes).")
def main(
    data: Path, model: str | None, pictures: int, crop: int, tile: int, compiled: bool
) -> None:
    """Decode files with several kinds of arithmetic, and compare."""
    warnings.simplefilter("ignore")
    loaded = get_model(model)
    if not loaded.exact:
        raise click.UsageError(f"model {loaded.name} is not exact")
    print("picture                 arithmetic       M      indices  samples  seconds")
    bad = 0
    for name, picture in photographs(data, pictures, crop):
        for got in compare(picture, model, compiled, tile):
            bad += not got.good
            print(
                f"{name:22}  {got.kind:15}  {f'{got.states}/{got.levels}':6} "
                f"{f'{got.indices}/{got.levels}':7}  {got.differ:7}  {got.seconds:7.1f}",
                flush=True,
            )
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
