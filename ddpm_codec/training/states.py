"""Training states: pictures as the decoder knows them in the middle of a file.

In the codec's states some coefficients are unobserved, and some are a level more precise than the
rest. A network trained on isotropic noise alone loses 2 dB and more on such states, so training
draws states of this kind.

In the codec a coefficient is unobserved because the decoder expects it to be small, not because it
is small. If training left out coefficients by their true magnitude, the network would learn that
every unobserved coefficient is zero, and would never have it sent. So training selects coefficients
by what a noisy view shows of their neighbours (:func:`draw`), or by the network's own predictions
(:class:`Walk`).
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from ..diffusion.transform import BANDS, BLOCK, zigzag
from ..network.conditioning import State, nominal

SNR_RANGE = (0.02, 4000.0)  # the codec's SNRs, with some margin


@cache  # once, because a copy from the host would wait for the device at each step
def _frequencies(device: torch.device) -> Tensor:
    """(64, 2) vertical and horizontal frequency of each band."""
    return torch.as_tensor(zigzag(), device=device)


def local_energy(c: Tensor) -> Tensor:
    """(B, 192, h, w) mean square of each coefficient's neighbours: 3x3 blocks by 3x3 bands."""
    b, _, h, w = c.shape
    v, u = _frequencies(c.device).T
    index = v * BLOCK + u
    raster = torch.empty_like(c).reshape(b, 3, BLOCK * BLOCK, h, w)
    raster[:, :, index] = c.square().reshape(b, 3, BLOCK * BLOCK, h, w)
    e = _box(raster.reshape(b * 3 * BLOCK * BLOCK, 1, h, w))
    e = e.reshape(b * 3, BLOCK, BLOCK, h * w).permute(0, 3, 1, 2)
    e = _box(e.reshape(-1, 1, BLOCK, BLOCK))
    e = e.reshape(b, 3, h, w, BLOCK * BLOCK).permute(0, 1, 4, 2, 3)[:, :, index]
    bands = _box(c.new_ones(1, 1, BLOCK, BLOCK)).reshape(-1)[index].repeat(3)[:, None, None]
    blocks = _box(c.new_ones(1, 1, h, w))[0]
    return (e.reshape(b, BANDS, h, w) - c.square()).clamp(min=0) / (bands * blocks - 1)


def _box(x: Tensor) -> Tensor:
    """Sums over 3x3 neighbourhoods."""
    return 9 * F.avg_pool2d(x, 3, 1, 1)


def draw(c: Tensor, w: Tensor, generator: torch.Generator | None = None) -> State:
    """A random state for each picture. c: (B, 192, h, w), coefficients of x_0; w: (B, 192, 1, 1).

    log-SNR is uniform, so that the eps loss is the variational bound. 15 % of the states are
    isotropic, as in DDPM. In the others a coefficient is observed if its expected energy times SNR
    exceeds tau, which is log-uniform in [0.25, 8]. In 15 % the expected energy is the band's
    variance; in 70 % it is that of the neighbours in a view of a quarter of the SNR. Both are
    jittered. In a fifth of the non-isotropic states, the coefficients of the largest expected
    energy have twice the SNR.
    """
    b, dev = c.shape[0], c.device

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, device=dev, generator=generator)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=dev, generator=generator)

    snr = _log_uniform(SNR_RANGE, uniform(b))
    s = snr[:, None, None, None] * w.square()
    tau = _log_uniform((0.25, 8.0), uniform(b))[:, None, None, None]

    per_band = c.square().mean((2, 3), keepdim=True) * torch.exp(0.5 * normal(b, BANDS, 1, 1))
    view = local_energy(c + normal(*c.shape) * (4 / s).sqrt()) - 4 / s
    blur = 0.7 * uniform(b, 1, 1, 1) * normal(*c.shape)
    local = (view.clamp(min=0) + 0.1 * per_band) * torch.exp(blur)
    kind = uniform(b)[:, None, None, None]
    energy = torch.where(kind < 0.3, per_band.expand_as(c), local)
    energy = torch.where(kind < 0.15, torch.inf, energy)

    # When a level has arrived in part, its classes of the largest variance have the next SNR.
    threshold = tau * torch.exp(4.0 * uniform(b))[:, None, None, None]
    partial = (uniform(b) < 0.2)[:, None, None, None] & (kind >= 0.15)
    finer = s * torch.where(partial & (energy * s > threshold), 2.0, 1.0)
    precision = torch.where(energy * s > tau, finer, torch.zeros_like(finer))
    return observe(c, precision, snr, w, generator)


class Walk:
    """A batch of training states, most of which go through the levels as in the codec.

    The first ``drawn`` states are drawn afresh at each step (:func:`draw`). The others begin at a
    low SNR, where bands are observed by their variance, and double the SNR at each step. A
    coefficient is newly observed if the network expects 2 b^2 SNR > tau, with b = sigma
    exp(log_scale) and tau log-uniform in [0.25, 1.5] for each picture. After the last level a new
    picture takes the place. So the network's own predictions select the coefficients, and these
    predictions are by-products of the training steps.

    Nothing here reads a number from the device, so that the host never waits for it.
    """

    def __init__(
        self, c: Tensor, drawn: int, generator: torch.Generator | None = None, weighted: float = 0.5
    ) -> None:
        """c: (B, 192, h, w), coefficients of the first pictures."""
        self.drawn, self.generator, self.weighted = drawn, generator, weighted
        self.c, self.state, self.tau = c, *self._first(c)
        self.new = torch.ones(len(c), dtype=torch.bool, device=c.device)

    def _uniform(self, n: int, device: torch.device) -> Tensor:
        return torch.rand(n, device=device, generator=self.generator)

    def _first(self, c: Tensor) -> tuple[State, Tensor]:
        """First states of new pictures, and their tau."""
        n = self.drawn
        w = weights(len(c), self.weighted, c.device, self.generator)
        # A random first SNR makes states of low SNR, where there are hardly any bits, rarer.
        snr = _log_uniform((SNR_RANGE[0], 64 * SNR_RANGE[0]), self._uniform(len(c), c.device))
        tau = _log_uniform((0.25, 1.5), self._uniform(len(c), c.device))
        energy = c.square().mean((2, 3), keepdim=True).expand_as(c)
        first = _observed(c, energy, snr, tau, w, self.generator)
        if n:
            drawn = draw(c[:n], w[:n], self.generator)
            first = State(*(torch.cat([a, b[n:]]) for a, b in zip(drawn, first, strict=True)))
        return first, tau

    def step(self, log_scale: Tensor, c: Tensor) -> None:
        """Go to the next level, by the log-scales predicted from these states.

        Pictures of c replace those that have had their last level; ``new`` marks them.
        """
        snr = 2 * self.state.snr
        self.new = snr > SNR_RANGE[1]
        self.new[: self.drawn] = True
        energy = 2 * torch.exp(2 * log_scale) / nominal(self.state)
        energy = torch.where(self.state.precision > 0, torch.inf, energy)
        w = self.state.weights
        finer = _observed(self.c, energy, snr, self.tau, w, self.generator)
        fresh, tau = self._first(c)

        def chosen(a: Tensor, b: Tensor) -> Tensor:
            return torch.where(self.new.view(-1, *[1] * (a.dim() - 1)), a, b)

        self.state = State(*(chosen(a, b) for a, b in zip(fresh, finer, strict=True)))
        self.c, self.tau = chosen(c, self.c), chosen(tau, self.tau)


def weights(
    n: int, share: float, device: torch.device, generator: torch.Generator | None = None
) -> Tensor:
    """(n, 192, 1, 1) weights of the bands (conditioning.State): 1 in ``1 - share`` of the states.

    In the others, colours and high frequencies are less precise than low frequencies of the
    luminance: a weight falls exponentially with frequency, and by a factor for each colour.
    """

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, device=device, generator=generator)

    f = _frequencies(device).float().norm(dim=1) / (2**0.5 * (BLOCK - 1))
    colour = torch.cat([torch.zeros(n, 1, device=device), 1.5 * uniform(n, 2)], dim=1)
    log_w = colour[:, :, None] + 1.5 * uniform(n, 1, 1) * f
    log_w = log_w * (uniform(n, 1, 1) < share)
    return torch.exp(-log_w).reshape(n, BANDS, 1, 1)


def _log_uniform(between: tuple[float, float], u: Tensor) -> Tensor:
    low, high = (math.log(x) for x in between)
    return torch.exp(low + (high - low) * u)


def _observed(
    c: Tensor, energy: Tensor, snr: Tensor, tau: Tensor, w: Tensor,
    generator: torch.Generator | None,
) -> State:  # fmt: skip
    """c observed with precision w^2 ``snr`` where ``energy`` times it exceeds tau."""
    s = snr[:, None, None, None] * w.square()
    precision = torch.where(energy * s > tau[:, None, None, None], s, torch.zeros_like(c))
    return observe(c, precision, snr, w, generator)


def observe(
    c: Tensor, precision: Tensor, snr: Tensor, w: Tensor, generator: torch.Generator | None = None
) -> State:
    """The state in which c is observed with this precision; where that is 0, M is 0."""
    noise = torch.randn(c.shape, device=c.device, generator=generator)
    observed = precision > 0
    m = torch.where(observed, c + noise * torch.where(observed, precision, 1.0).rsqrt(), 0.0)
    return State(m, precision, snr, w)
