"""The error certificate and the log-sum-exp, as parts of ``Attend``. Formulas: ``runtime/certificate.py``."""

from __future__ import annotations

from lamp_compile.frontends.onnx.form import Form

_PEAK_SQUARE = 119.0**2 / 7.5
"""Mean square of a row over the square of its scale (``runtime/formats``: PEAK_TO_MEAN_SQUARE)."""
_BF16_NOISE = 2.0**-14 / 12 / (7 / 3)


def log_sum_exp() -> str:
    """From the largest weight and its logit: no second pass of exponentials."""
    return """lse_peak = ReduceMax<keepdims = 0>(logits, last)
  lse_weight = ReduceMax<keepdims = 0>(p, last)
  lse_log = Log(lse_weight)
  lse_some = Sub(lse_peak, lse_log)
  live_number = Cast<to = 1>(live)
  live_some = ReduceMax<keepdims = 0>(live_number, last)
  live_row = Cast<to = 9>(live_some)
  lse_none = Constant<value = float {-inf}>()
  lse = Where(live_row, lse_some, lse_none)"""


def _query_noise(form: Form) -> str:
    if form.query_bits == 8:
        return "query_noise0 = Mul(step, step)\n  query_noise = Mul(query_noise0, twelfth)"
    if form.query_bits == 16:
        return (
            f"bf16 = Constant<value = float {{{_BF16_NOISE!r}}}>()\n  query_mean = Div(query_square, key_width)\n"
            "  query_noise = Mul(query_mean, bf16)"
        )
    return "query_noise = Mul(query_square, zero)"


def sums(form: Form) -> str:
    """The three sums ``[B, H, S, 3]``: weights times features of the stored rows, as two matrix products."""
    stored = "hot_factor" if form.cache else "stored_factor"
    exact = "" if form.cache else "\n  stored_factor = Where(exact_rows, zero, hot_factor)"
    exact_rows = "" if form.cache else "\n  exact_rows = Reshape(is_exact, weight_shape)"
    return f"""twelfth = Constant<value = float {{0.0833333333}}>()
  p_all = Reshape(p, weight_shape)
  one_step = Constant<value = float {{1.0}}>()
  sixteen_steps = Constant<value = float {{256.0}}>()
  hot_factor = Where(hot_rows, one_step, sixteen_steps){exact_rows}{exact}
  p_square = Mul(p_all, p_all)
  p_noise = Mul(p_square, {stored})
  k_square = Mul(k_scale1, k_scale1)
  v_square = Mul(v_scale1, v_scale1)
  kv_square = Mul(k_square, v_square)
  features0 = Concat<axis = 2>(k_square, v_square, kv_square)
  features = Transpose<perm = [0, 1, 3, 2]>(features0)
  noise_sums = MatMul(p_noise, features)
  weight_sums = MatMul(p_all, features)
  noise_k, noise_v, noise_kv = Split<axis = 3, num_outputs = 3>(noise_sums)
  weight_k, weight_v, weight_kv = Split<axis = 3, num_outputs = 3>(weight_sums)
  key_width0 = Cast<to = 1>(row_tail)
  key_width = Squeeze(key_width0)
  value_width0 = Cast<to = 1>(value_width)
  value_channels = Squeeze(value_width0)
  step_square = Mul(step, step)
  whole_square0 = Mul(query, query)
  whole_square = ReduceSum(whole_square0, last)
  query_square = Mul(whole_square, step_square)
  {_query_noise(form)}
  peak_square = Constant<value = float {{{_PEAK_SQUARE!r}}}>()
  key_square = Mul(key_width, peak_square)
  value_square = Mul(value_channels, peak_square)
  scale_square = Mul(scale, scale)
  of_key0 = Mul(query_square, twelfth)
  of_key = Mul(of_key0, scale_square)
  of_query0 = Mul(query_noise, key_square)
  of_query = Mul(of_query0, scale_square)
  from_key = Mul(noise_k, of_key)
  from_query = Mul(weight_k, of_query)
  certificate0 = Add(from_key, from_query)
  per_value = Mul(value_channels, twelfth)
  certificate1 = Mul(noise_v, per_value)
  from_key_kv = Mul(noise_kv, of_key)
  from_query_kv = Mul(weight_kv, of_query)
  both_kv = Add(from_key_kv, from_query_kv)
  certificate2 = Mul(both_kv, value_square)
  certificate_rows = Concat<axis = 3>(certificate0, certificate1, certificate2)
  three = Constant<value_ints = [3]>()
  certificate_shape = Concat<axis = 0>(q_lead, three)
  certificate = Reshape(certificate_rows, certificate_shape)"""
