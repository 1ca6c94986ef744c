"""The orthonormal basis in which pictures are coded: a 3x3 colour rotation times an 8x8 DCT.

Gaussian noise N(0, I) is invariant under rotation, so the diffusion process is the same in any
orthonormal basis. This one concentrates a picture's energy in few coefficients, mainly low
frequencies of the luminance. Squared errors are the same in both bases, so the PSNR over RGB
follows from the squared error of coefficients.

Neighbouring blocks of a smooth picture have similar means, and similar errors of the estimate.
:func:`across` therefore rotates each band of 4x4 blocks into sums and differences; white noise
stays white.

Bands are numbered ``64 * component + zigzag``: components are luminance, red - blue and
green - magenta; zigzag is JPEG's order, 0 the block's mean.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

BLOCK = 8  # side of a transform block
BITS = BLOCK**2  # bands per component
BANDS = 3 * BITS  # colour components x DCT frequencies
SQUARE = 4  # side of the squares of blocks whose bands :func:`across` transforms together
POSITIONS = SQUARE**2

COLOUR = np.array(
    [
        [1 / np.sqrt(3), 1 / np.sqrt(3), 1 / np.sqrt(3)],
        [1 / np.sqrt(2), 0.0, -1 / np.sqrt(2)],
        [-1 / np.sqrt(6), 2 / np.sqrt(6), -1 / np.sqrt(6)],
    ]
)


@cache
def zigzag() -> NDArray[np.int64]:
    """(64, 2) vertical and horizontal frequency of each zigzag position."""
    order = sorted(
        ((v, h) for v in range(8) for h in range(8)),
        key=lambda p: (p[0] + p[1], p[0] if (p[0] + p[1]) % 2 else p[1]),
    )
    return np.array(order, dtype=np.int64)


@cache
def basis() -> NDArray[np.float64]:
    """(192, 192), orthonormal: rows are bands, columns (component, row, column) of a block.

    Its entries are multiples of 2^-20, so that in float64 a transform of numbers on such a grid is
    exact, whatever the order of its sums.
    """
    n = np.arange(BLOCK)
    dct = np.sqrt(2 / BLOCK) * np.cos(np.pi * (2 * n[None, :] + 1) * n[:, None] / (2 * BLOCK))
    dct[0] /= np.sqrt(2)
    v, h = zigzag().T
    block = dct[v][:, :, None] * dct[h][:, None, :]  # (64, 8, 8)
    return np.rint(np.einsum("ij,zvh->izjvh", COLOUR, block).reshape(BANDS, BANDS) * 2**20) / 2**20


# Not functools.cache: torch.compile ignores it, and the graph would compute the basis at each step.
_tensors: dict[tuple[torch.device, torch.dtype], Tensor] = {}


def _basis_tensor(device: torch.device, dtype: torch.dtype) -> Tensor:
    if (device, dtype) not in _tensors:
        _tensors[device, dtype] = torch.tensor(basis(), device=device, dtype=dtype)
    return _tensors[device, dtype]


def forward(x: Tensor) -> Tensor:
    """Pixels to coefficients: (B, 3, H, W) to (B, 192, H/8, W/8); H and W multiples of 8."""
    b, c, h, w = x.shape
    x = x.reshape(b, c, h // BLOCK, BLOCK, w // BLOCK, BLOCK).permute(0, 2, 4, 1, 3, 5)
    y = x.reshape(-1, BANDS) @ _basis_tensor(x.device, x.dtype).T
    return y.reshape(b, h // BLOCK, w // BLOCK, BANDS).permute(0, 3, 1, 2)


def inverse(y: Tensor) -> Tensor:
    """Coefficients to pixels: (B, 192, h, w) to (B, 3, 8h, 8w)."""
    b, _, h, w = y.shape
    x = y.permute(0, 2, 3, 1).reshape(-1, BANDS) @ _basis_tensor(y.device, y.dtype)
    x = x.reshape(b, h, w, 3, BLOCK, BLOCK).permute(0, 3, 1, 4, 2, 5)
    return x.reshape(b, 3, h * BLOCK, w * BLOCK)


def across(c: NDArray[np.float64], blocks: tuple[int, int]) -> NDArray[np.float64]:
    """The Walsh-Hadamard transform of each band over squares of 4x4 blocks; its own inverse.

    c: (B, h w) coefficients of h x w blocks; the result has the same shape. The coefficient at
    (i, j) of a square belongs to the Walsh function of index i over rows and j over columns. Blocks
    beyond the last whole square stay as they are.
    """
    h, w = (n // SQUARE for n in blocks)
    sign = np.array([[1.0, 1.0], [1.0, -1.0]])
    walsh = np.kron(sign, sign) / 2
    out = c.reshape(len(c), *blocks).copy()
    whole = out[:, : h * SQUARE, : w * SQUARE]
    squares = whole.reshape(len(c), h, SQUARE, w, SQUARE)
    whole[:] = np.einsum("ia,jb,chawb->chiwj", walsh, walsh, squares, optimize=True).reshape(
        whole.shape
    )
    return out.reshape(c.shape)


def positions(blocks: tuple[int, int]) -> NDArray[np.int64]:
    """(h w,): 4 i + j of each block in its square (:func:`across`); POSITIONS outside squares."""
    h, w = blocks
    i, j = np.arange(h)[:, None], np.arange(w)
    out = SQUARE * (i % SQUARE) + j % SQUARE
    out[(i >= h // SQUARE * SQUARE) | (j >= w // SQUARE * SQUARE)] = POSITIONS
    return out.reshape(-1)
