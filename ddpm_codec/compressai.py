"""The codec with the interface of CompressAI's models. CompressAI itself is not needed.

from ddpm_codec.compressai import Codec

codec = Codec(bpp=0.5)                 # the keywords of ddpm_codec.encode
out = codec.compress(x)                # (N, 3, H, W) in 0 .. 1
x_hat = codec.decompress(**out)["x_hat"]
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor, nn

from .codec.decoder import Recon, decode
from .codec.encoder import ModelLike, encode
from .errors import FormatError
from .network.modelfile import get_model


class Compressed(TypedDict):
    """What compress() returns and decompress() takes."""

    strings: list[list[bytes]]  # one list, as if of one latent; in it a .ddpm file per picture
    shape: torch.Size  # (H, W)


class Codec(nn.Module):
    """compress() and decompress() of RGB pictures; ``.to()`` says on which device.

    Its one parameter is empty. It is there because CompressAI looks up a model's device at one.
    """

    def __init__(self, *, model: ModelLike = None, recon: Recon = "mean", **how: Any) -> None:
        """model, recon: as of ddpm_codec.decode. how: keywords of ddpm_codec.encode.

        Raises TypeError for a keyword that encode() does not have; ModelError.
        """
        super().__init__()
        known = inspect.signature(encode).parameters.keys() - {"image", "model", "device"}
        if unknown := how.keys() - known:
            raise TypeError(f"ddpm_codec.encode has no keyword {min(unknown)!r}")
        get_model(model)  # or say at once what is wrong with it
        self.model, self.recon, self.how = model, recon, how
        self.empty = nn.Parameter(torch.empty(0), requires_grad=False)

    def update(self, *_: object, **__: object) -> bool:
        """Do nothing and return False: there are no tables to update."""
        return False

    def compress(self, x: Tensor) -> Compressed:
        """x: (N, 3, H, W) in 0 .. 1; what lies outside is clipped.

        ``bpp`` and ``bytes`` count for each picture as it is given, with whatever padding the
        caller has put around it. Raises ValueError for another shape, and as ddpm_codec.encode.
        """
        if x.ndim != 4 or x.shape[1] != 3 or not x.numel():
            raise ValueError(f"expected (N, 3, H, W), not {tuple(x.shape)}")
        pixels = (x.detach().float() * 255).round().clamp(0, 255).byte()
        pictures = pixels.permute(0, 2, 3, 1).cpu().numpy()
        how: dict[str, Any] = {"model": self.model, "device": str(self.empty.device)} | self.how
        return {"strings": [[encode(p, **how) for p in pictures]], "shape": x.shape[2:]}

    def decompress(
        self, strings: Sequence[Sequence[bytes]], shape: Sequence[int]
    ) -> dict[str, Tensor]:
        """``{"x_hat": (N, 3, H, W)}`` of what compress() returned.

        Raises ValueError for other strings, FormatError if the pictures have another shape, and as
        ddpm_codec.decode.
        """
        if len(strings) != 1 or not strings[0]:
            raise ValueError("expected [[bytes, ...]], one list of files")
        device, pictures = str(self.empty.device), []
        for data in strings[0]:
            picture = decode(data, model=self.model, device=device, recon=self.recon)
            if picture.size[::-1] != tuple(shape):
                size = f"{picture.height}x{picture.width}"
                raise FormatError(f"the file's picture is {size}, not {'x'.join(map(str, shape))}")
            pictures.append(np.array(picture.convert("RGB")))
        x_hat = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255
        return {"x_hat": x_hat.to(self.empty.device)}
