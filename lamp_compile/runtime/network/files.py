"""The file of a look-ahead network: safetensors with what it was trained for in the header. Everything is checked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lamp_compile.errors import PlanError
from lamp_compile.runtime.network import gate
from lamp_compile.runtime.network.gate import Gate

VERSION = 1
HEADER = "lamp_lookahead"
RETRAIN = "lamp-compile train-lookahead MODEL --text FILE --out FILE.safetensors"
MOST_BYTES = 1 << 30
HALF = ("query", "key", "ahead")
"""Weights that stay in 16 bits as they are read: they are most of a gate."""


@dataclass(frozen=True)
class Layer:
    """One site that the network was trained for."""

    name: str
    heads: int
    kv_heads: int
    dim: int
    serves: bool
    """Whether it was good enough on held-out text; a site that it does not serve keeps the exact look-ahead."""
    basis: str
    """Rotation and balance of the stored keys, see ``basis_of``."""
    metrics: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class About:
    """What a network is for and where it comes from."""

    layers: tuple[Layer, ...]
    model: str
    weights: str
    """Hash of the attention weights it was trained on (``weights_mark``)."""
    rank: int
    group: int
    """Keys per summary."""
    subtile: int
    ahead: int
    """W."""
    trained: int
    """Tokens of the longest sequence it was trained on."""
    text: str
    text_sha256: str
    seed: int
    version: int = VERSION
    provenance: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Network:
    """A network as loaded: what it says of itself, the gates by site, and the hash of its file."""

    about: About
    gates: Mapping[str, Gate]
    sha256: str = ""

    def save(self, path: str | Path) -> str:
        """Write it; gives back the file's hash.

        Raises:
            PlanError: It cannot be written.
        """
        tensors = {
            f"{name}.{part.name}": getattr(made, part.name).detach().to(torch.float16).contiguous().cpu()
            for name, made in self.gates.items()
            for part in fields(Gate)
        }
        try:
            save_file(tensors, str(path), metadata={HEADER: json.dumps(asdict(self.about))})
            return hashlib.sha256(Path(path).read_bytes()).hexdigest()
        except (OSError, SafetensorError) as error:
            raise PlanError(f"cannot write the network: {error}", where=str(path), fix="another path") from None


def load(path: str | Path, sha256: str = "") -> Network:
    """Read a network and check all of it.

    Raises:
        PlanError: Not there, not such a file, truncated, of another version, with weights of the wrong shape or that
            are no numbers, or not the file that a plan named (``sha256``).
    """
    where = str(path)
    try:
        size = Path(path).stat().st_size
        if size > MOST_BYTES:
            raise PlanError(f"{size} bytes are no look-ahead network", where=where, fix="check the path")
        found = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError as error:
        raise PlanError(
            f"cannot read the look-ahead network: {error.strerror}", where=where, fix="check the path"
        ) from None
    if sha256 and found != sha256:
        raise PlanError(
            f"the look-ahead network is not the one the plan was made with (sha256 {found[:12]}, not {sha256[:12]})",
            where=where,
            fix="the right file, or a new plan: compile(model, lookahead=...)",
        )
    try:
        with safe_open(str(path), framework="pt") as opened:
            header = (opened.metadata() or {}).get(HEADER)
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise PlanError(
            f"truncated or no safetensors file: {str(error).splitlines()[0]}", where=where, fix=RETRAIN
        ) from None
    about = _about(header, where)
    return Network(about, _gates(about, tensors, where), found)


def basis_of(rotation: str, balance: Sequence[Sequence[float]] | None) -> str:
    """Rotation and balance of stored keys as a short name: a gate reads keys and queries in that basis only."""
    if balance is None:
        return rotation
    return f"{rotation}+{hashlib.sha256(json.dumps([list(row) for row in balance]).encode()).hexdigest()[:12]}"


def weights_mark(modules: Sequence[torch.nn.Module]) -> str:
    """Hash of a sample of the weights of these modules, the same for a model loaded in float32 or bfloat16."""
    digest = hashlib.sha256()
    for module in modules:
        for name, parameter in sorted(module.named_parameters()):
            sample = parameter.detach().flatten()[:: max(1, parameter.numel() // 256)][:256]
            digest.update(f"{name}{tuple(parameter.shape)}".encode())
            digest.update(sample.to(torch.bfloat16).view(torch.int16).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _about(header: str | None, where: str) -> About:
    if header is None:
        raise PlanError("this is no look-ahead network: its header says nothing of one", where=where, fix=RETRAIN)
    try:
        data = json.loads(header)
        version = data["version"]
        if version != VERSION:
            raise PlanError(
                f"look-ahead network of version {version!r}, this release reads {VERSION}", where=where, fix=RETRAIN
            )
        about = About(**{**data, "layers": tuple(Layer(**layer) for layer in data["layers"])})
        _check(about)
    except PlanError:
        raise
    except (ValueError, TypeError, KeyError, RecursionError, AttributeError) as error:
        raise PlanError(f"the network's header is damaged: {error}", where=where, fix=RETRAIN) from None
    return about


def _check(about: About) -> None:
    sizes = [about.rank, about.group, about.subtile, about.trained]
    sizes += [size for layer in about.layers for size in (layer.heads, layer.kv_heads, layer.dim)]
    if not all(isinstance(size, int) and not isinstance(size, bool) and 0 < size < 1 << 20 for size in sizes):
        raise ValueError(f"impossible sizes {sizes}")
    if not isinstance(about.ahead, int) or not 0 <= about.ahead <= 64 or about.subtile % about.group:
        raise ValueError(f"ahead {about.ahead!r}, group {about.group} of sub-tiles of {about.subtile}")
    for layer in about.layers:
        if layer.heads % layer.kv_heads or not isinstance(layer.name, str) or not isinstance(layer.serves, bool):
            raise ValueError(f"impossible layer {layer.name!r}")


def _gates(about: About, tensors: Mapping[str, Tensor], where: str) -> dict[str, Gate]:
    gates, used = {}, set()
    for layer in about.layers:
        parts = {}
        for name, shape in gate.shapes(layer.heads, layer.kv_heads, layer.dim, about.rank, about.ahead).items():
            key = f"{layer.name}.{name}"
            found = tensors.get(key)
            if found is None:
                raise PlanError(f"the network lacks {key}", where=where, fix=RETRAIN)
            if tuple(found.shape) != shape or not found.is_floating_point():
                raise PlanError(
                    f"{key} is {found.dtype} {tuple(found.shape)}, not floating {shape}", where=where, fix=RETRAIN
                )
            if not bool(found.isfinite().all()):
                raise PlanError(f"{key} holds numbers that are none (NaN or infinite)", where=where, fix=RETRAIN)
            parts[name] = found if name in HALF else found.float()
            used.add(key)
        if not bool((parts["limit"] > 0).all() and (parts["margin"] > 0).all()):
            raise PlanError(f"limit or margin of {layer.name} is not above 0", where=where, fix=RETRAIN)
        gates[layer.name] = Gate(**parts)
    if extra := sorted(set(tensors) - used):
        raise PlanError(f"the network holds {extra[0]}, which belongs to no layer", where=where, fix=RETRAIN)
    return gates
