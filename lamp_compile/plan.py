"""The plan: what the compiler decided for every site. Frozen data, JSON both ways, meant to be read and edited by
hand."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from lamp_compile import _plugins, control_plan, linear_plan
from lamp_compile.control_plan import ControlPlan
from lamp_compile.errors import OptionError, PlanError
from lamp_compile.ir import Floor
from lamp_compile.launch_plan import LaunchPlan
from lamp_compile.linear_plan import LinearPlan
from lamp_compile.network_plan import LOOKAHEADS, NetworkPlan
from lamp_compile.plan_fields import LARGEST, choice, each, jsonable, number, read_row

PLAN_VERSION = 1
FORMATS = _plugins.names("runtime/formats")
CONTROLS = ("random_tiles", "static_tiles")
"""Selection rules for measurements, refused in a plan."""
RULES = tuple(name for name in _plugins.names("runtime/lookahead") if name not in CONTROLS)
ROTATIONS = ("hadamard", "none")
QUERY_BITS = (0, 8, 16)
TILES = (32, 64, 128)
EXACT_TIERS = ("none", "host")
SIXTEEN_BITS = ("bf16", "fp16")
"""Formats that keep a 16-bit model's keys and values as they are."""


@dataclass(frozen=True)
class GuardPlan:
    """When a kv head falls back to more precision (``runtime/guard.py``)."""

    budget: float = 0.25
    """Relative output error the certificate may report, as a running root mean square; infinity = never fall back."""
    window: int = 16
    """Steps of the running mean."""
    hold: int = 64
    """Steps a raised floor level is held."""
    hysteresis: float = 0.5
    """The level sinks again below this share of the budget."""
    retry: bool = False
    """Do a step in which this site's floor rose again at the raised level, instead of from the next step on."""


@dataclass(frozen=True)
class SitePlan:
    """Decisions for one attention site. ``tau``, ``floor`` and ``guard.budget`` are hot; everything else is compiled
    in."""

    name: str
    apply: bool = True
    """False keeps the original attention."""
    reason: str = ""
    """Why it is kept, or why something here differs from the preset."""
    rule: str = "energy"
    tau: float | tuple[float, ...] = 0.01
    """Threshold of the rule; one number, or one per kv head. Smaller refines more: 0 refines every live tile."""
    floor: int | tuple[int, ...] = 0
    """Least precision (``ir.Floor``): 0 as the rule says, 1 both planes, 2 exact; one number, or one per kv head."""
    k_format: str = "nested8"
    v_format: str = "nested8"
    rotation: str = "hadamard"
    query_bits: int = 8
    tile: int = 32
    """Keys per storage tile, and per page of a pool."""
    subtile: int = 32
    """Keys per decision."""
    balance: tuple[tuple[float, ...], ...] | None = None
    """Divisor of each key channel (and factor of the query's), per kv head; None = all 1."""
    exact_tier: str = "none"
    """Where keys and values are kept as they came, for floor 2: "host" is a copy in the host's memory."""
    guard: GuardPlan = GuardPlan()
    lookahead: str = field(default="exact", kw_only=True)
    """"exact" scores the high plane of every key; "network" lets the plan's network predict (one token at a time)."""
    skip: float = field(default=0.0, kw_only=True)
    """Softmax mass that a row may lose to sub-tiles that are not read; 0 reads all. With a network only."""

    @property
    def sixteen_bits(self) -> bool:
        """Whether what is stored is what floor 2 asks for, so that nothing is missing there."""
        return self.k_format in SIXTEEN_BITS and self.v_format in SIXTEEN_BITS and self.query_bits != 8

    def validate(self, where: str = "") -> None:
        """Check every field.

        Raises:
            PlanError: Naming the field, its value and what it may be.
        """
        where = where or f"plan, site {self.name!r}"
        choice(self.rule, RULES, "rule", where)
        choice(self.k_format, FORMATS, "k_format", where)
        choice(self.v_format, FORMATS, "v_format", where)
        choice(self.rotation, ROTATIONS, "rotation", where)
        choice(self.query_bits, QUERY_BITS, "query_bits", where)
        choice(self.tile, TILES, "tile", where)
        choice(self.exact_tier, EXACT_TIERS, "exact_tier", where)
        choice(self.subtile, (16, 32, 64, 128), "subtile", where)
        if self.tile % self.subtile:
            raise PlanError(f"subtile {self.subtile} does not divide tile {self.tile}", where=where, fix="subtile 32")
        for value in each(self.tau):
            number(value, "tau", where, least=0.0)
        for value in each(self.floor):
            choice(value, tuple(int(level) for level in Floor), "floor", where)
        for row in self.balance or ():
            for value in row:
                number(value, "balance", where, above=0.0)
        choice(self.lookahead, LOOKAHEADS, "lookahead", where)
        number(self.skip, "skip", where, least=0.0, most=0.5)
        if self.lookahead == "network" and self.rule != "energy":
            raise PlanError(
                f"a network predicts the energy rule's importance, this is {self.rule!r}",
                where=where,
                fix="rule energy",
            )
        if self.lookahead == "network" and self.exact_tier != "none":
            raise PlanError(
                "a network beside an exact copy on the host", where=where, fix="exact_tier none, or lookahead exact"
            )
        if self.skip and self.lookahead != "network":
            raise PlanError(f"skip is {self.skip!r} without a network", where=where, fix="lookahead network, or skip 0")
        number(self.guard.budget, "guard.budget", where, above=0.0, infinite=True)
        number(self.guard.hysteresis, "guard.hysteresis", where, above=0.0, most=1.0)
        if not isinstance(self.guard.retry, bool):
            raise PlanError(f"guard.retry is {self.guard.retry!r}", where=where, fix="true or false")
        for name in ("window", "hold"):
            value = getattr(self.guard, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= LARGEST:
                raise PlanError(
                    f"guard.{name} must be a whole number of steps, got {value!r}", where=where, fix="1 or more"
                )


@dataclass(frozen=True)
class Plan:
    """All sites of one model or graph, in graph order, and where the numbers come from."""

    sites: tuple[SitePlan, ...]
    linears: tuple[LinearPlan, ...] = field(default=(), kw_only=True)
    """Linear layers looked at; layers without a row keep their weights."""
    network: NetworkPlan | None = field(default=None, kw_only=True)
    """The look-ahead network that rows with ``lookahead: "network"`` use."""
    model: str = ""
    """What it was made for, in words (class and sizes)."""
    fingerprint: str = ""
    """Hash of the names and shapes of all sites; a plan for another graph is refused by it."""
    preset: str = "balanced"
    launch: Mapping[str, LaunchPlan] = field(default_factory=dict)
    """By kind of GPU, such as "sm_90": how kernels cut their work there; the defaults where it is not named."""
    control: ControlPlan | None = None
    """What the precision controller holds while the model runs; None = no controller."""
    shadow: float = 0.0
    """Share of steps that run a second time without approximation, to measure the true error."""
    provenance: Mapping[str, Any] = field(default_factory=lambda: {"calibration": "uncalibrated"})
    version: int = PLAN_VERSION

    def site(self, name: str) -> SitePlan:
        """The row of one site.

        Raises:
            PlanError: The plan has no such row.
        """
        for row in self.sites:
            if row.name == name:
                return row
        raise PlanError(
            f"the plan has no site {name!r}",
            where=f"plan for {self.model or 'another graph'}",
            fix="make a new plan for this model",
        )

    def validate(self) -> Plan:
        """Check every row; returns self.

        Raises:
            PlanError: A row is malformed or a name occurs twice.
        """
        names = [row.name for row in self.sites]
        for name in names:
            if names.count(name) > 1:
                raise PlanError(f"site {name!r} occurs twice", where="plan", fix="keep one of the rows")
        for row in self.sites:
            row.validate()
        linear_plan.validate(self.linears)
        if self.network is not None:
            self.network.validate("plan, network")
        for row in self.sites:
            if row.lookahead == "network" and self.network is None:
                raise PlanError(
                    "a site with a network, and the plan names none",
                    where=f"plan, site {row.name!r}",
                    fix="compile(model, lookahead=FILE), or lookahead exact",
                )
        for name, launch in self.launch.items():
            launch.validate(f"plan, launch on {name!r}")
        if self.control is not None:
            self.control.validate()
        number(self.shadow, "shadow", "plan", least=0.0, most=1.0)
        return self

    def check(self, fingerprint: str, model: str) -> None:
        """Raise PlanError unless this plan was made for sites with that fingerprint."""
        if self.fingerprint and self.fingerprint != fingerprint:
            raise PlanError(
                f"this plan was made for {self.model or 'another graph'}, not for {model}",
                where=f"plan (fingerprint {self.fingerprint}, this graph has {fingerprint})",
                fix="make a new plan, or clear the plan's fingerprint if you know that the sites are the same",
            )

    def to_json(self) -> str:
        """Readable JSON, one object per site."""
        return json.dumps(jsonable(asdict(self)), indent=2, allow_nan=False) + "\n"

    def save(self, path: str | Path) -> None:
        """Write ``to_json()`` to a file."""
        Path(path).write_text(self.to_json(), encoding="utf-8")

    @staticmethod
    def from_json(text: str, where: str = "plan") -> Plan:
        """Read and validate a plan.

        Raises:
            PlanError: Not JSON, another version, unknown or missing fields, impossible values.
        """
        try:
            data = json.loads(text, object_pairs_hook=lambda pairs: _once(pairs, where))
        except (json.JSONDecodeError, RecursionError) as error:
            raise PlanError(
                f"not JSON: {error}", where=where, fix="write plans with Plan.save() or `lamp-compile compile`"
            ) from None
        if not isinstance(data, dict):
            raise PlanError(
                f"a plan is a JSON object, this is a {type(data).__name__}",
                where=where,
                fix="write plans with Plan.save() or `lamp-compile compile`",
            )
        if data.get("version") != PLAN_VERSION:
            raise PlanError(
                f"plan version {data.get('version')!r}, this release reads {PLAN_VERSION}",
                where=where,
                fix="make a new plan",
            )
        rows = data.get("sites")
        if not isinstance(rows, list):
            raise PlanError("`sites` must be a list", where=where, fix="see docs/plan.md")
        sites = tuple(_row(SitePlan, row, f"{where}, site {index}") for index, row in enumerate(rows))
        launch = data.get("launch", {})
        if not isinstance(launch, dict):
            raise PlanError("`launch` must be an object", where=where, fix='{"sm_90": {"stages": 4}}, or leave it out')
        cut = {name: _row(LaunchPlan, row, f"{where}, launch on {name!r}") for name, row in launch.items()}
        linears = linear_plan.read(data.get("linears", []), where)
        control = control_plan.read(data.get("control"), where)
        known = {"sites": sites, "linears": linears, "launch": cut, "control": control}
        if data.get("network") is not None:
            known["network"] = _row(NetworkPlan, data["network"], f"{where}, network")
        plan: Plan = _row(Plan, {**data, **known}, where)
        if not isinstance(plan.provenance, dict):
            raise PlanError("`provenance` must be an object", where=where, fix="see docs/plan.md")
        return plan.validate()

    @staticmethod
    def load(path: str | Path) -> Plan:
        """Read a plan from a file.

        Raises:
            PlanError: See ``from_json``; also when the file cannot be read.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else f"not UTF-8 text: {error.reason}"
            raise PlanError(f"cannot read the plan: {reason}", where=str(path), fix="check the path") from None
        return Plan.from_json(text, where=str(path))


PRESETS: Mapping[str, Mapping[str, Any]] = {
    "conservative": {"tau": 0.003},
    "balanced": {"tau": 0.01},
    "aggressive": {"tau": 0.03},
}
"""Named starting points; each sets fields of every SitePlan."""

KEPT = {"conservative": 1 / 16}
"""Share of a decoder's attention layers, rounded up, that a preset keeps as the model has them: the last ones, where no
text has said which are the most sensitive (``lamp-compile calibrate``)."""

HOT = ("tau", "floor")
NO_OPTIONS = ("name", "apply", "reason", "balance", "guard", "lookahead", "skip")
"""Fields of a row that are no options of ``compile``: they belong to one site, or need a network beside them."""
SITE_OPTIONS = tuple(f.name for f in fields(SitePlan) if f.name not in NO_OPTIONS)
GUARD_OPTIONS = tuple(f.name for f in fields(GuardPlan))


def template(preset: str = "balanced", **overrides: Any) -> SitePlan:
    """A nameless SitePlan of a preset with fields overridden (``guard_budget=`` and the like reach into the guard).

    Raises:
        OptionError: Unknown preset or field, by name.
        PlanError: Impossible value.
    """
    if preset not in PRESETS:
        raise OptionError(f"unknown preset {preset!r}", where="preset", fix=f"one of {', '.join(PRESETS)}")
    known = (*SITE_OPTIONS, *(f"guard_{name}" for name in GUARD_OPTIONS))
    for name in overrides:
        if name not in known:
            raise OptionError(f"unknown option {name!r}", where="options", fix=f"one of {', '.join(known)}")
    guard = {name.removeprefix("guard_"): value for name, value in overrides.items() if name.startswith("guard_")}
    site = {name: value for name, value in overrides.items() if not name.startswith("guard_")}
    site = {name: tuple(v) if name in HOT and isinstance(v, list) else v for name, v in site.items()}
    made = replace(SitePlan(name="*"), **{**PRESETS[preset], **site})
    made = replace(made, guard=replace(made.guard, **guard))
    made.validate(where="options")
    return made


def keep_last(rows: tuple[SitePlan, ...], preset: str) -> tuple[SitePlan, ...]:
    """The rows with as many of the last applied ones kept in 16 bits as the preset says; one at least stays applied."""
    applied = [row.name for row in rows if row.apply]
    count = min(math.ceil(KEPT.get(preset, 0.0) * len(applied)), len(applied) - 1)
    kept = set(applied[len(applied) - count :]) if count > 0 else set()
    reason = f"kept: preset {preset}, uncalibrated, keeps the last {'layer' if count == 1 else f'{count} layers'}"
    return tuple(replace(row, apply=False, reason=reason) if row.name in kept else row for row in rows)


def fingerprint(sites: Iterable[tuple[str, int, int, int, int]]) -> str:
    """Hash of (name, heads, kv heads, head dim, value dim) of all sites."""
    text = json.dumps([list(site) for site in sites])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _row(kind: type[Any], data: object, where: str) -> Any:
    values = read_row(kind, data, where)
    if kind is SitePlan:
        if not isinstance(values.get("name"), str):
            raise PlanError(
                "a site needs a name", where=where, fix="the module path that `lamp-compile explain` prints"
            )
        for name, wanted in (("apply", bool), ("reason", str)):
            if name in values and not isinstance(values[name], wanted):
                raise PlanError(
                    f"{name} must be {wanted.__name__}, got {values[name]!r}", where=where, fix="see docs/plan.md"
                )
        for name in ("tau", "floor"):
            if isinstance(values.get(name), list):
                values[name] = tuple(values[name])
        if values.get("balance") is not None:
            values["balance"] = _balance(values["balance"], where)
        guard = values.get("guard", {})
        values["guard"] = _row(GuardPlan, guard, f"{where}, guard")
    if values.get("budget") == "Infinity":
        values["budget"] = math.inf
    return kind(**values)


def _balance(value: object, where: str) -> tuple[tuple[float, ...], ...]:
    if (
        not isinstance(value, list)
        or not value
        or not all(isinstance(row, list) for row in value)
        or len({len(r) for r in value}) > 1
    ):
        raise PlanError(
            "balance must be one list of numbers per kv head, all of one length", where=where, fix="or null"
        )
    return tuple(tuple(row) for row in value)


def _once(pairs: list[tuple[str, Any]], where: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise PlanError(f"{name!r} stands twice in one object", where=where, fix="leave one of them")
        found[name] = value
    return found
