"""Noise levels: the schedule of Ho, Jain and Abbeel (2020), "DDPM", and the codec's ladder.

beta_t is the variance of the noise added at step t, alpha_bar_t = prod_s (1 - beta_s), and SNR(t) =
alpha_bar_t / (1 - alpha_bar_t) is the precision of x_t / sqrt(alpha_bar_t) as an observation of
x_0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor  # which the container does without

Array = TypeVar("Array", NDArray[np.float64], "Tensor")

HALF_POWER = (1.0, 0.7071067811865476)  # 2^-(j / 2) for j = 0 and 1


def snr_of(alpha_bar: Array) -> Array:
    """SNR(t) = alpha_bar_t / (1 - alpha_bar_t)."""
    return alpha_bar / (1.0 - alpha_bar)


@dataclass(frozen=True)
class Schedule:
    """Linear beta from ``beta_1`` to ``beta_T`` over ``T`` steps (DDPM section 4)."""

    T: int = 1000
    beta_1: float = 1e-4
    beta_T: float = 0.02

    @cached_property
    def beta(self) -> NDArray[np.float64]:
        """(T + 1,): beta_t for t = 0 .. T, with beta_0 = 0."""
        return np.concatenate([[0.0], np.linspace(self.beta_1, self.beta_T, self.T)])

    @cached_property
    def alpha_bar(self) -> NDArray[np.float64]:
        """(T + 1,): alpha_bar_t for t = 0 .. T, with alpha_bar_0 = 1 (DDPM eq. 4)."""
        return np.cumprod(1.0 - self.beta, dtype=np.float64)

    @cached_property
    def snr(self) -> NDArray[np.float64]:
        """(T + 1,): SNR(t); infinite at t = 0."""
        with np.errstate(divide="ignore"):
            return snr_of(self.alpha_bar)

    def timestep(self, snr: float) -> int:
        """The t in 1 .. T whose SNR is nearest to ``snr``, on a logarithmic scale."""
        return 1 + int(np.argmin(np.abs(np.log(self.snr[1:]) - np.log(snr))))

    def time(self, snr: float) -> float:
        """The t in [1, T] at which SNR(t) is ``snr``, log-SNR being linear between whole steps."""
        return float(np.interp(-np.log(snr), -np.log(self.snr[1:]), np.arange(1.0, self.T + 1)))


@dataclass(frozen=True)
class Ladder:
    """The SNRs at which tables are measured, half octaves apart. A file's levels are rungs of it.

    The rungs are numbered from the highest SNR down.
    """

    rungs: int = 33
    finest: int = 2560  # SNR of rung 0
    tau: float = 0.25  # significance threshold: a coefficient is first sent when v SNR exceeds it

    def check(self) -> None:
        """Raises ModelError for a ladder that the format cannot express."""
        numbers = (self.rungs, self.finest)
        ok = all(isinstance(n, int) for n in numbers) and 1 <= self.rungs <= 200
        if not (ok and 1 <= self.finest < 1 << 31 and self.tau > 0):
            raise ModelError("impossible levels")

    def snr(self, rung: int) -> float:
        """finest / 2^(rung / 2), the same double on every machine."""
        return math.ldexp(self.finest * HALF_POWER[rung % 2], -(rung // 2))

    @property
    def snrs(self) -> list[float]:
        """The SNRs of all rungs, rising: the order of the tables."""
        return [self.snr(j) for j in reversed(range(self.rungs))]
