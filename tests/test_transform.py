"""The orthonormal basis: numbered as documented, and the same squared errors in both worlds."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from ddpm_codec.diffusion import transform


def test_basis_is_orthonormal() -> None:
    basis = transform.basis()
    assert basis.shape == (192, 192)
    np.testing.assert_allclose(basis @ basis.T, np.eye(192), atol=2e-5)
    assert np.array_equal(basis * 2**20, np.rint(basis * 2**20))  # exact in sums
    np.testing.assert_allclose(transform.COLOUR @ transform.COLOUR.T, np.eye(3), atol=1e-15)


def test_zigzag_is_jpegs() -> None:
    zigzag = transform.zigzag()
    assert zigzag.shape == (64, 2)
    # ITU-T T.81, figure 5: vertical and horizontal frequency.
    first = [(0, 0), (0, 1), (1, 0), (2, 0), (1, 1), (0, 2), (0, 3), (1, 2), (2, 1), (3, 0)]
    assert [tuple(p) for p in zigzag[:10].tolist()] == first
    assert [tuple(p) for p in zigzag[-3:].tolist()] == [(6, 7), (7, 6), (7, 7)]
    assert len({tuple(p) for p in zigzag.tolist()}) == 64


def test_across_blocks() -> None:
    rng = np.random.default_rng(0)
    c = rng.standard_normal((5, 9 * 6))
    transformed = transform.across(c, (9, 6))
    np.testing.assert_allclose(transform.across(transformed, (9, 6)), c, atol=1e-14)
    np.testing.assert_allclose(np.square(transformed).sum(1), np.square(c).sum(1), rtol=1e-13)
    at = transform.positions((9, 6)).reshape(9, 6)
    assert at[:4, :4].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]
    assert (at[4:8, :4] == at[:4, :4]).all() and (at[8] == 16).all() and (at[:, 4:] == 16).all()
    alone = (at == 16).reshape(-1)
    np.testing.assert_array_equal(transformed[:, alone], c[:, alone])
    # A constant is the first function's; rows that alternate are the second of the other axis.
    for block, place in ((np.ones((4, 4)), 0), (np.array([[1.0, -1, 1, -1]] * 4).T, 4)):
        expected = np.zeros(16)
        expected[place] = 4
        assert transform.across(block.reshape(1, 16), (4, 4)).reshape(-1).tolist() == list(expected)
    for blocks in ((1, 1), (3, 9)):
        c = rng.standard_normal((2, blocks[0] * blocks[1]))
        np.testing.assert_array_equal(transform.across(c, blocks), c)


def test_rows_of_the_basis() -> None:
    basis = transform.basis().reshape(3, 64, 3, 8, 8)
    np.testing.assert_allclose(basis[0, 0], 1 / np.sqrt(192), atol=2**-21)
    # Grey has no colour.
    np.testing.assert_allclose(basis[1:].sum(2), 0, atol=2**-19)
    # Band 1 of each component varies horizontally alone, band 2 vertically alone.
    for band, still, moving in ((1, 1, 2), (2, 2, 1)):
        for component in range(3):
            rows = basis[component, band]
            assert np.abs(np.diff(rows, axis=still)).max() < 1e-15
            assert np.abs(np.diff(rows, axis=moving)).max() > 0.01


def test_round_trip() -> None:
    x = torch.randn(2, 3, 24, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = transform.forward(x)
    assert y.shape == (2, 192, 3, 5)
    torch.testing.assert_close(transform.inverse(y), x, rtol=0, atol=1e-4)
    torch.testing.assert_close(transform.forward(transform.inverse(y)), y, rtol=0, atol=1e-4)
    # Each block is where it was, and looked at alone.
    alone = transform.forward(x[1:, :, 8:16, 32:40])
    torch.testing.assert_close(y[1:, :, 1:2, 4:5], alone, rtol=0, atol=1e-13)
    assert transform.forward(x.float()).dtype == torch.float32


def test_transforms_are_exact() -> None:
    """Of multiples of 2^-14 within 1024 each sum is, whatever its order: of bands, of blocks."""
    generator = torch.Generator().manual_seed(0)
    whole = torch.randint(-(2**24), 2**24 + 1, (2, 192, 3, 4), generator=generator)
    basis = np.rint(transform.basis() * 2**20).astype(np.int64)
    for of, flat in (
        (transform.inverse, lambda y: y.reshape(2, 3, 3, 8, 4, 8).permute(0, 2, 4, 1, 3, 5)),
        (transform.forward, lambda y: y.permute(0, 2, 3, 1)),
    ):
        x = whole if of is transform.inverse else transform.inverse(whole.double()).long()
        x = x.clamp(-(2**24), 2**24)
        rows = (
            x.permute(0, 2, 3, 1).reshape(-1, 192).numpy().astype(object)
            if of is transform.inverse
            else x.reshape(2, 3, 3, 8, 4, 8).permute(0, 2, 4, 1, 3, 5).reshape(-1, 192).numpy()
        ).astype(object)
        expected = rows @ (basis if of is transform.inverse else basis.T).astype(object)
        got = flat(of(x.double() / 2**14)).reshape(-1, 192).numpy()
        np.testing.assert_array_equal(got, expected.astype(np.float64) / 2.0**34)


def test_psnr_is_preserved(picture: Image.Image) -> None:
    pixels = np.asarray(picture)[:24].astype(np.float64) / 127.5 - 1
    x = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
    difference = transform.forward(x + 0.1 * noise) - transform.forward(x)
    np.testing.assert_allclose(
        float(difference.square().sum()), float((0.1 * noise).square().sum()), rtol=1e-5
    )
