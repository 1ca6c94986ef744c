"""Targets for fuzzing: any bytes must lead to one of our errors or to none, and quickly.

    pip install '.[fuzz]'
    python tests/fuzz.py TARGET [libFuzzer's options]   # coverage-guided, by atheris
    python tests/fuzz.py seeds                          # makes the first inputs again

New inputs go to .fuzz/TARGET; those in tests/corpus/TARGET are replayed by `make test`. One that is
worth keeping is called found- and what it found.
"""

from __future__ import annotations

import io
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

with suppress(ImportError):  # replaying needs no fuzzer
    import atheris  # type: ignore[import-untyped, unused-ignore]

    if __name__ == "__main__":
        atheris.instrument_imports(include=["ddpm_codec"]).__enter__()

import numpy as np
import torch
from PIL import Image

import ddpm_codec.pillow  # noqa: F401 (registers itself)
from ddpm_codec.codec import chain, container, decoder, encoder, lossless, stops
from ddpm_codec.codec import header as headers
from ddpm_codec.codec.container import Writer
from ddpm_codec.codec.header import MODES, Header
from ddpm_codec.diffusion.schedule import Ladder
from ddpm_codec.errors import DdpmcError, DdpmcWarning, LimitError, ModelError
from ddpm_codec.network import modelfile
from ddpm_codec.network.exact import ExactConfig, ExactUNet
from ddpm_codec.network.modelfile import Model
from ddpm_codec.network.tables import new_tables
from ddpm_codec.network.unet import UNet, UNetConfig

CORPUS = Path(__file__).resolve().parent / "corpus"
SIZES = ((8, 8), (9, 5), (1, 1), (40, 33))
LEVELS = 6  # of the files of the target "stream"


@contextmanager
def unlocked() -> Iterator[None]:
    """Make every checksum 0, because hardly any input would have the real ones."""
    with (
        mock.patch.object(container, "crc16", lambda *_: 0),
        mock.patch.object(headers, "crc16", lambda *_: 0),
        mock.patch.object(container, "zlib", SimpleNamespace(crc32=lambda *_: 0)),
        mock.patch.object(chain, "_checksum", lambda _: bytes(2)),
        mock.patch.object(lossless, "binascii", SimpleNamespace(crc_hqx=lambda *_: 0)),
    ):
        yield


@cache
def tiny_model(scales: bool) -> Model:
    """A model with random weights. scales: for photographs, else of the paper's kind."""
    torch.manual_seed(0)
    net: UNet | ExactUNet
    if scales:
        net = ExactUNet(ExactConfig((4, 4, 4, 4), (1, 1, 1, 1), (1, 1, 1), embedding=8))
        for layer in (net.out, net.scales):
            torch.nn.init.normal_(layer.weight, std=0.02)
        net.freeze(net.integers(), "cpu", torch.float32)
    else:
        net = UNet(UNetConfig(
            patch=8, channels=(32,), blocks=1, middle=0, attention=(), embedding=8, prediction="x0",
        )).eval()  # fmt: skip
        torch.nn.init.normal_(net.out.weight, std=0.05)
    ladder = Ladder(rungs=9, finest=160)
    return Model("tiny", net, new_tables(ladder, scales), ladder, bytes(32))


def header(data: bytes) -> None:
    """Tests parsing of headers and records, cuts, truncation and info."""
    with unlocked(), suppress(DdpmcError), warnings.catch_warnings():
        warnings.simplefilter("ignore", DdpmcWarning)
        stops.info(data)
        stream = container.parse(data)
        assert stream.header_size <= stream.read_to <= len(data)
        for stop in ({"bytes": len(data) // 2}, {"bpp": 0.5}, {"stop_at": "t=500"}):
            with suppress(LimitError):  # fewer bytes than the header
                shorter = stops.truncate(data, **stop)
                part = container.parse(shorter)
                assert len(shorter) <= len(data) and (stream.damage or part.damage is None)
                assert part.extras.items() <= stream.extras.items()
                for got, whole in zip(part.levels, stream.levels[: len(part.levels)], strict=True):
                    assert whole.payload.startswith(got.payload)


def pieces(data: bytes) -> Iterator[bytes]:
    """Split bytes into pieces; two bytes before each are its length."""
    while data:
        n = int.from_bytes(data[:2], "little")
        yield data[2 : 2 + n]
        data = data[2 + n :]


def stream(data: bytes) -> None:
    """Tests the decoder, on the file that :func:`stream_file` makes of the bytes."""
    with unlocked(), suppress(DdpmcError), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", DdpmcWarning)
        file, model = stream_file(data)
        size = SIZES[data[0] & 3] if data else SIZES[0]
        assert decoder.decode(file, model=model).size == size


def stream_file(data: bytes) -> tuple[bytes, Model]:
    """A file and its model. The first byte is the kind of picture, the rest fills the records."""
    kind, rest = (data[0], data[1:]) if data else (0, b"")
    model, mode = tiny_model(not kind & 4), MODES[kind >> 3 & 3]
    head = stream_header(model, SIZES[kind & 3], mode, isotropic=bool(kind & 32))
    file, levels = Writer(head), 0
    for i, piece in enumerate(pieces(rest)):
        if i == 0 and "A" in mode:
            file.extra("alpha", piece)
        elif levels < head.levels:
            file.level(20.0, piece or b"\0")
            levels += 1
        else:
            file.extra("residual", piece)
            break
    return file.file(), model


def stream_header(model: Model, size: tuple[int, int], mode: str, isotropic: bool) -> Header:
    """The header of a file of the target "stream"."""
    picture = Image.new(mode, size)
    if not model.exact:
        ts = tuple(range(900, 900 - 120 * LEVELS, -120))
        return encoder.make_header(picture, model, effort=1, timesteps=ts)
    path = "isotropic" if isotropic else "spectral"
    return encoder.make_header(picture, model, path, effort=1, steps=LEVELS)


def model(data: bytes) -> None:
    """Tests the reader of model files."""
    with tempfile.NamedTemporaryFile(suffix=".safetensors") as f, suppress(ModelError):
        f.write(data)
        f.flush()
        # No input would have the right digest of its contents, either.
        with mock.patch.object(modelfile, "digest", lambda _, about: _given(about)):
            modelfile.load_model(Path(f.name))


def _given(about: dict[str, str]) -> bytes:
    try:
        return bytes.fromhex(about["digest"])
    except ValueError:
        return b""


def plugin(data: bytes) -> None:
    """Tests opening with Pillow and our plugin. The picture is not loaded."""
    refused = OSError, Image.DecompressionBombError
    with unlocked(), suppress(*refused), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Image.open(io.BytesIO(data), formats=["DDPM"])


TARGETS: dict[str, Callable[[bytes], None]] = {
    "header": header, "stream": stream, "model": model, "plugin": plugin,
}  # fmt: skip


def seeds() -> None:
    """Write sound inputs for every target, from which fuzzing starts."""
    inputs: dict[tuple[str, str], bytes] = {}
    profile = Image.radial_gradient("L").resize((16, 8)).convert("RGB")
    profile.info["icc_profile"] = b"colours"
    small: dict[str, Any] = {"model": tiny_model(True), "effort": 1, "steps": 5}
    with unlocked():
        files = {
            "photo": encoder.encode(profile, lossless=True, **small),
            "alpha": encoder.encode(profile.convert("LA"), **small),
            "paper": encoder.encode(
                profile, model=tiny_model(False), effort=1, timesteps=(900, 600, 500)
            ),
        }
        for kind in (0x00, 0x09, 0x33, 0x0C, 0x1D):
            inputs["stream", f"{kind:02x}"] = bytes([kind]) + stream_seed(kind)
    inputs |= {("header", k): v for k, v in files.items()}
    inputs |= {("plugin", k): v[:160] for k, v in files.items()}
    for name, scales in (("tiny", True), ("small", False)):
        model = tiny_model(scales)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.safetensors"
            modelfile.save_model(path, name, model.net, model.tables, model.ladder)
            inputs["model", name] = path.read_bytes()
    inputs["model", "head"] = inputs["model", "tiny"][:4000]
    for (target, name), data in inputs.items():
        (CORPUS / target).mkdir(parents=True, exist_ok=True)
        (CORPUS / target / f"seed-{name}").write_bytes(data)


def stream_seed(kind: int) -> bytes:
    """The contents of the records of a lossless file of that kind, for :func:`pieces` to split."""
    model, mode = tiny_model(not kind & 4), MODES[kind >> 3 & 3]
    picture = Image.radial_gradient("L").resize(SIZES[kind & 3]).convert(mode)
    if "A" in mode:
        picture.putalpha(Image.linear_gradient("L").resize(picture.size))
    head = stream_header(model, picture.size, mode, isotropic=bool(kind & 32))
    made = encoder.Encoder(np.asarray(picture.convert("RGB")), head, model)
    for _ in range(head.levels):
        made.step()
    made.finish()
    whole = container.parse(made.file())
    alpha = [encoder.extras_of(picture, "none")["alpha"]] if "A" in mode else []
    contents = [*alpha, *(bytes(v.payload) for v in whole.levels), whole.extras["residual"]]
    return b"".join(len(piece).to_bytes(2, "little") + piece for piece in contents)


def main() -> None:
    name = sys.argv[1]
    if name == "seeds":
        seeds()
        return
    found = Path(".fuzz") / name  # new inputs
    found.mkdir(parents=True, exist_ok=True)
    # More than libFuzzer's 2 GB: with atheris each run of "stream" leaks about a megabyte. Without
    # atheris it leaks nothing.
    options = [
        sys.argv[0], "-rss_limit_mb=16384", *sys.argv[2:], str(found), str(CORPUS / name),
    ]  # fmt: skip
    atheris.Setup(options, TARGETS[name])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
