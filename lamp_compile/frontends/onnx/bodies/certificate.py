"""The error certificate as part of ``Attend``. Formulas: ``runtime/certificate.py``."""

from __future__ import annotations

from lamp_compile.frontends.onnx.form import Form

_PEAK_SQUARE = 119.0**2 / 7.5
"""Mean square of a row over the square of its scale (``runtime/formats``: PEAK_TO_MEAN_SQUARE)."""
_BF16_NOISE = 2.0**-14 / 12 / (7 / 3)


def _with_query(form: Form) -> str:
    """Adds the share of the query's rounding, in twelfths of a squared step of the scores."""
    if form.query_bits == 8:
        share = "key_width0 = Shape<start = 3>(query)\n  key_width = Cast<to = 1>(key_width0)\n  "
        share += "query_share = Mul(key_width, peak_square)"
    elif form.query_bits == 16:
        noise = 12 * _PEAK_SQUARE * _BF16_NOISE
        share = f"bf16 = Constant<value = float {{{noise!r}}}>()\n  query_share = Mul(query_square, bf16)"
    else:
        return "score_noise = Identity(key_noise)"
    return f"{share}\n  query_noise = Mul(p_rows, query_share)\n  score_noise = Add(key_noise, query_noise)"


def estimate(form: Form) -> str:
    """The squared error estimate of each row, ``[B, G, R, 1]``: weights times features of the stored rows, as two
    matrix products. Its three sums are ``relative * square``, ``value_part`` and ``absolute``."""
    stored = "hot_factor" if form.cache else "stored_factor"
    exact = "" if form.cache else "\n  stored_factor = Where(is_exact, zero, hot_factor)"
    return f"""twelfth = Constant<value = float {{{1 / 12!r}}}>()
  one_step = Constant<value = float {{1.0}}>()
  sixteen_steps = Constant<value = float {{256.0}}>()
  peak_square = Constant<value = float {{{_PEAK_SQUARE!r}}}>()
  off_peak = Constant<value = float {{{1 / _PEAK_SQUARE!r}}}>()
  hot_factor = Where(hot, one_step, sixteen_steps){exact}
  p_square = Mul(p, p)
  noise0 = Mul(p_square, {stored})
  noise = Reshape(noise0, row_shape)
  p_rows = Reshape(p, row_shape)
  value_width0 = Shape<start = 3>(out_rows)
  value_width = Cast<to = 1>(value_width0)
  value_peak = Mul(value_width, peak_square)
  k_square = Mul(k_scale1, k_scale1)
  v_square0 = Mul(v_scale1, v_scale1)
  v_square = Mul(v_square0, value_peak)
  kv_square = Mul(k_square, v_square)
  features0 = Concat<axis = 2>(k_square, kv_square)
  features = Transpose<perm = [0, 1, 3, 2]>(features0)
  v_feature = Transpose<perm = [0, 1, 3, 2]>(v_square)
  query_square = ReduceSumSquare(query, last)
  key_noise = Mul(noise, query_square)
  {_with_query(form)}
  score_sums = MatMul(score_noise, features)
  value_sums = MatMul(noise, v_feature)
  relative, absolute = Split<axis = 3, num_outputs = 2>(score_sums)
  of_output = Mul(relative, square)
  from_scores = Add(of_output, absolute)
  factor_square = Mul(factor, factor)
  score_part = Mul(from_scores, factor_square)
  value_part = Mul(value_sums, off_peak)
  both_parts = Add(score_part, value_part)
  estimate = Mul(both_parts, twelfth)"""
