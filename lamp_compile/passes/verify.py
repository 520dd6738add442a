"""The check between the stages: what a rewritten graph must look like after each pass. Always on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from lamp_compile.errors import OptionError, PassError
from lamp_compile.ir import AttentionSite
from lamp_compile.passes._nodes import OPS, lamp_nodes, outcome
from lamp_compile.passes.capture import Program
from lamp_compile.passes.patterns._dialect import aten, bind
from lamp_compile.passes.patterns._values import same_shape, tensor
from lamp_compile.runtime import formats

# After which pass a site consists of which nodes, in this order: without a cache, with one.
STAGES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "meet": (("attention",), ("cached",)),
    "insert_lookahead": (("quantize", "look_ahead", "attention"), ("look_ahead", "cached")),
    "insert_selector": (("quantize", "look_ahead", "select", "attend"), ("look_ahead", "select", "attend", "cached")),
    "insert_guard": (
        ("quantize", "look_ahead", "select", "attend", "guard"),
        ("look_ahead", "select", "attend", "guard"),
    ),
    "fuse": ((), ("fused_attention",)),
}
_HOT = {
    "select": ("tau", "floor", "state"),
    "guard": ("state", "stats", "floor", "budget"),
    "fused_attention": ("tau", "floor", "budget", "state", "stats"),
    "fused_predicted": ("tau", "floor", "budget", "state", "stats", "history", "trust"),
}
_FUSED = ("fused_attention", "fused_predicted")


@dataclass(frozen=True)
class Expected:
    """What must not change about a site: its output, and what each of its readers saw."""

    site: AttentionSite
    value: Any
    readers: tuple[Node, ...]

    @staticmethod
    def of(site: AttentionSite) -> Expected:
        """Taken before the first pass."""
        out = outcome(site.root, 0) if site.cache is not None else [site.root]
        found = tensor(out[0]) if out else None
        return Expected(site, found, tuple(reader for node in out for reader in node.users))


def verify(program: Program, stage: str, expected: Iterable[Expected]) -> None:
    """Check all rewritten sites after a pass.

    Raises:
        PassError: Naming the pass and the site.
    """
    graph = program.graph
    try:
        graph.lint()
    except RuntimeError as error:
        raise PassError(f"{stage} left an invalid graph: {error}", where=stage, fix="please report it") from error
    order = {node: index for index, node in enumerate(graph.nodes)}
    for item in expected:
        where = f"pass {stage}, site {item.site.name}"
        found = lamp_nodes(graph, item.site.name)
        wanted = _wanted(stage, item.site)
        found.pop("quantize", None) if "quantize" not in wanted else None
        if tuple(found) != wanted:
            raise _fault(f"expected the nodes {', '.join(wanted)}, found {', '.join(found) or 'none'}", where)
        if item.site.cache is None and item.site.root in order:
            raise _fault(f"the original {item.site.root} is still there", where)
        _check_formats(found, where)
        _check_output(item, found, where)
        _check_hot(found, where)
        if "guard" in found and item.site.cache is None:
            _check_written_back(found["guard"], where)


def _wanted(stage: str, site: AttentionSite) -> tuple[str, ...]:
    """The nodes of a site after a pass. A network predicts in front of them, is arbitrated with the look-ahead, and
    audited in the end."""
    wanted = STAGES[stage][site.cache is not None]
    if site.cache is None or "predicted" not in site.cache.nodes:
        return wanted
    if stage == "fuse":
        return ("fused_predicted",)
    named = {"cached": ("predicted",), "look_ahead": ("look_ahead", "arbitrate"), "guard": ("guard", "audit")}
    return ("predict", *(name for op in wanted for name in named.get(op, (op,))))


def _check_formats(found: dict[str, Node], where: str) -> None:
    for node in found.values():
        for name, setting in bind(node).items():
            if name in ("k_format", "v_format"):
                try:
                    formats.get(setting)
                except OptionError as error:
                    raise _fault(f"{node} has {name} {setting!r}: {error.what}", where) from error


def _check_output(item: Expected, found: dict[str, Node], where: str) -> None:
    last = next(found[op] for op in (*_FUSED, "attend", "attention", "cached", "predicted") if op in found)
    if item.value is None:
        return
    out = (
        tensor(last)
        if last.target in (OPS["attention"], *(OPS[op] for op in _FUSED))
        else tensor(outcome(last, 0)[0])
        if outcome(last, 0)
        else None
    )
    if out is None:
        raise _fault("nothing takes the attention's output", where)
    wanted = item.value.unsqueeze(1) if item.value.dim() == 3 else item.value
    if not same_shape(out, wanted):
        raise _fault(f"the output is {tuple(out.shape)}, it was {tuple(item.value.shape)}", where)
    reached = _reached(last)
    for reader in item.readers:
        if reader.graph is last.graph and not reader._erased and reader not in reached:
            raise _fault(f"{reader} no longer reads the attention's output", where)
    for reader in item.readers:
        for node in reader.all_input_nodes if not reader._erased else ():
            value = tensor(node)
            if (
                node in reached
                and value is not None
                and value.dim() == item.value.dim()
                and value.dtype != item.value.dtype
            ):
                raise _fault(f"the output is {value.dtype}, it was {item.value.dtype}", where)


def _reached(start: Node, depth: int = 4) -> set[Node]:
    """Nodes within a few steps downstream: result, squeeze, cast, reader."""
    reached, edge = {start}, {start}
    for _ in range(depth):
        edge = {user for node in edge for user in node.users}
        reached |= edge
    return reached


def _check_hot(found: dict[str, Node], where: str) -> None:
    for op, names in _HOT.items():
        if op not in found:
            continue
        bound = bind(found[op])
        for name in names:
            node = bound[name]
            if not isinstance(node, Node):
                raise _fault(f"lamp::{op} has no {name}", where)
            if node.op not in ("placeholder", "get_attr") and node.target not in (aten.copy_.default,):
                _check_cache_owned(node, name, op, where)
    if "select" in found and "guard" in found:
        select, guard = bind(found["select"]), bind(found["guard"])
        for name in ("floor", "state"):
            if select[name] is not guard[name]:
                raise _fault(f"select and guard read different {name} tensors", where)


def _check_cache_owned(node: Node, name: str, op: str, where: str) -> None:
    """A cache may hand in a view of its tensors; anything computed from other values is not hot."""
    if tensor(node) is None:
        raise _fault(f"{name} of lamp::{op} is not a tensor", where)


def _check_written_back(guard: Node, where: str) -> None:
    bound = bind(guard)
    for index, name in enumerate(("state", "stats")):
        copies = [
            user
            for result in outcome(guard, index)
            for user in result.users
            if user.target is aten.copy_.default and user.args[0] is bound[name]
        ]
        if not copies:
            raise _fault(f"the guard's new {name} is not written back", where)


def _fault(what: str, where: str) -> PassError:
    return PassError(what, where=where, fix="this is a bug in lamp_compile: please report it with the program")
