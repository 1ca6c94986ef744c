"""Tables and plots of rate-distortion curves."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from curves import METRICS, Curve, Curves, average, bd_rate, ends, is_ours, mean_at

RATES = (0.1, 0.15, 0.25, 0.4, 0.6, 1.0, 1.5, 2.0)  # bits per pixel
LOW_RATES = (0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5)
NAMES = {
    "jpeg": "JPEG", "webp": "WebP", "jpeg2000": "JPEG 2000", "avif": "AVIF",
    "ddpmc": "**ddpmc**", "ddpmc-s33-e9": "**ddpmc --steps 33 --effort 9**",
}  # fmt: skip


def measured(curves: Curves) -> list[str]:
    """The metrics that were measured, judged by the first picture's JPEG curve."""
    return [m for m, f in METRICS.items() if all(np.isfinite(f(p)) for p in curves["jpeg"][0])]


def rates_saved(curves: Curves, codec: str, metric: str) -> list[float]:
    """BD-rate of each picture against JPEG, per cent, at the levels' ends."""
    pairs = zip(curves["jpeg"], curves[codec], strict=True)
    return [bd_rate(anchor, ends(curve), metric) for anchor, curve in pairs]


def table(curves: Curves) -> str:
    """Markdown: each codec's mean PSNR at some rates, and its BD-rates with their range."""
    metrics = measured(curves)
    heads = [*(f"{bpp:g} bpp" for bpp in RATES), *(f"BD-rate, {metric}" for metric in metrics)]
    lines = [f"| codec | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for name, whole in curves.items():
        mine = [ends(curve) for curve in whole]
        cells = means(mine, RATES, "PSNR")
        for metric in metrics:
            rates = rates_saved(curves, name, metric)
            extent = f"({min(rates):+.0f} to {max(rates):+.0f})"
            cells.append("0" if name == "jpeg" else f"{np.mean(rates):+.1f} % {extent}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def seconds_table(curves: Curves) -> str:
    """Markdown: seconds to encode a whole file and to decode 0.5 bpp, means over pictures."""
    lines = ["| codec | encode, s | decode 0.5 bpp, s |", "|---|---|---|"]
    for name, whole in curves.items():
        mine = [ends(curve) for curve in whole]
        encode = float(np.mean([curve[-1].encode for curve in mine]))
        seconds = encode, mean_at(mine, 0.5, lambda p: p.decode)
        cells = ["-" if np.isnan(v) else f"{v:.2f}" for v in seconds]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def means(curves: list[Curve], rates: tuple[float, ...], metric: str) -> list[str]:
    """The curves' mean at each rate, as text; "-" if one of them does not reach it."""
    values = (mean_at(curves, bpp, METRICS[metric]) for bpp in rates)
    return ["-" if np.isnan(v) else f"{v:.2f}" for v in values]


def low_rates_table(curves: Curves, metric: str = "SSIMULACRA2") -> str:
    """Markdown: the mean of a metric at low rates."""
    lines = [f"| {metric} | {' | '.join(f'{bpp:g} bpp' for bpp in LOW_RATES)} |"]
    lines.append("|---" * (len(LOW_RATES) + 1) + "|")
    for name, mine in curves.items():
        cells = means([ends(c) for c in mine], LOW_RATES, metric)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def short_table(curves: Curves) -> str:
    """Markdown: mean BD-rates of the common codecs, as in the README."""
    metrics = measured(curves)
    heads = ["PSNR of luma" if m == "PSNR-Y" else m for m in metrics]
    lines = [f"| codec | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for name, shown in NAMES.items():
        if name in curves:
            cells = [f"{np.mean(rates_saved(curves, name, m)):+.1f} %" for m in metrics]
            cells = ["0"] * len(cells) if name == "jpeg" else cells
            bold = "**" if shown.startswith("**") else ""
            lines.append(f"| {shown} | {' | '.join(f'{bold}{c}{bold}' for c in cells)} |")
    return "\n".join(lines)


def all_tables(curves: Curves, others: dict[str, Curve]) -> str:
    """All tables, as they are printed."""
    parts = [table(curves)]
    if "SSIMULACRA2" in measured(curves):
        parts.append(low_rates_table(curves))
    parts.append(short_table(curves))
    if others:
        parts.append(others_table(curves, others))
    if cuts := cuts_table(curves):
        parts.append(cuts)
    parts.append(seconds_table(curves))
    return "\n\n".join(parts)


def cuts_table(curves: Curves) -> str:
    """What cuts inside levels cost: BD-rates against cuts at the levels' ends of the same files."""
    lines = []
    for name, mine in curves.items():
        if any(len(ends(c)) < len(c) for c in mine):
            rates = [bd_rate(ends(c), c) for c in mine]
            lines.append(
                f"{name}, cut at {len(mine[0])} points: {np.mean(rates):+.2f} % against the ends "
                f"of its {len(ends(mine[0]))} levels ({min(rates):+.1f} to {max(rates):+.1f})"
            )
    return "\n".join(lines)


def others_table(curves: Curves, others: dict[str, Curve]) -> str:
    """Markdown: BD-rates of mean curves against JPEG's mean curve."""
    anchor = list(average(curves["jpeg"]))
    means = {name: list(average(mine)) for name, mine in curves.items() if is_ours(name)} | others
    lines = ["| mean curve | BD-rate, PSNR |", "|---|---|"]
    return "\n".join(
        lines + [f"| {name} | {bd_rate(anchor, c):+.1f} % |" for name, c in means.items()]
    )


def plot(curves: Curves, others: dict[str, Curve], out: Path, title: str) -> None:
    """Plot mean PSNR against rate, as PNG and SVG in the folder ``out``."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.5, 5), layout="constrained")
    for name, mine in curves.items():
        points = list(average(mine))
        style = {"linewidth": 2.5, "color": "black"} if name == "ddpmc" else {"linewidth": 1.2}
        style |= {"linestyle": "--"} if name.endswith("-cut") else {}
        marker = "o" if len(points) < 20 else None
        rates, distortions = [p.bpp for p in points], [p.psnr for p in points]
        axes.plot(rates, distortions, marker=marker, markersize=3, label=name, **style)
    for name, points in others.items():
        rates, distortions = [p.bpp for p in points], [p.psnr for p in points]
        axes.plot(rates, distortions, linestyle=":", linewidth=1.2, label=name)
    axes.set(
        xlabel="bits per pixel",
        ylabel="PSNR over RGB, dB",
        title=title,
        xlim=(0, 2.5),
        ylim=(20, 43),
    )
    axes.grid(alpha=0.3)
    axes.legend()
    for suffix in ("png", "svg"):
        figure.savefig(out / f"rate-distortion.{suffix}", dpi=120)
    plt.close(figure)


def write(curves: Curves, others: dict[str, Curve], names: list[str], out: Path, text: str) -> None:
    """Write mean curves as JSON, the tables and the plot into the folder ``out``.

    names: of the pictures. text: the tables.
    """
    out.mkdir(parents=True, exist_ok=True)
    for name, mine in curves.items():
        points = list(average(mine))
        results: dict[str, list[float]] = {
            "bpp": [p.bpp for p in points],
            "psnr-rgb": [p.psnr for p in points],
            "psnr-y": [p.psnr_y for p in points],
            "ms-ssim-rgb": [p.ms_ssim for p in points],
            "ssimulacra2": [p.ssimulacra2 for p in points],
            "lpips": [p.lpips for p in points],
            "encoding_time": [p.encode for p in points],
            "decoding_time": [p.decode for p in points],
        }
        # JSON has no "not a number", so measures that are missing are left out.
        results = {k: v for k, v in results.items() if np.isfinite(v).all() or k == "psnr-rgb"}
        about = {"name": name, "description": f"{len(names)} pictures", "results": results}
        (out / f"{name}.json").write_text(json.dumps(about, indent=1) + "\n")
    (out / "table.md").write_text(text + "\n")
    plot(curves, others, out, f"{len(names)} pictures")
