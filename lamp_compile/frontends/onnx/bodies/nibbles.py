"""Products with one plane of nibbles: ``NibbleProducts`` for keys, ``NibbleSums`` for values.

A byte holds two nibbles in two's complement. ``x = byte ^ 0x88`` is ``16 (upper + 8) + (lower + 8)`` and ``l = x & 15``
is ``lower + 8``: with zero points 136 and 8 both are signed numbers, and 16 * upper is their difference. The difference
is taken after multiplying, where there are few numbers. All factors stay below 256 as unsigned and the other operand
is unsigned too: signed ones saturate on x86 machines without VNNI.
"""

from __future__ import annotations

from lamp_compile.frontends.onnx.form import Form

_NIBBLES_FLOAT = """
  sixteenth = Constant<value = float {0.0625}>()
  sixteen = Constant<value = float {16.0}>()
  eighth = Constant<value = float {0.125}>()
  byte = Cast<to = 1>(plane)
  byte16 = Mul(byte, sixteenth)
  high4 = Floor(byte16)
  high64 = Mul(high4, sixteen)
  low4 = Sub(byte, high64)
  high_half = Mul(high4, eighth)
  high_sign = Floor(high_half)
  high_wrap = Mul(high_sign, sixteen)
  upper = Sub(high4, high_wrap)
  low_half = Mul(low4, eighth)
  low_sign = Floor(low_half)
  low_wrap = Mul(low_sign, sixteen)
  lower = Sub(low4, low_wrap)
"""

_NIBBLES_BITS = """
  flip = Constant<value = uint8 {136}>()
  fifteen = Constant<value = uint8 {15}>()
  x = BitwiseXor(plane, flip)
  l = BitwiseAnd(x, fifteen)
"""


def products(form: Form) -> str:
    """Planes ``[M, N, W]`` and queries ``[M, R, 2W]`` -> 16 * nibbles . query, float ``[M, N, R]``."""
    if not form.integer:
        return f"""NibbleProducts (plane, query) => (y) {{
  {_NIBBLES_FLOAT}
  columns = Transpose<perm = [0, 2, 1]>(query)
  q_upper, q_lower = Split<axis = 1, num_outputs = 2>(columns)
  from_upper = MatMul(upper, q_upper)
  from_lower = MatMul(lower, q_lower)
  both = Add(from_upper, from_lower)
  y = Mul(both, sixteen)
}}"""
    return f"""NibbleProducts (plane, query) => (y) {{
  {_NIBBLES_BITS}
  eight = Constant<value = uint8 {{8}}>()
  middle = Constant<value = uint8 {{128}}>()
  offset = Constant<value = float {{128.0}}>()
  sixteen = Constant<value = int32 {{16}}>()
  shifted = Add(query, offset)
  bytes = Cast<to = 2>(shifted)
  columns = Transpose<perm = [0, 2, 1]>(bytes)
  q_upper, q_lower = Split<axis = 1, num_outputs = 2>(columns)
  all_upper = MatMulInteger(x, q_upper, flip, middle)
  low_upper = MatMulInteger(l, q_upper, eight, middle)
  low_lower = MatMulInteger(l, q_lower, eight, middle)
  from_upper = Sub(all_upper, low_upper)
  from_lower = Mul(low_lower, sixteen)
  exact = Add(from_upper, from_lower)
  y = Cast<to = 1>(exact)
}}"""


def sums(form: Form) -> str:
    """Planes ``[M, W, N]`` and weights ``[M, N, R]`` -> 16 * nibbles weighted and summed, float ``[M, 2W, R]``."""
    if form.arithmetic == "float":
        return f"""NibbleSums (plane, weight) => (y) {{
  {_NIBBLES_FLOAT}
  from_upper = MatMul(upper, weight)
  from_lower = MatMul(lower, weight)
  both = Concat<axis = 1>(from_upper, from_lower)
  y = Mul(both, sixteen)
}}"""
    return f"""NibbleSums (plane, weight) => (y) {{
  {_NIBBLES_BITS}
  eight = Constant<value = uint8 {{8}}>()
  one = Constant<value = float {{1.0}}>()
  sixteen = Constant<value = float {{16.0}}>()
  all_float = DequantizeLinear(x, one, flip)
  low_float = DequantizeLinear(l, one, eight)
  all_sums = MatMul(all_float, weight)
  low_sums = MatMul(low_float, weight)
  from_upper = Sub(all_sums, low_sums)
  from_lower = Mul(low_sums, sixteen)
  y = Concat<axis = 1>(from_upper, from_lower)
}}"""
