"""Find every attention of a graph: run the readers over their anchors, and report each softmax that nobody claims."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace

from torch.fx import GraphModule, Node

from lamp_compile.errors import ModelError
from lamp_compile.ir import AttentionSite, Found, Refusal
from lamp_compile.passes.capture import Program
from lamp_compile.passes.patterns import all_patterns
from lamp_compile.passes.patterns._base import NoMatch, Pattern, Refuse
from lamp_compile.passes.patterns._dialect import Call, aten, read
from lamp_compile.passes.patterns._values import Emitter

_DECOMPOSED = "if this was an attention: rewrite it before run_decompositions"
_UNREAD = {
    "flex_attention": ("flex_attention carries its mask and score change as code", "use the SDPA spelling"),
    "lowered_sdpa": (
        "this graph was lowered to a device's own attention already",
        "rewrite it before run_decompositions",
    ),
    "safe_softmax": ("this graph was decomposed already", "rewrite it before run_decompositions"),
    "leaf_module": ("this capture keeps the module whole", "capture it with torch.export"),
    "native_multihead": ("the fused inference path of nn.MultiheadAttention", "capture it through torch.compile"),
}
_ANCHORS = ("sdpa", "softmax", "multihead", "encoder_layer", *_UNREAD)


def find_sites(program: Program) -> Found:
    """Read all sites, in graph order. Operators that hold more than attention are expanded in the program's copy first.

    Raises:
        ModelError: The graph was captured in training mode.
    """
    refusals: list[Refusal] = []
    expanded: set[Node] = set()
    for node in list(program.graph.nodes):
        call = _read(node)
        for pattern in all_patterns().values():
            if call is not None and pattern.expand is not None and call.op in pattern.roots:
                refusals.extend(_expand(node, call, pattern))
                expanded.add(node)
    sites: list[AttentionSite] = []
    unclaimed: list[Refusal] = []
    names: Counter[str] = Counter()
    for node in list(program.graph.nodes):
        call = _read(node)
        if node in expanded or call is None:
            unclaimed.extend(_nested(node))
            continue
        readers = [p for p in all_patterns().values() if p.read is not None and call.op in p.roots]
        if call.op in _UNREAD:
            reason, fix = _UNREAD[call.op]
            unclaimed.append(Refusal(site_name(node), reason, fix, node=node.name))
        outcome = _first_outcome(node, call, readers)
        if isinstance(outcome, AttentionSite):
            name = outcome.name or site_name(node)
            names[name] += 1
            unique = name if names[name] == 1 else f"{name}#{names[name]}"
            sites.append(replace(outcome, name=unique, stack_trace=node.meta.get("stack_trace") or ""))
        elif isinstance(outcome, Refusal):
            (refusals if outcome.pattern else unclaimed).append(outcome)
    return Found(tuple(sites), tuple(refusals), tuple(unclaimed))


def site_name(node: Node) -> str:
    """The module path of a node: one spelling for Dynamo's ``L['self'].layers[0]`` and torch.export's ``layers.0``."""
    stack = node.meta.get("nn_module_stack") or {}
    path = ""
    for entry in stack.values():
        path = entry[0] if isinstance(entry, tuple) else str(entry)
    # A decorated forward of transformers 5.24 has the model as the first of its arguments.
    path = re.sub(r"^[LG]\[(['\"])(?:args\1\]\[0\]|[^'\"]*\1\])", "", path)
    path = re.sub(r"\.(_modules|__self__)\b", "", path)
    path = re.sub(r"\[(['\"]?)([^'\"\]]*)\1\]", r".\2", path)
    return re.sub(r"@\d+", "", path).strip(".") or "attention"


def _read(node: Node) -> Call | None:
    """The canonical form of a node, whose operator the table knows or a pattern declares."""
    call = read(node)
    for pattern in all_patterns().values():
        if call is None and node.op in ("call_function", "call_method") and node.target in pattern.operators:
            named = dict(zip(pattern.operators[node.target], node.args, strict=False))
            return Call(pattern.name, {**named, **node.kwargs})
    return call


def _first_outcome(node: Node, call: Call, readers: list[Pattern]) -> AttentionSite | Refusal | None:
    """The site of the first reader that knows the node; else its refusal (``pattern`` set); else why nobody matched."""
    missing: list[str] = []
    for pattern in readers:
        assert pattern.read is not None
        emit = Emitter(node)
        try:
            return pattern.read(node, call, emit)
        except NoMatch as no_match:
            emit.undo()
            missing.append(str(no_match))
        except Refuse as refuse:
            emit.undo()
            return _refusal(node, refuse, pattern)
    if not readers:
        return None
    fix = _DECOMPOSED if node.target is aten._softmax.default else ""
    return Refusal(site_name(node), "; ".join(missing), fix, node=node.name)


def _expand(node: Node, call: Call, pattern: Pattern) -> list[Refusal]:
    assert pattern.expand is not None
    emit = Emitter(node)
    try:
        pattern.expand(node, call, emit)
    except (NoMatch, Refuse) as outcome:
        emit.undo()
        refuse = outcome if isinstance(outcome, Refuse) else Refuse(str(outcome))
        return [_refusal(node, refuse, pattern)]
    return []


def _refusal(node: Node, refuse: Refuse, pattern: Pattern) -> Refusal:
    name = site_name(node)
    if refuse.training:
        raise ModelError(refuse.reason, where=name, fix=refuse.fix)
    return Refusal(name, refuse.reason, refuse.fix, pattern.name, node.name)


def _nested(node: Node) -> list[Refusal]:
    """A child graph is not entered: say so when there is attention in it."""
    owner = node.graph.owning_module
    if node.op != "call_function" or owner is None:
        return []
    found = []
    for argument in node.all_input_nodes:
        child = getattr(owner, str(argument.target), None) if argument.op == "get_attr" else None
        for inner in child.graph.nodes if isinstance(child, GraphModule) else ():
            call = read(inner)
            if call is not None and call.op in _ANCHORS:
                reason = f"it is inside a nested region ({node.target})"
                fix = "compile the model without nested regions"
                found.append(Refusal(site_name(inner), reason, fix, node=inner.name))
    return found
