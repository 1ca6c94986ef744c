"""From pictures to a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .. import files
from . import options
from .options import ABOVE_0, ANY, COUNT, FILE, SHARE, Finite, flag, one_of, option, torch_device
from .report import Report

if TYPE_CHECKING:
    from ..network.modelfile import Config


def channel_list(
    context: click.Context, option: click.Parameter, value: str | None
) -> tuple[int, ...] | None:
    """Callback: numbers, separated by commas."""
    if value is None:
        return None
    width = click.IntRange(1, 2048)
    return tuple(width(n, option, context) for n in value.split(","))


def snr_ranges(
    context: click.Context, option: click.Parameter, value: tuple[tuple[float, float, float], ...]
) -> tuple[tuple[float, float, float], ...]:
    if sum(share for share, *_ in value) > 1 or any(low >= high for _, low, high in value):
        raise click.BadParameter("shares are at most 1 in all, LOW is below HIGH", context, option)
    return value


# fmt: off
train_options = options.options(
    option("--out checkpoint", "FILE", FILE, "Checkpoint to write, or to go on from.",
           required=True),
    option("--val validation", "DIR", ANY, "For the validation; may be repeated.", multiple=True),
    option("--preset", None, one_of("photo", "cifar10", "cifar10-paper"), default="photo",
           text="The photo codec's network, or DDPM's for 32x32 pictures: narrow, or the paper's "
           "own."),
    option("--coarse", "PATH", ANY, multiple=True,
           text="Small pictures with compression artefacts, for high noise only; may be repeated."),
    option("--patches", "N", COUNT, "Length of the run, in 64x64 patches; in pictures of 32x32.",
           default=1_000_000),
    option("--seconds", "S", Finite(0), "Length of the run in seconds, in place of --patches.",
           default=0.0, show_default=False),
    option("--parts", "DIR", options.FOLDER,
           "Also write half-precision weights there, in files of at most 16 MiB."),
    option("--size", "N", COUNT, "Side of a crop.", default=128),
    option("--batch", "N", COUNT, "Crops per step and process.", default=16),
    option("--lr", "X", ABOVE_0, "Learning rate at its highest.", default=6e-4),
    option("--warmup", "N", COUNT, "Steps until it is reached.", default=400),
    option("--decay", "X", Finite(0, 1), default=0.3,
           text="Part of the run over which it falls to zero."),
    option("--weight-decay", "X", Finite(0), "Of AdamW.", default=1e-3),
    option("--clip", "X", ABOVE_0, "Largest norm of the gradient.", default=1.0),
    option("--optimizer", None, one_of("muon", "adamw"), "Muon beside AdamW, or alone the latter.",
           default="muon"),
    option("--from start", "FILE", ANY,
           "Model, checkpoint or --parts folder: a new run starts with the weights that fit."),
    option("--ema", "X", SHARE, "Memory of the averaged weights.", default=0.9995),
    option("--channels", "N,N..", str, "Widths of the network, in place of the preset's.",
           callback=channel_list),
    option("--patch", None, click.Choice([1, 2, 4, 8]), "Pixel-unshuffle factor at the input."),
    option("--blocks", "N", click.IntRange(1, 64), "Residual blocks at each resolution."),
    option("--dropout", "X", Finite(0, 1, max_open=True),
           "Share of activations dropped in training."),
    option("--prediction", None, one_of("eps", "x0", "v", "mu"),
           "What the network puts out."),
    option("--objective", None, one_of("simple", "bound"), default="simple",
           text="For 32x32 pictures: L_simple, or the variational bound."),
    options.variance(),
    option("--log-snr", "SHARE LOW HIGH", (SHARE, ABOVE_0, ABOVE_0),
           "For 32x32 pictures: share of a batch with log-SNR uniform between these, in place of "
           "uniform t; may be repeated.", multiple=True, default=(), callback=snr_ranges),
    option("--coarse-below", "SNR", ABOVE_0, "Where the --coarse pictures serve.", default=1.0),
    flag("--dry-run", "Count pictures and parameters; train nothing."),
)
calibrate_options = options.options(
    option("--checkpoint", "FILE", ANY, "Of `ddpmc train`, its --parts folder, or a model file.",
           required=True),
    option("-o --output", "MODEL.safetensors", FILE, "Model file to write.", required=True),
    option("--name", "NAME", options.NAME, "Name of the model.", default="photo"),
    option("--pictures", "N", COUNT, "How many pictures to look at.", default=64),
    option("--rungs", "N", click.IntRange(1, 200),
           "Of the ladder of SNRs.  [default: 33; for 32x32 pictures 37]"),
    option("--finest", "SNR", click.IntRange(1, 2**31 - 1),
           "Of the last.  [default: 2560; for 32x32 pictures 10240]"),
    option("--tau", "X", ABOVE_0, default=0.25,
           text="A coefficient is first sent when its expected energy is X times the noise's."),
)
# fmt: on


@click.command()
@options.data
@train_options
@options.seed
@options.auto
def train(
    folders: tuple[Path, ...], checkpoint: Path, validation: tuple[Path, ...], preset: str,
    device: str, dry_run: bool, start: Path | None, coarse: tuple[Path, ...],
    parts: Path | None, **how: Any,
) -> int:  # fmt: skip
    """Train a network on pictures.

    On several GPUs or processes: torchrun --nproc-per-node N -m ddpm_codec train ...
    """
    device = torch_device(device)
    from ..training.config import TrainConfig
    from ..training.train import train as run

    net = network_of(preset, how)
    if not dry_run:
        files.check_output(str(checkpoint), force=True)
    run(
        folders, checkpoint, net, TrainConfig(**how), validation, device,
        dry_run=dry_run, start=start, coarse=coarse, parts=parts,
    )  # fmt: skip
    return 0


def network_of(preset: str, how: dict[str, Any]) -> Config:
    """The network to train; takes its options out of ``how``. Raises UsageError."""
    from ..network.exact import ExactConfig
    from ..network.modelfile import PRESETS, preset_config

    network = {k: how.pop(k) for k in ("channels", "patch", "blocks", "dropout", "prediction")}
    if how["variance"] == "learned":
        network["variance"] = True
    changes = {k: v for k, v in network.items() if v is not None}
    if other := changes.keys() - vars(PRESETS[preset]).keys():
        raise click.UsageError(f"the network of --preset {preset} has no --{min(other)}")
    net = preset_config(preset, changes)
    if isinstance(net, ExactConfig) and how["size"] % net.multiple:
        text = f"{how['size']} is not a multiple of {net.multiple}, as this network's crops are"
        raise click.BadParameter(text, param_hint="'--size'")
    return net


@click.command()
@options.data
@calibrate_options
@options.seed
@options.auto
@options.force
@options.quiet
def calibrate(
    folders: tuple[Path, ...], checkpoint: Path, output: Path, force: bool, quiet: bool,
    device: str, **how: Any,
) -> int:  # fmt: skip
    """Fit a trained network's tables on pictures, and write both as one model file."""
    with options.usage():
        files.refuse_inputs(str(output), [str(checkpoint)])
    files.check_output(str(output), force)
    device = torch_device(device)
    from ..training.calibrate import calibrate as run

    say = Report(quiet=quiet).say
    run(checkpoint, list(folders), output, device=device, say=say, **how)
    return 0
