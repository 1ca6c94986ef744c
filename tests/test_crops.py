"""Training crops: where they come from, how they are flipped and how far they are shrunk."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ddpm_codec.errors import DataError, DdpmcWarning
from ddpm_codec.training import crops as crops_module
from ddpm_codec.training.crops import SCALES, Crops


def ramps(height: int, width: int, number: int) -> NDArray[np.uint8]:
    """Its pixels say where they are, and of which picture."""
    y, x = np.mgrid[:height, :width]
    return np.stack([4 * y, 4 * x, number + 0 * x], -1).astype(np.uint8)


def pictures(folder: Path, *sizes: tuple[int, int]) -> list[Path]:
    paths = []
    for k, size in enumerate(sizes):
        paths.append(folder / f"{k}.png")
        Image.fromarray(ramps(*size, k)).save(paths[-1])
    return paths


def turns(crops: Tensor) -> tuple[list[tuple[bool, bool, bool]], NDArray[np.float64]]:
    """Of each crop, whether it is transposed, its rows and columns are flipped; and its scale."""
    x = crops.double().numpy()
    down, right = x[:, :, -1] - x[:, :, 0], x[:, :, :, -1] - x[:, :, :, 0]
    out, scales = [], []
    for k in range(len(x)):
        rows = down[k, 0].mean(), right[k, 0].mean()  # how the row's number goes on
        columns = down[k, 1].mean(), right[k, 1].mean()
        transposed = bool(abs(rows[1]) > abs(rows[0]))
        assert transposed == (abs(columns[0]) > abs(columns[1]))
        out.append((transposed, bool(rows[transposed] < 0), bool(columns[not transposed] < 0)))
        scales.append(4 * (x.shape[-1] - 1) / abs(rows[transposed]))
    return out, np.array(scales)


def test_crops_are_parts_of_pictures(tmp_path: Path) -> None:
    """At all scales, in all eight orientations; those that are not shrunk are exact copies."""
    sizes = (40, 60), (52, 44)
    crops = Crops(pictures(tmp_path, *sizes), 16, 3, "cpu").batch(2000)
    assert crops.shape == (2000, 3, 16, 16) and crops.dtype == torch.uint8
    ways, scales = turns(crops)
    counts = Counter(ways)
    assert len(counts) == 8 and min(counts.values()) > 170
    nearest = np.abs(np.log(scales[:, None] / np.array(SCALES))).argmin(1)
    assert np.abs(np.log(scales / np.array(SCALES)[nearest])).max() < 0.12
    np.testing.assert_allclose(np.bincount(nearest) / 2000, [0.5, 0.25, 0.25], atol=0.04)
    corners = set()
    for crop, (transposed, up, left), scale in zip(crops, ways, nearest, strict=True):
        x = crop.permute(1, 2, 0).numpy()
        number = int(x[0, 0, 2])
        assert (x[..., 2] == number).all() and number in (0, 1)
        if scale == 0:
            x = x.transpose(1, 0, 2) if transposed else x
            x = x[:: -1 if up else 1, :: -1 if left else 1]
            top, first = (int(v) // 4 for v in x[0, 0, :2])
            whole = ramps(*sizes[number], number)
            np.testing.assert_array_equal(x, whole[top : top + 16, first : first + 16])
            corners.add((number, top, first))
    # From edge to edge.
    for number, (h, w) in enumerate(sizes):
        rows, columns = zip(*((t, f) for n, t, f in corners if n == number), strict=True)
        assert (min(rows), max(rows)) == (0, h - 16)
        assert (min(columns), max(columns)) == (0, w - 16)


def test_large_pictures_come_more_often(tmp_path: Path) -> None:
    crops = Crops(pictures(tmp_path, (40, 40), (40, 120)), 16, 0, "cpu").batch(2000)
    assert float(crops[:, 2].double().mean()) == pytest.approx(0.75, abs=0.04)


def test_pictures_that_are_too_small(tmp_path: Path) -> None:
    """Are left out, at those scales at which they are; without any there is nothing to learn."""
    paths = pictures(tmp_path, (15, 60), (20, 30), (60, 15))
    crops = Crops(paths, 16, 0, "cpu").batch(200)
    assert bool((crops[:, 2] == 1).all())
    _, scales = turns(crops)
    np.testing.assert_allclose(scales, 1.0)
    crops = Crops(paths, 14, 0, "cpu").batch(800)
    assert set(crops[:, 2].flatten().tolist()) == {0, 1, 2}
    assert 0.2 < float((turns(crops)[1] < 0.8).mean()) < 0.5
    with pytest.raises(DataError, match="no picture is at least 64 pixels wide and high"):
        Crops(paths, 64, 0, "cpu")


def test_of_a_large_collection_a_random_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crops_module, "AT_A_TIME", 1)
    paths = pictures(tmp_path, *[(20, 20)] * 12)
    kept = set()
    for seed in range(6):
        crops = Crops(paths, 16, seed, "cpu", memory=2 * 20 * 20 * 3)
        some = set(crops.batch(300)[:, 2].flatten().tolist())
        assert len(some) <= 3
        kept |= some
    assert len(kept) > 5


def test_broken_pictures_are_skipped(tmp_path: Path) -> None:
    """With one warning that counts them and names one."""
    paths = pictures(tmp_path, *[(20, 20)] * 3)
    whole = paths[1].read_bytes()
    paths[1].write_bytes(whole[: len(whole) // 2])
    with pytest.warns(
        DdpmcWarning, match=f"broken pictures skipped: 1, the last .*{paths[1].name}"
    ):
        crops = Crops(paths, 16, 0, "cpu")
    assert len(crops.shapes) == 2


def test_the_seed_decides(tmp_path: Path) -> None:
    paths = pictures(tmp_path, (40, 60), (52, 44))
    one, two, three = (Crops(paths, 16, seed, "cpu") for seed in (1, 1, 2))
    first = one.batch(20)
    assert torch.equal(first, two.batch(20)) and not torch.equal(first, three.batch(20))
    assert not torch.equal(first, one.batch(20))
