"""Distil a gate for every layer: window by window, each layer from a small buffer of its own samples."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lamp_compile.errors import InputError
from lamp_compile.quality.network.samples import BURN_IN, FAINTEST, OnSample, Sample, Sampling, observe
from lamp_compile.runtime.network import gate
from lamp_compile.runtime.network.gate import Gate

BUFFER = 6
"""Windows whose samples a layer keeps."""
LEARNT = tuple(name for name in (part.name for part in fields(Gate)) if name not in ("limit", "margin"))
CONCERN = 0.003
"""Importance from which on a sub-tile matters to the loss: below the tau of every preset."""
PAST = (0.3, 0.2)
"""Weights of the past to start from: much of attention goes on as it was."""
UNDER = 2.0
"""Weight of what is predicted too low, against what is predicted too high: a miss costs more than a read."""


@dataclass(frozen=True)
class Settings:
    """How a network is trained.

    Attributes:
        rank: R.
        sampling: Rows taken from a window, and W.
        windows: Windows of text, in all.
        steps: Steps of Adam per window and layer.
        rate: Learning rate at its highest.
        blocks: Blocks of rows in a step.
        seed: Of weights and choices.
    """

    rank: int
    sampling: Sampling
    windows: int
    steps: int = 16
    rate: float = 4e-3
    blocks: int = 4
    seed: int = 0


class LayerTrainer:
    """One layer's gate, its optimiser and its buffer."""

    def __init__(self, shape: tuple[int, int, int], settings: Settings) -> None:
        heads, kv_heads, dim = shape
        self.settings, self.shape = settings, shape
        self.weights = fresh(heads, kv_heads, dim, settings)
        learnt = [self.weights[name].requires_grad_() for name in LEARNT]
        self.optimizer = torch.optim.Adam(learnt, lr=settings.rate, betas=(0.9, 0.99))
        self.buffer: list[Sample] = []
        self.done = 0
        self.loss = math.nan

    @property
    def gate(self) -> Gate:
        """As it is now."""
        return Gate(**self.weights)

    def keep(self, sample: Sample) -> None:
        """Into the buffer, which forgets the oldest."""
        self.buffer = [*self.buffer[-BUFFER + 1 :], sample]

    def learn(self, sample: Sample) -> None:
        """Some steps on this sample and earlier ones."""
        self.keep(sample)
        total = self.settings.windows * self.settings.steps
        for _ in range(self.settings.steps):
            generator = torch.Generator().manual_seed(self.settings.seed * 7919 + self.done)
            chosen = self.buffer[int(torch.randint(len(self.buffer), (), generator=generator))]
            blocks = torch.randperm(chosen.query.shape[0], generator=generator)[: self.settings.blocks]
            warm = min(1.0, (self.done + 1) / 30)
            rate = self.settings.rate * warm * (0.51 + 0.49 * math.cos(math.pi * self.done / total))
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            value = loss(self.gate, chosen, blocks, self.settings.sampling)
            self.optimizer.zero_grad()
            value.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            self.done += 1
            self.loss = float(value.detach())


def fresh(heads: int, kv_heads: int, dim: int, settings: Settings) -> dict[str, Tensor]:
    """Weights to start from."""
    generator = torch.Generator().manual_seed(settings.seed)
    made = {}
    ahead = settings.sampling.ahead
    for name, shape in gate.shapes(heads, kv_heads, dim, settings.rank, ahead).items():
        if name in ("query", "key", "ahead"):
            size = 0.1 if name == "ahead" else 1.0
            made[name] = torch.randn(shape, generator=generator) * size * shape[-2] ** -0.5
        else:
            made[name] = torch.ones(shape) if name in ("limit", "margin") else torch.zeros(shape)
    made["extra"][..., gate.LAST], made["extra"][..., gate.MEAN] = PAST
    return made


def forward(made: Gate, sample: Sample, blocks: Tensor, rows: slice, ahead: int) -> list[tuple[Tensor, Tensor]]:
    """Log importance and log mass ``[b, H, rows, T]`` that the gate expects 0 ... ``ahead`` steps after each row."""
    projected = gate.project(sample.query[blocks][:, :, rows], made.query, made.query_bias)
    summary = gate.summarise(sample.pooled[None], made.key, made.key_bias).expand(len(blocks), -1, -1, -1)
    groups, history = sample.live(blocks, rows, sample.group), sample.history[blocks][:, :, rows]
    found = []
    for step in range(ahead + 1):
        later = slice(rows.start + step, rows.stop + step)
        tiles = sample.live(blocks, later, sample.subtile)
        query = gate.look_forward(projected, made, step)
        said = gate.content(query, summary, groups, tiles.shape[-1], sample.scale)
        found.append(gate.predict(said, history, tiles, made.age[step], made.extra[step]))
    return found


def loss(made: Gate, sample: Sample, blocks: Tensor, sampling: Sampling) -> Tensor:
    """KL of the masses at t and, at a quarter's weight, at t+1 ... t+W; and the error of log importance at t where it
    matters, misses counted double."""
    rows = slice(BURN_IN, BURN_IN + sampling.rows)
    (importance, mass), *later_on = forward(made, sample, blocks, rows, sampling.ahead)
    total = divergence(sample.mass[blocks][:, :, rows], mass).mean()
    for step, (_, expected) in enumerate(later_on, start=1):
        later = slice(rows.start + step, rows.stop + step)
        total = total + divergence(sample.mass[blocks][:, :, later], expected).mean() / (4 * sampling.ahead)
    target = sample.importance[blocks][:, :, rows]
    tile = torch.arange(target.shape[-1], device=target.device) * sample.subtile
    whole = tile + sample.subtile <= sample.rows[blocks][:, None, rows, None].to(target.device)
    guess = importance.clamp_min(-14.0)
    weight = whole * torch.sigmoid(torch.maximum(target, guess.detach()) - math.log(CONCERN))
    weight = weight * torch.where(target > guess.detach(), UNDER, 1.0)
    error = torch.nn.functional.smooth_l1_loss(guess, target.clamp_min(-14.0), reduction="none")
    return total + (weight * error).sum() / weight.sum().clamp_min(1.0)


def divergence(target: Tensor, guess: Tensor) -> Tensor:
    """KL(target || guess) of log masses ``[..., T]`` over the sub-tiles that have mass."""
    terms = target.exp() * (target - guess.clamp_min(FAINTEST))
    return torch.where(target > FAINTEST, terms, 0.0).sum(-1)


class Trainer:
    """All layers. ``run`` goes on from where a checkpoint stopped.

    Args:
        fast: A model of ``lamp_compile.compile(model, mode="eager")``.
        settings: How.
        windows: Text, int64 ``[n, N]``, as many as the settings say.
        checkpoint: File to go on from and to write to after each window, or None.
    """

    def __init__(self, fast: Any, settings: Settings, windows: Tensor, checkpoint: Path | None = None) -> None:
        self.fast, self.settings, self.windows, self.checkpoint = fast, settings, windows, checkpoint
        sites = [s for s in fast.lamp.sites if not s.reason and fast.lamp.plan.site(s.name).apply]
        self.layers = {s.name: LayerTrainer((s.heads, s.kv_heads, s.head_dim), settings) for s in sites}
        self.first = 0
        if checkpoint is not None and checkpoint.exists():
            self._resume(checkpoint)

    def run(self, on_window: Callable[[str], None]) -> dict[str, Gate]:
        """Train; gives back the gates by site."""
        for index in range(max(0, self.first - BUFFER + 1), self.first):
            self._observe(index, lambda name, sample: self.layers[name].keep(sample))
        for index in range(self.first, self.windows.shape[0]):
            self._observe(index, lambda name, sample: self.layers[name].learn(sample))
            if self.checkpoint is not None:
                self.save(self.checkpoint, index + 1)
            mean = sum(layer.loss for layer in self.layers.values()) / len(self.layers)
            on_window(f"loss {mean:.3f}")
        return {name: detached(layer.gate) for name, layer in self.layers.items()}

    def _observe(self, index: int, on_sample: OnSample) -> None:
        ids = self.windows[index : index + 1].to(next(self.fast.parameters()).device)
        observe(self.fast, ids, index, self.settings.sampling, on_sample)

    def save(self, path: Path, done: int) -> None:
        """Weights, moments and how far it is; replaced in one step, so that an interruption leaves the older one."""
        tensors: dict[str, Tensor] = {}
        for name, layer in self.layers.items():
            moments = layer.optimizer.state_dict()["state"]
            for index, part in enumerate(LEARNT):
                tensors[f"{name}.{part}"] = layer.weights[part].detach().contiguous()
                for moment in ("exp_avg", "exp_avg_sq"):
                    tensors[f"{name}.{part}.{moment}"] = moments[index][moment].contiguous()
        about = {"settings": asdict(self.settings), "done": done, "text": self._text()}
        partial = path.with_name(path.name + ".partial")
        save_file(tensors, str(partial), metadata={"lamp_checkpoint": json.dumps(about)})
        partial.replace(path)

    def _text(self) -> int:
        """The windows as a number: another text is told by it."""
        weights = torch.arange(1, self.windows.numel() + 1, dtype=torch.int64)
        return int((self.windows.flatten().cpu() * weights).sum())

    def _resume(self, path: Path) -> None:
        about, tensors = _read(path)
        wanted = {"settings": json.loads(json.dumps(asdict(self.settings))), "text": self._text()}
        for name, value in wanted.items():
            if about.get(name) != value:
                raise InputError(
                    f"the checkpoint was made with another {name}", where=str(path), fix="delete it, or train as before"
                )
        self.first = int(about["done"])
        for name, layer in self.layers.items():
            layer.done = self.first * self.settings.steps
            state = {}
            for index, part in enumerate(LEARNT):
                try:
                    found, one, two = (tensors[f"{name}.{part}{suffix}"] for suffix in ("", ".exp_avg", ".exp_avg_sq"))
                except KeyError as error:
                    raise InputError(f"the checkpoint lacks {error}", where=str(path), fix="delete it") from None
                if found.shape != layer.weights[part].shape:
                    raise InputError(f"{part} has another shape", where=str(path), fix="delete it")
                layer.weights[part].data.copy_(found)
                state[index] = {"step": torch.tensor(float(layer.done)), "exp_avg": one, "exp_avg_sq": two}
            groups = layer.optimizer.state_dict()["param_groups"]
            layer.optimizer.load_state_dict({"state": state, "param_groups": groups})


def detached(made: Gate) -> Gate:
    """The same numbers without gradients."""
    return Gate(**{part.name: getattr(made, part.name).detach() for part in fields(Gate)})


def _read(path: Path) -> tuple[Mapping[str, Any], dict[str, Tensor]]:
    try:
        with safe_open(str(path), framework="pt") as opened:
            about = json.loads((opened.metadata() or {})["lamp_checkpoint"])
            return about, {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
        raise InputError(f"no checkpoint of a training: {error}", where=str(path), fix="delete it") from None
