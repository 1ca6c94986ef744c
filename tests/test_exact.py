"""The exact network: the same bits whatever computes them, its bounds, and how it is trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from networks import TINY, exact_network
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ddpm_codec.codec.chain import Chain
from ddpm_codec.codec.header import Header
from ddpm_codec.diffusion.schedule import Ladder
from ddpm_codec.diffusion.transform import BANDS
from ddpm_codec.errors import ModelError
from ddpm_codec.network import exact, selftest, tiles
from ddpm_codec.network.bounds import check
from ddpm_codec.network.exact import (
    HIGH,
    NODES,
    STEP,
    SUM,
    WEIGHT,
    Convolution,
    ExactConfig,
    ExactUNet,
    Inputs,
    Quantiser,
)
from ddpm_codec.network.modelfile import Model, new_network
from ddpm_codec.network.tables import new_tables

TYPES = (torch.bfloat16, torch.float32, torch.float64)
RUNGS = (32, 31, 26, 18)


def frozen(net: ExactUNet, device: str = "cpu", dtype: torch.dtype = torch.float32) -> ExactUNet:
    net.freeze(net.integers(), device, dtype)
    return net.to(device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]


def seen(seed: int = 0, batch: int = 2, snr: float = 4.0, device: str = "cpu") -> Inputs:
    """Integers of all sizes, more often small."""
    generator = torch.Generator().manual_seed(seed)

    def integers(*shape: int) -> Tensor:
        x = 80 * torch.randn(shape, generator=generator) * torch.rand(shape, generator=generator)
        return x.round().clamp(-HIGH, HIGH).bfloat16().to(device)

    pixels, blocks = integers(batch, 6, 32, 48), integers(batch, 2 * BANDS, 4, 6)
    return Inputs(pixels, blocks, torch.full((batch,), snr, dtype=torch.float64, device=device))


def equal(a: Any, b: Any) -> bool:
    """Whether all bits of a network's outputs are the same."""
    return all(torch.equal(x.cpu(), y.cpu()) for x, y in zip(a, b, strict=True))


# --- The same bits -----------------------------------------------------------------------------


class After(NamedTuple):
    """What there is after a level."""

    m: NDArray[np.float32]
    depth: NDArray[np.integer]
    x0_hat: NDArray[np.float32]
    scales: NDArray[np.int8]
    picture: NDArray[np.uint8]


@pytest.fixture(scope="module")
def wary() -> Model:
    """Of which some bands come early and others late, or never."""
    net = exact_network()
    with torch.no_grad():
        net.block_out.weight[2 * BANDS :] *= 8
    ladder = Ladder(tau=0.5)  # with less, a random network has nearly all coefficients sent
    model = Model("wary", net, new_tables(ladder, scales=True), ladder, bytes(32))
    net.freeze(net.integers(), "cpu", torch.float32)
    return model


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "TILE", 16)
    monkeypatch.setattr(tiles, "OVERLAP", 16)


def chain_of(model: Model, device: str = "cpu") -> Chain:
    header = Header(32, 28, "RGB", "spectral", model.id, 7, 1, model.ladder.finest, RUNGS)
    return Chain(header, model, device)


def levels_of(model: Model, pixels: NDArray[np.uint8]) -> list[bytes]:
    chain = chain_of(model)
    chain.observe(pixels)
    out, estimate = [], chain.estimate(-1)
    for i in range(len(RUNGS)):
        out.append(chain.encode_level(i, estimate))
        estimate = chain.estimate(i)
    return out


def followed(model: Model, levels: list[bytes], device: str = "cpu") -> list[After]:
    """All that a decoder holds after each level."""
    chain, out = chain_of(model, device), []
    estimate = chain.estimate(-1)
    for i, payload in enumerate(levels):
        assert chain.decode_level(i, estimate, payload) == (len(payload), None)
        estimate = chain.estimate(i)
        x0_hat, index = estimate.x0_hat, estimate.index
        assert index is not None
        out.append(After(chain.m.copy(), chain.depth.copy(), x0_hat, index, chain.picture(x0_hat)))
    return out


@pytest.fixture(scope="module")
def levels(wary: Model, picture: Image.Image) -> list[bytes]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "TILE", 16)
        patch.setattr(tiles, "OVERLAP", 16)
        return levels_of(wary, np.asarray(picture)[:, :32])


@pytest.fixture(scope="module")
def expected(wary: Model, levels: list[bytes]) -> list[After]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "TILE", 16)
        patch.setattr(tiles, "OVERLAP", 16)
        return followed(wary, levels)


def test_the_states_are_worth_comparing(expected: list[After]) -> None:
    """Some coefficients are known and others are not, and the network predicts all of them."""
    shares = [float((state.depth >= 0).mean()) for state in expected]
    assert any(0.1 < share < 0.98 for share in shares)
    assert all(len(np.unique(state.scales)) > 8 for state in expected[1:])
    assert all(len(np.unique(state.picture)) > 50 for state in expected)


@contextmanager
def threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def flushed() -> Iterator[None]:
    if not torch.set_flush_denormal(True):
        pytest.skip("denormal numbers cannot be flushed here")
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


@contextmanager
def default(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def computed_in(model: Model, dtype: torch.dtype) -> Iterator[None]:
    assert isinstance(model.net, ExactUNet)
    model.net.compute_in(dtype)
    try:
        yield
    finally:
        model.net.compute_in(torch.float32)


@contextmanager
def laid_out(model: Model, how: torch.memory_format) -> Iterator[None]:
    """Weights, and the pictures that the network gets."""
    net = model.net
    assert isinstance(net, ExactUNet)
    before = [layer.frozen for layer in convolutions(net)]
    for layer in convolutions(net):
        assert layer.frozen is not None
        layer.frozen = layer.frozen[0].contiguous(memory_format=how), layer.frozen[1]

    def turn(_: Any, given: tuple[Inputs]) -> tuple[Inputs]:
        pixels, blocks = (x.contiguous(memory_format=how) for x in given[0][:2])
        return (Inputs(pixels, blocks, given[0].snr),)

    handle = net.register_forward_pre_hook(turn)
    try:
        yield
    finally:
        handle.remove()
        for layer, was in zip(convolutions(net), before, strict=True):
            layer.frozen = was


@contextmanager
def in_pairs(model: Model) -> Iterator[None]:
    """Each picture is computed beside another, first or second in turn."""
    net = model.net
    assert isinstance(net, ExactUNet)
    forward, calls = net.forward, 0

    def pair(x: Inputs) -> exact.Outputs:
        nonlocal calls
        calls += 1
        others = [(255 * torch.rand(t.shape)).round().to(t.dtype) for t in x[:2]]
        order = calls % 2
        both = [torch.cat([a, b][:: 1 - 2 * order]) for a, b in zip(x[:2], others, strict=True)]
        got = forward(Inputs(both[0], both[1], x.snr.repeat(2)))
        return exact.Outputs(*(t[order : order + 1] for t in got))

    net.forward = pair  # type: ignore[method-assign]
    try:
        yield
    finally:
        del net.forward
    assert calls > len(RUNGS)


@contextmanager
def tiles_reversed() -> Iterator[None]:
    """The network sees the last tile first; messages are in the format's order all the same."""
    ask = Chain.ask

    def backwards(self: Chain, snr: float) -> Any:
        order = self.tiles
        assert len(order) == 4
        self.tiles = order[::-1]
        try:
            return ask(self, snr)
        finally:
            self.tiles = order

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Chain, "ask", backwards)
        yield


def convolutions(net: ExactUNet) -> list[Convolution]:
    return [layer for layer in net.modules() if isinstance(layer, Convolution)]


WAYS: dict[str, Callable[[Model], Any]] = {
    "1 thread": lambda model: threads(1),
    "2 threads": lambda model: threads(2),
    "bfloat16": lambda model: computed_in(model, torch.bfloat16),
    "float32": lambda model: computed_in(model, torch.float32),
    "float64": lambda model: computed_in(model, torch.float64),
    "in pairs": in_pairs,
    "channels last": lambda model: laid_out(model, torch.channels_last),
    "channels first": lambda model: laid_out(model, torch.contiguous_format),
    "no oneDNN": lambda model: torch.backends.mkldnn.flags(enabled=False),  # type: ignore
    "denormals flushed": lambda model: flushed(),
    "autocast": lambda model: torch.autocast("cpu", dtype=torch.bfloat16),
    "default float64": lambda model: default(torch.float64),
    "tiles reversed": lambda model: tiles_reversed(),
}


@pytest.mark.filterwarnings("ignore:TF32")
@pytest.mark.parametrize("way", WAYS)
def test_every_way_gives_the_same_bits(
    wary: Model, levels: list[bytes], expected: list[After], way: str
) -> None:
    """M, what is known, the estimate, its scale and the picture, after every level."""
    with WAYS[way](wary):
        same(followed(wary, levels), expected)


def same(got: list[After], expected: list[After]) -> None:
    for level, (a, b) in enumerate(zip(got, expected, strict=True)):
        pairs: list[tuple[str, NDArray[Any], NDArray[Any]]]
        pairs = list(zip(After._fields, a, b, strict=True))  # type: ignore[arg-type]
        for name, mine, theirs in pairs:
            assert mine.dtype == theirs.dtype
            assert mine.tobytes() == theirs.tobytes(), (level, name)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", TYPES)
def test_cuda_gives_the_same_bits(
    wary: Model, levels: list[bytes], expected: list[After], dtype: torch.dtype
) -> None:
    assert isinstance(wary.net, ExactUNet)
    net = ExactUNet(TINY)
    net.freeze(wary.net.integers(), "cuda", dtype)
    net.to("cuda", memory_format=torch.channels_last)  # type: ignore[call-overload]
    assert selftest.passes([(8, 8, 3, 1)], "cuda", dtype)
    same(followed(replace(wary, net=net), levels, "cuda"), expected)


def test_new_models_in_any_default_type(wary: Model) -> None:
    """A network that is made while the default type is another computes the same."""
    assert isinstance(wary.net, ExactUNet)
    with default(torch.float64):
        net = new_network(TINY)
        assert isinstance(net, ExactUNet)
        net.freeze(wary.net.integers(), "cpu", torch.float32)
    assert equal(net(seen()), wary.net(seen()))


# --- In integers -------------------------------------------------------------------------------


def in_integers(x: Tensor, w: Tensor, stride: int, padding: int) -> Tensor:
    """A convolution as one 64-bit product of matrices."""
    size = w.shape[2]
    whole = torch.nn.functional.pad(x.long(), (padding,) * 4)
    patches = whole.unfold(2, size, stride).unfold(3, size, stride)
    b, _, rows, columns = patches.shape[:4]
    flat = patches.permute(0, 2, 3, 1, 4, 5).reshape(b * rows * columns, -1)
    return (flat @ w.long().flatten(1).T).reshape(b, rows, columns, -1).permute(0, 3, 1, 2)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("size", "stride"), [(3, 1), (1, 1), (2, 2), (4, 4)])
def test_convolutions_are_of_integers(size: int, stride: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = Convolution(24, 16, size, stride)
    w, unit = layer.integers()
    layer.frozen = w.detach().to(dtype), unit
    if not selftest.passes([(24, 16, size, stride)], "cpu", dtype):
        pytest.skip("not exact on this machine, and not used then")
    x = torch.randint(-HIGH, HIGH + 1, (2, 24, 8, 12))
    u, scale = layer(x.bfloat16())
    sums = in_integers(x, w.detach(), stride, layer.padding)
    assert int(sums.abs().max()) > 1 << 16
    assert torch.equal(u, sums.float().bfloat16())
    assert torch.equal(scale.flatten(), unit * STEP)


@pytest.mark.parametrize("signed", [False, True])
def test_a_quantiser_rounds_once(signed: bool) -> None:
    """Halves to even, and clamped, in float64 as in single precision."""
    torch.manual_seed(0)
    q = Quantiser(5, signed)
    with torch.no_grad():
        q.gain.copy_(torch.tensor([1.0, -0.7, 3.0, 0.01, 1 / 64]))
        if q.offset is not None:
            q.offset.copy_(torch.tensor([0.0, 1.0, -0.3, 2.0, 0.0]))
    x = (20 * torch.randn(2, 5, 40, 50)).bfloat16()
    x[0, 4, :, 0] = torch.arange(40)  # halves
    unit = torch.tensor([1.0, 3.0, 0.5, 1.25, 1.0])[:, None, None]
    gain, offset = q.integers()
    exactly = x.double() * (gain[:, None, None] * unit).double() + offset[:, None, None].double()
    expected = exactly.float().round().clamp(-HIGH if signed else 0, HIGH).bfloat16()
    with torch.no_grad():
        got = q(x, unit)
    assert torch.equal(got, expected)
    assert float(got.min()) == (-HIGH if signed else 0) and float(got.max()) == HIGH
    assert got[0, 4, :6, 0].tolist() == [0, 0, 1, 2, 2, 2]
    # In training, and in strips of whatever height.
    assert torch.equal(q(x, unit), expected)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(Quantiser, "CACHED", 1)
        assert torch.equal(q(x, unit), expected)


def test_a_sum_is_rounded_once() -> None:
    torch.manual_seed(0)
    h = torch.randn(1, 6, 30, 30).bfloat16()
    u = torch.randint(-(1 << 24), 1 << 24, h.shape).float().bfloat16()
    s = (torch.rand(6, 1, 1) * 2**-22).bfloat16().float()
    exactly = h.double() + u.double() * s.double()
    assert torch.equal(exact.plus(h, (u, s)), exactly.float().bfloat16())
    assert torch.equal(exact.scaled((u, s)), (u.double() * s.double()).float().bfloat16())


def test_everything_counts() -> None:
    """Each input, and the noise level."""
    net = frozen(exact_network())
    x = seen()
    y = net(x)
    for other in (
        x._replace(pixels=-x.pixels),
        x._replace(blocks=torch.cat([-x.blocks[:, :BANDS], x.blocks[:, BANDS:]], 1)),
        x._replace(blocks=torch.cat([x.blocks[:, :BANDS], -x.blocks[:, BANDS:]], 1)),
        x._replace(snr=x.snr * 2),
    ):
        assert not any(torch.equal(a, b) for a, b in zip(net(other), y, strict=True))
    assert [t.shape[1:] for t in y] == [(3, 32, 48), *[(BANDS, 4, 6)] * 3]
    assert all(t.dtype == torch.float32 and bool(t.isfinite().all()) for t in y)


def test_a_new_network_says_nothing() -> None:
    assert not any(y.any() for y in ExactUNet(TINY)(seen()))


def test_reach() -> None:
    """Pixels far from a change stay as they are: a tile sees enough around itself."""
    net = frozen(exact_network())
    x = seen(batch=1)
    wide = x._replace(pixels=x.pixels.repeat(1, 1, 1, 6), blocks=x.blocks.repeat(1, 1, 1, 6))
    changed = wide._replace(pixels=wide.pixels.clone(), blocks=wide.blocks.clone())
    changed.pixels[..., 280:] += 1
    changed.blocks[..., 35:] += 1
    moved = [
        (a - b).abs().amax((0, 1, 2)).nonzero()
        for a, b in zip(net(wide), net(changed), strict=True)
    ]
    assert all(len(at) > 0 for at in moved)
    assert 280 - 112 < int(moved[0].min()) < 278
    assert all(35 - 14 < int(at.min()) < 35 for at in moved[1:])


@pytest.mark.parametrize("cfg", [
    ExactConfig(channels=(4, 8, 12, 4), down=(1, 0, 2, 0), up=(0, 1, 1), embedding=8),
    ExactConfig(channels=(4, 4, 4, 4, 4, 4), down=(1,) * 6, up=(1,) * 5, embedding=8),
])  # fmt: skip
def test_other_shapes(cfg: ExactConfig) -> None:
    net = frozen(exact_network(cfg))
    assert cfg.multiple == max(8, 2 ** len(cfg.channels))
    x = seen()
    x = x._replace(pixels=x.pixels.repeat(1, 1, 2, 4), blocks=x.blocks.repeat(1, 1, 2, 4))
    one = net(x)
    net.compute_in(torch.bfloat16)
    assert equal(net(x), one) and one[0].shape == (2, 3, 64, 192)
    check(net.integers(), net)


def test_rows_of_the_noise_levels_table() -> None:
    """Row j is for 2^(j / 4 - 6), and the nearest by the logarithm is taken."""
    net = frozen(exact_network())
    assert len(NODES) == 73 and (NODES[0], NODES[-1]) == (-6.0, 12.0)
    of = [-20.0, -6.0, -5.876, -5.874, 0.0, 0.124, 0.126, 12.0, 30.0]
    rows = net.embedding(2.0 ** torch.tensor(of, dtype=torch.float64))
    assert rows.tolist() == [0, 0, 0, 1, 24, 24, 25, 72, 72]
    assert net.embedding(torch.tensor(NODES).exp2()).tolist() == list(range(73))
    # At a boundary it is one row on every machine: a double.
    between = 2.0 ** torch.tensor(0.125, dtype=torch.float64)
    at = torch.stack([between, torch.nextafter(between, torch.tensor(9.0).double())])
    assert net.embedding(at).tolist() == [24, 25]


# --- Bounds ------------------------------------------------------------------------------------


def adversarial(kind: str, weight: Tensor) -> None:
    flat = weight.view(len(weight), -1)
    if kind == "equal":
        flat.fill_(1e3)
    elif kind == "one huge":
        flat.normal_()
        flat[:, 2] = 1e6
    elif kind == "zeros":
        flat.zero_()
    elif kind == "tiny":
        flat.fill_(1e-12)
    elif kind == "signs":
        flat.copy_(torch.where(torch.rand_like(flat) < 0.5, -7.0, 7.0))
    elif kind == "mixed":  # each channel of another size
        flat.normal_().mul_(torch.logspace(-9, 9, len(flat))[:, None])


@pytest.mark.parametrize("shape", [(700, 8, 3, 1), (2048, 12, 1, 4), (64, 16, 4, 1), (3, 4, 1, 1)])
@pytest.mark.parametrize("kind", ["equal", "one huge", "zeros", "tiny", "signs", "mixed"])
def test_units_keep_the_bounds(shape: tuple[int, int, int, int], kind: str) -> None:
    """Whatever the weights: sums stay below 2^24, weights within 127, units are bfloat16."""
    c_in, c_out, size, alike = shape
    torch.manual_seed(0)
    layer = Convolution(c_in, c_out, size, alike=alike)
    with torch.no_grad():
        adversarial(kind, layer.weight)
    w, unit = layer.integers()
    assert w.dtype == torch.bfloat16 and torch.equal(w, w.round())
    sums = HIGH * w.detach().double().abs().flatten(1).sum(1)
    assert float(sums.max()) < SUM and float(w.detach().abs().max()) <= WEIGHT
    assert torch.equal(unit, unit.bfloat16().float()) and bool((unit > 2.0**-40).all())
    assert torch.equal(unit.view(-1, alike), unit[::alike, None].expand(-1, alike))
    # The unit is no larger than it has to be.
    most = torch.maximum(w.detach().abs().double().flatten(1).amax(1) / WEIGHT, sums / SUM).view(
        -1, alike
    )
    if kind not in ("zeros", "tiny"):
        large = unit[::alike] > 1e-7
        assert float(most.amax(1)[large].min()) > 0.95
        off = (w.detach().float() * unit[:, None, None, None] - layer.weight.detach()).abs()
        assert bool((off <= 0.55 * unit[:, None, None, None]).all())


def integers() -> tuple[ExactUNet, dict[str, Tensor]]:
    net = exact_network()
    return net, net.integers()


def changed(name: str, change: Callable[[Tensor], Any]) -> Callable[[dict[str, Tensor]], None]:
    def do(given: dict[str, Tensor]) -> None:
        x = given[name].clone()
        out = change(x)
        given[name] = x if out is None else out

    return do


def put(value: float, *at: int) -> Callable[[Tensor], None]:
    return lambda x: x.__setitem__(at, value)


def fill(value: float) -> Callable[[Tensor], Any]:
    return lambda x: x.fill_(value)


BROKEN: dict[str, tuple[str, Callable[[dict[str, Tensor]], None]]] = {
    "weights' sum": (
        "scales", changed("scales.weight", lambda x: x.repeat(1, 1, 20, 20).fill_(127)),
    ),
    "unit of 24 bits": ("stem", changed("stem.unit", put(1 + 2.0**-20, 3))),
    "unit of 9 bits": ("stem", changed("stem.unit", put(1 + 2.0**-8, 3))),
    "no unit": ("stem", changed("stem.unit", put(0.0, 3))),
    "tiny unit": ("stem", changed("stem.unit", put(2.0**-126, 3))),
    "huge unit": ("stem", changed("stem.unit", put(2.0**60, 3))),
    "infinite unit": ("stem", changed("stem.unit", put(float("inf"), 3))),
    "unit that is none": ("stem", changed("stem.unit", put(float("nan"), 3))),
    "units of a group": ("grow.1", changed("grow.1.unit", lambda x: put(2 * float(x[5]), 5)(x))),
    "double units": ("stem", changed("stem.unit", lambda x: x.double())),
    "half units": ("stem", changed("stem.unit", lambda x: x.half())),
    "few units": ("stem", changed("stem.unit", lambda x: x[:-1].clone())),
    "-128": ("stem", changed("stem.weight", put(-128, 0, 0, 0, 0))),
    "wide weights": ("stem", changed("stem.weight", lambda x: x.short())),
    "weights of floats": ("stem", changed("stem.weight", lambda x: x.float())),
    "few weights": ("stem", changed("stem.weight", lambda x: x[:, :-1].clone())),
    "flat weights": ("stem", changed("stem.weight", lambda x: x.flatten())),
    "one weight": ("stem", changed("stem.weight", lambda x: x[0, 0, 0, 0].clone())),
    "gain of 24 bits": ("out_q", changed("out_q.gain", put(1.000001, 0))),
    "no gain": ("out_q", changed("out_q.gain", put(0.0, 0))),
    "double gain": ("out_q", changed("out_q.gain", lambda x: x.double())),
    "few gains": ("out_q", changed("out_q.gain", lambda x: x[1:].clone())),
    "huge offset": ("out_q", changed("out_q.offset", put(2.0**24, 0))),
    "infinite offset": ("out_q", changed("out_q.offset", put(float("inf"), 0))),
    "offset that is none": ("out_q", changed("out_q.offset", put(float("nan"), 0))),
    "double offset": ("out_q", changed("out_q.offset", lambda x: x.double())),
    "few offsets": ("out_q", changed("out_q.offset", lambda x: x[1:].clone())),
    "signed with an offset": ("grow_q.0", changed("grow_q.0.offset", put(1.0, 0))),
    "infinite level": ("down.2.0", changed("down.2.0.levels", put(float("inf"), 7, 2))),
    "level that is none": ("down.2.0", changed("down.2.0.levels", put(float("nan"), 7, 2))),
    "single levels": ("down.2.0", changed("down.2.0.levels", lambda x: x.float())),
    "few levels": ("down.2.0", changed("down.2.0.levels", lambda x: x[1:].clone())),
    "narrow levels": ("down.2.0", changed("down.2.0.levels", lambda x: x[:, 1:].clone())),
    "negative deviation": ("sigma_data", changed("sigma_data", put(-1.0, 9))),
    "infinite deviation": ("sigma_data", changed("sigma_data", put(float("inf"), 9))),
    "deviation that is none": ("sigma_data", changed("sigma_data", put(float("nan"), 9))),
    "double deviations": ("sigma_data", changed("sigma_data", lambda x: x.double())),
    "few deviations": ("sigma_data", changed("sigma_data", lambda x: x[1:].clone())),
}  # fmt: skip


def test_what_a_network_gives_is_exact() -> None:
    net, given = integers()
    check(given, net)
    for name in ("weight", "unit", "gain", "offset", "levels"):
        assert sum(key.endswith(f".{name}") for key in given) >= 7
    assert given["sigma_data"].shape == (BANDS,)


@pytest.mark.parametrize("kind", BROKEN)
def test_what_breaks_a_bound_is_refused(kind: str) -> None:
    net, given = integers()
    layer, change = BROKEN[kind]
    change(given)
    with pytest.raises(ModelError, match=layer):
        check(given, net)


def test_the_bound_is_sharp() -> None:
    """As many weights as sum up to one less than 2^24 pass, and one more unit does not."""
    net = ExactUNet(replace(TINY, channels=(64, 8, 8, 8)))
    given = net.integers()
    w = given["down.0.0.conv1.weight"]
    most = (SUM - 1) // HIGH
    flat = torch.zeros(w[0].numel(), dtype=torch.int8)
    flat[: most // WEIGHT], flat[most // WEIGHT] = WEIGHT, most % WEIGHT
    assert len(flat) > most // WEIGHT
    w[5] = -flat.view(w[5].shape)
    check(given, net)
    w[5].view(-1)[-1] = 1
    with pytest.raises(ModelError, match=r"layer down.0.0.conv1 is not exact"):
        check(given, net)


# --- Training ----------------------------------------------------------------------------------


def exact_levels(net: ExactUNet) -> None:
    """A network of the noise level whose offsets half precision holds."""
    with torch.no_grad():
        for layer in net.modules():
            if isinstance(layer, exact.Block):
                layer.level.weight.zero_()
                layer.level.bias.copy_((layer.level.bias * 64).round() / 64)
                assert layer.q2.offset is not None
                layer.q2.offset.copy_((layer.q2.offset * 64).round() / 64)


@pytest.mark.parametrize("node", [0, 30, 72])
def test_training_computes_what_files_are_made_with(node: int) -> None:
    """To the bit, gradients or not; of the noise level but what half precision holds."""
    net, other = exact_network(), ExactUNet(TINY)
    exact_levels(net)
    x = seen(snr=2.0 ** NODES[node])
    single = x._replace(snr=x.snr.float())
    trained = [y.detach() for y in net.train()(single)]
    with torch.no_grad():
        assert equal(net(single), trained)
    for dtype in TYPES:
        other.freeze(net.integers(), "cpu", dtype)
        assert equal(other(x), [y.detach() for y in net(single)])


def test_gradients_reach_every_parameter() -> None:
    net = exact_network()
    x = seen()
    sum((y * torch.randn_like(y)).sum() for y in net(x._replace(snr=x.snr.float()))).backward()
    for name, p in net.named_parameters():
        assert p.grad is not None and bool(p.grad.isfinite().all()), name
        assert bool(p.grad.any()), name


def test_gradients_pass_through_roundings_and_stop_at_clamps() -> None:
    q = Quantiser(1)
    x = torch.tensor([-1.0, 0.01, 1.3, 7.0, 9.0]).view(1, 1, 1, -1).requires_grad_()
    y = q(x)
    assert y.flatten().tolist() == [0, 0, 42, 224, 255]
    y.sum().backward()
    assert x.grad is not None and q.gain.grad is not None and q.offset is not None
    assert q.offset.grad is not None
    inside = [0.0, 1.0, 1.0, 1.0, 0.0]
    assert x.grad.flatten().tolist() == [g / STEP for g in inside]
    assert float(q.offset.grad) == 3 / STEP
    assert float(q.gain.grad) == pytest.approx((0.01 + 1.3 + 7.0) / STEP, rel=0.01)

    layer = Convolution(2, 30, 1)
    u, scale = layer(torch.full((1, 2, 1, 1), 5.0))
    (u * scale).sum().backward()
    # As of the weights themselves: integers times units are weights, 5 steps are 5 / 32.
    grad = layer.weight.grad
    assert grad is not None
    past = (layer.weight / layer.integers()[1][:, None, None, None]).abs() > WEIGHT
    assert not past.all() and not grad[past].any()
    torch.testing.assert_close(
        grad[~past] / STEP, torch.full_like(grad[~past], 5), rtol=0.01, atol=0
    )


def test_configurations() -> None:
    assert ExactConfig().multiple == 16 and TINY.multiple == 16
    sizes = sum(p.numel() for p in _meta(ExactConfig()).parameters())
    assert 5e6 < sizes < 16e6


def _meta(cfg: ExactConfig) -> ExactUNet:
    with torch.device("meta"):
        return ExactUNet(cfg)
