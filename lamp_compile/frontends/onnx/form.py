"""Which of several bodies a function has: the choices that change its nodes, not its numbers.

ONNX function bodies cannot branch on their attributes, so every combination in use is a function of its own, told
apart by its *overload* (``Form.tag``). Numbers (scale, window, soft-cap, the guard's constants) stay attributes.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from lamp_compile.errors import ModelError, OptionError
from lamp_compile.plan import SitePlan

GUARDS = ("if", "select")
ARITHMETIC = ("integer", "float")
RULES = ("energy", "lamp_strict", "lamp_relaxed")
CAUSAL = ("", "top_left", "bottom_right")
MASKS = ("", "keys", "column")


@dataclass(frozen=True)
class Form:
    """One combination.

    Attributes:
        guard: "if" reads the residual planes inside an ``If`` and, where fewer than half of the tiles are refined,
            those tiles only; "select" has no control flow (CUDA graphs) and reads all.
        arithmetic: "integer" unpacks with bit operations and multiplies with ``MatMulInteger``; "float" needs neither.
        rule: Selection rule.
        query_bits: 8, 16 or 0, as of ``runtime.arguments.Scores``.
        subtile: Keys per decision.
        tile: Keys per storage tile; for sites without a cache.
        rotation: Whether keys, values and queries are rotated.
        balance: Whether there is a balance.
        causal: "", "top_left" or "bottom_right".
        window: Whether there is a sliding window (its length is an attribute).
        softcap: Whether scores are soft-capped.
        mask: "" none; "keys" one column for each key; "column" one column for all.
        bias: Whether something is added to the scores.
        sinks: Whether there are sink logits.
        start: Whether each sequence has a first live key.
        paired: Whether keys and values are equally wide, so that a cache's new rows of both are encoded as one tensor.
        cache: Whether keys and values come as planes of a cache. Without one the original keys and values serve
            level 2, and the guard's state is one for the whole batch.
    """

    guard: str = "if"
    arithmetic: str = "integer"
    rule: str = "energy"
    query_bits: int = 8
    subtile: int = 32
    tile: int = 32
    rotation: bool = True
    balance: bool = False
    causal: str = "bottom_right"
    window: bool = False
    softcap: bool = False
    mask: str = ""
    bias: bool = False
    sinks: bool = False
    start: bool = False
    paired: bool = False
    cache: bool = True

    def __post_init__(self) -> None:
        for name, allowed in (
            ("guard", GUARDS), ("arithmetic", ARITHMETIC), ("rule", RULES), ("causal", CAUSAL), ("mask", MASKS),
            ("query_bits", (0, 8, 16)), ("subtile", (16, 32, 64, 128)), ("tile", (32, 64, 128)),
        ):  # fmt: skip
            value = getattr(self, name)
            if value not in allowed:
                raise OptionError(
                    f"{name} {value!r} has no ONNX body",
                    where="ai.lamp",
                    fix=f"one of {', '.join(str(item) or 'none' for item in allowed)}",
                )
        if self.window and not self.causal:
            raise OptionError("a window needs causality", where="ai.lamp", fix="causal='bottom_right'")

    @property
    def integer(self) -> bool:
        """Whether products are formed from integers: they are exact only for a query rounded to 8 bits."""
        return self.arithmetic == "integer" and self.query_bits == 8

    @property
    def tag(self) -> str:
        """The overload: every choice, spelled out, so that nobody has to look it up."""
        parts = [self.guard, self.arithmetic, self.rule, f"q{self.query_bits}", f"s{self.subtile}", f"t{self.tile}"]
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name in ("causal", "mask"):
                parts += [f"{item.name}_{value}"] if value else []
            elif isinstance(value, bool) and value:
                parts.append(item.name)
        return ".".join(parts)


def check_row(row: SitePlan) -> None:
    """Raise where ONNX functions cannot do what a row of a plan says.

    Raises:
        ModelError: A storage format or a rule without a body.
    """
    for field, allowed in (("k_format", ("nested8",)), ("v_format", ("nested8",)), ("rule", RULES)):
        value = getattr(row, field)
        if value not in allowed:
            fix = f"{field} {' or '.join(repr(item) for item in allowed)}"
            raise ModelError(f"{field} {value!r} has no ONNX functions", where=row.name, fix=fix)
