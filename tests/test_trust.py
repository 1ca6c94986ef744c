"""Properties of the whole codec: any picture, concurrency, a full disk, hostile models."""

from __future__ import annotations

import ast
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import ddpm_codec
from ddpm_codec.cli.main import main
from ddpm_codec.codec.container import parse
from ddpm_codec.codec.decoder import decode
from ddpm_codec.codec.encoder import encode
from ddpm_codec.codec.stops import truncate
from ddpm_codec.errors import ModelError
from ddpm_codec.network import denoiser
from ddpm_codec.network.modelfile import get_model, load_model

PACKAGE = Path(ddpm_codec.__file__).parent
resource = pytest.importorskip("resource")  # not on Windows
QUICK: dict[str, Any] = {"steps": 4, "effort": 1, "tune": "even"}
SOME = settings(
    max_examples=12, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip


def shot(width: int, height: int, mode: str, seed: int) -> Image.Image:
    """Half noise, half gradient."""
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 256, (height, width, 4)).astype(np.uint8)
    x[: height // 2] = np.linspace(0, 255, width, dtype=np.uint8)[None, :, None]
    return Image.fromarray(x, "RGBA").convert(mode)


# --- Properties --------------------------------------------------------------------------------


@SOME
@given(
    width=st.integers(1, 41), height=st.integers(1, 37), seed=st.integers(0, 2**32 - 1),
    mode=st.sampled_from(["L", "LA", "RGB", "RGBA"]),
    path=st.sampled_from(["spectral", "isotropic"]),
)  # fmt: skip
def test_lossless_is_exact(
    tiny_model: Path, width: int, height: int, mode: str, seed: int, path: str
) -> None:
    picture = shot(width, height, mode, seed % 1000)
    if mode in ("LA", "RGBA"):  # without hidden colours, which only lossless files keep
        picture.putalpha(picture.getchannel("A").point(lambda x: max(x, 1)))
    how = {"model": tiny_model, "path": path, "seed": seed, **QUICK}
    data = encode(picture, lossless=True, **how)
    np.testing.assert_array_equal(np.asarray(decode(data, model=tiny_model)), picture)
    # The lossless layer is the last record: the file before it is that of a lossy encode.
    assert data.startswith(encode(picture, stop_at="t=2", **how))
    assert list(parse(data).extras)[-1] == "residual"


@SOME
@given(
    width=st.integers(1, 41), height=st.integers(1, 37), seed=st.integers(0, 1000),
    t=st.integers(1, 1000), share=st.floats(0.0, 1.0),
)  # fmt: skip
def test_truncating_is_encoding_less(
    tiny_model: Path, width: int, height: int, seed: int, t: int, share: float
) -> None:
    picture = shot(width, height, "RGB", seed)
    how = {"model": tiny_model, "seed": seed, **QUICK}
    whole = encode(picture, **how)
    head = parse(whole).header_size
    stops: list[dict[str, Any]] = [
        {"stop_at": f"t={t}"}, {"bytes": round(head + share * (len(whole) - head))},
    ]  # fmt: skip
    for stop in stops:
        assert truncate(whole, **stop) == encode(picture, **stop, **how)


# --- Concurrency -------------------------------------------------------------------------------


def _both_ways(model: Path, seed: int) -> tuple[bytes, bytes]:
    data = encode(shot(40, 32, "RGB", seed), model=model, seed=seed, **QUICK)
    return data, decode(data, model=model).tobytes()


def test_threads_and_processes_do_not_disturb_each_other(tiny_model: Path) -> None:
    """They make the same files, which decode to the same bits everywhere."""
    seeds = list(range(4))
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(_both_ways, [tiny_model] * 8, seeds * 2))
    with ProcessPoolExecutor(2, get_context("spawn")) as processes:
        made += processes.map(_both_ways, [tiny_model] * 4, seeds)
    assert made[:4] == made[4:8] == made[8:]
    for data, pixels in made:
        assert decode(data, model=tiny_model).tobytes() == pixels


# --- The machine -------------------------------------------------------------------------------


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "ddpm_codec", *map(str, arguments)]


def test_ctrl_c_leaves_nothing(tiny_model: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "in.png", tmp_path / "out"
    out.mkdir()
    shot(900, 700, "RGB", 0).save(source)
    before = source.read_bytes()
    arguments = command("encode", "-v", source, "-o", out / "x.ddpm", "--model", tiny_model)
    # Background jobs of a shell ignore interrupts, and these tests may be one.
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, preexec_fn=heed) as process:
        assert process.stderr is not None
        assert "convolutions in" in process.stderr.readline()  # encoding is about to begin
        assert process.poll() is None, "ended before it could be interrupted"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err and err.count("\n") <= 1
    assert list(out.iterdir()) == [] and source.read_bytes() == before


@pytest.mark.parametrize("what", ["encode", "decode", "truncate"])
def test_a_full_disk_leaves_nothing(
    tiny_model: Path, tmp_path: Path, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A limit on the size of files stands for a full disk."""
    picture, file, out = tmp_path / "in.png", tmp_path / "in.ddpm", tmp_path / "out"
    out.mkdir()
    shot(64, 48, "RGB", 0).save(picture)
    file.write_bytes(encode(Image.open(picture), model=tiny_model, **QUICK))
    more = {
        "encode": (picture, "-o", out / "x.ddpm", "--model", tiny_model, "--effort", 1),
        "decode": (file, "-o", out / "x.png", "--model", tiny_model),
        "truncate": (file, "-o", out / "x.ddpm", "--bytes", file.stat().st_size - 1),
    }[what]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        status = main([what, *map(str, more)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    err = capsys.readouterr().err
    assert status == 1
    assert "too large" in err and err.count("\n") == 1
    assert list(out.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_standard_output(tiny_model: Path, tmp_path: Path) -> None:
    file = tmp_path / "in.ddpm"
    file.write_bytes(encode(shot(9, 9, "L", 0), model=tiny_model, **QUICK))
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            command("truncate", file, "-o", "-", "--bytes", 60), stdout=full,
            stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 1
    assert "No space left" in done.stderr and "Traceback" not in done.stderr


# --- Hostile models ----------------------------------------------------------------------------


def test_nothing_in_the_package_can_execute_what_it_reads() -> None:
    """No form of pickle, eval or exec is used."""
    paths = list(PACKAGE.rglob("*.py"))
    assert len(paths) > 30
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [a.name for a in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            elif isinstance(node, ast.Attribute):
                names = [f"{ast.unparse(node.value)}.{node.attr}"]
            elif isinstance(node, ast.Name):
                names = [node.id]
            elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                assert ast.unparse(node.value) == "False", path
            bad = {"pickle", "dill", "joblib", "shelve", "marshal", "torch.load", "eval", "exec"}
            assert not bad & set(names), f"{path}:{getattr(node, 'lineno', 0)}: {names}"


@settings(SOME, max_examples=60)
@given(at=st.integers(0, 2**20), value=st.integers(1, 255), cut=st.booleans())
def test_a_damaged_model_is_refused(
    tiny_model: Path, tmp_path: Path, at: int, value: int, cut: bool
) -> None:
    data = bytearray(tiny_model.read_bytes())
    head = 8 + int.from_bytes(data[:8], "little")
    at %= head if value % 4 else len(data)  # most of it is weights
    data[at] ^= value
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(data[:at] if cut else data)
    try:
        model = load_model(path)
    except ModelError as e:
        assert "\n" not in str(e)
    else:  # only its name or training record changed, which are not part of the digest
        assert model.digest == get_model(tiny_model).digest


def test_a_model_that_claims_to_be_huge(tiny_model: Path, tmp_path: Path) -> None:
    """It is refused by the sizes in its header, before anything is allocated."""
    data = tiny_model.read_bytes()
    size = int.from_bytes(data[:8], "little")
    head = json.loads(data[8 : 8 + size])
    head["net.stem.weight"]["shape"] = [1 << 20, 1 << 20, 3, 3]
    text = json.dumps(head).encode()
    path = tmp_path / "huge.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
    with pytest.raises(ModelError):
        load_model(path)
    path.write_bytes((1 << 62).to_bytes(8, "little") + data[8:])
    with pytest.raises(ModelError):
        load_model(path)
    assert os.listdir(tmp_path) == ["huge.safetensors"]


def test_cuda_computes_with_all_digits(small_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TF32 is off while the paper's network runs, and the settings are restored after it."""
    backends: Any = torch.backends  # its stubs lack these attributes
    conv, products = backends.cudnn.conv, backends.cuda.matmul

    def settings_now() -> tuple[str, str]:
        return conv.fp32_precision, products.fp32_precision

    before = settings_now()
    with denoiser.ieee("cpu"):
        assert settings_now() == before

    def work(_: int) -> set[tuple[str, str]]:
        with denoiser.ieee("cuda:0"):
            first = {settings_now()}
            time.sleep(0.01)
            return first | {settings_now()}

    with ThreadPoolExecutor(4) as pool:
        assert set.union(*pool.map(work, range(8))) == {("ieee", "ieee")}
    with pytest.raises(ZeroDivisionError), denoiser.ieee("cuda"):
        _ = 1 / 0
    assert settings_now() == before

    # The codec's network runs inside, on the chain's device.
    devices = []

    def fake(device: str) -> AbstractContextManager[None]:
        devices.append(device)
        return nullcontext()

    monkeypatch.setattr(denoiser, "ieee", fake)
    encode(Image.new("RGB", (8, 8), "teal"), model=small_model, timesteps=(800, 500))
    assert devices and set(devices) == {"cpu"}
