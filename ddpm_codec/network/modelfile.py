"""Model files: one safetensors file with weights, configuration and tables. No pickle anywhere."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ..diffusion import transform
from ..diffusion.schedule import Ladder
from ..errors import ModelError
from ..files import replacing
from ..rec import classes, rangecoder, trellis
from . import bounds, conditioning, exact, selftest, tiles
from . import tables as tables_module
from .exact import ExactConfig, ExactUNet
from .tables import Tables
from .unet import PAPER, UNet, UNetConfig

DEFAULT = "photo"
MAX_WEIGHTS = 1 << 26  # about a tenth of the weights of the largest network accepted
MAX_BYTES = 1 << 29  # a larger model file is refused before it is read
_PACKAGE = Path(__file__).resolve().parents[1]
# The models lie inside an installed package, and beside the package in a checkout.
FOLDERS = ((_PACKAGE if (_PACKAGE / "models").is_dir() else _PACKAGE.parent) / "models",)


@dataclass
class Model:
    """A network ready to run, and the tables that were measured with its weights."""

    name: str
    net: UNet | ExactUNet
    tables: Tables
    ladder: Ladder
    digest: bytes  # SHA-256 over everything that both ends must share

    @property
    def id(self) -> bytes:
        """The part of the digest that files carry."""
        return self.digest[:6]

    @property
    def exact(self) -> bool:
        """Whether it is the photo codec's kind: exact on all machines, and with log-scales."""
        return isinstance(self.net, ExactUNet)

    @property
    def unet(self) -> UNet:
        """The network, if it is of the paper's kind. Raises ModelError if it is for photographs."""
        if isinstance(self.net, ExactUNet):
            raise ModelError(
                f"model {self.name} is for photographs; this needs one of the paper's kind"
            )
        return self.net

    def error_at(self, snr: float) -> NDArray[np.float64]:
        """(192,) E(x_0 - x0_hat)^2 of each band where all is known with precision ``snr``."""
        of_bands: NDArray[np.float64] = self.tables.error_at(self.ladder, snr).mean(1)
        return of_bands


Config = UNetConfig | ExactConfig

# The networks that `ddpmc train` knows by name. "cifar10" is the paper's network on squares of 2x2
# pixels: a processor can train it, its attention is at 16x16 as in the paper, and in half precision
# it fits in 16 MB.
PRESETS: dict[str, Config] = {
    "photo": ExactConfig(),
    "cifar10": UNetConfig(
        patch=2, channels=(64, 96, 160, 160), middle=1, attention=(0,), embedding=128, wiring="lean"
    ),
    "cifar10-paper": PAPER,
}


def preset_config(name: str, changes: dict[str, Any]) -> Config:
    """A preset with some fields changed. Raises ModelError."""
    return network_config(asdict(PRESETS[name]) | changes)


def new_network(cfg: Config) -> UNet | ExactUNet:
    return ExactUNet(cfg) if isinstance(cfg, ExactConfig) else UNet(cfg)


def network_config(fields: dict[str, Any]) -> Config:
    """A configuration from its JSON. Every size is bounded before anything is allocated.

    Raises ModelError.
    """
    if not isinstance(fields, dict):
        raise ModelError("malformed network configuration")
    given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    try:
        cfg = ExactConfig(**given) if "down" in given else UNetConfig(**given)
        ok = _exact_bounds(cfg) if isinstance(cfg, ExactConfig) else _bounds(cfg)
    except TypeError as e:
        raise ModelError(f"malformed network configuration: {e}") from None
    if not ok:
        raise ModelError("network configuration out of bounds")
    return cfg


def _exact_bounds(cfg: ExactConfig) -> bool:
    blocks = (*cfg.down, *cfg.up)
    return (
        exact.BLOCK_LEVEL + 1 < len(cfg.channels) <= 6
        and all(isinstance(c, int) and 1 <= c <= 2048 for c in (*cfg.channels, cfg.embedding))
        and len(cfg.down) == len(cfg.channels) == len(cfg.up) + 1
        and all(isinstance(n, int) and 0 <= n <= 64 for n in blocks)
        and sum(blocks) * max(cfg.channels) ** 2 <= MAX_WEIGHTS
    )


def _bounds(cfg: UNetConfig) -> bool:
    sizes = [*cfg.channels, cfg.embedding]
    return (
        cfg.patch in (1, 2, 4, 8)
        and 1 <= len(cfg.channels) <= 6
        and all(isinstance(c, int) and 1 <= c <= 2048 for c in sizes)
        and 0 <= cfg.middle <= 64
        and 1 <= cfg.blocks <= 64
        and 0 <= cfg.dropout < 1
        and cfg.prediction in ("eps", "x0", "v", "mu")
        and cfg.wiring in ("lean", "paper")
        and (cfg.blocks * len(cfg.channels) + cfg.middle) * max(sizes) ** 2 <= MAX_WEIGHTS
    )


def digest(arrays: dict[str, NDArray[Any]], metadata: dict[str, str]) -> bytes:
    """SHA-256 over the format's constants, configuration and tensors, in a fixed order."""
    h = hashlib.sha256(json.dumps(constants(), sort_keys=True).encode())
    for key in ("network", "ladder"):
        h.update(json.dumps(json.loads(metadata[key]), sort_keys=True).encode())
    for name in sorted(arrays):
        a = arrays[name]
        h.update(f"{name} {a.dtype.str} {a.shape}".encode())
        h.update(a.tobytes())
    return h.digest()


def constants() -> dict[str, Any]:
    """The format's numbers, which the digest covers: whoever changes one makes another model."""
    values: dict[str, Any] = {
        f"{module.__name__}.{name}": value
        for module in (classes, conditioning, exact, rangecoder, tiles, trellis, tables_module)
        for name, value in vars(module).items()
        if name.isupper() and isinstance(value, int | float | tuple | list | dict)
    }
    # Far fewer digits than a double has: the last ones may differ between machines.
    basis = np.rint(transform.basis() * 2**20).astype("<i4").tobytes()
    values["basis"] = hashlib.sha256(basis).hexdigest()
    return values


def save_model(
    path: Path, name: str, net: UNet | ExactUNet, tables: Tables, ladder: Ladder,
    progress: str = "{}",
) -> bytes:  # fmt: skip
    """Write a model file, atomically; returns its digest.

    It holds an exact network's integers, or another's weights in half precision. progress: JSON,
    how long the network was trained; the digest leaves it out. Raises ModelError where an exact
    network's bounds do not hold.
    """
    if isinstance(net, ExactUNet):
        weights = net.integers()
        bounds.check(weights, net)
    else:
        weights = {k: v.detach().half().cpu().contiguous() for k, v in net.state_dict().items()}
    arrays: dict[str, NDArray[Any]] = {f"net.{k}": v.numpy() for k, v in weights.items()}
    arrays |= {f"tables.{k}": np.asarray(v, order="C") for k, v in tables.arrays().items()}
    metadata = {
        "name": name,
        "network": json.dumps(asdict(net.cfg)),
        "ladder": json.dumps(asdict(ladder)),
        "progress": progress,
    }
    metadata["digest"] = digest(arrays, metadata).hex()
    with replacing(path) as partial:
        # save_file would make a file that other users may not read.
        partial.write_bytes(save(arrays, metadata))
    return bytes.fromhex(metadata["digest"])


def read_metadata(path: Path) -> dict[str, str]:
    """Raises ModelError for anything that is not a model file."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ModelError(f"{path}: larger than a model may be")
        with safe_open(path, "np") as f:
            metadata = dict(f.metadata() or {})
    except (OSError, SafetensorError) as e:
        raise ModelError(f"{path}: not a model file ({e})") from None
    if not {"name", "network", "ladder", "digest"} <= set(metadata):
        raise ModelError(f"{path}: not a model file (no configuration)")
    return metadata


def load_model(path: Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Model:
    """Raises ModelError unless the file is whole and its digest right."""
    metadata = read_metadata(path)
    try:
        with safe_open(path, "np") as f:
            arrays = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
        cfg = network_config(json.loads(metadata["network"]))
        ladder = Ladder(**json.loads(metadata["ladder"]))
        if digest(arrays, metadata).hex() != metadata["digest"]:
            raise ModelError(f"{path}: the contents do not match their digest")
        tables = Tables(**{k[7:]: v for k, v in arrays.items() if k.startswith("tables.")})
        tables.check(ladder, isinstance(cfg, ExactConfig))
        weights = {k[4:]: torch.from_numpy(v) for k, v in arrays.items() if k.startswith("net.")}
        net = new_network(cfg)
        if isinstance(net, ExactUNet):
            bounds.check(weights, net)
        else:
            net.load_state_dict(weights)
    except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as e:
        raise ModelError(f"{path}: malformed model file ({str(e).splitlines()[0]})") from None
    if isinstance(net, ExactUNet):
        net.freeze(weights, device, selftest.choose(net, device))
    net.to(device=device, dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    net.eval().requires_grad_(False)
    return Model(metadata["name"], net, tables, ladder, bytes.fromhex(metadata["digest"]))


def shipped() -> Iterator[Path]:
    """The model files that come with the package."""
    for folder in FOLDERS:
        yield from sorted(folder.glob("*.safetensors"))


def check_device(device: str) -> None:
    """Raises ValueError for a device that is missing or lacks double precision (as MPS does)."""
    try:
        torch.ones(1, dtype=torch.float64, device=device).item()
    except torch.cuda.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, AssertionError, ImportError) as e:
        reason = str(e).partition("\n")[0].partition(". ")[0]
        raise ValueError(f"device {device}: {reason}") from None


# By path, device and type: the file's modification time, length and inode, and its model.
_loaded: dict[tuple[Path, str, torch.dtype], tuple[tuple[int, ...], Model]] = {}


def get_model(
    which: str | Path | Model | None = None, *, id: bytes | None = None, device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Model:  # fmt: skip
    """A model by file, by the name of a shipped one, or by the id that a file carries.

    Loaded once per process, and again when the file has changed. Raises ModelError if there is
    none, or if its id is not ``id``; ValueError for an unusable device (:func:`check_device`).
    """
    check_device(device)
    if isinstance(which, Model):
        model = which
    else:
        path = find(which, id)
        key, about = (path.resolve(), device, dtype), path.stat()
        version = about.st_mtime_ns, about.st_size, about.st_ino
        if key not in _loaded or _loaded[key][0] != version:
            _loaded[key] = version, load_model(path, device, dtype)
        model = _loaded[key][1]
    if id is not None and model.id != id:
        raise ModelError(f"made with model {id.hex()}, not with {model.name} ({model.id.hex()})")
    return model


def get_small(which: str | Path | None, device: str = "cpu") -> Model:
    """A model of the paper's kind, for whole small pictures. Raises ModelError."""
    model = get_model(which or "cifar10", device=device)
    _ = model.unet  # refuses one for photographs
    return model


def find(which: str | Path | None = None, id: bytes | None = None) -> Path:
    """The file of a model; see :func:`get_model`. Raises ModelError."""
    if which is None and id is not None:
        for path in shipped():
            if read_metadata(path)["digest"].startswith(id.hex()):
                return path
        raise ModelError(f"made with model {id.hex()}, which is not installed (give its file)")
    which = which or DEFAULT
    for path in shipped():
        if path.stem == str(which):
            return path
    if Path(which).is_file():
        return Path(which)
    names = ", ".join(p.stem for p in shipped()) or "none"
    raise ModelError(f"no model {which!s} (a file, or one of those shipped: {names})")
