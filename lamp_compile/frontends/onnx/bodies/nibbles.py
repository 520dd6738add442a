"""Products with one plane of nibbles: ``NibbleProducts`` for keys, ``NibbleSums`` for values.

A byte holds two nibbles in two's complement. ``x = byte ^ 0x88`` is ``16 (upper + 8) + (lower + 8)`` and ``l = x & 15``
is ``lower + 8``: with zero points 136 and 8 both are signed numbers, and 16 * upper is their difference. The difference
is taken after multiplying, where there are few numbers. All factors stay below 256 as unsigned and the other operand
is unsigned too: signed ones saturate on x86 machines without VNNI. Values are multiplied in float, and the zero points
taken off afterwards: that costs 1e-5 of a step, rounding to both planes costs 0.3.
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
  q_both = Concat<axis = 2>(q_upper, q_lower)
  all_upper = MatMulInteger(x, q_upper, flip, middle)
  low_both = MatMulInteger(l, q_both, eight, middle)
  low_upper, low_lower = Split<axis = 2, num_outputs = 2>(low_both)
  from_upper = Sub(all_upper, low_upper)
  from_lower = Mul(low_lower, sixteen)
  exact = Add(from_upper, from_lower)
  y = Cast<to = 1>(exact)
}}"""


def sums(form: Form) -> str:
    """Planes ``[M, W, N]`` and weights ``[M, R, N]`` -> 16 * nibbles weighted and summed, float ``[M, R, 2W]``."""
    if form.arithmetic == "float":
        return f"""NibbleSums (plane, weight) => (y) {{
  {_NIBBLES_FLOAT}
  upper_columns = Transpose<perm = [0, 2, 1]>(upper)
  lower_columns = Transpose<perm = [0, 2, 1]>(lower)
  from_upper = MatMul(weight, upper_columns)
  from_lower = MatMul(weight, lower_columns)
  both = Concat<axis = 2>(from_upper, from_lower)
  y = Mul(both, sixteen)
}}"""
    return f"""NibbleSums (plane, weight) => (y) {{
  {_NIBBLES_BITS}
  middle = Constant<value = float {{136.0}}>()
  eight = Constant<value = float {{8.0}}>()
  sixteen = Constant<value = float {{16.0}}>()
  last = Constant<value_ints = [-1]>()
  all_float = Cast<to = 1>(x)
  low_float = Cast<to = 1>(l)
  all_columns = Transpose<perm = [0, 2, 1]>(all_float)
  low_columns = Transpose<perm = [0, 2, 1]>(low_float)
  all_raw = MatMul(weight, all_columns)
  low_raw = MatMul(weight, low_columns)
  total = ReduceSum(weight, last)
  all_offset = Mul(total, middle)
  low_offset = Mul(total, eight)
  all_sums = Sub(all_raw, all_offset)
  low_sums = Sub(low_raw, low_offset)
  from_upper = Sub(all_sums, low_sums)
  from_lower = Mul(low_sums, sixteen)
  y = Concat<axis = 2>(from_upper, from_lower)
}}"""
