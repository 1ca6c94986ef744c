"""The optimizer: Muon for the inner convolutions, AdamW for everything else.

Muon (Jordan et al. 2024) replaces a matrix's momentum by the nearest orthogonal matrix, so that all
directions learn at the same pace. AdamW trains all parameters that are not matrices between hidden
channels: biases, norms, embeddings, the first and the last layers. Both have the same learning
rate, because Muon's steps are scaled to the magnitude of AdamW's (Liu et al. 2025, "Muon is
scalable for LLM training", eq. 4).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import DdpmcError

# The first and the last layers.
_ENDS = ("stem", "map_in", "block_in", "embed", "out", "scales", "block_out")


class Optimizer:
    """AdamW, and with ``muon`` also Muon, for a network whose convolutions are channels-last."""

    def __init__(self, net: nn.Module, lr: float, weight_decay: float, muon: bool) -> None:
        """Raises DdpmcError for a torch that is too old, though not for the codec."""
        if not hasattr(torch.optim, "Muon"):
            raise DdpmcError(f"training needs torch 2.9 or newer, this is {torch.__version__}")
        self.named = dict(net.named_parameters())
        self.matrices: dict[str, Tensor] = {}  # views (out, in x height x width)
        if muon:
            for name, p in self.named.items():
                if p.dim() == 4 and name.split(".")[0] not in _ENDS:
                    self.matrices[name] = nn.Parameter(_matrix(p.detach()))
        others = [p for name, p in self.named.items() if name not in self.matrices]
        device = others[0].device
        self.adam = torch.optim.AdamW(
            others, lr, betas=(0.9, 0.99), weight_decay=weight_decay,
            fused=device.type in ("cpu", "cuda"),
        )  # fmt: skip
        self.all: list[torch.optim.Optimizer] = [self.adam]
        if self.matrices:
            self.muon = torch.optim.Muon(
                self.matrices.values(), lr, weight_decay=weight_decay, momentum=0.95,
                adjust_lr_fn="match_rms_adamw",
            )  # fmt: skip
            self.all.append(self.muon)

    def step(self, lr: float) -> None:
        """One step at this learning rate, by the gradients of the network's parameters."""
        for name, matrix in self.matrices.items():
            grad = self.named[name].grad
            matrix.grad = None if grad is None else _matrix(grad)
        for optimizer in self.all:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
        for p in self.named.values():
            p.grad = None

    def _of(self, name: str) -> tuple[torch.optim.Optimizer, Tensor]:
        if name in self.matrices:
            return self.muon, self.matrices[name]
        return self.adam, self.named[name]

    def tensors(self) -> dict[str, Tensor]:
        """The state, named ``KEY.PARAMETER``; that of matrices has their flattened shape."""
        out = {}
        for name in self.named:
            optimizer, p = self._of(name)
            for key, value in optimizer.state.get(p, {}).items():
                out[f"{key}.{name}"] = value.detach().reshape(p.shape if value.dim() else (1,))
        return out

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Restore :meth:`tensors`. Parameters without a state of their optimizer start afresh."""
        keys = {"adam": ("step", "exp_avg", "exp_avg_sq"), "muon": ("momentum_buffer",)}
        for name in self.named:
            optimizer, p = self._of(name)
            wanted = keys["adam" if optimizer is self.adam else "muon"]
            if not all(f"{key}.{name}" in tensors for key in wanted):
                continue
            # A state has the parameter's device and memory layout. The step count is a scalar,
            # which fused optimizers need on the device.
            optimizer.state[p] = {
                key: tensors[f"{key}.{name}"].reshape(()).to(p.device)
                if key == "step"
                else torch.empty_like(p).copy_(tensors[f"{key}.{name}"])
                for key in wanted
            }


def _matrix(x: Tensor) -> Tensor:
    """(O, I, H, W) as (O, H W I): a view if x is channels-last, else a copy."""
    return x.permute(0, 2, 3, 1).flatten(1)
