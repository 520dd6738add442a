"""What launchers need to know of tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from lamp_compile.runtime import rotation

_ready: dict[tuple[int, torch.device], Tensor] = {}


def signs(dim: int, device: torch.device) -> Tensor:
    """The rotation times sqrt(D): a matrix of 1 and -1, float16 ``[D, D]``."""
    if (dim, device) in _ready:
        return _ready[dim, device]
    with torch.inference_mode(False):
        made = torch.from_numpy(rotation.sign_matrix(dim)).to(device=device, dtype=torch.float16).contiguous()
    # Under a fake mode this is a fake tensor: fine for this call, but not to be kept for others.
    if type(made) is Tensor and not made.is_meta:
        _ready[dim, device] = made
    return made


def power_of_two(n: int) -> int:
    """The least power of two that is n or more. Triton's own is made for kernels, and slow on the host."""
    return 1 << max(0, n - 1).bit_length()


def parts(x: Tensor, balance: Tensor | None) -> int:
    """Halves of float16 that hold a row of x, balanced or not (``_device.turned``)."""
    return 1 if x.dtype == torch.bfloat16 and balance is None else 2


def padded_half(half: int) -> int:
    """Channels of one nibble, widened to what integer matrix instructions take."""
    return max(32, power_of_two(half))


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


def per_key(mask: Tensor) -> bool:
    """Whether a mask is one number per key, shared by heads and queries."""
    return mask.dim() == 1 or all(size == 1 for size in mask.shape[-3:-1])
