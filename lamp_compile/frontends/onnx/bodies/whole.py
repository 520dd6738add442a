"""One node for one attention: ``FusedAttention`` over a cache, ``UncachedAttention`` over keys and values."""

from __future__ import annotations

from lamp_compile.frontends.onnx.form import Form

_GUARD = "<guard_window: int = @guard_window, guard_hold: int = @guard_hold, hysteresis: float = @hysteresis>"
_PLANES = "k_high, k_residual, k_scale, v_high, v_residual, v_scale"


def _given(form: Form, *names: str) -> str:
    return "".join(f", {name}" for name in names if getattr(form, name))


def _attributes(form: Form) -> tuple[str, str, str]:
    """Attributes of the whole, of products and of visibility."""
    window = ", window: int = 0" if form.window else ""
    cap = ", softcap: float = 1.0" if form.softcap else ""
    own = f"scale: float = 1.0{window}{cap}, guard_window: int = 16, guard_hold: int = 64, hysteresis: float = 0.5"
    products = f"<scale: float = @scale{', softcap: float = @softcap' if form.softcap else ''}>"
    return own, products, "<window: int = @window>" if form.window else ""


def _parts(form: Form) -> str:
    _, products, visible = _attributes(form)
    turned_k = (", rotate_k" if form.rotation else "") + _given(form, "balance")
    turned = (", rotate_k, rotate_v" if form.rotation else "") + _given(form, "balance")
    bias = "bias5 = ai.lamp.ByGroup(bias, q, k_scale)\n  " if form.bias else ""
    added = (", bias5" if form.bias else "") + _given(form, "sinks")
    exact = "" if form.cache else ", k, v"
    rest = _PLANES.removeprefix("k_high, ")
    return f"""live, tiles = ai.lamp.Visible{visible}(q, k_scale, lengths{_given(form, "start", "mask")})
  {bias}importance, scores = ai.lamp.LookAhead{products}(q, k_high, k_scale, live, tiles{turned_k}{added})
  levels = ai.lamp.Select(importance, tau, floor, state)
  out, square, estimate, mass = ai.lamp.Attend{products}(q, scores, levels, live, {rest}{turned}{added}{exact})
  state_new, stats_new = ai.lamp.Guard{_GUARD}(estimate, square, mass, levels, state, stats, floor, budget)"""


def fused_attention(form: Form) -> str:
    """Attention over the planes of a cache."""
    turned = (", rotate_k, rotate_v" if form.rotation else "") + _given(form, "balance")
    seen = _given(form, "start", "mask", "bias", "sinks")
    return f"""FusedAttention <{_attributes(form)[0]}>
(q, {_PLANES}, tau, floor, budget, state, stats, lengths{turned}{seen}) => (out, state_new, stats_new) {{
  {_parts(form)}
}}"""


def attention(form: Form) -> str:
    """Attention over keys and values that are quantised here; level 2 uses them as they are."""
    turned = (", rotate_k, rotate_v" if form.rotation else "") + _given(form, "balance")
    padded = [name for name in ("mask", "bias") if getattr(form, name) and (name == "bias" or form.mask == "keys")]
    given = _given(form, "mask", "bias", "sinks")
    renamed = given
    pads = ""
    for name in padded:
        renamed = renamed.replace(f", {name}", f", {name}_given")
        pads += f"\n  {name} = Pad({name}_given, pads, , axis)"
    if padded:
        pads = f"""
  stored = Shape<start = 2, end = 3>(k_scale)
  missing = Sub(stored, lengths)
  begin = Constant<value_ints = [0]>()
  axis = Constant<value_ints = [3]>()
  pads = Concat<axis = 0>(begin, missing){pads}"""
    return f"""UncachedAttention <{_attributes(form)[0]}>
(q, k, v, tau, floor, budget, state, stats{turned}{renamed}) => (out, state_new, stats_new) {{
  {_PLANES} = ai.lamp.Quantize(k, v{turned})
  lengths = Shape<start = 2, end = 3>(k){pads}
  {_parts(form)}
}}"""
