"""The work on one picture: what becomes a result, and what travels."""

from __future__ import annotations

import io
import pickle
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from works import jobs, work

import ddpm_codec
from ddpm_codec.batch.jobs import Decode, Encode, Job, Result, perform
from ddpm_codec.errors import ConversionWarning, DdpmcWarning, ModelError, collected, warn
from ddpm_codec.network.modelfile import read_metadata

QUICK: dict[str, Any] = {"steps": 3, "effort": 1}


def png(picture: Image.Image) -> bytes:
    picture.save(out := io.BytesIO(), format="PNG")
    return out.getvalue()


def test_errors_and_warnings_are_part_of_the_result() -> None:
    fine, bad, warned = (perform(work, job) for job in jobs("fine", "bad", "warned"))
    assert (fine.data, fine.error, fine.warnings) == (b"FINE", None, ())
    assert (bad.data, str(bad.error), bad.source) == (None, "a bad one", "1.png")
    assert [(type(w), str(w)) for w in warned.warnings] == [(ConversionWarning, "beware")]
    with pytest.raises(ZeroDivisionError):
        perform(work, jobs("fault")[0])


def test_no_warning_but_ours_gets_through() -> None:
    def noisy(job: Job, _: Any) -> tuple[bytes, dict[str, Any]]:
        warnings.warn("of Pillow", UserWarning, stacklevel=1)
        return b"", {}

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert perform(noisy, jobs("fine")[0]).warnings == ()


def test_warnings_of_several_threads_stay_apart() -> None:
    """As in a worker of Dask's with several threads."""
    both, got = threading.Barrier(2), {}

    def one(name: str) -> None:
        with collected() as caught:
            both.wait(60)
            warn(name, DdpmcWarning)
            both.wait(60)
        got[name] = [str(w) for w in caught]

    threads = [threading.Thread(target=one, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == {"a": ["a"], "b": ["b"]}


def test_results_travel() -> None:
    for error in (FileExistsError(None, "exists", "a"), ModelError("no"), MemoryError()):
        result = Result("a", "b", None, {"x": 1}, (ConversionWarning("w"),), error)
        back = pickle.loads(pickle.dumps(result))
        assert (type(back.error), str(back.error)) == (type(error), str(error))
        assert str(back.warnings[0]) == "w" and back.about == {"x": 1}


def test_encoding_and_decoding_are_the_librarys(tiny_model: Path, picture: Image.Image) -> None:
    digest = read_metadata(tiny_model)["digest"]
    encode = Encode({"model": str(tiny_model), **QUICK}, digest)
    made = perform(pickle.loads(pickle.dumps(encode)), Job("a.png", "a.ddpm", png(picture)))
    assert made.data == ddpm_codec.encode(picture, model=tiny_model, **QUICK)
    assert made.about == ddpm_codec.info(made.data)
    decode = Decode({"model": str(tiny_model)}, "tif")
    again = perform(decode, Job("a.ddpm", "a.png", made.data))
    assert again.data is not None
    with Image.open(io.BytesIO(again.data)) as im:
        assert im.format == "TIFF"
        assert im.tobytes() == ddpm_codec.decode(made.data, model=tiny_model).tobytes()


def test_another_model_of_that_name_is_refused(tiny_model: Path, picture: Image.Image) -> None:
    encode = Encode({"model": str(tiny_model), **QUICK}, "00" * 32)
    made = perform(encode, Job("a.png", "a.ddpm", png(picture)))
    assert isinstance(made.error, ModelError) and "another than the one asked for" in str(
        made.error
    )
