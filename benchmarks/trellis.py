"""What the trellis loses against the information it sends, where, and how fast it is.

    python benchmarks/trellis.py [--bits 24000] [--memories 8,10,12,14,16]

For each memory, and each variance v of what is sent in units of the noise's, one message of so many
bits about mu ~ N(0, v) is written and read. Printed are

- *efficiency*: the information of the Gaussian channel from mu to y that was made, 1/2 log2(1 / (1
  - rho^2)) of their correlation rho, over the bits written; the rest is lost;
- *noise*: the variance of y - mu, which should be 1, and *gain*, E y mu / E mu^2, likewise;
- microseconds a message bit of writing, on one thread, and nanoseconds a coefficient of reading.

A file's own share of bits over information is printed by speed.py.
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
    """Efficiency, noise, gain, microseconds a bit, nanoseconds a coefficient."""
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
@click.option("--bits", default=24000, show_default=True, help="Of a message, about.")
@click.option("--memories", default="8,10,12,14,16", show_default=True)
def main(bits: int, memories: str) -> None:
    """Loss and speed of the trellis by memory and variance."""
    torch.set_num_threads(1)
    print("| memory | v | efficiency | noise | gain | us a bit | ns a coefficient |")
    print("|---" * 7 + "|")
    for memory in map(int, memories.split(",")):
        measure(memory, 0.3, 2000)  # makes the table
        for v in VARIANCES:
            *three, us, ns = measure(memory, v, bits)
            cells = [str(memory), f"{v:g}", *(f"{x:.3f}" for x in three), f"{us:.1f}", f"{ns:.0f}"]
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
