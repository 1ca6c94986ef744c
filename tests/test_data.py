"""Pictures from every kind of file, broken ones included."""

from __future__ import annotations

import io
import pickle
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from ddpm_codec import data
from ddpm_codec.errors import DataError, DdpmcWarning


@pytest.fixture(scope="module")
def pictures() -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)


def png(x: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(x).save(buffer, "PNG")
    return buffer.getvalue()


def write(path: Path, x: NDArray[np.uint8]) -> Path:
    """Write pictures to the kind of file that the name stands for."""
    planes = x.transpose(0, 3, 1, 2).reshape(len(x), -1)
    if path.suffix == ".npz":
        np.savez(path, images=x, labels=np.zeros(len(x), np.int64))
    elif path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("readme.txt", "none")
            for k, one in enumerate(x):
                archive.writestr(f"dog/{k}.png", png(one))
    elif path.suffix == ".bin":
        path.write_bytes(b"".join(b"\x03" + one.tobytes() for one in planes))
    elif path.suffix == ".png":
        path.write_bytes(png(x[0]))
    else:
        protocol = 4 if path.name == "test_batch" else 2
        batch = {b"labels": [0] * len(x), b"data": planes}
        path.write_bytes(pickle.dumps(batch, protocol=protocol))
    return path


@pytest.mark.parametrize(
    "name", ["a.npz", "a.zip", "data_batch_1.bin", "data_batch_2", "test_batch", "a.png"]
)
def test_every_kind_of_file(tmp_path: Path, pictures: NDArray[np.uint8], name: str) -> None:
    path = write(tmp_path / name, pictures)
    expected = pictures[:1] if name == "a.png" else pictures
    for given in (path, tmp_path):
        got = data.small_pictures([given])
        assert got.is_contiguous()
        np.testing.assert_array_equal(got.permute(0, 2, 3, 1).numpy(), expected)


def test_batch_of_python_2(tmp_path: Path, pictures: NDArray[np.uint8]) -> None:
    """CIFAR-10's batches hold a long string with the opcode that Python 2 wrote."""
    raw = pictures.transpose(0, 3, 1, 2).tobytes()
    path = tmp_path / "data_batch_1"
    path.write_bytes(b"\x80\x02U\x04dataT" + len(raw).to_bytes(4, "little") + raw + b"\x86.")
    got = data.small_pictures([path]).permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal(got, pictures)


def test_files_add_up_in_order(tmp_path: Path, pictures: NDArray[np.uint8]) -> None:
    a, b = write(tmp_path / "b.npz", pictures), write(tmp_path / "a.zip", pictures[::-1])
    (tmp_path / "readme.html").write_text("none of ours")
    got = data.small_pictures([a, b]).permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal(got, np.concatenate([pictures, pictures[::-1]]))
    assert len(data.small_pictures([tmp_path])) == 10


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.npz", b"nothing"),
        ("a.zip", b"PK\x03\x04"),
        ("data_batch_1.bin", b"\x00" * 100),
        ("data_batch_1", b"\x80\x02}."),
        ("data_batch_1", b"no pickle"),
        ("a.png", png(np.zeros((31, 32, 3), np.uint8))),
        ("readme.txt", b""),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError):
        data.small_pictures([tmp_path / name])


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """A folder of five pictures of 40x40, two of them broken."""
    rng = np.random.default_rng(0)
    for name in "abcde":
        content = png(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8))
        (tmp_path / f"{name}.png").write_bytes(content[:-200] if name in "bd" else content)
    return tmp_path


def test_broken_pictures_are_skipped(broken: Path) -> None:
    """One warning counts them."""
    paths = data.list_pictures([broken])
    with pytest.warns(DdpmcWarning) as caught:
        assert len(data.validation_crops(paths, 32, 9)) == 3
    assert len(caught) == 1
    assert re.fullmatch(
        r"broken pictures skipped: 2, the last .*[bd]\.png: broken picture \(.+\)",
        str(caught[0].message),
    )


def test_broken_small_pictures_are_skipped(tmp_path: Path, pictures: NDArray[np.uint8]) -> None:
    write(tmp_path / "a.png", pictures)
    (tmp_path / "b.png").write_bytes(png(pictures[1])[:-30])
    with pytest.warns(DdpmcWarning, match=r"skipped: 1, the last .*b\.png: broken"):
        got = data.small_pictures([tmp_path]).permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal(got, pictures[:1])
    with pytest.raises(DataError, match=r"b\.png: broken picture"):
        data.small_pictures([tmp_path / "b.png"])


def test_nothing_is_executed(tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return exec, (f"open({str(tmp_path / 'harm')!r}, 'w')",)

    (tmp_path / "data_batch_1").write_bytes(pickle.dumps(Attack()))
    with pytest.raises(DataError):
        data.small_pictures([tmp_path])
    assert not (tmp_path / "harm").exists()
