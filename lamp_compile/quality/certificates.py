"""How the error certificate compares with the true error on real text: coverage and over-estimate, by layer and length.

The model runs exactly. At every attention that a plan applies to, output rows spread over the window are computed once
more on the same q, k and v, as the plan says and without any rounding (float64). A row is covered when its true error
||delta out|| is at most ``FACTOR`` times the certificate's estimate (``runtime/certificate.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from lamp_compile.frontends.huggingface.attention import NAME, observing
from lamp_compile.frontends.structure import structural_copy
from lamp_compile.plan import Plan, SitePlan
from lamp_compile.quality import rows as specs
from lamp_compile.quality.metrics import wilson
from lamp_compile.runtime import certificate, reference
from lamp_compile.runtime.arguments import Scores, Visibility

FACTOR = 6.0
"""Multiple of the estimate within which the true error is claimed to lie."""
COVERAGE = 0.999
"""Share of rows for which it is claimed to."""
EDGES = (1, 32, 128, 512, 2048, 8192, 32768)
"""Rows are told apart by how many keys they see: 1 to 31, 32 to 127, and so on."""
ROWS_PER_LENGTH = 96
"""Positions of a window measured in each of these classes, at most; every query head of them is a row."""
JUDGED = 1000
"""Rows a group must have to be held against a limit: fewer cannot tell 99.9 % from 99 %."""
ALL = "all"
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "plan": {},
    "all_low": specs.ALL_LOW.changes,
    "all_high": specs.ALL_HIGH.changes,
}
"""The plan as it is, and its extremes: the guard moves between them."""


@dataclass(frozen=True)
class Coverage:
    """One group of rows.

    Attributes:
        setting: One of ``SETTINGS``.
        model: ``"plain"``, or the outlier twin's name.
        layer: Site, or ``"all"``.
        length: Keys seen, such as ``"32-127"``, or ``"all"``.
        rows: Output rows measured.
        coverage: Share with ||delta out|| <= FACTOR x estimate.
        coverage_low: Lower end of its 95 % Wilson interval.
        median_overestimate: Median of estimate / ||delta out||.
        least_ratio: The smallest of these ratios.
    """

    setting: str
    model: str
    layer: str
    length: str
    rows: int
    coverage: float
    coverage_low: float
    median_overestimate: float
    least_ratio: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return asdict(self)


class Meter:
    """Collects the ratios estimate / true error of one or several models.

    Args:
        settings: By name, what each changes in the rows of the plan.
        rows_per_length: See ``ROWS_PER_LENGTH``.
    """

    def __init__(
        self, settings: Mapping[str, Mapping[str, Any]] = SETTINGS, rows_per_length: int = ROWS_PER_LENGTH
    ) -> None:
        self._settings, self._per_length = settings, rows_per_length
        self._ratios: dict[tuple[str, str, str, str], list[Tensor]] = {}

    def measure(
        self,
        model: nn.Module,
        plan: Plan,
        windows: Tensor,
        name: str = "plain",
        on_window: Callable[[str], None] | None = None,
    ) -> None:
        """Run the exact model over windows ``[n, T]``, one at a time, and look at every attention.

        Args:
            model: A transformers decoder in evaluation mode; it stays as it is.
            plan: Made for it (``fast.lamp.plan``).
            windows: Token ids ``[n, T]``.
            name: What its groups are called.
            on_window: Called with ``name`` after each window.
        """
        exact: Any = structural_copy(model)
        exact.set_attn_implementation(NAME)
        sites = {id(module): path for path, module in exact.named_modules()}

        def observe(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, arguments: dict[str, Any]) -> None:
            row = plan.site(sites[id(module)])
            if row.apply:
                self._look(name, row, (q, k, v), arguments)

        for window in windows:
            with torch.no_grad(), observing(observe):
                exact(input_ids=window[None].to(exact.device), use_cache=False)
            if on_window is not None:
                on_window(name)

    def groups(self) -> list[Coverage]:
        """Per setting and model: all rows, then by layer, by length, and by both."""
        heads = dict.fromkeys((key[0], key[1]) for key in self._ratios)
        return [found for head in heads for found in self._groups_of(*head)]

    def _groups_of(self, setting: str, model: str) -> Iterator[Coverage]:
        mine = {key[2:]: torch.cat(parts) for key, parts in self._ratios.items() if key[:2] == (setting, model)}
        layers = dict.fromkeys(layer for layer, _ in mine)
        lengths = sorted({length for _, length in mine}, key=lambda text: int(text.partition("-")[0]))
        for layer, length in (
            (ALL, ALL),
            *((layer, ALL) for layer in layers),
            *((ALL, length) for length in lengths),
            *((layer, length) for layer in layers for length in lengths),
        ):
            parts = [ratios for (a, b), ratios in mine.items() if layer in (ALL, a) and length in (ALL, b)]
            if parts:
                yield _group((setting, model, layer, length), torch.cat(parts))

    def _look(self, name: str, row: SitePlan, qkv: tuple[Tensor, Tensor, Tensor], arguments: dict[str, Any]) -> None:
        q, k, v = qkv
        picked = _positions(q.shape[2], self._per_length).to(q.device)
        q = q[:, :, picked]
        visible = _visible(picked, k.shape[2], arguments)
        scale = q.shape[-1] ** -0.5 if arguments.get("scaling") is None else float(arguments["scaling"])
        softcap = float(arguments.get("softcap") or 0.0)
        exact, _ = reference.exact_attention(q, k, v, visible, scale, softcap)
        live = visible.live(slice(0, q.shape[2]), q.shape[2], k.shape[2], q.device).expand(*q.shape[:3], -1).sum(-1)
        for setting, changes in self._settings.items():
            out, sums = attended(replace(row, **changes), (q, k, v), visible, scale, softcap)
            error = (out.double() - exact).norm(dim=-1)
            estimate = certificate.estimate(out, sums).double()
            ratio = torch.where(error == 0, torch.inf, estimate / error)
            for first, last in _classes(k.shape[2]):
                chosen = ratio[(live >= first) & (live <= last)].float().cpu()
                if chosen.numel():
                    key = (setting, name, row.name, f"{first}-{last}")
                    self._ratios.setdefault(key, []).append(chosen)


def attended(
    row: SitePlan, qkv: tuple[Tensor, Tensor, Tensor], visible: Visibility, scale: float, softcap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Attention as a row of a plan says, every query deciding for itself: output ``[B, H, S, Dv]`` and certificate
    ``[B, H, S, 3]``, from q ``[B, H, S, D]``, k ``[B, G, N, D]`` and v ``[B, G, N, Dv]``."""
    q, k, v = qkv
    balance = None if row.balance is None else torch.tensor(row.balance, dtype=torch.float32, device=q.device)
    planes = reference.quantize(k, v, balance, row.k_format, row.v_format, row.rotation, row.tile)
    scores = Scores(scale, softcap, row.rotation, row.query_bits)
    importance = reference.look_ahead(
        q, planes.k_high, planes.k_scale, balance, visible, scores, row.k_format, row.rule, row.subtile
    )
    tau, floor = (
        torch.tensor(value, dtype=torch.float32, device=q.device).expand(k.shape[1]) for value in (row.tau, row.floor)
    )
    levels = reference.select(importance, tau, floor, None, None, False)
    out, _, sums = reference.attend(
        q, planes, levels, None, balance, visible, scores, row.k_format, row.v_format, row.subtile
    )
    return out, sums


def below(groups: Sequence[Coverage], least: float) -> list[str]:
    """The groups of the plan whose coverage is below ``least``, in words: all rows, each layer, each length. Groups of
    fewer than ``JUDGED`` rows are left out, and those of one layer and one length."""
    return [
        f"coverage {group.coverage:.4%} of {group.rows} rows ({group.model}, layer {group.layer}, keys {group.length})"
        f", --min-coverage {least:g}"
        for group in groups
        if group.setting == "plan"
        and group.rows >= JUDGED
        and ALL in (group.layer, group.length)
        and not group.coverage >= least
    ]


HEADER = (
    f"{'setting':9s} {'model':14s} {'layer':26s} {'keys seen':>10s} {'rows':>8s} {f'within x{FACTOR:g}':>10s} "
    f"{'(95 % low)':>10s} {'estimate/error':>14s} {'least':>7s}"
)


def table(groups: Sequence[Coverage], *, crossed: bool = False) -> str:
    """The groups as aligned text; those of one layer and one length only where ``crossed``."""
    shown = [group for group in groups if crossed or ALL in (group.layer, group.length)]
    return "\n".join([HEADER, *map(_line, shown)])


def _line(group: Coverage) -> str:
    return (
        f"{group.setting:9s} {group.model:14s} {group.layer:26s} {group.length:>10s} {group.rows:8d} "
        f"{group.coverage:10.3%} {group.coverage_low:10.3%} {group.median_overestimate:14.2f} {group.least_ratio:7.3f}"
    )


def _group(names: tuple[str, str, str, str], ratios: Tensor) -> Coverage:
    covered = int((ratios * FACTOR >= 1).sum())
    low, _ = wilson(covered, ratios.numel())
    return Coverage(
        *names,
        rows=ratios.numel(),
        coverage=covered / ratios.numel(),
        coverage_low=low,
        median_overestimate=float(ratios.median()),
        least_ratio=float(ratios.min()),
    )


def _classes(keys: int) -> list[tuple[int, int]]:
    """First and last count of keys of each class up to ``keys``."""
    edges = (*EDGES, max(keys, EDGES[-1]) + 1)
    return [(first, after - 1) for first, after in pairwise(edges) if first <= keys]


def _positions(queries: int, per_length: int) -> Tensor:
    """Query positions, evenly spread in each class of lengths."""
    picked: list[int] = []
    for first, last in _classes(queries):
        room = min(last, queries) - first + 1
        count = min(room, per_length)
        picked += [first - 1 + i * room // count for i in range(count)]
    return torch.tensor(picked)


def _visible(rows: Tensor, keys: int, arguments: Mapping[str, Any]) -> Visibility:
    """Visibility of some query positions, from what the model handed to its attention."""
    mask, sinks = arguments.get("mask"), arguments.get("s_aux")
    if mask is None:
        mask = torch.arange(keys, device=rows.device) <= rows[:, None]
        return Visibility(keys, mask=mask[None, None], sinks=sinks)
    mask = mask if mask.shape[2] == 1 else mask[:, :, rows]
    if mask.dtype == torch.bool:
        return Visibility(keys, mask=mask, sinks=sinks)
    return Visibility(keys, bias=mask, mask=mask > torch.finfo(mask.dtype).min, sinks=sinks)
