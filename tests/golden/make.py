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

from ddpm_codec import encode
from ddpm_codec.codec import container
from ddpm_codec.codec.decoder import Decoder
from ddpm_codec.network.modelfile import get_model
from ddpm_codec.rec import classes, trellis

HERE = Path(__file__).resolve().parent


def decoded(data: bytes) -> tuple[Image.Image, str]:
    """The picture, and SHA-256 over every integer that both ends must hold.

    Of each message its bits, which of them each coefficient waits for, and the coefficients in
    the order of their classes.
    """
    stream = container.parse(data)
    model = get_model(None, id=stream.header.model)
    h, sort, decode = hashlib.sha256(), classes.sort, trellis.decode

    def add(numbers: Any) -> None:
        h.update(np.ascontiguousarray(numbers, dtype="<i8").tobytes())

    def sorting(*args: Any) -> classes.Classes:
        out = sort(*args)
        add(out.n)
        add(out.order)
        return out

    def decoding(bits: trellis.Bits, layout: trellis.Layout, key: trellis.Key) -> Any:
        add(bits)
        add(layout.last)
        return decode(bits, layout, key)

    with (
        mock.patch.object(classes, "sort", sorting),
        mock.patch.object(trellis, "decode", decoding),
    ):
        decoder = Decoder(stream, model).run()
    levels = decoder.level + 1 + decoder.partial
    assert decoder.damage is None and levels == len(stream.levels), decoder.damage
    return decoder.image(decoder.picture()), h.hexdigest()


def main() -> None:
    photo = Image.open(HERE.parents[1] / "benchmarks" / "pictures" / "coffee.png")
    x = np.arange(64)[None, :].repeat(48, 0)
    alpha = Image.fromarray((4 * x).astype(np.uint8))
    crop = photo.convert("RGB").crop((200, 150, 264, 198))
    with_alpha = crop.copy()
    with_alpha.putalpha(alpha)
    files = {
        "colour": encode(crop, seed=1),
        "isotropic": encode(crop, path="isotropic", stop_at="t=100"),
        "grey-lossless": encode(crop.convert("L").crop((0, 0, 33, 21)), lossless=True),
        "alpha": encode(with_alpha, bytes=470),  # ends inside a level
        "cifar10": encode(crop.resize((32, 32)), model="cifar10", stop_at="t=100"),
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
