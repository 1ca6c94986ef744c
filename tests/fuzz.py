"""Targets for fuzzing: whatever the bytes, our own errors or none, and soon.

    pip install '.[fuzz]'
    python tests/fuzz.py TARGET [libFuzzer's options]   # coverage-guided, by atheris
    python tests/fuzz.py seeds                          # the first inputs, anew

New inputs go to .fuzz/TARGET; those in tests/corpus/TARGET are replayed by `make test`.
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
from unittest import mock

with suppress(ImportError):  # replaying needs no fuzzer
    import atheris

    if __name__ == "__main__":
        atheris.instrument_imports(include=["ddpm_codec"]).__enter__()

import torch
from PIL import Image

import ddpm_codec.pillow  # noqa: F401 (registers itself)
from ddpm_codec.codec import codec
from ddpm_codec.codec import container as bitstream
from ddpm_codec.errors import DdpmcError, DdpmcWarning, ModelError
from ddpm_codec.network import modelfile
from ddpm_codec.network.modelfile import Model
from ddpm_codec.network.tables import Ladder, laplace_tables
from ddpm_codec.network.unet import UNet, UNetConfig

CORPUS = Path(__file__).resolve().parent / "corpus"


@contextmanager
def unlocked() -> Iterator[None]:
    """Every checksum is 0: no input would get past the real ones."""
    from ddpm_codec.codec import container as bitstream
    from ddpm_codec.codec import nested

    zero = {"new": lambda *_: 0}
    with (
        mock.patch.object(bitstream, "crc16", **zero),
        mock.patch.object(nested.Agreed, "checksum", **zero),
    ):
        yield


@cache
def tiny_model() -> Model:
    """Random weights; never written to a file."""
    torch.manual_seed(0)
    net = UNet(UNetConfig(patch=8, channels=(4,), blocks=1, middle=0, embedding=8)).eval()
    return Model("tiny", net, laplace_tables(Ladder()), Ladder(), bytes(32))


def header(data: bytes) -> None:
    """The parser of headers, level heads and cuts, and what is built on it."""
    with unlocked(), suppress(DdpmcError):
        bitstream.info(data)
        stream = bitstream.parse(data)
        points = list(bitstream.safe_points(data, stream))
        assert all(0 < offset <= len(data) for offset, *_ in points)
        for stop in ({"nbytes": len(data) // 2}, {"bpp": 0.5}, {"stop_at": "t=500"}):
            cut = bitstream.truncate(data, **stop)
            assert stream.damage or bitstream.parse(cut).damage is None
            assert data.startswith(cut)


def stream(data: bytes) -> None:
    """The decoder: a picture's kind in the first byte, then a level's payload after another."""
    kind, rest = (data[0], data[1:]) if data else (0, b"")
    width, height = ((8, 8), (9, 5), (1, 1), (16, 8))[kind & 3]
    ts = (900, 500, 200) if kind & 4 else ()
    ladder = tiny_model().ladder
    head = bitstream.Header(
        width, height, "L" if kind & 8 else "RGB", "gaussian" if ts else "nested", "isotropic",
        tiny_model().id, 0, len(ts) or ladder.levels, ladder.ratio, ladder.finest, ts,
    )  # fmt: skip
    with unlocked(), suppress(DdpmcError), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", DdpmcWarning)
        file = bitstream.write_header(head)
        size = 4 * (1 + (kind >> 4))
        for a in range(0, len(rest), size):
            payload = rest[a : a + size].ljust(size, b"\0")
            cut = bitstream.Cut(bitstream.GROUPS, size, 0)
            file += bitstream.write_level(
                bitstream.Level(0.0, (64, 64, 64), 0, [cut], payload), head.rec
            )
        assert codec.decode(file, model=tiny_model()).size == (width, height)


def model(data: bytes) -> None:
    """The reader of model files."""
    with tempfile.NamedTemporaryFile(suffix=".safetensors") as f, suppress(ModelError):
        f.write(data)
        f.flush()
        # A digest over the contents cannot be met by chance, either.
        with mock.patch.object(modelfile, "digest", lambda _, about: _given(about)):
            modelfile.load_model(Path(f.name))


def _given(about: dict[str, str]) -> bytes:
    try:
        return bytes.fromhex(about["digest"])
    except ValueError:
        return b""


def plugin(data: bytes) -> None:
    """Pillow, with our plugin alone: opened, never loaded."""
    with unlocked(), suppress(OSError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Image.open(io.BytesIO(data), formats=["DDPM"])


TARGETS: dict[str, Callable[[bytes], None]] = {
    "header": header, "stream": stream, "model": model, "plugin": plugin,
}  # fmt: skip


def seeds() -> None:
    """Sound inputs of every target, to begin with."""
    model = tiny_model()
    picture = Image.radial_gradient("L").resize((16, 8))
    with unlocked():
        colour, alpha = picture.convert("RGB"), picture.convert("LA")
        files = {
            "nested": codec.encode(colour, model=model, lossless=True),
            "alpha": codec.encode(alpha, model=model, stop_at="t=400"),
            "gaussian": codec.encode(
                picture, model=model, rec="gaussian", timesteps=(900, 600, 500)
            ),
        }
    inputs = {("header", k): v for k, v in files.items()}
    inputs |= {("plugin", k): v[:100] for k, v in files.items()}
    for kind in (0x00, 0x21, 0x46, 0x19):
        inputs["stream", f"{kind:02x}"] = bytes([kind]) + bytes(range(7, 250, 3))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tiny.safetensors"
        modelfile.save_model(path, "tiny", model.net, model.tables, model.ladder)
        inputs["model", "tiny"] = path.read_bytes()
    inputs["model", "head"] = inputs["model", "tiny"][:4000]
    for (target, name), data in inputs.items():
        (CORPUS / target).mkdir(parents=True, exist_ok=True)
        (CORPUS / target / f"seed-{name}").write_bytes(data)


def main() -> None:
    name = sys.argv[1]
    if name == "seeds":
        seeds()
        return
    found = Path(".fuzz") / name
    found.mkdir(parents=True, exist_ok=True)
    # Not libFuzzer's 2 GB: watching the codec, atheris loses about a megabyte a run of "stream",
    # which without atheris loses none.
    options = [
        sys.argv[0], "-rss_limit_mb=16384", *sys.argv[2:], str(found), str(CORPUS / name),
    ]  # fmt: skip
    atheris.Setup(options, TARGETS[name])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
