"""Loss and speed of the trellis: bits of a message against the information that it sends.

    python benchmarks/trellis.py [--bits 24000] [--memories 8,10,12,14,16]

For each memory, and each variance v in units of the noise's variance, one message about mu ~ N(0,
v) is written and read. The columns are

- *efficiency*: the information that y has about mu, over the bits written. It is 1/2 log2(1 / (1 -
  rho^2)) for each coefficient, rho being the correlation of mu and y;
- *noise*: the variance of y - mu, and *gain*: E y mu / E mu^2. Both should be 1;
- microseconds to write a bit of the message, on one thread, and nanoseconds to read a coefficient.

speed.py prints the bits over the information for whole files.
"""

from __future__ import annotations

import time

import click
import numpy as np
import torch

from ddpm_codec.rec import search, trellis
from ddpm_codec.rec.trellis import Layout

VARIANCES = (0.05, 0.1, 0.3, 0.7, 1.0, 3.0)


def measure(memory: int, v: float, bits: int) -> tuple[float, ...]:
    """Efficiency, noise, gain, microseconds per bit, nanoseconds per coefficient."""
    n = round(bits / (0.5 * np.log2(1 + v)))
    layout = Layout.of(np.array([v]), np.array([n]), memory)
    mu = np.random.default_rng(memory).standard_normal(n)
    mu *= np.sqrt(v / np.square(mu).mean())
    begin = time.perf_counter()
    message, y = search.encode(mu, layout, (1, 2))
    written = time.perf_counter()
    trellis.decode(message, layout, (1, 2))
    read = time.perf_counter() - written
    rho2 = float(mu @ y) ** 2 / float(mu @ mu) / float(y @ y)
    information = -0.5 * n * np.log2(1 - rho2)
    return (
        information / layout.bits, float(np.square(y - mu).mean()), float(mu @ y / (mu @ mu)),
        1e6 * (written - begin) / layout.bits, 1e9 * read / n,
    )  # fmt: skip


@click.command()
@click.option("--bits", default=24000, show_default=True, help="Length of a message, about.")
@click.option("--memories", default="8,10,12,14,16", show_default=True)
def main(bits: int, memories: str) -> None:
    """Measure loss and speed of the trellis by memory and variance."""
    torch.set_num_threads(1)
    print("| memory | v | efficiency | noise | gain | us a bit | ns a coefficient |")
    print("|---" * 7 + "|")
    for memory in map(int, memories.split(",")):
        measure(memory, 0.3, 2000)  # makes the table of labels, which is not timed
        for v in VARIANCES:
            *three, us, ns = measure(memory, v, bits)
            cells = [str(memory), f"{v:g}", *(f"{x:.3f}" for x in three), f"{us:.1f}", f"{ns:.0f}"]
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
