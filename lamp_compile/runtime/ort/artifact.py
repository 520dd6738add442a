"""What an artifact says about itself: the JSON object under the key ``ai.lamp`` of its metadata, checked against its
inputs and outputs. Nothing in it is evaluated."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lamp_compile.errors import InputError
from lamp_compile.runtime.hot_values import FIELDS, per_head

KEY = "ai.lamp"
VERSION = 1
FIRST_LOGITS = "logits_from"
"""Field that names the input which says whose logits are computed; artifacts without it compute those of all tokens."""
PLANES = ("k_high", "k_residual", "k_scale", "v_high", "v_residual", "v_scale")
GUARD = ("state", "stats")
MOST = 1 << 20
"""No size in an artifact is larger."""
STATE_FIELDS, STATS_FIELDS = 4, 7
GUARD_WINDOW = 16
"""Where an artifact does not say."""


@dataclass(frozen=True)
class Buffer:
    """A tensor of a site that goes in and comes out again.

    Attributes:
        past: Name of the input.
        present: Name of the output that takes its place.
        dtype: numpy's name of the element type.
        shape: After the batch; None is the axis that grows with the keys.
        keys: Keys per step of that axis; 0 where nothing grows.
    """

    past: str
    present: str
    dtype: str
    shape: tuple[int | None, ...]
    keys: int = 0

    def shape_for(self, batch: int, capacity: int) -> tuple[int, ...]:
        """Its shape for so many sequences of so many keys."""
        return (batch, *(capacity // self.keys if n is None else n for n in self.shape))


@dataclass(frozen=True)
class Site:
    """One attention of the artifact.

    Attributes:
        name: Module path.
        heads, kv_heads, head_dim, value_dim, tile: Its sizes; heads and tile are 0 where keys stay in float.
        buffers: Planes, guard state and statistics by name; ``k`` and ``v`` where keys stay in float.
        controls: Inputs of tau, floor and budget by name; none where keys stay in float.
        row: The site's row of inputs that all sites share, or None where each has its own.
        plan: What tau, floor and budget start at.
        window: Steps of the guard's running mean.
    """

    name: str
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    tile: int
    buffers: Mapping[str, Buffer]
    controls: Mapping[str, str]
    row: int | None
    plan: Mapping[str, Sequence[float]]
    window: int = GUARD_WINDOW


@dataclass(frozen=True)
class Artifact:
    """A decoder with its cache at the boundary, or a plain module (no sites with buffers).

    Attributes:
        kind: "decoder" or "module".
        inputs: Names of the inputs ``tokens`` ``[B, S]`` and ``slots`` ``[B]``, where each sequence's first new row
            goes.
        logits: Name of that output.
        logits_from: Name of the input ``[1]`` that says from which of the new tokens on logits are computed, negative
            from the end; empty where all are.
        sites: With planes first, then those whose keys stay in float.
        max_length: Tokens the model was made for, or None.
        stop: Token ids that end a sequence.
        about: The whole object.
    """

    kind: str
    inputs: Mapping[str, str]
    logits: str
    logits_from: str
    sites: tuple[Site, ...]
    max_length: int | None
    stop: tuple[int, ...]
    about: Mapping[str, Any]

    @property
    def planes(self) -> tuple[Site, ...]:
        """Sites whose keys and values are planes."""
        return tuple(site for site in self.sites if site.tile)


def read(session: Any, where: str) -> Artifact:
    """The artifact that an ``onnxruntime.InferenceSession`` has loaded.

    Raises:
        InputError: It is no artifact of ours, or its description does not fit its graph.
    """
    text = session.get_modelmeta().custom_metadata_map.get(KEY)
    if text is None:
        raise InputError(
            f"the model has no metadata {KEY!r}: it was not written by export_onnx",
            where=where,
            fix="lamp_compile.export_onnx(model, ...), or onnxruntime.InferenceSession for other models",
        )
    try:
        about = json.loads(text)
        if about["version"] != VERSION:
            raise ValueError(f"layout version {about['version']!r}, this package reads {VERSION}")
        made = _artifact(about)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        what = f"no field {error}" if isinstance(error, KeyError) else str(error)
        raise InputError(
            f"metadata {KEY!r} cannot be read: {what}", where=where, fix="export the model again"
        ) from error
    _match(made, session, where)
    return made


def _artifact(about: Any) -> Artifact:
    kind = about["kind"]
    if kind == "module":
        return Artifact(kind, {}, "", "", (), None, (), about)
    if kind != "decoder":
        raise ValueError(f"kind {kind!r}")
    inputs = {name: _name(value) for name, value in about["inputs"].items() if value is not None}
    if set(inputs) != {"tokens", "slots"}:
        raise ValueError(f"inputs for {', '.join(inputs)} instead of tokens and slots")
    sites = [_planes_site(row) for row in about["sites"]]
    sites += [_float_site(row) for row in about.get("float_sites", ())]
    if len({site.name for site in sites}) != len(sites):
        raise ValueError("two sites of one name")
    chosen = _name(about[FIRST_LOGITS]) if FIRST_LOGITS in about else ""
    longest, stop = about.get("max_length"), about.get("eos_token_id")
    stop = () if stop is None else (stop,) if isinstance(stop, int) else tuple(stop)
    return Artifact(
        kind, inputs, _name(about["logits"]), chosen, tuple(sites), None if longest is None else _size(longest),
        tuple(int(token) for token in stop), about,
    )  # fmt: skip


def _planes_site(row: Any) -> Site:
    kv_heads, dim, value_dim, tile = (_size(row[name]) for name in ("kv_heads", "head_dim", "value_dim", "tile"))
    if dim % 2 or value_dim % 2 or tile not in (32, 64, 128):
        raise ValueError(f"site {row['name']!r}: head sizes {dim} and {value_dim}, storage tiles of {tile}")
    shapes: dict[str, tuple[str, tuple[int | None, ...], int]] = {
        "state": ("float32", (kv_heads, STATE_FIELDS), 0),
        "stats": ("int64", (kv_heads, STATS_FIELDS), 0),
    }
    for letter, last in (("k", (tile, dim // 2)), ("v", (value_dim // 2, tile))):
        shapes[f"{letter}_high"] = shapes[f"{letter}_residual"] = ("uint8", (kv_heads, None, *last), tile)
        shapes[f"{letter}_scale"] = ("float16", (kv_heads, None), 1)
    buffers = {
        name: Buffer(_name(row["past"][name]), _name(row["present"][name]), *shapes[name]) for name in (*PLANES, *GUARD)
    }
    controls = {name: _name(row["controls"][name]) for name in FIELDS}
    at = row["controls"].get("row")
    return Site(
        _name(row["name"]), _size(row["heads"]), kv_heads, dim, value_dim, tile, buffers, controls,
        None if at is None else _size(at + 1) - 1,
        {name: per_head(row["plan"][name], kv_heads, f"{name} of the plan") for name in FIELDS},
        _size(row["plan"].get("window", GUARD_WINDOW)),
    )  # fmt: skip


def _float_site(row: Any) -> Site:
    kv_heads, dim = _size(row["kv_heads"]), _size(row["head_dim"])
    sizes = {"k": dim, "v": _size(row.get("value_dim", dim))}
    buffers = {
        name: Buffer(_name(row["past"][name]), _name(row["present"][name]), "float32", (kv_heads, None, sizes[name]), 1)
        for name in ("k", "v")
    }
    return Site(_name(row["name"]), 0, kv_heads, dim, sizes["v"], 0, buffers, {}, None, {})


def _name(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise TypeError(f"{value!r} is no name")
    return value


def _size(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= MOST:
        raise ValueError(f"{value!r} is no size")
    return value


TYPES = {
    "uint8": "tensor(uint8)", "float16": "tensor(float16)", "float32": "tensor(float)", "int64": "tensor(int64)",
}  # fmt: skip


def _match(artifact: Artifact, session: Any, where: str) -> None:
    """Raise InputError unless the graph has the inputs and outputs named, of these types and sizes."""
    given = {x.name: x for x in (*session.get_inputs(), *session.get_overridable_initializers())}
    made = {x.name: x for x in session.get_outputs()}
    wanted: list[tuple[dict[str, Any], str, str, tuple[int | None, ...] | None]] = []
    wanted += [(given, name, "int64", None) for name in artifact.inputs.values()]
    for site in artifact.sites:
        for buffer in site.buffers.values():
            sizes = (None, *buffer.shape)
            wanted += [(given, buffer.past, buffer.dtype, sizes), (made, buffer.present, buffer.dtype, sizes)]
        for name in site.controls.values():
            wanted.append((given, name, "float32", (site.kv_heads,) if site.row is None else (None, site.kv_heads)))
    if artifact.kind == "decoder":
        wanted.append((made, artifact.logits, "float32", None))
        wanted += [(given, artifact.logits_from, "int64", (1,))] if artifact.logits_from else []
    for there, name, dtype, shape in wanted:
        found = there.get(name)
        side = "input" if there is given else "output"
        if found is None or found.type != TYPES[dtype] or not _fits(found.shape, shape):
            raise InputError(
                f"{side} {name!r} is {'missing' if found is None else f'{found.type} {found.shape}'}, "
                f"the metadata says {dtype} {'' if shape is None else list(shape)}".rstrip(),
                where=where,
                fix="export the model again",
            )


def _fits(found: Any, wanted: tuple[int | None, ...] | None) -> bool:
    if wanted is None or not found:
        return True
    pairs = zip(found, wanted, strict=False)
    return len(found) == len(wanted) and all(b is None or not isinstance(a, int) or a == b for a, b in pairs)
