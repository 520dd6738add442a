"""The functions of domain ``ai.lamp``, version 1: what a model written by ``export_onnx`` is made of.

Each is a model-local function whose body consists of standard operators, so that any ONNX runtime can run it. A runtime
that has a kernel of the same domain and name uses that and never looks at the body. Bodies differ by ``Form``; the one
that a node means is its ``overload`` (``Form.tag``). Functions called by functions have no overload, because ONNX
Runtime 1.32 does not find those: in a model of several forms their names are numbered. Inputs that a form does not have
are left out, not empty; their order is always that of the tables.

Shapes: B batch, H query heads, G kv heads, S queries, N keys stored (capacity), D and Dv channels of keys and values,
``tile`` keys per storage tile, P = N / tile, ``subtile`` keys per decision, T = N / subtile, R = H / G * S rows that
share a kv head. Planes hold the bytes of ``runtime/formats/nested8.py`` in the layout of ``runtime/layout.py``:
``k_high``, ``k_residual`` uint8 ``[B, G, P, tile, D/2]``; ``v_high``, ``v_residual`` uint8 ``[B, G, P, Dv/2, tile]``;
``k_scale``, ``v_scale`` float16 ``[B, G, N]`` (float32 of the same values from ``Quantize``, which stores nothing).

The nodes of a graph:

| function | inputs | outputs |
|---|---|---|
| ``Append`` | k ``[B, G, n, D]``, v ``[B, G, n, Dv]``, six planes, positions int64 ``[B]``, rotate_k, rotate_v, balance | six planes |
| ``FusedAttention`` | q ``[B, H, S, D]``, six planes, tau, floor, budget, state, stats, lengths int64 ``[B]`` or ``[1]``, rotate_k, rotate_v, balance, start, mask, bias, sinks | out ``[B, H, S, Dv]``, state, stats |
| ``UncachedAttention`` | q, k, v, tau, floor, budget, state, stats, rotate_k, rotate_v, balance, mask, bias, sinks | out, state, stats |

What the last two consist of, and call:

| function | inputs | outputs |
|---|---|---|
| ``Quantize`` | k, v, rotate_k, rotate_v, balance | six planes |
| ``Visible`` | q, k_scale, lengths, start, mask | live: boolean, broadcastable to ``[B, G, H / G, S, N]``; tiles: the same for sub-tiles |
| ``LookAhead`` | q, k_high, k_scale, live, tiles, rotate_k, balance, bias, sinks | importance ``[B, G, S, T]``, scores ``[B, G, H / G, S, N]`` |
| ``Select`` | importance, tau, floor, state | levels ``[B, G, S, T]`` (``ir.Precision``, as float) |
| ``Attend`` | q, scores, levels, live, k_residual, k_scale, v_high, v_residual, v_scale, rotate_k, rotate_v, balance, bias, sinks, k_exact, v_exact | out; of each row ``[B, G, R, 1]``: the square of its norm, the certificate's estimate of the squared error, the sum of its weights |
| ``Guard`` | the last three, levels, state, stats, floor, budget | state ``[B, G, 4]``, stats int64 ``[B, G, 7]`` |

| input | |
|---|---|
| tau, floor, budget | float ``[G]`` or ``[B, G]``; in exported models initialisers that are graph inputs too, so that a caller may override them |
| state, stats | as of ``runtime/guard.py``; ``UncachedAttention`` pools the batch: ``[1, G, 4]`` and ``[1, G, 7]`` |
| positions | where each sequence's first new row goes; 0 or more, and all rows within the planes |
| lengths | keys of each sequence, new ones included |
| start | int64 ``[B]``: first live key |
| rotate_k, rotate_v | orthonormal ``[D, D]``, ``[Dv, Dv]``: keys, queries and values are multiplied by them from the right |
| balance | float ``[G, D]``: divides keys, multiplies queries |
| mask | boolean, four axes, broadcastable to ``[B, H, S, keys]``; True = attend. Keys: N with a cache, those given without |
| bias | float, four axes, broadcastable to the scores, all keys (as mask) |
| sinks | ``[H]`` |

| attribute | of | meaning (default) |
|---|---|---|
| scale | FusedAttention, UncachedAttention, LookAhead, Attend | factor on q.k (1.0) |
| window | FusedAttention, UncachedAttention, Visible | keys each query looks back; only in forms that have one |
| softcap | FusedAttention, UncachedAttention, LookAhead, Attend | only in forms that have one |
| guard_window, guard_hold, hysteresis | FusedAttention, UncachedAttention, Guard | 16, 64, 0.5 |
| causal, rule, query_bits, subtile, tile, rotation, format, site | Append, FusedAttention, UncachedAttention | what the form means, for kernels and readers: strings ``causal``, ``rule``, ``rotation`` ("hadamard", "none"), ``format`` ("nested8"), ``site``; integers ``query_bits``, ``subtile``, ``tile``. Bodies do not read them |

No function is called ``Attention``: some readers of ONNX files look at the name and not at the domain.

``scores`` are scaled products with the high plane, before soft-cap, bias and mask. Masks and biases of these five have
five axes, as scores (``ByGroup``). Rows at and beyond ``lengths`` may
hold anything finite. Bodies use operators that did not change from opset 18 to 26, and are made at the opset of the
model they go into, because runtimes paste them in.
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lamp_compile.errors import OptionError
from lamp_compile.frontends.onnx.bodies import attend, guard, nibbles, scores, store, whole
from lamp_compile.frontends.onnx.form import Form

if TYPE_CHECKING:
    from onnx import FunctionProto, NodeProto

DOMAIN, VERSION = "ai.lamp", 1
OPSET = 20
"""Opset of exported models: what torch's exporter writes, and rotary embeddings survive any batch size (from 23 on they
are fused into a node that does not)."""
OPSETS = range(18, 27)
"""Opsets at which the bodies mean the same."""
IR_VERSION = 10
"""The first with overloads of functions."""
NODES = ("Append", "FusedAttention", "UncachedAttention")
"""Functions that a graph calls; the others are called by these."""
PLANES = ("k_high", "k_residual", "k_scale", "v_high", "v_residual", "v_scale")
HOT, STATE = ("tau", "floor", "budget"), ("state", "stats")
LABELS: dict[str, Any] = {
    "causal": "", "rule": "energy", "rotation": "hadamard", "format": "nested8", "site": "",
    "query_bits": 8, "subtile": 32, "tile": 32,
}  # fmt: skip
"""Attributes of all three nodes that bodies do not read, and their defaults."""
NUMBERS: dict[str, Any] = {"scale": 1.0, "guard_window": 16, "guard_hold": 64, "hysteresis": 0.5}
"""Attributes of the last two nodes that bodies read."""


def functions_for(forms: Iterable[Form], opset: int = OPSET) -> list[FunctionProto]:
    """All functions that nodes of these forms call, directly or not; to be appended to ``ModelProto.functions``.

    Args:
        forms: Those in use; duplicates do not matter.
        opset: That of the model.

    Raises:
        OptionError: The bodies do not mean the same at this opset.
    """
    if opset not in OPSETS:
        raise OptionError(
            f"opset {opset}", where="ai.lamp", fix=f"a model of opset {OPSETS.start} to {OPSETS.stop - 1}"
        )
    ordered = sorted(set(forms), key=lambda form: form.tag)
    return [
        _function(text, form, opset, f"_{number}" if number > 1 else "")
        for number, form in enumerate(ordered, start=1)
        for text in _texts(form)
    ]


def attributes_for(op: str, form: Form, **given: Any) -> dict[str, Any]:
    """All attributes of a node: labels of its form, ``given`` (``site``, ``scale``, ``window``, ``softcap``, the
    guard's), defaults for the rest. Spelled out, because not every reader of ONNX files knows a function's defaults.

    Raises:
        OptionError: ``given`` has a name that this node does not take.
    """
    found = {
        **LABELS, "causal": form.causal, "rule": form.rule, "query_bits": form.query_bits, "subtile": form.subtile,
        "tile": form.tile, "rotation": "hadamard" if form.rotation else "none",
    }  # fmt: skip
    if op != "Append":
        found.update(NUMBERS)
        found.update({"window": 0} if form.window else {}, **({"softcap": 1.0} if form.softcap else {}))
    for name, value in given.items():
        if name not in found:
            raise OptionError(f"{op} of form {form.tag} has no {name!r}", where=DOMAIN, fix=", ".join(found))
        found[name] = value
    return found


def inputs_of(op: str, form: Form) -> tuple[str, ...]:
    """Names of a node's inputs, in order."""
    turned = ("rotate_k", "rotate_v") if form.rotation else ()
    balance = ("balance",) if form.balance else ()
    seen = tuple(name for name in ("start", "mask", "bias", "sinks") if getattr(form, name))
    if op == "Append":
        return ("k", "v", *PLANES, "positions", *turned, *balance)
    if op == "FusedAttention":
        return ("q", *PLANES, *HOT, *STATE, "lengths", *turned, *balance, *seen)
    return ("q", "k", "v", *HOT, *STATE, *turned, *balance, *seen)


def outputs_of(op: str) -> tuple[str, ...]:
    """Names of a node's outputs, in order; ``_new`` marks what goes in under the same name."""
    return tuple(f"{name}_new" for name in PLANES) if op == "Append" else ("out", "state_new", "stats_new")


def make_node(op: str, form: Form, inputs: Mapping[str, str], outputs: Sequence[str], **attributes: Any) -> NodeProto:
    """A node for a graph. The model needs ``functions_for([form])``, an import of the domain and ``IR_VERSION``.

    Args:
        op: One of ``NODES``.
        form: Which body.
        inputs: Names of values by the names of ``inputs_of``.
        outputs: Names of values in the order of ``outputs_of``.
        **attributes: As of ``attributes_for``.

    Raises:
        OptionError: An attribute that the node does not take.
    """
    from onnx import helper

    found = attributes_for(op, form, **attributes)
    node = helper.make_node(op, [inputs[name] for name in inputs_of(op, form)], outputs, domain=DOMAIN)
    node.overload = form.tag
    node.attribute.extend(helper.make_attribute(name, value) for name, value in found.items())
    return node


def _texts(form: Form) -> list[str]:
    """Those that are called come first: the reference evaluator of the onnx package wants it so."""
    parts = [scores.SHAPES, scores.KEY_ROWS]
    if form.mask or form.bias:
        parts.append(scores.BY_GROUP)
    parts += [
        nibbles.products(form), nibbles.sums(form), scores.prepare_query(form), scores.visible(form),
        scores.logits(form), scores.weights(form), scores.look_ahead(form), scores.select(form),
        attend.dense_keys(), attend.dense_values(), attend.high_values(form),
    ]  # fmt: skip
    if form.guard == "if":
        parts += [attend.gathered_keys(), attend.gathered_values()]
    parts += [attend.attend(form), guard.guard(form)]
    if form.arithmetic == "float":
        parts.append(store.pack())
    parts.append(store.encode(form))
    if form.cache:
        return [*parts, store.append(form), whole.fused_attention(form)]
    return [*parts, store.key_tiles(form), store.quantize(form), whole.attention(form)]


def _function(text: str, form: Form, opset: int, suffix: str) -> FunctionProto:
    from onnx import helper, parser

    head = f'<domain: "{DOMAIN}", opset_import: ["" : {opset}, "{DOMAIN}" : {VERSION}]>\n'
    made: FunctionProto = parser.parse_function(head + text)
    _number(made.node, suffix)
    if made.name not in NODES:
        made.name += suffix
        return made
    made.overload = form.tag
    for name, value in LABELS.items():
        made.attribute_proto.append(helper.make_attribute(name, value))
    return made


def _number(nodes: Any, suffix: str) -> None:
    """Calls within a function mean the functions of the same form, also inside branches."""
    for node in nodes:
        if node.domain == DOMAIN:
            node.op_type += suffix
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _number(attribute.g.node, suffix)
