"""The Markdown report beside an artifact."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lamp_compile.frontends.onnx.exporting.targets import Target
from lamp_compile.frontends.onnx.exporting.verify import Verification
from lamp_compile.quality.metrics import Scores

if TYPE_CHECKING:
    from lamp_compile.frontends.onnx.exporting.export import Artifact


def markdown(artifact: Artifact, name: str, target: Target, guard: str, verification: Verification, size: int) -> str:
    """The whole report."""
    proto, report = artifact.proto, artifact.report
    inputs = [f"`{value.name}`" for value in proto.graph.input if not value.name.startswith(("past.", "lamp."))]
    properties = {item.key: item.value for item in proto.metadata_props}
    lines = [
        f"# {name}",
        "",
        f"{'Passed' if verification.passed else 'FAILED'}: verified on {verification.what}, ONNX Runtime on the CPU "
        "against torch with LAMP and against the float model.",
        "",
        table(verification),
        "",
        *[f"- {failure}" for failure in verification.failures],
        "## What it is",
        "",
        f"- kind {artifact.kind}, target `{target.name}`, guard `{guard}`, opset {proto.opset_import[0].version}, "
        f"{len(proto.graph.node)} nodes, {size:,} bytes",
        f"- {len(report.rewritten)} of {len(report.sites)} attentions are nodes of domain `ai.lamp`",
        f"- inputs: {', '.join(inputs)}" + ("; the cache: `past.*` in, `present.*` out" if _has_cache(proto) else ""),
        "- settings that may be given as inputs, and have defaults: `lamp.<site>.tau`, `floor`, `budget`",
        f"- plan sha256 `{properties['lamp.plan_sha256']}`",
        f"- made with {properties['lamp.versions']}",
        "",
        "## Sites",
        "",
        "```text",
        report.text(),
        "```",
        "",
    ]
    return "\n".join(lines)


def table(verification: Verification) -> str:
    """The numbers."""
    lines = [
        "| output | max difference to torch | to float | drift from torch | LAMP's own error |",
        "|---|---|---|---|---|",
    ]
    for item in verification.outputs:
        lines.append(
            f"| {item.name} | {_number(item.max_torch)} | {_number(item.max_float)} | {_number(item.drift)} | "
            f"{_number(item.own)} |"
        )
    rows = [("float", verification.against_float), ("torch with LAMP", verification.against_torch)]
    if any(scores is not None for _, scores in rows):
        lines += [
            "",
            "| predictions against | positions | KL | agreement | perplexity ratio |",
            "|---|---|---|---|---|",
        ]
    lines += [_scores(name, scores) for name, scores in rows if scores is not None]
    return "\n".join(lines)


def _scores(name: str, scores: Scores) -> str:
    interval = f"{scores.agreement:.2%} ({scores.agreement_low:.2%} to {scores.agreement_high:.2%})"
    return f"| {name} | {scores.positions:,} | {scores.kl:.2e} | {interval} | {scores.perplexity_ratio:.5f} |"


def _number(value: float) -> str:
    return "-" if value != value else f"{value:.2e}"


def _has_cache(proto: Any) -> bool:
    return any(value.name.startswith("past.") for value in proto.graph.input)
