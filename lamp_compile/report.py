"""What was done to a graph or model, for people and machines: sites, refusals, unclaimed softmaxes, notes."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from lamp_compile import linear_plan
from lamp_compile.ir import Refusal
from lamp_compile.plan import Plan


@dataclass(frozen=True)
class SiteSummary:
    """One claimed site, without graph objects."""

    name: str
    pattern: str
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    dtype: str
    features: tuple[str, ...] = ()
    """What stands out: "mask", "bias", "causal", "window 4096", "softcap 50", "sinks", "cache"."""


def described(plan: Plan) -> str:
    """Where the numbers of a plan come from, in words: "uncalibrated" where no text was measured."""
    found = plan.provenance
    state = str(found.get("calibration", "uncalibrated"))
    details = [f"preset {plan.preset}"]
    if "tokens" in found:
        details.append(f"{found['tokens']} tokens of text {str(found.get('text_sha256', ''))[:12]}")
    if "lamp_compile" in found:
        details.append(f"lamp_compile {found['lamp_compile']}")
    return f"{state} ({', '.join(details)})"


@dataclass(frozen=True)
class Report:
    """What the compiler saw and did."""

    sites: tuple[SiteSummary, ...]
    refusals: tuple[Refusal, ...]
    unclaimed: tuple[Refusal, ...]
    plan: Plan
    rewritten: tuple[str, ...]
    """Names of the sites that were rewritten (claimed, applied by the plan, within fuel)."""
    backend: str = ""
    notes: tuple[str, ...] = field(default=())
    """What the reader should know: what is not gained, what falls back, what differs from what was asked."""
    before: str = ""
    """One site's part of the graph before the rewrite, as text."""
    after: str = ""
    """The same site after it."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        data = asdict(self)
        data["plan"] = asdict(self.plan)
        return data

    def text(self) -> str:
        """A readable summary."""
        lines = [
            f"{len(self.rewritten)} of {len(self.sites)} attention sites rewritten"
            + (f" for {self.backend}" if self.backend else "")
        ]
        for site in self.sites:
            row = self.plan.site(site.name)
            kept = row.reason or ("beyond fuel" if row.apply else "the plan says apply: false")
            done = "rewritten" if site.name in self.rewritten else f"kept: {kept}"
            shape = f"{site.heads} heads, {site.kv_heads} kv, D {site.head_dim}" + (
                f"/{site.value_dim}" if site.value_dim != site.head_dim else ""
            )
            lines.append(f"  {site.name}  [{site.pattern}]  {shape}, {site.dtype}  {' '.join(site.features)}")
            formats = row.k_format if row.k_format == row.v_format else f"K {row.k_format} / V {row.v_format}"
            balance = "balanced" if row.balance else "not balanced"
            balance += ", exact copies in the host's memory" if row.exact_tier == "host" else ""
            lines.append(f"      {done}; {formats}, {row.rule} tau {row.tau}, rotation {row.rotation}, {balance}")
        for title, refusals in (("refused", self.refusals), ("softmax not claimed", self.unclaimed)):
            for refusal in refusals:
                lines.append(
                    f"  {title}: {refusal.site}: {refusal.reason}" + (f" (try: {refusal.fix})" if refusal.fix else "")
                )
        lines.append(f"  plan: {described(self.plan)}")
        lines.extend(linear_plan.summary(self.plan.linears))
        lines.extend(f"  note: {note}" for note in self.notes)
        return "\n".join(lines)
