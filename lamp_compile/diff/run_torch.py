"""A torch program in memory, run eagerly on a copy of its buffers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule
from torch.utils import _pytree

from lamp_compile.diff.readers.fx import _flat
from lamp_compile.errors import InputError


def run_program(program: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Outputs as ``output.0`` and so on.

    Raises:
        InputError: It does not run on these inputs.
    """
    given = [tensor(value) for value in inputs.values()]
    try:
        with torch.no_grad():
            result = _exported(program, given) if isinstance(program, ExportedProgram) else _graph(program, given)
    except (RuntimeError, TypeError, ValueError, IndexError, AssertionError, AttributeError) as error:
        raise InputError(
            f"the program does not run on these inputs: {str(error).splitlines()[0][:300]}", where="--numerics",
            fix="other sizes, such as --size d1=64",
        ) from None  # fmt: skip
    return named(_flat(result))


def named(flat: list[Any]) -> dict[str, Any]:
    """Results as arrays, by place."""
    return {f"output.{index}": array(x) for index, x in enumerate(flat)}


def tensor(value: Any) -> Tensor:
    """A NumPy array as a tensor, bfloat16 too."""
    if str(getattr(value, "dtype", "")) == "bfloat16":
        return torch.from_numpy(value.view("uint16").copy()).view(torch.bfloat16)
    return torch.as_tensor(value)


def array(x: Any) -> Any:
    """A result as a NumPy array."""
    import numpy as np

    if not isinstance(x, Tensor):
        return np.asarray(x)
    x = x.detach().cpu()
    return x.float().numpy() if x.dtype in (torch.bfloat16, torch.float16) else x.numpy()


@contextmanager
def _kept(buffers: Iterable[Tensor]) -> Iterator[None]:
    """Buffers as they were, whatever the program writes into them."""
    saved = [(buffer, buffer.clone()) for buffer in buffers]
    try:
        yield
    finally:
        for buffer, before in saved:
            buffer.copy_(before)


def _exported(program: ExportedProgram, given: list[Tensor]) -> Any:
    held = {**program.state_dict, **program.constants}
    names = program.graph_signature.buffers
    args, kwargs = _pytree.tree_unflatten(given, program.call_spec.in_spec)
    with _kept(held[name] for name in names if isinstance(held.get(name), Tensor)):
        return program.module()(*args, **kwargs)


def _graph(program: GraphModule, given: list[Tensor]) -> Any:
    with _kept(program.buffers()):
        return program(*given)
