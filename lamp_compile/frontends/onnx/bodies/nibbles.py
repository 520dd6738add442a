"""Products with one plane of nibbles: ``NibbleProducts`` for keys, ``NibbleSums`` for values.

A byte holds two nibbles in two's complement, ``byte = 16 upper + rest`` with ``rest`` the lower one without its sign.
In arithmetic that wraps at 256, ``16 byte`` is 16 times the lower nibble and ``byte - rest`` 16 times the upper one,
in two's complement. ONNX Runtime's sums and products of bytes (it has them from 1.21 on) are vectorised, its bit
operations are not: one of those takes as long as fifteen of these. Both operands of ``MatMulInteger`` are unsigned,
with zero point 128: signed ones saturate on x86 machines without VNNI. Values are multiplied in float, since rounding
their weights to 8 bits costs 0.3 of a step.
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

_NIBBLES_BYTES = """
  sixteenfold = Constant<value = uint8 {16}>()
  none = Constant<value = uint8 {0}>()
  sixteen = Constant<value = float {16.0}>()
  lower = Mul(plane, sixteenfold)
  lower_float = Cast<to = 1>(lower)
  rest = QuantizeLinear(lower_float, sixteen, none)
  upper = Sub(plane, rest)
"""


def products(form: Form) -> str:
    """Planes ``[.., N, W]`` and queries ``[.., R, 2W]``, four axes each -> 16 * nibbles . query, ``[.., R, N]``."""
    if not form.integer:
        return f"""NibbleProducts (plane, query) => (y) {{
  {_NIBBLES_FLOAT}
  columns = Transpose<perm = [0, 1, 3, 2]>(query)
  q_upper, q_lower = Split<axis = 2, num_outputs = 2>(columns)
  from_upper = MatMul(upper, q_upper)
  from_lower = MatMul(lower, q_lower)
  both = Add(from_upper, from_lower)
  turned = Transpose<perm = [0, 1, 3, 2]>(both)
  y = Mul(turned, sixteen)
}}"""
    return f"""NibbleProducts (plane, query) => (y) {{
  {_NIBBLES_BYTES}
  middle = Constant<value = uint8 {{128}}>()
  offset = Constant<value = float {{128.0}}>()
  both = Concat<axis = 3>(upper, lower)
  nibbles = Add(both, middle)
  shifted = Add(query, offset)
  bytes = Cast<to = 2>(shifted)
  columns = Transpose<perm = [0, 1, 3, 2]>(bytes)
  exact = MatMulInteger(nibbles, columns, middle, middle)
  turned = Transpose<perm = [0, 1, 3, 2]>(exact)
  y = Cast<to = 1>(turned)
}}"""


def sums(form: Form) -> str:
    """Planes ``[.., W, N]`` and weights ``[.., R, N]``, four axes each -> 16 * nibbles weighted and summed, float
    ``[.., R, 2W]``."""
    if form.arithmetic == "float":
        return f"""NibbleSums (plane, weight) => (y) {{
  {_NIBBLES_FLOAT}
  upper_columns = Transpose<perm = [0, 1, 3, 2]>(upper)
  lower_columns = Transpose<perm = [0, 1, 3, 2]>(lower)
  from_upper = MatMul(weight, upper_columns)
  from_lower = MatMul(weight, lower_columns)
  both = Concat<axis = 3>(from_upper, from_lower)
  y = Mul(both, sixteen)
}}"""
    return f"""NibbleSums (plane, weight) => (y) {{
  {_NIBBLES_BYTES}
  both = Concat<axis = 2>(upper, lower)
  nibbles = Cast<to = 3>(both)
  numbers = Cast<to = 1>(nibbles)
  columns = Transpose<perm = [0, 1, 3, 2]>(numbers)
  y = MatMul(weight, columns)
}}"""
