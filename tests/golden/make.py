"""Makes the golden files anew, with the shipped models: python tests/golden/make.py

Only when a new model or a new version of the format replaces the old: that every release decodes
the files that are here is what they are for.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from PIL import Image

from ddpm_codec.codec import codec
from ddpm_codec.codec import container as bitstream
from ddpm_codec.codec.chain import Nested
from ddpm_codec.network.modelfile import get_model
from ddpm_codec.rec import gaussian

HERE = Path(__file__).resolve().parent


def decoded(data: bytes) -> tuple[Image.Image, str]:
    """The picture, and SHA-256 over every integer that both ends must hold.

    Of nested coding the cells, of Gaussian coding the messages and what waits for which bit.
    """
    stream = bitstream.parse(data)
    model = get_model(None, id=stream.header.model)
    h, decode = hashlib.sha256(), gaussian.decode

    def recorded(message: gaussian.Bits, layout: gaussian.Layout, key: gaussian.Key) -> Any:
        h.update(message.tobytes())
        h.update(layout.last.astype("<i8").tobytes())
        return decode(message, layout, key)

    with mock.patch.object(gaussian, "decode", recorded):
        decoder = codec._Decoder(stream, model, "cpu").run()
    assert decoder.damage is None and decoder.level + 1 == len(stream.levels), decoder.damage
    if isinstance(decoder.chain, Nested):
        cells = decoder.chain.cells
        for a in (cells.depth, cells.cell):
            h.update(np.ascontiguousarray(a, dtype="<i8").tobytes())
    return decoder.image(decoder.picture("mean", 0)), h.hexdigest()


def main() -> None:
    photo = Image.open(HERE.parents[1] / "benchmarks" / "pictures" / "coffee.png")
    x = np.arange(64)[None, :].repeat(48, 0)
    alpha = Image.fromarray((4 * x).astype(np.uint8))
    crop = photo.convert("RGB").crop((200, 150, 264, 198))
    with_alpha = crop.copy()
    with_alpha.putalpha(alpha)
    files = {
        "colour": codec.encode(crop, seed=1),
        "isotropic": codec.encode(crop, path="isotropic", stop_at="t=100"),
        "grey-lossless": codec.encode(crop.convert("L").crop((0, 0, 33, 21)), lossless=True),
        "alpha": codec.encode(with_alpha.crop((0, 0, 17, 9)), psnr=30),
        "gaussian": codec.encode(
            crop.crop((0, 0, 24, 16)), rec="gaussian", timesteps=(800, 500, 300)
        ),
        "cifar10": codec.encode(crop.resize((32, 32)), model="cifar10", stop_at="t=100"),
    }
    about = {}
    for name, data in files.items():
        picture, digest = decoded(data)
        (HERE / f"{name}.ddpm").write_bytes(data)
        picture.save(HERE / f"{name}.png")
        about[name] = digest
        print(name, len(data), digest[:16])
    (HERE / "symbols.json").write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
