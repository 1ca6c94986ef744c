"""The chain that both ends follow: they hold the same, an observation of the picture."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from networks import exact_network
from numpy.typing import NDArray
from PIL import Image

from ddpm_codec.codec import chain
from ddpm_codec.codec.chain import Chain, Estimate
from ddpm_codec.codec.encoder import make_header, psnr
from ddpm_codec.codec.header import Header
from ddpm_codec.diffusion import transform
from ddpm_codec.diffusion.schedule import Ladder
from ddpm_codec.errors import FormatError
from ddpm_codec.network import tiles
from ddpm_codec.network.denoiser import ask_exact
from ddpm_codec.network.exact import ExactUNet
from ddpm_codec.network.modelfile import Model, get_model, save_model
from ddpm_codec.network.tables import new_tables

Doubles = NDArray[np.float64]
KINDS = ["spectral", "isotropic", "paper"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, small_model: Path) -> dict[str, Model]:
    """One for each of KINDS."""
    path = tmp_path_factory.mktemp("models") / "tiny.safetensors"
    save_model(path, "tiny", exact_network(), new_tables(Ladder(), scales=True), Ladder())
    tiny = get_model(path)
    return {"spectral": tiny, "isotropic": tiny, "paper": get_model(small_model)}


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "TILE", 16)
    monkeypatch.setattr(tiles, "OVERLAP", 16)


def header_of(
    im: Image.Image, models: dict[str, Model], kind: str = "spectral", **how: Any
) -> Header:
    path = None if kind == "paper" else kind
    usual: dict[str, Any] = {"steps": 5, "effort": 1, "tune": "even"}
    return make_header(im, models[kind], path, 3, **usual | how)


def ends(im: Image.Image, models: dict[str, Model], kind: str, **how: Any) -> tuple[Chain, Chain]:
    """The encoder's chain, and the decoder's."""
    header = header_of(im, models, kind, **how)
    ours, theirs = Chain(header, models[kind]), Chain(header, models[kind])
    ours.observe(np.asarray(im.convert("RGB")))
    return ours, theirs


def same(a: Chain, b: Chain) -> None:
    """The state that both ends must share, to the bit."""
    np.testing.assert_array_equal(a.m, b.m)
    np.testing.assert_array_equal(a.m * 2.0**14, np.rint(a.m * 2.0**14))
    np.testing.assert_array_equal(a.depth, b.depth)
    assert a.gains == b.gains
    assert a.information == b.information


def noise(of: Chain, level: int, where: Any = True) -> Doubles:
    """M - c of the coefficients last observed at this level, in units of its noise's deviation."""
    here = (of.depth == level) & where
    return (of.m - of.c.reshape(of.m.shape))[here].astype(np.float64) * of.snrs[level] ** 0.5


class Asked(NamedTuple):
    """What a network sees of a tile, (192, h, w)."""

    m: Doubles
    precision: Doubles  # 0 where nothing is known
    snr: float


def predicts(
    monkeypatch: pytest.MonkeyPatch, predict: Callable[[Asked], tuple[Doubles, Doubles]]
) -> None:
    """Replace the network by ``predict``: x0_hat and the deviation of its error."""

    def exact(
        net: Any, m: Any, depth: Any, snrs: list[float], snr: float, weights: Any, device: str
    ) -> tuple[NDArray[np.float32], NDArray[np.int8]]:
        x0_hat, deviation = predict(Asked(m.astype(np.float64), np.array(snrs)[depth], snr))
        # 2 b^2 is a Laplace distribution's variance.
        log_scale = np.log(deviation * (snr / 2) ** 0.5)
        index = np.floor((log_scale + 5) / 0.25).clip(0, 31)
        return x0_hat.astype(np.float32), np.broadcast_to(index, m.shape).astype(np.int8)

    monkeypatch.setattr(chain, "ask_exact", exact)


def informed(monkeypatch: pytest.MonkeyPatch, c: NDArray[np.float32], at: Chain) -> Doubles:
    """A network that predicts its errors' deviations, larger in the first bands. Returns them."""
    rng = np.random.default_rng(0)
    spread = 2.0 * np.exp(-np.arange(192) / 24.0)[:, None, None]
    off = rng.standard_normal(at.m.shape)
    truth = c.reshape(at.m.shape).astype(np.float64)

    def predict(asked: Asked) -> tuple[Doubles, Doubles]:
        known = np.where(asked.precision > 0, asked.precision, 1e-9)
        deviation = np.minimum(spread, 0.7 * known**-0.5)
        rolled = np.roll(off, int(math.log2(asked.snr)), 0)  # other errors at each level
        return truth + deviation * rolled, deviation

    predicts(monkeypatch, predict)
    return spread


# --- Both ends ---------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("size", [(1, 1), (19, 7), (40, 28)])
@pytest.mark.parametrize("kind", KINDS)
def test_both_ends_hold_the_same(
    models: dict[str, Model], picture: Image.Image, kind: str, size: tuple[int, int], mode: str
) -> None:
    ours, theirs = ends(picture.resize(size).convert(mode), models, kind)
    one, two = ours.estimate(-1), theirs.estimate(-1)
    for i in range(5):
        payload = ours.encode_level(i, one)
        assert theirs.decode_level(i, two, payload) == (len(payload), None)
        same(ours, theirs)
        one, two = ours.estimate(i), theirs.estimate(i)
    # All is known in the end, of a grey picture its luminance.
    assert (ours.depth[: 64 * ours.components] == 4).all()
    assert (ours.depth[64 * ours.components :] == -1).all()
    assert not ours.m[64 * ours.components :].any()


@pytest.mark.parametrize("kind", KINDS)
def test_both_ends_hold_the_same_in_tiles(
    models: dict[str, Model], picture: Image.Image, kind: str, small_tiles: None
) -> None:
    ours, theirs = ends(picture.resize((45, 30)), models, kind, steps=3)
    assert len(ours.tiles) == (2 if kind == "paper" else 6)
    one, two = ours.estimate(-1), theirs.estimate(-1)
    for i in range(3):
        payload = ours.encode_level(i, one)
        assert theirs.decode_level(i, two, payload) == (len(payload), None)
        same(ours, theirs)
        one, two = ours.estimate(i), theirs.estimate(i)
    error = np.asarray(picture.resize((45, 30))) - ours.pixels(one.x0_hat)
    assert np.sqrt(np.square(error).mean()) < 8


@pytest.mark.parametrize("steps", [1, 2, 5, 33])
def test_any_subset_of_the_ladder(
    models: dict[str, Model], picture: Image.Image, steps: int
) -> None:
    """The tables' variances serve whatever the steps between levels are."""
    ours, theirs = ends(picture.resize((16, 16)), models, "spectral", steps=steps)
    one, two = ours.estimate(-1), theirs.estimate(-1)
    for i in range(steps):
        payload = ours.encode_level(i, one)
        assert theirs.decode_level(i, two, payload) == (len(payload), None)
        one, two = ours.estimate(i), theirs.estimate(i)
    same(ours, theirs)
    assert (ours.depth == steps - 1).all()
    got = ours.picture(two.x0_hat)
    assert psnr(np.asarray(picture.resize((16, 16))), got) > 22


def test_other_rungs(
    models: dict[str, Model], picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any that fall: with gaps, and not down to the finest."""
    header = replace(header_of(picture, models), rungs=(30, 23, 22, 9))
    ours, theirs = Chain(header, models["spectral"]), Chain(header, models["spectral"])
    ours.observe(np.asarray(picture))
    informed(monkeypatch, ours.c, ours)
    one, two = ours.estimate(-1), theirs.estimate(-1)
    for i in range(4):
        payload = ours.encode_level(i, one)
        assert theirs.decode_level(i, two, payload) == (len(payload), None)
        one, two = ours.estimate(i), theirs.estimate(i)
    same(ours, theirs)
    assert np.square(noise(ours, 3)).mean() == pytest.approx(1, abs=0.25)


def test_the_messages_are_what_the_information_costs(
    models: dict[str, Model], picture: Image.Image
) -> None:
    ours, _ = ends(picture, models, "spectral")
    before, estimate = 0.0, ours.estimate(-1)
    for i in range(5):
        bits = 8 * len(ours.encode_level(i, estimate))
        information, before = ours.information - before, ours.information
        # 10 % with the shortest memory; the gains, the agreement, and whole bytes.
        assert 1.1 * information <= bits <= 1.102 * information + 400
        estimate = ours.estimate(i)


# --- An observation ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_held_is_an_observation(
    models: dict[str, Model], picture: Image.Image, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """M is c and noise of the level's precision, independent of c, of all that counts as known."""
    im = picture.resize((64, 48))
    ours, _ = ends(im, models, kind)
    if kind != "paper":
        informed(monkeypatch, ours.coefficients(np.asarray(im)), ours)
    estimate = ours.estimate(-1)
    for i in range(5):
        ours.encode_level(i, estimate)
        estimate = ours.estimate(i)
        n = noise(ours, i)
        if len(n):
            off = 5 / len(n) ** 0.5
            assert np.square(n).mean() == pytest.approx(1, abs=0.12 + 1.4 * off)
            assert abs(n.mean()) < off
            c = ours.c.reshape(ours.m.shape)[ours.depth == i]
            assert abs(np.corrcoef(n, c)[0, 1]) < off
        assert ((ours.depth == i) | (ours.depth == -1)).all()
        assert not ours.m[ours.depth < 0].any()


def test_what_is_not_worth_it_is_not_sent(
    models: dict[str, Model], picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A coefficient comes once its expected square exceeds tau times the noise's, and for good."""
    header = header_of(picture, models, steps=9)
    ours = Chain(header, models["spectral"])
    ours.observe(np.asarray(picture))
    deviation = informed(monkeypatch, ours.c, ours)[:, 0, 0]
    estimate = ours.estimate(-1)
    some, tau = 0, models["spectral"].ladder.tau
    for i in range(9):
        before = ours.depth >= 0
        ours.encode_level(i, estimate)
        estimate = ours.estimate(i)
        known = ours.depth >= 0
        assert (known >= before).all() and (ours.depth[known] == i).all()
        if i:
            # Scale indices are quarters of a nat, so the threshold is met to within one of them.
            share = known.reshape(192, -1).mean(1)
            worth = deviation**2 * ours.snrs[i]
            assert (share[worth > tau * math.exp(0.3)] == 1).all()
            new = ~before.reshape(192, -1).any(1) & (worth < tau * math.exp(-0.3))
            assert not share[new].any()
            some += int(new.sum())
    assert some > 100


@pytest.mark.parametrize("kind", KINDS)
def test_truth_drawn(
    models: dict[str, Model], picture: Image.Image, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """What exact coding would lead to, and the information that it would take."""
    ours, _ = ends(picture, models, kind)
    if kind != "paper":
        predicts(monkeypatch, lambda s: (s.m, np.full_like(s.m, s.snr**-0.5)))
    estimate, expected = ours.estimate(-1), 0.0
    table = models[kind].tables
    for i in range(3):
        ours.draw_level(i, estimate, 5, truth=True)
        estimate = ours.estimate(i)
        g = ours.snrs[i - 1] if i else 0.0
        d = ours.snrs[i] - g
        if i == 0 or kind == "paper":
            # New tables expect the same of all.
            v = float(table.error_at(models[kind].ladder, g).mean())
            sent = kind != "spectral" or d * v > 0.5
        else:
            # ln(b / sigma) = -0.35 is index 18, whose middle is -0.375.
            v, sent = 2 * math.exp(-0.75) / g, True
            if i == 1 and kind == "spectral":
                d = ours.snrs[1]  # nothing was known
        expected += sent * 0.5 * math.log2(1 + d * v) * ours.m.size
        assert ours.information == pytest.approx(expected, rel=1e-5)
        if sent:
            n = noise(ours, i)
            assert len(n) == ours.m.size
            assert np.square(n).mean() == pytest.approx(1, abs=0.1)
    assert expected > 1000


@pytest.mark.parametrize("kind", KINDS)
def test_drawn_from_the_model(models: dict[str, Model], picture: Image.Image, kind: str) -> None:
    """Without a picture: x0_hat and what is expected around it, the same for the same seed."""
    header = header_of(picture, models, kind, steps=3)

    def drawn(seed: int) -> Chain:
        of = Chain(header, models[kind])
        estimate = of.estimate(-1)
        for i in range(3):
            of.draw_level(i, estimate, seed)
            estimate = of.estimate(i)
        return of

    one, two, three = drawn(1), drawn(1), drawn(2)
    np.testing.assert_array_equal(one.m, two.m)
    assert not np.array_equal(one.m, three.m)
    assert (one.depth == 2).all()
    first = Chain(header, models["isotropic" if kind == "spectral" else kind])
    if kind != "spectral":
        first.draw_level(0, first.estimate(-1), 1)
        v = 6.25 + 1 / first.snrs[0]
        assert first.m.var() == pytest.approx(v, rel=0.1)
        assert abs(first.m.mean()) < 0.1 * v**0.5


def test_effort_changes_the_message_alone(models: dict[str, Model], picture: Image.Image) -> None:
    lengths, seen = [], []
    for effort in (1, 2, 5, 9):
        ours, theirs = ends(picture.resize((16, 16)), models, "isotropic", effort=effort)
        payload = ours.encode_level(0, ours.estimate(-1))
        seen.append((ours.information, ours.depth.tolist(), list(ours.gains)))
        m = ours.m.reshape(192, -1)
        second = ours.encode_level(1, Estimate(m.copy(), np.full(m.shape, 20, np.int8)))
        assert theirs.decode_level(0, theirs.estimate(-1), payload) == (len(payload), None)
        assert np.square(noise(ours, 1)).mean() == pytest.approx(1, abs=0.2)
        lengths.append(len(payload) + len(second))
    assert seen == [seen[0]] * 4
    assert lengths == sorted(lengths, reverse=True) and lengths[0] > lengths[-1]


# --- A part of a level -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_level_in_part(models: dict[str, Model], picture: Image.Image, kind: str) -> None:
    """What has arrived equals the whole level's state there; the rest is as it was."""
    im = picture.resize((96, 64))
    ours, theirs = ends(im, models, kind)
    theirs.observe(np.asarray(im))
    one, two = ours.estimate(-1), theirs.estimate(-1)
    seen = 0
    for i in range(4):
        before = theirs.fork()
        payload = ours.encode_level(i, one)
        across = kind == "paper" or i == 0
        last = 0
        for nbytes in range(0, len(payload), max(1, len(payload) // 6)):
            part = before.fork()
            used, wrong = part.decode_level(i, two, payload[:nbytes])
            new = part.depth == i
            assert used <= nbytes and wrong is None and bool(used) >= new.any()
            assert last <= new.sum() <= ours.depth.size
            last = int(new.sum())
            np.testing.assert_array_equal(part.depth[~new], before.depth[~new])
            # A known band that arrived in part is more precise than its depth.
            if not across:
                np.testing.assert_array_equal(part.m[~new], before.m[~new])
            assert not part.m[part.depth < 0].any()
            np.testing.assert_array_equal(part.m[new], ours.m[new])
            if 500 < last < new.size:
                seen += 1
                expected = np.square(noise(ours, i, new)).mean()
                assert np.square(noise(part, i)).mean() == pytest.approx(expected, rel=1e-3)
                assert expected < 1.5
        assert theirs.decode_level(i, two, payload) == (len(payload), None)
        one, two = ours.estimate(i), theirs.estimate(i)
    assert seen >= 3


def test_tile_by_tile(models: dict[str, Model], picture: Image.Image, small_tiles: None) -> None:
    """Of a level in part the first tiles are whole, and the last are as they were."""
    ours, theirs = ends(picture.resize((32, 32)), models, "isotropic", steps=2)
    payload = ours.encode_level(0, ours.estimate(-1))
    two = theirs.estimate(-1)
    part = theirs.fork()
    part.decode_level(0, two, payload[: len(payload) // 2])
    done = [bool((part.depth[:, t.rows, t.columns] == 0).all()) for t in part.tiles]
    assert done[0] and done == sorted(done, reverse=True) and not done[3]
    for tile, whole in zip(part.tiles, done, strict=True):
        place = slice(None), tile.rows, tile.columns
        if whole:
            np.testing.assert_array_equal(part.m[place], ours.m[place])
    assert not part.m[:, part.tiles[3].rows, part.tiles[3].columns].any()


def test_the_state_in_part_is_between_two_levels(
    models: dict[str, Model], picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The network is asked for an SNR as far on the way as the bytes are: a sum of products."""
    ours, _ = ends(picture, models, "spectral")
    asked: list[float] = []
    monkeypatch.setattr(Chain, "ask", lambda self, snr: asked.append(snr))
    ours.estimate(-1)
    assert not asked  # nothing is known: the mean
    ours.depth[0, 0, 0] = 0
    for level, share in ((0, 0.0), (2, 0.0), (2, 0.25), (2, 1.0), (-1, 0.5)):
        ours.estimate(level, share)
    a, b = ours.snrs[2:4]
    assert asked == [ours.snrs[0], a, a + 0.25 * (b - a), b, ours.snrs[0]]


def test_forks_go_their_own_way(models: dict[str, Model], picture: Image.Image) -> None:
    ours, _ = ends(picture, models, "isotropic")
    estimate = ours.estimate(-1)
    fork = ours.fork()
    fork.encode_level(0, estimate)
    assert not ours.m.any() and (ours.depth == -1).all() and fork.m.any()
    assert ours.gains == [22] != fork.gains


# --- What is wrong -----------------------------------------------------------------------------


def prepared(models: dict[str, Model], picture: Image.Image) -> tuple[Chain, Estimate, bytes]:
    """A decoder after level 1, its estimate, and the payload of level 2."""
    ours, theirs = ends(picture, models, "spectral")
    one, two = ours.estimate(-1), theirs.estimate(-1)
    for i in range(2):
        theirs.decode_level(i, two, ours.encode_level(i, one))
        one, two = ours.estimate(i), theirs.estimate(i)
    return theirs, two, ours.encode_level(2, one)


@pytest.mark.parametrize("by", [-1, 1])
def test_a_scale_that_differs(models: dict[str, Model], picture: Image.Image, by: int) -> None:
    """By one step, of one coefficient: it is noticed, and nothing is taken in."""
    theirs, two, payload = prepared(models, picture)
    assert two.index is not None
    right = theirs.fork()
    assert right.decode_level(2, two, payload) == (len(payload), None)
    rng = np.random.default_rng(0)
    for _ in range(20):
        index = two.index.copy()
        index[rng.integers(192), rng.integers(theirs.n)] += by
        off = theirs.fork()
        used, wrong = off.decode_level(2, Estimate(two.x0_hat, index), payload)
        assert used == 0
        assert wrong == "level 2: this machine's arithmetic differs from the encoder's"
        same(off, theirs)


def test_means_that_differ(models: dict[str, Model], picture: Image.Image) -> None:
    """No length depends on them: M is off by as much."""
    theirs, two, payload = prepared(models, picture)
    right, other = theirs.fork(), theirs.fork()
    right.decode_level(2, two, payload)
    off = np.random.default_rng(0).normal(0, 0.01, two.x0_hat.shape).astype(np.float32)
    assert other.decode_level(2, Estimate(two.x0_hat + off, two.index), payload)[1] is None
    np.testing.assert_array_equal(other.depth, right.depth)
    d = 1 - theirs.snrs[1] / theirs.snrs[2]
    known = theirs.depth == 1
    np.testing.assert_allclose(
        (other.m - right.m)[known], d * off.reshape(right.m.shape)[known], atol=2 / 2**14
    )


def test_too_long_a_payload(models: dict[str, Model], picture: Image.Image) -> None:
    theirs, two, payload = prepared(models, picture)
    used, wrong = theirs.decode_level(2, two, payload + b"x")
    assert (used, wrong) == (len(payload), "level 2: longer than its messages")


def test_impossible_gains(models: dict[str, Model], picture: Image.Image) -> None:
    _, theirs = ends(picture, models, "isotropic")
    got = theirs.decode_level(0, theirs.estimate(-1), b"\xff" * 40)
    assert got == (0, "level 0: impossible gains")
    assert not theirs.m.any()


def test_damage_after_a_whole_tile(
    models: dict[str, Model], picture: Image.Image, small_tiles: None
) -> None:
    """The tiles before it count."""
    ours, theirs = ends(picture.resize((32, 16)), models, "isotropic", steps=2)
    payload = ours.encode_level(0, ours.estimate(-1))
    estimate = theirs.estimate(-1)
    tried = (
        theirs.fork().decode_level(0, estimate, payload[:n] + b"\xff" * 40)[0]
        for n in range(len(payload))
    )
    first = next(used for used in tried if used)
    used, wrong = theirs.decode_level(0, estimate, payload[:first] + b"\xff" * 40)
    assert (used, wrong) == (first, "level 0: impossible gains")
    assert (theirs.depth[:, :, :2] == 0).all() and (theirs.depth[:, :, 2:] == -1).all()


@pytest.mark.parametrize("kind", ["spectral", "isotropic", "paper"])
def test_levels_of_another_model(models: dict[str, Model], picture: Image.Image, kind: str) -> None:
    header = header_of(picture, models, kind)
    Chain(header, models[kind])
    wrong = [replace(header, finest=header.finest + 1)]
    if kind == "paper":
        wrong.append(replace(header, path="spectral"))
    else:
        wrong.append(replace(header, rungs=(33, *header.rungs[1:])))
        wrong.append(replace(header, finest=0, rungs=(900, 5)))
    for other in wrong:
        with pytest.raises(FormatError, match="levels are not those of its model"):
            Chain(other, models[kind])


# --- Pictures and coefficients -----------------------------------------------------------------


@pytest.mark.parametrize("size", [(1, 1), (17, 300), (40, 28)])
def test_pictures_and_coefficients(
    models: dict[str, Model], picture: Image.Image, size: tuple[int, int]
) -> None:
    im = picture.resize(size)
    ours = Chain(header_of(im, models), models["spectral"])
    c = ours.coefficients(np.asarray(im))
    assert c.shape == (192, ours.n)
    np.testing.assert_array_equal(ours.picture(c), np.asarray(im))
    assert np.abs(ours.pixels(c) - np.asarray(im)).max() < 2e-3
    # Beyond the picture its last row and column go on.
    whole = transform.inverse(torch.from_numpy(c.reshape(1, 192, *ours.blocks)))[0].numpy()
    beyond = (whole[:, :, size[0] - 1 :] - whole[:, :, size[0] - 1 : size[0]])[:, : size[1]]
    assert np.abs(beyond).max() < 1e-4


@pytest.mark.parametrize("levels", [126, 127, 128, 200])
def test_many_levels(models: dict[str, Model], picture: Image.Image, levels: int) -> None:
    """However depths are kept, the last one is not taken for nothing, nor nothing for another."""
    model = replace(models["spectral"], ladder=Ladder(rungs=200, finest=1 << 20))
    model.tables = new_tables(model.ladder, scales=True)
    header = replace(header_of(picture.resize((16, 16)), models), width=16, height=16)
    rungs = tuple(range(levels - 1, -1, -1))
    ours = Chain(replace(header, finest=1 << 20, rungs=rungs), model)
    ours.m[:] = np.random.default_rng(0).normal(size=ours.m.shape).round(2)
    ours.depth[:100] = levels - 1
    ours.m[100:] = 0
    got = ours.ask(ours.snrs[-1])
    net, snrs = model.net, [ours.snrs[-1], 0.0]
    assert isinstance(net, ExactUNet) and got.index is not None
    depth = np.where(ours.depth >= 0, 0, -1)
    x0_hat, index = ask_exact(net, ours.m, depth, snrs, snrs[0], ours.weights, "cpu")
    np.testing.assert_array_equal(got.x0_hat, x0_hat.reshape(192, -1))
    np.testing.assert_array_equal(got.index, index.reshape(192, -1))


def test_grey_pictures(models: dict[str, Model], picture: Image.Image) -> None:
    im = picture.convert("L")
    ours = Chain(header_of(im, models), models["spectral"])
    c = ours.coefficients(np.asarray(im.convert("RGB")))
    assert np.abs(c[64:]).max() < 2e-5
    c[64:] = np.random.default_rng(0).normal(size=c[64:].shape)  # is not looked at
    np.testing.assert_array_equal(ours.picture(c), np.asarray(im.convert("RGB")))


def test_every_tile_sees_m(
    models: dict[str, Model], picture: Image.Image, small_tiles: None
) -> None:
    """Whatever the order: an estimate is made of the state before it."""
    model = models["spectral"]
    ours, _ = ends(picture.resize((45, 40)), models, "spectral")
    ours.draw_level(0, ours.estimate(-1), 0)
    ours.draw_level(1, ours.estimate(0), 0)
    got = ours.ask(3.0)
    assert len(ours.tiles) == 9
    for tile in ours.tiles:
        seen = slice(None), tile.input_rows, tile.input_columns
        net = model.net
        assert isinstance(net, ExactUNet) and got.index is not None
        alone = ask_exact(
            net, ours.m[seen], ours.depth[seen], [*ours.snrs, 0.0], 3.0, ours.weights, "cpu"
        )
        pairs: list[tuple[NDArray[Any], NDArray[Any]]]
        pairs = [(got.x0_hat, alone[0]), (got.index, alone[1])]
        for whole, part in pairs:
            rows, columns = tile.inner
            mine = whole.reshape(ours.m.shape)[:, tile.rows, tile.columns]
            np.testing.assert_array_equal(mine, part[:, rows, columns])
    ours.tiles.reverse()
    np.testing.assert_array_equal(ours.ask(3.0).x0_hat, got.x0_hat)
