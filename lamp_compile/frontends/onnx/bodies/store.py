"""Rows of keys and values into nested8 planes: ``Encode``, ``Append`` (into a cache), ``Quantize`` (whole tiles)."""

from __future__ import annotations

from lamp_compile.frontends.onnx.form import Form

_PACK_BYTES = """
  offset = Constant<value = float {136.0}>()
  signs = Constant<value = uint8 {136}>()
  four = Constant<value = uint8 {4}>()
  fifteen = Constant<value = uint8 {15}>()
  upper_half = Constant<value = uint8 {240}>()
  shifted = Add(q, offset)
  whole_byte = Cast<to = 2>(shifted)
  both = BitwiseXor(whole_byte, signs)
  upper, lower = Split<axis = -1, num_outputs = 2>(both)
  upper_high = BitwiseAnd(upper, upper_half)
  lower_high = BitShift<direction = "RIGHT">(lower, four)
  high = BitwiseOr(upper_high, lower_high)
  upper_low = BitShift<direction = "LEFT">(upper, four)
  lower_low = BitwiseAnd(lower, fifteen)
  residual = BitwiseOr(upper_low, lower_low)"""
"""q + 136 has hi + 8 in its upper nibble and lo + 8 in its lower one; 8 turns a nibble's sign."""

_PACK_FLOAT = """
  eight = Constant<value = float {8.0}>()
  sixteen = Constant<value = float {16.0}>()
  sixteenth = Constant<value = float {0.0625}>()
  raised = Add(q, eight)
  shifted = Mul(raised, sixteenth)
  hi = Floor(shifted)
  hi16 = Mul(hi, sixteen)
  lo = Sub(q, hi16)
  high = ai.lamp.Pack(hi)
  residual = ai.lamp.Pack(lo)"""


def encode(form: Form) -> str:
    """Rows ``[.., D]``, rotated and balanced -> high, residual uint8 ``[.., D/2]``, scale ``[..]`` rounded to
    float16 (float32 of that value without a cache), bit by bit as ``runtime/formats/nested8.py``. A NaN or infinity in
    a row goes into its scale."""
    if not form.cache:
        stored_scale = "scale = Squeeze(divisor, last)"
    elif form.arithmetic == "integer":
        stored_scale = "scale = Squeeze(divisor_half, last)"
    else:
        stored_scale = "scale0 = Squeeze(divisor, last)\n  scale = Cast<to = 10>(scale0)"
    return f"""Encode (x) => (high, residual, scale) {{
  last = Constant<value_ints = [-1]>()
  zero = Constant<value = float {{0.0}}>()
  largest = Constant<value = float {{119.0}}>()
  smallest = Constant<value = float {{-119.0}}>()
  size = Abs(x)
  peak = ReduceMax(size, last)
  total = ReduceSum(x, last)
  nothing = Mul(total, zero)
  step0 = Div(peak, largest)
  step = Add(step0, nothing)
  {rounded_to_half("step", "divisor", form)}
  ratio = Div(x, divisor)
  no_difference = Sub(ratio, ratio)
  defined = Equal(no_difference, zero)
  steps = Where(defined, ratio, zero)
  whole = Round(steps)
  q = Clip(whole, smallest, largest)
  {_PACK_BYTES if form.arithmetic == "integer" else _PACK_FLOAT}
  {stored_scale}
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


def _turned(form: Form) -> tuple[str, str]:
    """Nodes that make ``k_turned`` and ``v_turned``, and the inputs that they need."""
    inputs = (", rotate_k, rotate_v" if form.rotation else "") + (", balance" if form.balance else "")
    divide = "ratio = Unsqueeze(balance, minus_two)\n  k1 = Div(k0, ratio)" if form.balance else "k1 = Identity(k0)"
    return (
        f"""minus_two = Constant<value_ints = [-2]>()
  k0 = Cast<to = 1>(k)
  v0 = Cast<to = 1>(v)
  {divide}
  k_turned = {"MatMul(k1, rotate_k)" if form.rotation else "Identity(k1)"}
  v_turned = {"MatMul(v0, rotate_v)" if form.rotation else "Identity(v0)"}""",
        inputs,
    )


_ENCODE_EACH = """k_rows = Flatten<axis = 3>(k_turned)
  v_rows = Flatten<axis = 3>(v_turned)
  k_bytes, k_rest, k_step = ai.lamp.Encode(k_rows)
  v_bytes, v_rest, v_step = ai.lamp.Encode(v_rows)"""
_ENCODE_BOTH = """both_turned = Concat<axis = 0>(k_turned, v_turned)
  both_rows = Flatten<axis = 3>(both_turned)
  bytes, rest, step = ai.lamp.Encode(both_rows)
  k_bytes, v_bytes = Split<axis = 0, num_outputs = 2>(bytes)
  k_rest, v_rest = Split<axis = 0, num_outputs = 2>(rest)
  k_step, v_step = Split<axis = 0, num_outputs = 2>(step)"""

_COORDINATES = {
    "if": """
  every = ConstantOfShape<value = int64[1] {1}>(lead)
  coordinates = NonZero(every)
  b, g, row = Split<axis = 0, num_outputs = 3>(coordinates)""",
    "select": """
  none = Constant<value = int64 {0}>()
  next = Constant<value = int64 {1}>()
  every_axis = Constant<value_ints = [0]>()
  heads = Shape<start = 1, end = 2>(k)
  rows = Shape<start = 2, end = 3>(k)
  count = ReduceProd<keepdims = 0>(lead)
  number = Range(none, count, next)
  numbers = Unsqueeze(number, every_axis)
  row = Mod(numbers, rows)
  head = Div(numbers, rows)
  g = Mod(head, heads)
  b = Div(head, heads)""",
}
"""Batch, kv head and row of each of the M = B * G * n rows, ``[1, M]``; "select" without an output whose size
depends on numbers, which a CUDA graph cannot hold."""

_PLACES = """
  first = Gather(positions, b)
  place = Add(first, row)
  tile = Shape<start = 3, end = 4>(k_high)
  page = Div(place, tile)
  key = Mod(place, tile)
  scale_places = Concat<axis = 0>(b, g, place)
  at_scale = Transpose<perm = [1, 0]>(scale_places)
  key_places = Concat<axis = 0>(b, g, page, key)
  at_key = Transpose<perm = [1, 0]>(key_places)
"""
"""Where each row goes: ``at_scale [M, 3]``, ``at_key [M, 4]``."""

_CHANNELS = """
  zero = Constant<value = int64 {0}>()
  one = Constant<value = int64 {1}>()
  second = Constant<value_ints = [1]>()
  along = Constant<value = int64[5] {0,0,0,1,0}>()
  AT_ROW
  at_rows = Unsqueeze(at_row, second)
  width1 = Shape<start = 1>(v_bytes)
  width = Squeeze(width1)
  channels = Range(zero, width, one)
  channel = Unsqueeze(channels, second)
  steps = Mul(channel, along)
  at_value = Add(at_rows, steps)
"""
"""The same for every channel of a value, ``at_value [M, Dv/2, 5]``: batch, head, tile, channel, key in the tile."""
_AT_ROW = {
    "if": """apart = Constant<value = int64[4,5] {1,0,0,0,0, 0,1,0,0,0, 0,0,1,0,0, 0,0,0,0,1}>()
  at_row = MatMul(at_key, apart)""",
    "select": """no_channel = Mul(b, zero)
  value_places = Concat<axis = 0>(b, g, page, no_channel, key)
  at_row = Transpose<perm = [1, 0]>(value_places)""",
}
"""CUDA has no product of integer matrices."""


def append(form: Form) -> str:
    """New rows into the planes of a cache. The scattered planes have their own shape from input to output, with nothing
    in between: bound to one buffer on both sides they are written in place."""
    turned, inputs = _turned(form)
    planes = "k_high, k_residual, k_scale, v_high, v_residual, v_scale"
    outputs = ", ".join(f"{name}_new" for name in planes.split(", "))
    return f"""Append (k, v, {planes}, positions{inputs}) => ({outputs}) {{
  {turned}
  {_ENCODE_BOTH if form.paired else _ENCODE_EACH}
  lead = Shape<start = 0, end = 3>(k)
  {_COORDINATES[form.guard].strip()}
  {_PLACES.strip()}
  {_CHANNELS.replace("AT_ROW", _AT_ROW[form.guard]).strip()}
  k_high_new = ScatterND(k_high, at_key, k_bytes)
  k_residual_new = ScatterND(k_residual, at_key, k_rest)
  k_scale_new = ScatterND(k_scale, at_scale, k_step)
  v_high_new = ScatterND(v_high, at_value, v_bytes)
  v_residual_new = ScatterND(v_residual, at_value, v_rest)
  v_scale_new = ScatterND(v_scale, at_scale, v_step)
}}"""


def quantize(form: Form) -> str:
    """Keys and values ``[B, G, N, D]`` -> planes of whole storage tiles, padded with zeros."""
    turned, inputs = _turned(form)
    return f"""Quantize (k, v{inputs}) => (k_high, k_residual, k_scale, v_high, v_residual, v_scale) {{
  {turned}
  k_bytes, k_rest, k_step = ai.lamp.Encode(k_turned)
  v_bytes, v_rest, v_step = ai.lamp.Encode(v_turned)
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
