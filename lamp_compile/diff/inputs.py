"""What two sides of a comparison can be, told apart by what they hold and not by their names."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from lamp_compile import __version__
from lamp_compile.diff.canonical import canonical
from lamp_compile.diff.graph import Program
from lamp_compile.diff.sites import from_plan
from lamp_compile.diff.snapshot import MAGIC, Snapshot
from lamp_compile.errors import InputError
from lamp_compile.plan import Plan
from lamp_compile.plan_fields import jsonable

MOST_TEXT = 2**28
"""Bytes of a snapshot or plan."""
KINDS = "an ONNX file, a torch.export archive (.pt2), a plan (.json) or a snapshot (.lamp.txt)"


def kind_of(path: Path) -> str:
    """Which kind: "onnx", "torch", "plan" or "snapshot", by the first bytes.

    Raises:
        InputError: No such file, a folder, empty, or of no kind that is known.
    """
    try:
        with path.open("rb") as file:
            head = file.read(4096)
    except OSError as error:
        fix = "name the file in it" if path.is_dir() else "check the path"
        raise InputError(f"cannot read it: {error.strerror}", where=str(path), fix=fix) from None
    if head.startswith(MAGIC.split(" ", 1)[0].encode()):
        return "snapshot"
    if head.startswith(b"PK\x03\x04"):
        return "torch"
    if head.lstrip().startswith(b"{"):
        return "plan"
    if head[:1] == b"\x08" or (head and path.suffix == ".onnx"):
        return "onnx"
    what = "it is empty" if not head else f"it begins with {head[:12]!r}"
    raise InputError(f"of no known kind: {what}", where=str(path), fix=KINDS)


def snapshot(thing: Any, *, weights: bool = False) -> Snapshot:
    """The canonical snapshot of a graph or plan.

    Args:
        thing: A path, an ``onnx.ModelProto``, a ``torch.export.ExportedProgram``, a ``torch.fx.GraphModule``, a plan,
            a model
            from ``lamp_compile.compile`` (its plan), or a snapshot, which is given back as it is.
        weights: Hash the values of parameters too.

    Raises:
        InputError: It is of no known kind, cannot be read, or is broken.
        PlanError: A plan is malformed.
    """
    if isinstance(thing, Snapshot):
        return thing
    if isinstance(thing, str | Path):
        return _from_file(Path(thing), weights)
    made = canonical(_program(thing, weights))
    return replace(made, versions={"lamp_compile": __version__, **made.versions})


def _from_file(path: Path, weights: bool) -> Snapshot:
    kind = kind_of(path)
    if kind == "snapshot":
        return Snapshot.parse(_text(path), where=str(path))
    if kind == "plan":
        text = _text(path)
        if '"sites"' not in text:
            raise InputError("a JSON file that is no plan", where=str(path), fix=KINDS)
        return snapshot(Plan.from_json(text, where=str(path)))
    if kind == "torch":
        from lamp_compile.diff.readers.pt2 import read_pt2

        program = read_pt2(path, weights)
    else:
        from lamp_compile.diff.readers.onnx_model import read_model
        from lamp_compile.frontends.onnx.files.reading import Folder, load

        program = read_model(load(path, domains="*"), Folder(path), weights)
    made = canonical(program)
    return replace(made, versions={"lamp_compile": __version__, **made.versions})


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > MOST_TEXT:
            raise InputError(f"larger than {MOST_TEXT:,} bytes", where=str(path), fix="a snapshot of a smaller graph")
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8 text: {error.reason}", where=str(path), fix="write it again") from None
    except OSError as error:
        raise InputError(f"cannot read it: {error.strerror}", where=str(path), fix="check the path") from None


def _program(thing: Any, weights: bool) -> Program:
    if isinstance(thing, Plan):
        return Program("plan", sites=from_plan(thing), facts=_whole(thing))
    module = type(thing).__module__.split(".")[0]
    if module == "onnx":
        from lamp_compile.diff.readers.onnx_model import read_model
        from lamp_compile.frontends.onnx.files import reading

        if hasattr(thing, "opset_import") and hasattr(thing, "graph"):
            reading.check(thing, "model", domains="*")
            return read_model(thing, None, weights)
    else:
        from torch.export import ExportedProgram
        from torch.fx import GraphModule

        from lamp_compile.diff.readers import fx

        if isinstance(thing, ExportedProgram):
            return fx.read_exported(thing, weights)
        if isinstance(thing, GraphModule):
            return fx.read_graph_module(thing, weights)
        lamp = getattr(thing, "lamp", None)
        if lamp is not None and hasattr(lamp, "report"):
            return _program(lamp.report().plan, weights)
    raise InputError(
        f"cannot make a snapshot of a {type(thing).__name__}", where="snapshot",
        fix=f"{KINDS}; in memory an ExportedProgram, GraphModule, ModelProto, Plan or compiled model",
    )  # fmt: skip


def _whole(plan: Plan) -> dict[str, str]:
    """What a plan says of the model as a whole. How kernels cut their work changes the order of sums."""
    facts = {f"launch.{name}": launch.text() or "{}" for name, launch in plan.launch.items()}
    if plan.shadow:
        facts["shadow"] = f"{plan.shadow:g}"
    for name, part in (("control", plan.control), ("network", plan.network)):
        if part is not None:
            facts[name] = json.dumps(jsonable(asdict(part)), sort_keys=True)
    return facts
