"""What a report says of sites that no kernel serves: never silent where kernels run, nothing where none could."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from lamp_compile.plan import SitePlan
from lamp_compile.runtime import formats, kernels

START = "no kernel for "
NO_CACHE = "no cache of ours, and kernels read the planes of one"
UNKNOWN = "shapes are not known here"


def expected_on(device: torch.device) -> bool:
    """Whether a site on this device would be served by kernels, so that the reference is worth a note."""
    return device.type in ("cuda", "cpu")


def notes(reasons: Mapping[str, str | None]) -> list[str]:
    """One line per distinct reason, with the sites it holds for."""
    by_reason: dict[str, list[str]] = {}
    for site, reason in reasons.items():
        if reason is not None:
            by_reason.setdefault(reason, []).append(site)
    return [
        f"{START}{', '.join(sites)}: {reason}; the reference runs there, slowly" for reason, sites in by_reason.items()
    ]


def why_not_plan(plan: SitePlan, q: torch.Tensor, kv_heads: int, value_dim: int) -> str | None:
    """Why no kernel serves a site of a cache under this row of the plan, or None.

    Args:
        plan: The site's row.
        q: Any query of the site ``[B, H, S, D]``; only its shape, dtype and device are looked at.
        kv_heads: Of the site.
        value_dim: Of the site.
    """
    planes = _planes(plan, q, kv_heads, value_dim)
    state = torch.empty(0, kv_heads, 4, dtype=torch.float32, device=q.device)
    return kernels.why_not_attend(q[:0], planes, state, vars(plan))


def why_not_network(plan: SitePlan, q: torch.Tensor, group: int, rank: int) -> str | None:
    """Why no kernel serves a site of a cache whose importance a network predicts, or None; ``why_not_plan`` comes
    first.

    Args:
        plan: The site's row.
        q: Any query of one token ``[B, H, 1, D]``.
        group: Keys per summary.
        rank: Numbers per summary.
    """
    planes = _planes(plan, q, 1, 2)
    summary = torch.empty(0, 1, max(1, plan.tile // group), rank, dtype=torch.float16, device=q.device)
    history, trust = (torch.empty(0, 1, n, dtype=torch.float32, device=q.device) for n in (2, 7))
    return kernels.why_not_predicted(q, planes, (summary, history, trust), {**vars(plan), "pages": 1})


def _planes(plan: SitePlan, q: torch.Tensor, kv_heads: int, value_dim: int) -> tuple[torch.Tensor, ...]:
    """Planes of no sequences, which take no memory."""
    (k_high, k_residual), (v_high, v_residual) = (
        formats.get(name).plane_widths(dim) for name, dim in ((plan.k_format, q.shape[3]), (plan.v_format, value_dim))
    )
    lead, tile = (0, kv_heads, 1), plan.tile
    scale = torch.empty(0, kv_heads, tile, device=q.device)
    return (
        torch.empty(*lead, tile, k_high, device=q.device), torch.empty(*lead, tile, k_residual, device=q.device), scale,
        torch.empty(*lead, v_high, tile, device=q.device), torch.empty(*lead, v_residual, tile, device=q.device), scale,
    )  # fmt: skip
