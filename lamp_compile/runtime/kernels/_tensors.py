"""What launchers need to know of tensors."""

from __future__ import annotations

from functools import cache

import torch
import triton
from torch import Tensor

from lamp_compile.runtime import rotation


@cache
def signs(dim: int, device: torch.device) -> Tensor:
    """The rotation times sqrt(D): a matrix of 1 and -1, float16 ``[D, D]``."""
    with torch.inference_mode(False):
        return torch.from_numpy(rotation.sign_matrix(dim)).to(device=device, dtype=torch.float16).contiguous()


def parts(x: Tensor, balance: Tensor | None) -> int:
    """Halves of float16 that hold a row of x, balanced or not (``_device.rotated``)."""
    return 1 if x.dtype == torch.bfloat16 and balance is None else 2


def padded_half(half: int) -> int:
    """Channels of one nibble, widened to what integer matrix instructions take."""
    return max(32, int(triton.next_power_of_2(half)))


def row_step(setting: Tensor | None) -> int:
    """Step from one sequence to the next of a setting whose first axis may be shared by all."""
    return 0 if setting is None or setting.shape[0] == 1 else setting.stride(0)


def per_head_step(setting: Tensor) -> int:
    """The same of a setting ``[G]`` or ``[B, G]``."""
    return 0 if setting.dim() == 1 else row_step(setting)


def sequence_step(x: Tensor | None) -> int:
    """The same of one number per sequence, or one for all."""
    return 0 if x is None or x.numel() == 1 else x.stride(0)


def broadcast_steps(name: str, x: Tensor | None) -> dict[str, int]:
    """Steps, by argument name, of a mask or bias that broadcasts to ``[B, H, S, N]``."""
    names = [f"{name}_{axis}" for axis in ("b", "h", "s", "key")]
    if x is None:
        return dict.fromkeys(names, 0)
    x = x.reshape((1,) * (4 - x.dim()) + tuple(x.shape))
    return {n: 0 if size == 1 else step for n, size, step in zip(names, x.shape, x.stride(), strict=True)}
