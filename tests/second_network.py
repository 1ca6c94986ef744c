"""The photographs' network a second time, written from docs/exact.md and nothing else.

Activations are integers (int64), sums of their products are int64; all else is numpy's single
precision, of which every operation is rounded once. Arrays are (channels, rows, columns).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Tensors = dict[str, Array]  # of a model file, without "net."


def f32(x: Any) -> Array:
    return np.asarray(x, np.float32)


def bf16(x: Array) -> Array:
    """Rounded to 8 significant bits, halves to even."""
    mantissa, exponent = np.frexp(x)  # of at most 24 bits, in [1/2, 1)
    return f32(np.ldexp(np.rint(mantissa * np.float32(256)), exponent - 8))


class Scaled(NamedTuple):
    """u, and the scale t of each channel: they stand for u t."""

    u: Array
    t: Array  # (channels, 1, 1)

    @property
    def value(self) -> Array:
        return self.u * self.t


class Layers:
    """Section 2. Layers are known by their names in the model file."""

    def __init__(self, tensors: Tensors) -> None:
        self.tensors = tensors

    def column(self, name: str) -> Array:
        return f32(self.tensors[name])[:, None, None]

    def conv(self, name: str, a: Array, stride: int = 1) -> Scaled:
        w = self.tensors[f"{name}.weight"].astype(np.int64)
        assert (255 * np.abs(w).sum((1, 2, 3)) < 1 << 24).all()
        k = w.shape[2]
        if stride == 1:
            a = np.pad(a, ((0, 0), (k // 2, k // 2), (k // 2, k // 2)))
        h, width = ((n - k) // stride + 1 for n in a.shape[1:])
        sums = np.zeros((len(w), h * width), np.int64)
        for y, x in np.ndindex(k, k):
            part = a[:, y : y + stride * h : stride, x : x + stride * width : stride]
            sums += product(w[:, :, y, x], part.reshape(len(a), -1))
        u = bf16(f32(sums.reshape(len(w), h, width)))
        return Scaled(u, self.column(f"{name}.unit") / np.float32(32))

    def q(
        self, name: str, x: Array | Scaled, signed: bool = False, b: Array | None = None
    ) -> Array:
        x, t = x if isinstance(x, Scaled) else (x, f32(1))
        g = self.column(f"{name}.gain")
        if b is None:
            b = f32(0) if signed else self.column(f"{name}.offset")
        whole = np.rint(f32(b + x * (g * t))).astype(np.int64)
        return np.clip(whole, -255 if signed else 0, 255)

    def block(self, name: str, h: Array, row: int) -> Array:
        a = self.conv(f"{name}.conv1", self.q(f"{name}.q1", h))
        level = f32(self.tensors[f"{name}.levels"][row])[:, None, None]
        return plus(h, self.conv(f"{name}.conv2", self.q(f"{name}.q2", a, b=level)))


def product(w: Array, a: Array) -> Array:
    """The matrix product of integers.

    In double precision, of which numpy has a fast one: all sums, in whatever order they are taken,
    are below 2^24 (section 4), and double precision holds every integer below 2^53.
    """
    return (w.astype(np.float64) @ a.astype(np.float64)).astype(np.int64)


def plus(h: Array, x: Scaled) -> Array:
    return bf16(f32(h + x.value))


def row_of(snr: float) -> int:
    return sum(bool(2.0 ** (j / 4 - 6 + 1 / 8) < snr) for j in range(72))


def squares(x: Array) -> Array:
    """Each 2x2 of a plane as four channels, 4 plane + 2 row + column."""
    return np.stack([p[r::2, c::2] for p in x for r in (0, 1) for c in (0, 1)])


def planes(x: Array) -> Array:
    """The other way round."""
    out = np.zeros((len(x) // 4, 2 * x.shape[1], 2 * x.shape[2]), x.dtype)
    for k, channel in enumerate(x):
        out[k // 4, k // 2 % 2 :: 2, k % 2 :: 2] = channel
    return out


class Outputs(NamedTuple):
    y: Array
    shift: Array
    gain: Array
    log_scale: Array


class Network(Layers):
    """Section 3."""

    def __init__(self, tensors: Tensors, config: dict[str, Any]) -> None:
        super().__init__(tensors)
        self.down, self.up = config["down"], config["up"]

    def __call__(self, pixels: Array, precision_map: Array, whitened: Array, snr: float) -> Outputs:
        row = row_of(snr)
        h = bf16(self.conv("stem", squares(pixels)).value)
        u, t = self.conv("map_in", precision_map)
        h = plus(h, Scaled(u.repeat(4, 1).repeat(4, 2), t))
        kept = []
        for i, blocks in enumerate(self.down):
            if i == 2:
                h = plus(h, self.conv("block_in", np.concatenate([precision_map, whitened])))
            for j in range(blocks):
                h = self.block(f"down.{i}.{j}", h, row)
            if i + 1 < len(self.down):
                kept.append(h)
                a = self.q(f"shrink_q.{i}", h, signed=True)
                h = bf16(self.conv(f"shrink.{i}", a, stride=2).value)
        for i in reversed(range(len(self.up))):
            u, t = self.conv(f"grow.{i}", self.q(f"grow_q.{i}", h, signed=True))
            assert all(np.array_equal(t[::4], t[k::4]) for k in range(4))
            h = plus(kept[i], Scaled(planes(u), t[::4]))
            for j in range(self.up[i]):
                h = self.block(f"up.{i}.{j}", h, row)
            if i == 2:
                values = self.conv("block_out", self.q("block_q", h)).value
                shift, gain, scale = np.split(values, 3)
        a = self.q("out_q", h)
        y = planes(self.conv("out", a).value)
        return Outputs(y, shift, gain, f32(scale + self.conv("scales", a, stride=4).value))
