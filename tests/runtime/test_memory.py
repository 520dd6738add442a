"""A decode step of the reference never holds keys or values as floats for the whole context."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lamp_compile.ir import Precision
from lamp_compile.runtime import formats, reference
from lamp_compile.runtime.arguments import Scores, Visibility

KEYS, DIM, KV_HEADS = 2048, 64, 2


class Largest(TorchDispatchMode):
    """Remembers the largest float32 or float64 tensor that any operation returned, in elements."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.dtype in (torch.float32, torch.float64):
                self.elements = max(self.elements, x.numel())
        return out


@pytest.mark.parametrize("name", sorted(formats.all_formats()))
def test_decode_step_allocates_no_float_keys_or_values(name: str) -> None:
    k, v = torch.randn(1, KV_HEADS, KEYS, DIM), torch.randn(1, KV_HEADS, KEYS, DIM)
    q, visible, scores = torch.randn(1, 4, 1, DIM), Visibility(KEYS), Scores(DIM**-0.5, rotation="hadamard")
    planes = reference.quantize(k, v, None, name, name, "hadamard", 128)
    levels = torch.randint(1, 3, (1, KV_HEADS, 1, KEYS // 32), dtype=torch.uint8)
    assert set(levels.unique().tolist()) == {Precision.HIGH, Precision.BOTH}
    with Largest() as largest:
        reference.look_ahead(q, planes.k_high, planes.k_scale, None, visible, scores, name, "energy", 32)
        reference.attend(q, planes, levels, None, None, visible, scores, name, name, 32)
    assert 0 < largest.elements <= k.numel() / 4
    assert planes.bytes * 8 / (k.numel() + v.numel()) == formats.get(name).bits_per_value(DIM)
