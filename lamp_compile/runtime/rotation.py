"""Orthonormal Hadamard rotations of the head dimension.

x -> x R with R^T R = 1 leaves q.k unchanged and spreads an outlier channel over all channels, which makes the row
easier to quantise. D = m * 2^n with m in 1, 12, 20: Sylvester's doubling on top of Paley's construction (R. E. A. C.
Paley, 1933).
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lamp_compile.errors import OptionError

Matrix = NDArray[np.float64]
KINDS = ("hadamard", "none")
HEAD_DIMS = (16, 24, 32, 40, 48, 64, 80, 96, 128, 160, 192, 256)
"""Head dimensions the runtime accepts: even, with a Hadamard matrix from the constructions above."""


def _paley(prime: int) -> Matrix:
    """A Hadamard matrix of order prime + 1, for a prime that is 3 modulo 4."""
    residues = {(i * i) % prime for i in range(1, prime)}
    matrix = np.ones((prime + 1, prime + 1))
    for i in range(prime):
        matrix[i + 1, 0] = -1
        for j in range(prime):
            matrix[i + 1, j + 1] = 1 if i == j or (j - i) % prime in residues else -1
    return matrix


def _order(head_dim: int) -> tuple[int, int]:
    """(m, 2^n) with m * 2^n = head_dim, m in 1, 12, 20."""
    for base in (1, 12, 20):
        doubled = head_dim // base
        if head_dim % base == 0 and doubled & (doubled - 1) == 0:
            return base, doubled
    raise OptionError(
        f"no Hadamard rotation for head_dim {head_dim}",
        where="rotation='hadamard'",
        fix=f"a head_dim of {', '.join(map(str, HEAD_DIMS))}, or rotation='none'",
    )


@cache
def _matrix(head_dim: int) -> Matrix:
    # numpy, because torch's factories obey whatever mode or default device is set when this is first called.
    base, doubled = _order(head_dim)
    matrix = np.ones((1, 1)) if base == 1 else _paley(base - 1)
    two = np.array([[1.0, 1.0], [1.0, -1.0]])
    while doubled > 1:
        matrix, doubled = np.kron(two, matrix), doubled // 2
    return matrix / math.sqrt(head_dim)


def sign_matrix(head_dim: int) -> NDArray[np.int8]:
    """The rotation times sqrt(D): 1 and -1, for kernels that multiply exactly."""
    return np.rint(_matrix(head_dim) * math.sqrt(head_dim)).astype(np.int8)


def base_order(head_dim: int) -> int:
    """Order of the matrix that is doubled up to ``head_dim``: 1, 12 or 20."""
    return _order(head_dim)[0]


_ready: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}


def _matrix_on(head_dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    key = (head_dim, dtype, device)
    if key in _ready:
        return _ready[key]
    with torch.inference_mode(False):
        made = torch.from_numpy(_matrix(head_dim)).to(device=device, dtype=dtype)
    # Under a fake mode this is a fake tensor: fine for this call, but not to be kept for others.
    if type(made) is Tensor and not made.is_meta:
        _ready[key] = made
    return made


def matrix(head_dim: int, kind: str, like: Tensor) -> Tensor | None:
    """The rotation R ``[D, D]`` in ``like``'s dtype and device, or None for ``kind="none"``.

    Raises:
        OptionError: Unknown kind, or no Hadamard matrix of this size.
    """
    if kind == "none":
        return None
    if kind != "hadamard":
        raise OptionError(f"unknown rotation {kind!r}", where="rotation", fix=f"one of {', '.join(KINDS)}")
    return _matrix_on(head_dim, like.dtype, like.device)


def rotate(x: Tensor, kind: str) -> Tensor:
    """x R over the last dimension."""
    r = matrix(x.shape[-1], kind, x)
    return x if r is None else x @ r


def unrotate(x: Tensor, kind: str) -> Tensor:
    """x R^T over the last dimension: undoes ``rotate``."""
    r = matrix(x.shape[-1], kind, x)
    return x if r is None else x @ r.T
