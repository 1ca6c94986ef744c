"""Long tests of the codec: every cut, thousands of damages, other arithmetic, fuzzing.

    python benchmarks/soak.py [--damages 20000] [--trained 1400] [--fuzz 450] [--seed 0]

Takes hours. Prints a table row by row; the exit status is 1 if any check fails:

- *cuts*: files of every kind (both paths, the paper's timesteps, grey, alpha, 1x1 to 96x80 pixels)
  and of a photograph of 768x512, of random weights and of trained models, are cut to every length,
  blindly and by container.cut (a long file to 500 random lengths and at the levels' ends, the
  photograph with a trained model to 30). A cut inside the header is refused. Any other decodes
  without a warning of damage, and at a level's end to the stored PSNR.
- *PSNR*: with trained models it must not fall by more than 0.1 dB as bytes are added. The PSNR of a
  small picture varies with the noise; there the square error is averaged over 32 files.
- *damages* of the small files, whole and cut: bits are flipped, bytes inserted or removed, segments
  swapped or overwritten, files joined, or cut after a bit was flipped. Each is refused with one of
  the package's errors, or decodes with a warning to the picture of a prefix of the sound file. No
  warning is needed for the sound file's own picture, or if the damaged file is a cut of it.
- *arithmetic*: a photograph's file with every kind of arithmetic in agreement.py.
- *fuzzing*: the targets of tests/fuzz.py, coverage-guided, if atheris is installed.
"""

from __future__ import annotations

import copy
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import agreement
import click
import numpy as np
import torch
from numpy.typing import NDArray
from photographs import COFFEE
from PIL import Image

from ddpm_codec.codec import container
from ddpm_codec.codec.decoder import Decoder, decode
from ddpm_codec.codec.encoder import encode, psnr
from ddpm_codec.codec.image import load
from ddpm_codec.diffusion.schedule import Ladder
from ddpm_codec.errors import CutWarning, DamageWarning, DdpmcError, DdpmcWarning, FormatError
from ddpm_codec.network import modelfile
from ddpm_codec.network.exact import ExactConfig, ExactUNet
from ddpm_codec.network.modelfile import Model
from ddpm_codec.network.tables import new_tables
from ddpm_codec.network.unet import UNetConfig

ROOT = Path(__file__).resolve().parent.parent
TIMESTEPS = "timesteps"  # in place of a path: use a network of the paper's kind
KINDS = (
    ("RGB", (1, 1), "spectral"), ("RGB", (96, 80), "spectral"), ("L", (40, 28), "spectral"),
    ("RGBA", (17, 3), "spectral"), ("LA", (9, 30), "spectral"), ("RGB", (24, 16), "isotropic"),
    ("L", (1, 40), "spectral"), ("RGB", (32, 32), TIMESTEPS), ("LA", (40, 9), TIMESTEPS),
)  # fmt: skip
LARGE = ("RGB", (768, 512), "spectral")  # cuts only
RANDOM = "random weights"
DROP = 0.1  # dB by which PSNR may fall as bytes are added
CUTS, CUTS_OF_LARGE = 500, 30  # of a long file, of the photograph with a trained model
SMALL, SEEDS = 1 << 14, 32  # pixels below which errors are averaged, over so many files
SLOW = 120.0  # seconds of CPU time that no decoding may take

Models = tuple[Model, Model]  # for photographs, of the paper's kind


def small_models(folder: Path) -> Models:
    """Models with random weights."""
    out = []
    small = ExactConfig((16, 16, 16, 16), (1, 1, 1, 1), (1, 1, 1), embedding=32)
    paper = UNetConfig(channels=(32, 32), blocks=1, middle=1, attention=(1,), embedding=32)
    for name, cfg in (("small", small), ("paper", paper)):
        torch.manual_seed(0)
        net = modelfile.new_network(cfg)
        for layer in (net.out, net.scales) if isinstance(net, ExactUNet) else (net.out,):
            torch.nn.init.normal_(layer.weight, std=0.05)
        path = folder / f"{name}.safetensors"
        modelfile.save_model(path, name, net, new_tables(Ladder(), name == "small"), Ladder())
        out.append(modelfile.load_model(path))
    return out[0], out[1]


def picture(mode: str, size: tuple[int, int]) -> Image.Image:
    """The photograph for LARGE, a noisy gradient for other sizes."""
    w, h = size
    if (mode, size) == LARGE[:2]:
        return load(COFFEE).convert(mode).resize(size, Image.Resampling.LANCZOS)
    y, x = np.mgrid[:h, :w]
    rng = np.random.default_rng(w * h)
    rgb = np.stack([4 * x + y, 255 - 5 * x, 60 + 6 * y], -1) + rng.normal(0, 6, (h, w, 3))
    im = Image.fromarray(rgb.clip(0, 255).astype(np.uint8))
    if "A" in mode:
        im.putalpha(Image.fromarray((37 * (x // 5) + y).astype(np.uint8)))
    return im.convert(mode)


class Outcome:
    """The result of decoding: a picture or an error, and warnings."""

    def __init__(self, data: bytes, model: Model) -> None:
        self.error: Exception | None = None
        self.image: Image.Image | None = None
        begin = time.process_time()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", DdpmcWarning)
            try:
                self.image = decode(data, model=model)
            except Exception as e:  # any error is a result here
                self.error = e
        self.seconds = time.process_time() - begin
        self.warned = [w.category for w in caught if issubclass(w.category, DdpmcWarning)]

    @property
    def refused(self) -> bool:
        """Whether the file was refused with an error of the package."""
        return isinstance(self.error, DdpmcError)

    def bytes(self) -> bytes:
        """Mode and pixels, to compare pictures by."""
        assert self.image is not None
        return self.image.mode.encode() + self.image.tobytes()


def halves(data: bytes, model: Model) -> Iterator[NDArray[np.uint8]]:
    """The picture in the middle and at the end of each level."""
    decoder = Decoder(container.parse(data), model)
    for i, level in enumerate(decoder.stream.levels):
        part = copy.copy(decoder)
        part.chain, part.stream = decoder.chain.fork(), copy.copy(decoder.stream)
        half = replace(level, payload=level.payload[: level.nbytes // 2])
        part.stream.levels = [*decoder.stream.levels[:i], half]
        part.step()
        yield part.picture()
        decoder.step()
        yield decoder.picture()


def mean_psnr(im: Image.Image, model: Model, path: str) -> NDArray[np.float64]:
    """(2 L,) PSNR of the pictures of :func:`halves`, of square errors averaged over seeds."""
    rgb = np.asarray(im.convert("RGB"), dtype=np.float64)
    files = (encode(im, model=model, path=path, seed=seed) for seed in range(SEEDS))
    squares = [[np.square(x - rgb).mean() for x in halves(file, model)] for file in files]
    return 10 * np.log10(255**2 / np.maximum(np.mean(squares, 0), 1e-9))


def every_cut(data: bytes, im: Image.Image, model: Model, most: int) -> Counter[str]:
    """Cut a file at every length, and count the outcomes.

    most: number of random lengths for a longer file; the levels' ends are added.
    """
    stream = container.parse(data)
    stored = {level.end: level.psnr for level in stream.levels}
    counts = Counter[str]()
    rgb = np.asarray(im.convert("RGB"))
    small = im.width * im.height < SMALL
    if small:
        means = mean_psnr(im, model, stream.header.path)
        counts["fell"] += int((means[1:] < np.maximum.accumulate(means)[:-1] - DROP).sum())
    lengths: set[int] = set(range(len(data) + 1))
    if len(data) > most:
        rng = np.random.default_rng(0)
        lengths = {*rng.integers(0, len(data), most).tolist(), *stored, len(data)}
    for sealed in (False, True):
        best = -np.inf
        for n in sorted(lengths):
            if sealed and n < stream.header_size:  # container.cut refuses it, too
                with suppress(FormatError):
                    counts["wrong"] += len(container.cut(data, n)) >= 0
                continue
            part = container.cut(data, n) if sealed else data[:n]
            got = Outcome(part, model)
            counts["slow"] += got.seconds > SLOW
            if got.image is None:
                fine = got.refused and n < stream.header_size
                counts["refused" if fine else "wrong"] += 1
                continue
            allowed = [[], [CutWarning]] if len(part) < len(data) else [[]]
            fine = got.warned in allowed and len(part) <= n
            counts["decoded" if fine else "wrong"] += 1
            reached = psnr(rgb, np.asarray(got.image.convert("RGB")))
            counts["fell"] += bool(reached < best - DROP and not small)
            best = max(best, reached)
            if n in stored:
                steps = min(np.floor(reached / container.PSNR_STEP), 255)  # one byte
                counts["wrong"] += bool(stored[n] != steps * container.PSNR_STEP)
    return counts


def damage(data: bytes, rng: np.random.Generator) -> tuple[str, bytes]:
    """A random kind of damage, and the damaged file."""
    a, b, c = sorted(rng.integers(0, len(data), 3).tolist())
    n = int(rng.integers(1, 9))
    flipped = data[:a] + bytes([data[a] ^ 1 << n - 1]) + data[a + 1 :]
    try:
        flipped_and_cut = container.cut(flipped, b)
    except FormatError:  # the header is damaged
        flipped_and_cut = flipped[:b]
    damaged = {
        "flip": flipped,
        "flip and cut": flipped_and_cut,
        "insert": data[:a] + rng.bytes(n) + data[a:],
        "remove": data[:a] + data[a + n :],
        "swap": data[:a] + data[b:c] + data[a:b] + data[c:],
        "join": data[: max(a, 1)] + data,
        "burst": data[:a] + rng.bytes(b - a) + data[b:],
    }
    return list(damaged.items())[rng.integers(len(damaged))]


def damages(
    data: bytes, model: Model, n: int, rng: np.random.Generator
) -> Iterator[tuple[str, str]]:
    """Damage a file n times. Yields the kind of damage and the outcome."""
    prefixes: dict[int, bytes] = {}  # pictures of the sound file's prefixes, by their lengths

    def sound(nbytes: int) -> bytes:
        if nbytes not in prefixes:
            prefixes[nbytes] = Outcome(data[:nbytes], model).bytes()
        return prefixes[nbytes]

    for _ in range(n):
        kind, broken = damage(data, rng)
        got = Outcome(broken, model)
        if got.seconds > SLOW:
            yield kind, "slow"
        if got.image is None:
            yield kind, "refused" if got.refused else "wrong"
        elif not got.warned:
            if got.bytes() == sound(len(data)):
                yield kind, "whole"
            else:
                yield kind, "a cut" if broken == container.cut(data, len(broken)) else "wrong"
        elif got.bytes() == sound(container.parse(broken).read_to):
            yield kind, "prefix, damage" if DamageWarning in got.warned else "prefix, cut"
        else:
            yield kind, "wrong"


class Table:
    """Prints a table row by row, and counts what went wrong."""

    def __init__(self) -> None:
        self.wrong = 0
        print("| check | runs | wrong | outcomes |\n|---|---|---|---|", flush=True)

    def row(self, check: str, runs: int, wrong: int, outcomes: str) -> None:
        """Print one row."""
        self.wrong += wrong
        print(f"| {check} | {runs} | {int(wrong)} | {outcomes} |", flush=True)

    def counts(self, check: str, counts: Counter[str], fine: tuple[str, ...]) -> None:
        """Print one row of counted outcomes, of which those in ``fine`` are right."""
        wrong = sum(n for outcome, n in counts.items() if outcome not in fine)
        outcomes = ", ".join(f"{n} {outcome}" for outcome, n in sorted(counts.items()) if n)
        self.row(check, counts.total(), wrong, outcomes)


def soak(table: Table, name: str, models: Models, n: int, seed: int) -> None:
    """Cuts and n damages of files of every kind, made with these models."""
    rng = np.random.default_rng(seed)
    cuts, outcomes = Counter[str](), dict[str, Counter[str]]()
    with click.progressbar((LARGE, *KINDS), label=name, file=sys.stderr) as bar:
        for mode, size, path in bar:
            im, large = picture(mode, size), size == LARGE[1]
            model = models[path == TIMESTEPS]
            data = encode(
                im, model=model, path=None if path == TIMESTEPS else path,
                lossless=path == "spectral" and size[0] < 96,
            )  # fmt: skip
            cuts += every_cut(data, im, model, CUTS_OF_LARGE if large and name != RANDOM else CUTS)
            if large:
                continue
            for sound in (data, container.cut(data, len(data) * 2 // 3)):
                for kind, outcome in damages(sound, model, n // (2 * len(KINDS)), rng):
                    outcomes.setdefault(kind, Counter())[outcome] += 1
    fell = cuts.pop("fell", 0)
    table.counts(f"{name}: cuts", cuts, ("decoded", "refused"))
    table.row(
        f"{name}: PSNR fell by more than {DROP} dB", cuts["decoded"],
        0 if name == RANDOM else fell, f"{fell} fell",
    )  # fmt: skip
    for kind, counts in sorted(outcomes.items()):
        fine = ("refused", "prefix, damage", "prefix, cut", "whole", "a cut")
        table.counts(f"{name}: {kind}", counts, fine)


def agree(table: Table, which: str) -> None:
    """A photograph with every kind of arithmetic."""
    shot = load(COFFEE).convert("RGB")
    for row in agreement.compare(shot, which, compiled=True, tile=256):
        text = f"{row.states} of {row.levels} states the same, {row.differ} samples differ"
        table.row(f"{which}: {row.kind}", 1, not row.good, text)


def fuzz(table: Table, target: str, seconds: int) -> None:
    """One target of tests/fuzz.py, in a process of its own, which a crash ends."""
    done = subprocess.run(
        [sys.executable, "tests/fuzz.py", target, f"-max_total_time={seconds}"], cwd=ROOT,
        text=True, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, check=False,
    )  # fmt: skip
    runs = re.search(r"^Done (\d+) runs", done.stderr, re.MULTILINE)
    last = (done.stderr.strip().splitlines() or [""])[-1]
    table.row(
        f"fuzzing: {target}", int(runs[1]) if runs else 0, done.returncode != 0,
        f"{seconds} s" if done.returncode == 0 else last,
    )  # fmt: skip


@click.command()
@click.option("--damages", "n", default=20000, show_default=True, help="With random weights.")
@click.option("--trained", default=1400, show_default=True, help="Damages with trained ones.")
@click.option("--model", default="photo", show_default=True, help="Model for photographs.")
@click.option("--small", default="cifar10", show_default=True, help="Model of the paper's kind.")
@click.option("--fuzz", "seconds", default=450, show_default=True, help="Seconds for each target.")
@click.option("--agreement/--no-agreement", "agreeing", default=True, help="Other arithmetic.")
@click.option("--seed", default=0, show_default=True)
def main(
    n: int, trained: int, model: str, small: str, seconds: int, agreeing: bool, seed: int
) -> None:
    """Test cuts, damages, other arithmetic and fuzzing; 0 leaves a part out."""
    torch.set_num_threads(1)
    table = Table()
    if n:
        with tempfile.TemporaryDirectory() as folder:
            soak(table, RANDOM, small_models(Path(folder)), n, seed)
    if trained:
        models = modelfile.get_model(model), modelfile.get_small(small)
        soak(table, f"{models[0].name}, {models[1].name}", models, trained, seed)
    if agreeing:
        agree(table, model)
    if seconds and find_spec("atheris") is None:
        table.row("fuzzing", 0, 0, "not done: pip install '.[fuzz]'")
    elif seconds:
        for target in ("header", "stream", "model", "plugin"):
            fuzz(table, target, seconds)
    print(f"\n{table.wrong} wrong")
    sys.exit(1 if table.wrong else 0)


if __name__ == "__main__":
    main()
