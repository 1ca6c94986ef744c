"""Training states: pictures as the decoder knows them half way through a file.

The codec shows the network states in which some coefficients have not been observed and others are
a level finer than the rest. A network that has only seen isotropic noise loses 2 dB and more on
those, so training draws from the same family.

What has not been observed was left out because the decoder expected little of it, not because there
is little: states whose gaps were chosen by looking at the picture teach the network that every gap
is empty, and then it never asks for what it lacks. So gaps come from what a noisy view shows of the
neighbourhood (:func:`draw`), or from the network's own expectation (:class:`Walk`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ..diffusion.transform import BANDS, BLOCK, zigzag
from ..network.conditioning import State, nominal

SNR_RANGE = (0.02, 4000.0)  # what the codec visits, and a little more


def local_energy(c: Tensor) -> Tensor:
    """(B, 192, h, w) mean square of each coefficient's neighbours: 3x3 blocks by 3x3 bands."""
    b, _, h, w = c.shape
    v, u = zigzag().T
    index = torch.as_tensor(v * BLOCK + u, device=c.device)
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
    isotropic (DDPM to the letter); in the others a coefficient is observed once its expected energy
    times SNR exceeds tau, tau log-uniform in [0.25, 8]: in 15 % by the bands' jittered variances,
    in the rest by the energy of the neighbourhood in a view of a quarter of the SNR, jittered, too.
    In a fifth, the coefficients of which the most is expected are a level finer.
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

    # In a level that has arrived in part, the loudest coefficients are at twice the SNR.
    least = tau * torch.exp(4.0 * uniform(b))[:, None, None, None]
    cut = (uniform(b) < 0.2)[:, None, None, None] & (kind >= 0.15)
    finer = s * torch.where(cut & (energy * s > least), 2.0, 1.0)
    precision = torch.where(energy * s > tau, finer, torch.zeros_like(finer))
    return observe(c, precision, snr, w, generator)


class Walk:
    """A batch of training states, most of them on their way through the levels as in the codec.

    The first ``drawn`` states are drawn afresh at each step (:func:`draw`). The others begin at a
    low SNR, where bands are observed by their variance, and at each step go on to twice the
    SNR: newly observed is what the network expects to be worth it, 2 b^2 SNR > tau with b =
    sigma exp(lam) and tau log-uniform in [0.25, 1.5] for each picture. A picture leaves after the
    last level. So the network's own word decides on what later states lack, and no evaluation is
    spent on that alone.

    Nothing here asks the device for a number, so that the host never waits.
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
        """States of new pictures."""
        n = self.drawn
        w = weights(len(c), self.weighted, c.device, self.generator)
        # Less often at low SNR, where there are next to no bits.
        snr = _log_uniform((SNR_RANGE[0], 64 * SNR_RANGE[0]), self._uniform(len(c), c.device))
        tau = _log_uniform((0.25, 1.5), self._uniform(len(c), c.device))
        energy = c.square().mean((2, 3), keepdim=True).expand_as(c)
        first = _observed(c, energy, snr, tau, w, self.generator)
        if n:
            drawn = draw(c[:n], w[:n], self.generator)
            first = State(*(torch.cat([a, b[n:]]) for a, b in zip(drawn, first, strict=True)))
        return first, tau

    def step(self, lam: Tensor, c: Tensor) -> None:
        """Go on, by the network's word on these states; pictures of c take the place of those that
        leave. ``new`` marks their places.
        """
        snr = 2 * self.state.snr
        self.new = snr > SNR_RANGE[1]
        self.new[: self.drawn] = True
        energy = 2 * torch.exp(2 * lam) / nominal(self.state)
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
    """(n, 192, 1, 1) random factors of the bands' noise deviations, 1 for ``1 - share`` of them.

    The others know colours and high frequencies less well than low ones of the luminance: w falls
    exponentially with frequency, and by a factor for each colour component.
    """

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, device=device, generator=generator)

    f = torch.as_tensor(zigzag(), device=device).float().norm(dim=1) / (2**0.5 * (BLOCK - 1))
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
    s, least = snr[:, None, None, None] * w.square(), tau[:, None, None, None]
    precision = torch.where(energy * s > least, s, torch.zeros_like(c))
    return observe(c, precision, snr, w, generator)


def observe(
    c: Tensor, precision: Tensor, snr: Tensor, w: Tensor, generator: torch.Generator | None = None
) -> State:
    """c with fresh Gaussian noise of the given precision; 0 where that is 0."""
    noise = torch.randn(c.shape, device=c.device, generator=generator)
    known = precision > 0
    m = torch.where(known, c + noise * torch.where(known, precision, 1.0).rsqrt(), 0.0)
    return State(m, precision, snr, w)
