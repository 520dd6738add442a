"""Rows of keys and values into nested8 planes: ``Encode``, ``Append`` (into a cache), ``Quantize`` (whole tiles)."""

from __future__ import annotations

from lamp_compile.frontends.onnx.form import Form


def encode(form: Form, balance: bool) -> str:
    """Rows ``[B, G, n, D]`` -> high, residual uint8 ``[B, G, n, D/2]``, scale ``[B, G, n]`` rounded to float16 (kept as
    float32), bit by bit as ``runtime/formats/nested8.py``. A NaN or infinity in a row goes into its scale."""
    rotation = form.rotation
    name = f"Encode{'Rotated' if rotation else ''}{'Balanced' if balance else ''}"
    inputs = ", ".join(["rows", *(["rotate"] if rotation else []), *(["balance"] if balance else [])])
    divide = "divisor = Unsqueeze(balance, minus_two)\n  x1 = Div(x0, divisor)" if balance else "x1 = Identity(x0)"
    turn = "x = MatMul(x1, rotate)" if rotation else "x = Identity(x1)"
    return f"""{name} ({inputs}) => (high, residual, scale) {{
  last = Constant<value_ints = [-1]>()
  minus_two = Constant<value_ints = [-2]>()
  zero = Constant<value = float {{0.0}}>()
  largest = Constant<value = float {{119.0}}>()
  smallest = Constant<value = float {{-119.0}}>()
  eight = Constant<value = float {{8.0}}>()
  sixteen = Constant<value = float {{16.0}}>()
  sixteenth = Constant<value = float {{0.0625}}>()
  x0 = Cast<to = 1>(rows)
  {divide}
  {turn}
  size = Abs(x)
  peak = ReduceMax<keepdims = 0>(size, last)
  total = ReduceSum<keepdims = 0>(x, last)
  nothing = Mul(total, zero)
  step0 = Div(peak, largest)
  step = Add(step0, nothing)
  {rounded_to_half("step", "scale", form)}
  divisor1 = Unsqueeze(scale, last)
  ratio = Div(x, divisor1)
  unscaled = Equal(divisor1, zero)
  undefined = IsNaN(ratio)
  empty = Or(unscaled, undefined)
  steps = Where(empty, zero, ratio)
  whole = Round(steps)
  q = Clip(whole, smallest, largest)
  raised = Add(q, eight)
  shifted = Mul(raised, sixteenth)
  hi = Floor(shifted)
  hi16 = Mul(hi, sixteen)
  lo = Sub(q, hi16)
  high = ai.lamp.Pack(hi)
  residual = ai.lamp.Pack(lo)
}}"""


def rounded_to_half(x: str, name: str, form: Form) -> str:
    """x rounded to float16, as float32. Some compilers drop a cast there and back, so "float" forms split it by hand
    (T. J. Dekker, 1971): 11 bits of mantissa; they differ below float16's smallest normal number only."""
    if form.arithmetic == "integer":
        return f"{name}_half = Cast<to = 10>({x})\n  {name} = Cast<to = 1>({name}_half)"
    return f"""{name}_factor = Constant<value = float {{8193.0}}>()
  {name}_scaled = Mul({x}, {name}_factor)
  {name}_rest = Sub({name}_scaled, {x})
  {name} = Sub({name}_scaled, {name}_rest)"""


def pack() -> str:
    """Nibbles in [-8, 7] as floats ``[..., D]`` -> bytes ``[..., D/2]``: channel j above channel j + D/2."""
    return """Pack (nibble) => (byte) {
  zero = Constant<value = float {0.0}>()
  sixteen = Constant<value = float {16.0}>()
  negative = Less(nibble, zero)
  wrapped = Add(nibble, sixteen)
  unsigned = Where(negative, wrapped, nibble)
  upper, lower = Split<axis = -1, num_outputs = 2>(unsigned)
  shifted = Mul(upper, sixteen)
  both = Add(shifted, lower)
  byte = Cast<to = 2>(both)
}"""


def _encoded(form: Form, prefix: str = "") -> tuple[str, str]:
    """The two calls of ``Encode``, and the inputs that they need."""
    turned = "Rotated" if form.rotation else ""
    inputs = (", rotate_k, rotate_v" if form.rotation else "") + (", balance" if form.balance else "")
    rotate_k, rotate_v = (", rotate_k", ", rotate_v") if form.rotation else ("", "")
    balance, balanced = (", balance", "Balanced") if form.balance else ("", "")
    return (
        f"""k_bytes, k_rest, k_step = ai.lamp.Encode{turned}{balanced}(k{rotate_k}{balance})
  v_bytes, v_rest, v_step = ai.lamp.Encode{turned}(v{rotate_v})""",
        inputs,
    )


_INDEX = """
  last = Constant<value_ints = [-1]>()
  zero = Constant<value = int64 {0}>()
  one = Constant<value = int64 {1}>()
  first1 = Constant<value_ints = [1]>()
  outer2 = Constant<value_ints = [1, 2]>()
  outer0 = Constant<value_ints = [0, 2]>()
  lead = Shape<start = 0, end = 3>(k)
  batch1, heads1, rows1 = Split<axis = 0, num_outputs = 3>(lead)
  batch = Squeeze(batch1)
  heads = Squeeze(heads1)
  rows = Squeeze(rows1)
  every_batch = Range(zero, batch, one)
  every_head = Range(zero, heads, one)
  every_row = Range(zero, rows, one)
  b0 = Unsqueeze(every_batch, outer2)
  b1 = Expand(b0, lead)
  b = Unsqueeze(b1, last)
  g0 = Unsqueeze(every_head, outer0)
  g1 = Expand(g0, lead)
  g = Unsqueeze(g1, last)
  first = Unsqueeze(positions, first1)
  place0 = Add(first, every_row)
  place1 = Unsqueeze(place0, first1)
  place2 = Expand(place1, lead)
  place = Unsqueeze(place2, last)
"""


def append(form: Form) -> str:
    """New rows into the planes of a cache. The scattered planes have their own shape from input to output, with nothing
    in between: bound to one buffer on both sides they are written in place."""
    calls, inputs = _encoded(form)
    planes = "k_high, k_residual, k_scale, v_high, v_residual, v_scale"
    outputs = ", ".join(f"{name}_new" for name in planes.split(", "))
    return f"""Append (k, v, {planes}, positions{inputs}) => ({outputs}) {{
  {calls}
  {_INDEX}
  tile = Shape<start = 3, end = 4>(k_high)
  page = Div(place, tile)
  before = Mul(page, tile)
  key = Sub(place, before)
  at_scale = Concat<axis = -1>(b, g, place)
  at_key = Concat<axis = -1>(b, g, page, key)
  k_high_new = ScatterND(k_high, at_key, k_bytes)
  k_residual_new = ScatterND(k_residual, at_key, k_rest)
  k_half = Cast<to = 10>(k_step)
  v_half = Cast<to = 10>(v_step)
  k_scale_new = ScatterND(k_scale, at_scale, k_half)
  v_scale_new = ScatterND(v_scale, at_scale, v_half)
  width1 = Shape<start = 3, end = 4>(v_bytes)
  width = Squeeze(width1)
  every_channel = Range(zero, width, one)
  channel0 = Unsqueeze(every_channel, last)
  v_lead = Concat<axis = 0>(lead, width1, first1)
  channel = Expand(channel0, v_lead)
  minus_two = Constant<value_ints = [-2]>()
  bgp0 = Concat<axis = -1>(b, g, page)
  bgp1 = Unsqueeze(bgp0, minus_two)
  three = Constant<value_ints = [3]>()
  bgp_lead = Concat<axis = 0>(lead, width1, three)
  bgp = Expand(bgp1, bgp_lead)
  key1 = Unsqueeze(key, minus_two)
  key2 = Expand(key1, v_lead)
  at_value = Concat<axis = -1>(bgp, channel, key2)
  v_high_new = ScatterND(v_high, at_value, v_bytes)
  v_residual_new = ScatterND(v_residual, at_value, v_rest)
}}"""


def quantize(form: Form) -> str:
    """Keys and values ``[B, G, N, D]`` -> planes of whole storage tiles, padded with zeros."""
    calls, inputs = _encoded(form)
    return f"""Quantize (k, v{inputs}) => (k_high, k_residual, k_scale, v_high, v_residual, v_scale) {{
  {calls}
  k_high, k_residual, k_scale = ai.lamp.KeyTiles(k_bytes, k_rest, k_step)
  v_rows, v_rest_rows, v_scale = ai.lamp.KeyTiles(v_bytes, v_rest, v_step)
  v_high = Transpose<perm = [0, 1, 2, 4, 3]>(v_rows)
  v_residual = Transpose<perm = [0, 1, 2, 4, 3]>(v_rest_rows)
}}"""


def key_tiles(form: Form) -> str:
    """Rows ``[B, G, n, W]`` and scales ``[B, G, n]`` -> tiles ``[B, G, P, tile, W]`` and scales ``[B, G, P tile]``."""
    return f"""KeyTiles (high, residual, scale) => (high_tiles, residual_tiles, scale_tiles) {{
  tile = Constant<value_ints = [{form.tile}]>()
  two = Constant<value_ints = [2]>()
  minus = Constant<value_ints = [-1]>()
  rows = Shape<start = 2, end = 3>(high)
  width = Shape<start = 3, end = 4>(high)
  lead = Shape<start = 0, end = 2>(high)
  negative = Neg(rows)
  missing = Mod(negative, tile)
  zero = Constant<value_ints = [0]>()
  pads = Concat<axis = 0>(zero, missing)
  high1 = Pad(high, pads, , two)
  residual1 = Pad(residual, pads, , two)
  scale_tiles = Pad(scale, pads, , two)
  shape = Concat<axis = 0>(lead, minus, tile, width)
  high_tiles = Reshape(high1, shape)
  residual_tiles = Reshape(residual1, shape)
}}"""
