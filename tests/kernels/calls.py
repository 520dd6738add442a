"""Calls of the fused attention: inputs, what the kernels make of them, what the reference makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from lamp_compile.ir import Precision
from lamp_compile.runtime import guard, layout, lookahead, reference, rotation
from lamp_compile.runtime import ops as _ops  # noqa: F401 (registers torch.ops.lamp)
from lamp_compile.runtime.arguments import Visibility
from lamp_compile.runtime.kernels import cpu

CHUNK = 512
"""Keys whose weights are relative to one number (``core/rows.h``)."""
COLD, BOTH = 1e9, 0.0
"""tau that refines nothing, tau that refines everything."""
NAMES = ("mask", "bias", "sinks", "start", "lengths", "table")
STRICT = replace(lookahead.get("lamp_strict"), importance=lambda z, y, live: (2 * z * y.abs()).amax(-1))
"""The strict rule as kernels have it, which is never less: without the factor 1 - z, for which a second pass would be
needed."""


class Native(NamedTuple):
    """Where kernels run, in place of a torch.device: the compiled core for CPUs, with one of its instruction sets."""

    name: str
    type: str = "cpu"


Where = torch.device | Native


@dataclass(frozen=True)
class Call:
    """Arguments of one ``lamp::fused_attention``, and the keys and values its planes were made of."""

    q: Tensor
    k: Tensor
    v: Tensor
    planes: tuple[Tensor, ...]
    hot: tuple[Tensor, ...]
    balance: Tensor | None
    seen: tuple[Tensor | None, ...]
    options: dict[str, Any]

    @property
    def keys(self) -> int:
        return int(self.options["keys"])

    def exact(self) -> Tensor:
        """Attention over the keys and values themselves, in float64."""
        see = Visibility(self.keys, *self.seen[:5], self.options["causal"], self.options["window"])
        scale = self.q.shape[-1] ** -0.5
        return reference.exact_attention(self.q, self.k, self.v, see, scale, self.options["softcap"])[0]

    def arguments(self, device: Where) -> tuple[Any, ...]:
        """For ``decode``, on a device; state and statistics are copies."""

        def there(x: Tensor | None) -> Tensor | None:
            """Strides are part of the case."""
            if x is None or device.type == "cpu":
                return x
            moved = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)
            return moved.copy_(x)

        hot = tuple(x.to(device.type, copy=True) for x in self.hot)
        return (
            there(self.q), tuple(map(there, self.planes)), hot, there(self.balance), tuple(map(there, self.seen)),
            self.options,
        )  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What an attention leaves."""

    out: Tensor
    lse: Tensor
    certificate: Tensor
    state: Tensor
    stats: Tensor

    def tensors(self) -> dict[str, Tensor]:
        return dict(vars(self))


def steady(x: Tensor, step: Tensor) -> Tensor:
    """x with nothing near the middle between two steps, so that no last bit decides how it is rounded."""
    whole = (x / step).round()
    return (whole + (x / step - whole).clamp(-0.4, 0.4)) * step


def queries(shape: tuple[int, ...], sharpness: float, balance: Tensor | None, kind: str, kv_heads: int) -> Tensor:
    """Normal queries ``[B, H, S, D]`` whose rounding to int8 is not in doubt; float32."""
    x = torch.randn(shape, dtype=torch.float64) * sharpness
    x = rotation.unrotate(steady(x, x.abs().amax(-1, keepdim=True) / 127), kind)
    if balance is not None:
        per_head = balance.double().repeat_interleave(shape[1] // kv_heads, dim=-2)
        x = x / per_head.reshape(-1, shape[1], 1, shape[3])
    return x.float()


def between(importance: Tensor, share: float) -> Tensor:
    """tau ``[G]`` that takes about this share of the live sub-tiles, in the widest gap nearby: no last bit decides."""
    taus = []
    for values in importance.transpose(0, 1).flatten(1):
        alive = values[values > 0].double().sort(descending=True).values
        if len(alive) < 2:
            taus.append(0.01)
            continue
        first = min(max(0, int(len(alive) * share) - 3), len(alive) - 2)
        window = alive[first : first + 7]
        widest = int((window[:-1] / window[1:]).argmax())
        taus.append(float((window[widest] * window[widest + 1]).sqrt()))
    return torch.tensor(taus)


def make(
    seed: int = 0, *, batch: int = 2, heads: int = 4, kv_heads: int = 2, tokens: int = 1, keys: int = 150,
    dim: int = 64, value_dim: int | None = None, tile: int = 32, dtype: torch.dtype = torch.float32,
    sharpness: float = 1.0, balance: Tensor | None = None, share: float = 0.3, tau: float | Tensor | None = None,
    floor: float | Tensor = 0.0, budget: float | Tensor = 0.25, state: Tensor | None = None, lanes: bool = False,
    **given: Any,
) -> Call:  # fmt: skip
    """Inputs of one call; values have a mean, so that an output of the wrong size is seen. ``lanes``: planes lie so.
    ``given``: what a row sees, and options."""
    torch.manual_seed(seed)
    seen = tuple(given.pop(name, None) for name in NAMES)
    options = {
        "causal": "", "window": 0, "scale": None, "softcap": 0.0, "keys": keys, "k_format": "nested8",
        "v_format": "nested8", "rotation": "hadamard", "rule": "energy", "query_bits": 8, "subtile": 32,
        "guard_window": 16, "guard_hold": 64, "hysteresis": 0.5, "site": "", **given,
    }  # fmt: skip
    q = queries((batch, heads, tokens, dim), sharpness, balance, options["rotation"], kv_heads).to(dtype)
    k, v = torch.randn(batch, kv_heads, keys, dim), torch.randn(batch, kv_heads, keys, value_dim or dim) + 0.3
    stored = reference.quantize(k, v, balance, "nested8", "nested8", options["rotation"], tile)
    planes = (stored.k_high, stored.k_residual, stored.k_scale, stored.v_high, stored.v_residual, stored.v_scale)
    planes = planes_by_lanes(planes) if lanes else planes

    def setting(x: float | Tensor) -> Tensor:
        return x if isinstance(x, Tensor) else torch.full((kv_heads,), float(x))

    state = guard.new_state(batch, kv_heads) if state is None else state
    hot = (setting(0.0), setting(floor), setting(budget), state, guard.new_stats(batch, kv_heads))
    call = Call(q, k, v, planes, hot, balance, seen, options)
    return replace(call, hot=(setting(between(importance_of(call), share) if tau is None else tau), *hot[1:]))


def planes_by_lanes(planes: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Six planes, of which two are scales."""
    return tuple(x if x.dim() == 3 else layout.as_lanes(x) for x in planes)


def fit_lanes(planes: Sequence[Tensor]) -> bool:
    """Whether six planes by rows can lie by lanes."""
    keys, values = planes[0], planes[3]
    return layout.lanes_fit(layout.tile_of(keys), layout.key_width(keys), layout.value_width(values))


def layouts(call: Call, device: Where) -> list[Call]:
    """The call over planes by rows, and the same over planes by lanes where they can lie so and are read so."""
    assert not layout.by_lanes(call.planes[0])
    if not isinstance(device, Native) or not fit_lanes(call.planes):
        return [call]
    return [call, replace(call, planes=planes_by_lanes(call.planes))]


def importance_of(call: Call, *, kernels: bool = True) -> Tensor:
    """The reference's importance of each sub-tile ``[B, G, S, T]``, by the rule as kernels have it or as it stands."""
    names = ("causal", "window", "scale", "softcap", "keys", "k_format", "rotation", "rule", "query_bits", "subtile",
             "site")  # fmt: skip
    options = {name: call.options[name] for name in names}
    rule = STRICT if kernels and options["rule"] == "lamp_strict" else lookahead.get(options["rule"])
    with mock.patch.object(reference.lookahead, "get", return_value=rule):
        made = torch.ops.lamp.look_ahead(call.q, call.planes[0], call.planes[2], call.balance, *call.seen, **options)
    assert isinstance(made, Tensor)
    return made


def levels_of(call: Call, together: int = 1, *, kernels: bool = True) -> Tensor:
    """The reference's precision of each sub-tile; ``together`` tokens decide as one: what one of them wants refined is
    refined for all of them that see it."""
    tau, floor, _, state, _ = call.hot
    importance = importance_of(call, kernels=kernels)
    levels = torch.ops.lamp.select(importance, tau, floor, state, None, exact=False, site="")
    blocks = [torch.where(b > Precision.SKIP, b.amax(2, keepdim=True), b) for b in levels.split(together, dim=2)]
    return torch.cat(blocks, dim=2)


def by_reference(call: Call, levels: Tensor) -> Outcome:
    """attend and guard of the reference; log-sum-exps of float64, since those of float32 are as far off as a kernel."""
    names = ("causal", "window", "scale", "softcap", "keys", "k_format", "v_format", "rotation", "query_bits",
             "subtile", "site")  # fmt: skip
    options = {name: call.options[name] for name in names}
    out, lse, certificate = torch.ops.lamp.attend(
        call.q, *call.planes, levels, None, None, call.balance, *call.seen, **options
    )
    precise = torch.ops.lamp.attend(
        call.q.double(), *call.planes, levels, None, None, call.balance, *call.seen, **options
    )[1]
    return Outcome(out, precise, certificate, *guarded(call, out, lse, certificate, levels))


def guarded(call: Call, out: Tensor, lse: Tensor, certificate: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """State and statistics after the reference's guard has seen this."""
    _, floor, budget, state, stats = call.hot
    options = call.options
    return guard.step(
        out, lse, certificate, levels, state, stats, floor, budget, window=options["guard_window"],
        hold=options["guard_hold"], hysteresis=options["hysteresis"], exact=False,
    )  # fmt: skip


def by_kernels(call: Call, device: Where) -> Outcome:
    """What the kernels leave, on the CPU."""
    arguments = call.arguments(device)
    if isinstance(device, Native):
        assert cpu.instruction_set() == device.name
        result: Any = cpu.attend(*arguments, details=True)
    else:
        from lamp_compile.runtime.kernels import decode

        result = decode.decode(*arguments)
    state, stats = arguments[2][3:]
    return Outcome(*(x.cpu() for x in (result.out, result.lse, result.certificate, state, stats)))


def decided_together(call: Call, device: Where) -> int:
    """Tokens of one program, which decide as one; on a CPU each for itself, as in the reference."""
    from lamp_compile.launch_plan import LaunchPlan

    if isinstance(device, Native):
        return 1
    from lamp_compile.runtime.kernels import targets

    pages = call.planes[0].shape[2] if call.seen[5] is None else call.seen[5].shape[1]
    room = min(call.keys, pages * layout.tile_of(call.planes[0]))
    launch = LaunchPlan.parse("")
    target = targets.target_of(device)
    return targets.cut(target, launch, call.q, call.planes, room, call.options["subtile"], mixed=False).tokens


def use_launch(patch: Any, **choices: Any) -> None:
    """Cut calls otherwise than by default, so that small ones meet in several programs, in launches of their own."""
    from lamp_compile.launch_plan import LaunchPlan

    plan = LaunchPlan(**{"most_finished": 0, **choices})
    patch.setattr(LaunchPlan, "parse", staticmethod(lambda text: plan))


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


def same(one: Outcome, other: Outcome) -> None:
    """Bit for bit, NaN included."""
    for name, value in one.tensors().items():
        assert torch.equal(bits(value), bits(other.tensors()[name])), name


def worst(got: Tensor, wanted: Tensor) -> float:
    """The largest error of a row relative to the row."""
    got, wanted = got.double(), wanted.double()
    size = wanted.norm(dim=-1)
    return float(((got - wanted).norm(dim=-1) / size.clamp_min(1e-30))[size > 0].max()) if (size > 0).any() else 0.0


def whole(got: Tensor, wanted: Tensor) -> float:
    """The error of all rows relative to all rows."""
    return float((got.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-30))
