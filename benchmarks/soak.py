"""Every cut, thousands of damages, other arithmetic, fuzzing: can the codec be trusted?

    python benchmarks/soak.py [--damages 20000] [--trained 1400] [--fuzz 450] [--seed 0]

Prints one table, row by row as they are done (in hours), and ends with status 1 if anything went
wrong:

- *cuts* of small files of every kind (both paths and the paper's timesteps, grey and alpha, 1x1 to
  96x80) and of a photograph of 768x512, made with small networks of random weights and with trained
  ones: the file's first bytes, as a connection leaves them that breaks, and what container.cut
  makes of as many, both of every length (of long files of 500 random lengths and the levels' ends;
  of the photograph with the trained model of 30). They decode, without a word of damage, or are
  refused where they end inside the header; at the end of a level the PSNR is the one stored. It may
  not fall by more than 0.1 dB as bytes are added, except with random weights, whose estimates owe
  nobody to get better. Of a small picture it is the noise's chance; there that of the mean square
  error over 32 files, in the middle and at the end of each level, may not.
- *damages* of the small files, whole and cut: bits flipped, bytes inserted, removed, segments
  swapped, files joined, or cut after a bit was flipped. Refused with one of the package's errors,
  or decoded with a warning to a picture that a prefix of the sound file gives, too; the sound
  file's own picture needs no warning, nor what is itself a cut of it.
- *arithmetic*: a photograph's file under all that agreement.py tries.
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
from PIL import Image

from ddpm_codec.codec import container
from ddpm_codec.codec.decoder import Decoder, decode
from ddpm_codec.codec.encoder import encode, psnr
from ddpm_codec.diffusion.schedule import Ladder
from ddpm_codec.errors import CutWarning, DamageWarning, DdpmcError, DdpmcWarning, FormatError
from ddpm_codec.network.exact import ExactConfig, ExactUNet
from ddpm_codec.network.modelfile import (
    Model,
    get_model,
    get_small,
    load_model,
    new_network,
    save_model,
)
from ddpm_codec.network.tables import new_tables
from ddpm_codec.network.unet import UNetConfig

HERE = Path(__file__).resolve().parent
TIMESTEPS = "timesteps"  # in place of a path: with a network of the paper's kind
KINDS = (
    ("RGB", (1, 1), "spectral"), ("RGB", (96, 80), "spectral"), ("L", (40, 28), "spectral"),
    ("RGBA", (17, 3), "spectral"), ("LA", (9, 30), "spectral"), ("RGB", (24, 16), "isotropic"),
    ("L", (1, 40), "spectral"), ("RGB", (32, 32), TIMESTEPS), ("LA", (40, 9), TIMESTEPS),
)  # fmt: skip
LARGE = ("RGB", (768, 512), "spectral")  # cuts only
RANDOM = "random weights"
DROP = 0.1  # dB that more bytes may cost
MANY, FEW = 500, 30  # cuts of a long file, of the photograph with a model that takes its time
SPECK, SEEDS = 1 << 14, 32  # pixels below which PSNR is a chance; files over which it is none
SLOW = 120.0  # seconds of computing that nothing may take

Models = tuple[Model, Model]  # for photographs, of the paper's kind


def small_models(folder: Path) -> Models:
    """Of random weights."""
    out = []
    small = ExactConfig((16, 16, 16, 16), (1, 1, 1, 1), (1, 1, 1), embedding=32)
    paper = UNetConfig(channels=(32, 32), blocks=1, middle=1, attention=(1,), embedding=32)
    for name, cfg in (("small", small), ("paper", paper)):
        torch.manual_seed(0)
        net = new_network(cfg)
        for layer in (net.out, net.scales) if isinstance(net, ExactUNet) else (net.out,):
            torch.nn.init.normal_(layer.weight, std=0.05)
        path = folder / f"{name}.safetensors"
        save_model(path, name, net, new_tables(Ladder(), name == "small"), Ladder())
        out.append(load_model(path))
    return out[0], out[1]


def picture(mode: str, size: tuple[int, int]) -> Image.Image:
    w, h = size
    if (mode, size) == LARGE[:2]:
        with Image.open(HERE / "pictures" / "coffee.png") as photograph:
            return photograph.convert(mode).resize(size, Image.Resampling.LANCZOS)
    y, x = np.mgrid[:h, :w]
    rng = np.random.default_rng(w * h)
    rgb = np.stack([4 * x + y, 255 - 5 * x, 60 + 6 * y], -1) + rng.normal(0, 6, (h, w, 3))
    im = Image.fromarray(rgb.clip(0, 255).astype(np.uint8))
    if "A" in mode:
        im.putalpha(Image.fromarray((37 * (x // 5) + y).astype(np.uint8)))
    return im.convert(mode)


class Outcome:
    """What decoding gave."""

    def __init__(self, data: bytes, model: Model) -> None:
        self.error: Exception | None = None
        self.image: Image.Image | None = None
        begin = time.process_time()
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always", DdpmcWarning)
            try:
                self.image = decode(data, model=model)
            except Exception as e:  # whatever it is, it is to be counted
                self.error = e
        self.seconds = time.process_time() - begin
        self.warned = [w.category for w in seen if issubclass(w.category, DdpmcWarning)]

    @property
    def refused(self) -> bool:
        return isinstance(self.error, DdpmcError)

    def bytes(self) -> bytes:
        assert self.image is not None
        return self.image.mode.encode() + self.image.tobytes()


def halves(data: bytes, model: Model) -> Iterator[NDArray[np.uint8]]:
    """The picture in the middle and at the end of each level."""
    at = Decoder(container.parse(data), model)
    for i, level in enumerate(at.stream.levels):
        part = copy.copy(at)
        part.chain, part.stream = at.chain.fork(), copy.copy(at.stream)
        some = replace(level, payload=level.payload[: level.nbytes // 2])
        part.stream.levels = [*at.stream.levels[:i], some]
        part.step()
        yield part.picture()
        at.step()
        yield at.picture()


def mean_psnr(im: Image.Image, model: Model, path: str) -> NDArray[np.float64]:
    """(2 L,): of the mean square error at :func:`halves`, over files that differ in their seed."""
    rgb = np.asarray(im.convert("RGB"), dtype=np.float64)
    squares = [
        [
            np.square(pixels - rgb).mean()
            for pixels in halves(encode(im, model=model, path=path, seed=seed), model)
        ]
        for seed in range(SEEDS)
    ]
    return 10 * np.log10(255**2 / np.maximum(np.mean(squares, 0), 1e-9))


def every_cut(data: bytes, im: Image.Image, model: Model, most: int) -> Counter[str]:
    """most: lengths of a long file, beside the levels' ends."""
    stream = container.parse(data)
    stored = {level.end: level.psnr for level in stream.levels}
    counts = Counter[str]()
    rgb = np.asarray(im.convert("RGB"))
    speck = im.width * im.height < SPECK
    if speck:
        means = mean_psnr(im, model, stream.header.path)
        counts["fell"] += int((means[1:] < np.maximum.accumulate(means)[:-1] - DROP).sum())
    lengths: set[int] = set(range(len(data) + 1))
    if len(data) > most:
        rng = np.random.default_rng(0)
        lengths = {*rng.integers(0, len(data), most).tolist(), *stored, len(data)}
    for sealed in (False, True):
        best = -np.inf
        for n in sorted(lengths):
            if sealed and n < stream.header_size:  # else refused already here
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
            counts["fell"] += bool(reached < best - DROP and not speck)
            best = max(best, reached)
            if n in stored:
                counts["wrong"] += bool(stored[n] != min(np.floor(4 * reached) / 4, 63.75))
    return counts


def damage(data: bytes, rng: np.random.Generator) -> tuple[str, bytes]:
    kind = ("flip", "insert", "remove", "swap", "join", "burst", "flip and cut")[rng.integers(7)]
    a, b, c = sorted(rng.integers(0, len(data), 3).tolist())
    flipped = data[:a] + bytes([data[a] ^ 1 << int(rng.integers(8))]) + data[a + 1 :]
    if kind == "flip":
        return kind, flipped
    if kind == "flip and cut":
        with suppress(FormatError):  # where it is the header that is damaged
            return kind, container.cut(flipped, b)
        return kind, flipped[:b]
    if kind == "insert":
        return kind, data[:a] + rng.bytes(int(rng.integers(1, 9))) + data[a:]
    if kind == "remove":
        return kind, data[:a] + data[a + int(rng.integers(1, 9)) :]
    if kind == "swap":
        return kind, data[:a] + data[b:c] + data[a:b] + data[c:]
    if kind == "join":
        return kind, data[: max(a, 1)] + data
    return kind, data[:a] + rng.bytes(b - a) + data[b:]


def damages(
    data: bytes, model: Model, n: int, rng: np.random.Generator
) -> Iterator[tuple[str, str]]:
    """Kind and outcome of n damages."""
    prefixes: dict[int, bytes] = {}  # the sound file's picture, by how many bytes there are

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
    """Rows of one table, printed as they come."""

    def __init__(self) -> None:
        self.wrong = 0
        print("| check | runs | wrong | outcomes |\n|---|---|---|---|", flush=True)

    def row(self, check: str, runs: int, wrong: int, outcomes: str) -> None:
        self.wrong += wrong
        print(f"| {check} | {runs} | {int(wrong)} | {outcomes} |", flush=True)

    def counts(self, check: str, counts: Counter[str], fine: tuple[str, ...]) -> None:
        wrong = sum(n for what, n in counts.items() if what not in fine)
        said = ", ".join(f"{n} {what}" for what, n in sorted(counts.items()) if n)
        self.row(check, counts.total(), wrong, said)


def soak(table: Table, name: str, models: Models, n: int, seed: int) -> None:
    """Cuts and n damages of files of every kind, made with a model for photographs, or small."""
    rng = np.random.default_rng(seed)
    cuts, found = Counter[str](), dict[str, Counter[str]]()
    with click.progressbar((LARGE, *KINDS), label=name, file=sys.stderr) as bar:
        for mode, size, path in bar:
            im, large = picture(mode, size), size == LARGE[1]
            model = models[path == TIMESTEPS]
            data = encode(
                im, model=model, path=None if path == TIMESTEPS else path,
                lossless=path == "spectral" and size[0] < 96,
            )  # fmt: skip
            cuts += every_cut(data, im, model, FEW if large and name != RANDOM else MANY)
            if large:
                continue
            for sound in (data, container.cut(data, len(data) * 2 // 3)):
                for kind, outcome in damages(sound, model, n // (2 * len(KINDS)), rng):
                    found.setdefault(kind, Counter())[outcome] += 1
    fell = cuts.pop("fell", 0)
    table.counts(f"{name}: cuts", cuts, ("decoded", "refused"))
    table.row(
        f"{name}: PSNR fell by more than {DROP} dB", cuts["decoded"],
        0 if name == RANDOM else fell, f"{fell} fell",
    )  # fmt: skip
    for kind, counts in sorted(found.items()):
        fine = ("refused", "prefix, damage", "prefix, cut", "whole", "a cut")
        table.counts(f"{name}: {kind}", counts, fine)


def agree(table: Table, which: str) -> None:
    """A photograph under every kind of arithmetic."""
    with Image.open(HERE / "pictures" / "coffee.png") as photograph:
        shot = photograph.convert("RGB")
    for row in agreement.compare(shot, which, compiled=True, tile=256):
        said = f"{row.states} of {row.of} states the same, {row.differ} samples differ"
        table.row(f"{which}: {row.kind}", 1, not row.good, said)


def fuzz(table: Table, target: str, seconds: int) -> None:
    """One target of tests/fuzz.py, in a process of its own: a crash ends it."""
    script = HERE.parent / "tests" / "fuzz.py"
    done = subprocess.run(
        [sys.executable, script, target, f"-max_total_time={seconds}"], cwd=HERE.parent,
        text=True, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, check=False,
    )  # fmt: skip
    runs = re.search(r"^Done (\d+) runs", done.stderr, re.MULTILINE)
    last = (done.stderr.strip().splitlines() or [""])[-1]
    table.row(
        f"fuzzing: {target}", int(runs[1]) if runs else 0, done.returncode != 0,
        f"{seconds} s" if done.returncode == 0 else last,
    )  # fmt: skip


@click.command()
@click.option("--damages", "n", default=20000, show_default=True, help="Of random weights' files.")
@click.option("--trained", default=1400, show_default=True, help="Of the trained models' files.")
@click.option("--model", default="photo", show_default=True, help="For photographs.")
@click.option("--small", default="cifar10", show_default=True, help="Model of the paper's kind.")
@click.option("--fuzz", "seconds", default=450, show_default=True, help="Seconds a target.")
@click.option("--agreement/--no-agreement", "agreeing", default=True, help="Other arithmetic, too.")
@click.option("--seed", default=0, show_default=True)
def main(
    n: int, trained: int, model: str, small: str, seconds: int, agreeing: bool, seed: int
) -> None:
    """Cuts, damages, other arithmetic, fuzzing; 0 leaves a part out."""
    torch.set_num_threads(1)
    table = Table()
    if n:
        with tempfile.TemporaryDirectory() as folder:
            soak(table, RANDOM, small_models(Path(folder)), n, seed)
    if trained:
        models = get_model(model), get_small(small)
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
