"""The precision plan of each attention site, from plans and from ``lamp`` nodes alike, and its changes in words."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lamp_compile.plan import Plan

SETTINGS = (
    "rule", "k_format", "v_format", "rotation", "query_bits", "tile", "subtile", "hysteresis", "guard_window",
    "guard_hold", "guard_retry", "exact_tier", "lookahead", "skip", "launch", "exact",
)  # fmt: skip
HOT = ("tau", "floor", "budget")
PRECISION = frozenset((*SETTINGS, *HOT, "window", "hold"))
"""Attributes of ``lamp`` nodes that are said once for a site, and not again for each node."""
GUARDED = ("guard", "fused_attention", "uncached_attention", "attention.cached")
"""Operators that are a guard, or hold one."""
TWO_PLANES = ("nested8",)
"""Formats with a residual plane."""
BOUNDED = ("energy", "mass", "lamp_relaxed")
"""Rules whose importance is at most 1: with ``tau`` 1 or more nothing is refined."""
_LAYER = re.compile(r"(?:^|[._/])(?:layers?|h|blocks?|encoder|decoder)[._/]?(\d+)(?:[._/]|$)")
_WORDS = {
    "rule": "selection rule", "k_format": "key format", "v_format": "value format", "rotation": "rotation",
    "query_bits": "bits of the query", "tile": "storage tile", "subtile": "sub-tile",
    "balance": "balance of key channels",
    "budget": "guard's error budget", "guard_window": "guard's window", "guard_hold": "guard's hold",
    "hysteresis": "guard's hysteresis", "floor": "floor level", "tau": "tau", "launch": "launch of kernels",
    "exact": "exact K and V at hand", "guard_retry": "retry of a step whose guard rose", "exact_tier": "exact tier",
    "lookahead": "look-ahead", "skip": "softmax mass that may be skipped", "format": "format",
    "group": "group",
}  # fmt: skip


def from_plan(plan: Plan) -> dict[str, dict[str, Any]]:
    """A row for each site and each linear layer of a plan."""
    rows: dict[str, dict[str, Any]] = {}
    for site in plan.sites:
        row: dict[str, Any] = {"apply": site.apply}
        if site.apply:
            row |= {name: getattr(site, name) for name in SETTINGS if hasattr(site, name)}
            row |= {name: _plain(getattr(site, name)) for name in ("tau", "floor")}
            guard = site.guard
            row |= {"budget": _plain(guard.budget), "hysteresis": guard.hysteresis}
            row |= {"guard_window": guard.window, "guard_hold": guard.hold, "guard_retry": guard.retry}
            row["balance"] = site.balance is not None
            if site.balance is not None:
                row["balance"] = [list(channels) for channels in site.balance]
        rows[site.name] = row
    for linear in plan.linears:
        row = {"apply": linear.apply, "linear": True}
        rows[linear.name] = row | ({"format": linear.format, "group": linear.group} if linear.apply else {})
    return rows


def from_call(
    rows: dict[str, dict[str, Any]], site: str, op: str, settings: Mapping[str, Any], hot: Mapping[str, str]
) -> None:  # fmt: skip
    """Add what one ``lamp`` node says about its site. ``hot`` holds literals by argument name: ``float32[2]{0.01,
    0.01}``."""
    if not site:
        return
    row = rows.setdefault(site, {"apply": True, "guard": False})
    short = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", op).lower()
    for name, value in settings.items():
        if short == "guard" and name in ("window", "hold"):
            row[f"guard_{name}"] = value
        elif (name in SETTINGS and name != "exact" and value != "") or (name in HOT and isinstance(value, int | float)):
            row[name] = value
        elif name == "format":
            row["k_format"] = row["v_format"] = value
    row["guard"] = row["guard"] or short in GUARDED
    for name, text in hot.items():
        if name in HOT:
            row[name] = _values(text)


def layer(site: str) -> str:
    """``layer 3 (model.layers.3.self_attn)``, or the site's name where it says no layer."""
    found = _LAYER.search(site)
    return f"layer {found[1]} ({site})" if found else site


def planes(row: Mapping[str, Any]) -> str:
    """Which planes are read: the precision of a site in a few words."""
    if not row.get("apply", True):
        return "original weights" if row.get("linear") else "original attention"
    if row.get("linear"):
        return f"{row.get('format')} weights"
    formats = {str(row[key]) for key in ("k_format", "v_format") if row.get(key) is not None}
    if not formats or row.get("tau") is None:
        return ""
    if not formats & set(TWO_PLANES):
        return " and ".join(sorted(formats))
    floors = {min(int(value), 1) for value in _each(row.get("floor", 0))}
    taus = _each(row["tau"])
    if floors == {1} or (floors == {0} and all(tau == 0 for tau in taus)):
        return "high+low"
    if floors == {0} and row.get("rule") in BOUNDED and all(float(tau) >= 1 for tau in taus):
        return "high only"
    return "high, and low where the rule asks for it"


def changes(
    name: str, before: Mapping[str, Any] | None, after: Mapping[str, Any] | None, kinds: tuple[str, str]
) -> list[tuple[str, str, Any, Any]]:
    """What changed at one site: (setting, sentence, before, after). Settings that one side does not know are no
    change."""
    who = layer(name)
    if before is None or after is None:
        there = after if before is None else before
        assert there is not None
        what = planes(there) or ("rewritten" if there.get("apply", True) else "original attention")
        return [("site", f"{who} {'is new' if before is None else 'is gone'}: {what}", before, after)]
    out: list[tuple[str, str, Any, Any]] = []
    was, now = planes(before), planes(after)
    shared = {key for key in before.keys() & after.keys() if before[key] != after[key]}
    if kinds[0] != kinds[1]:
        shared -= {"guard"}
    if before.get("apply", True) != after.get("apply", True):
        return [("apply", f"{who} went from {was or 'rewritten'} to {now or 'rewritten'}", was, now)]
    if was and now and was != now:
        cause = [key for key in ("floor", "tau", "rule", "k_format", "v_format", "format") if key in shared]
        why = ", ".join(f"{_word(key)} {_show(before[key])} -> {_show(after[key])}" for key in cause)
        out.append(
            (
                cause[0] if cause else "planes",
                f"{who} went from {was} to {now}" + (f" ({why})" if why else ""),
                was,
                now,
            )
        )
        shared -= set(cause)
    elif kinds[0] == kinds[1]:
        shared |= {key for key in before.keys() ^ after.keys() if key in PRECISION}
    for key in sorted(shared):
        old, new = before.get(key), after.get(key)
        if key == "guard":
            text = f"{who}: the fallback guard is {'new' if new else 'gone'}"
        else:
            text = f"{who}: {_word(key)} {_show(old)} -> {_show(new)}{_direction(key, old, new)}"
        out.append((key, text, old, new))
    return out


def _direction(key: str, old: Any, new: Any) -> str:
    if key != "tau" or old is None or new is None or isinstance(old, list | str) or isinstance(new, list | str):
        return ""
    return " (refines less)" if new > old else " (refines more)"


def _word(key: str) -> str:
    return _WORDS.get(key, key)


def _show(value: Any) -> str:
    if isinstance(value, list) and value and isinstance(value[0], list):
        return f"{len(value)} x {len(value[0])} factors"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "not set" if value is None else str(value)


def _each(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _plain(value: Any) -> Any:
    """Lists for tuples, one number where all are equal, a word for infinity."""
    if isinstance(value, tuple | list):
        listed = [_plain(item) for item in value]
        return listed[0] if len(set(map(str, listed))) == 1 else listed
    return "Infinity" if value == float("inf") else value


def _values(text: str) -> Any:
    inner = text[text.index("{") + 1 : text.rindex("}")] if "{" in text else ""
    found: list[Any] = []
    for part in filter(None, map(str.strip, inner.split(","))):
        number = float(part)
        found.append(int(number) if number.is_integer() and "float" not in text else number)
    return _plain(found) if found else None
