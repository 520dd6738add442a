"""``Guard``: certificate against budget. Definition: ``runtime/guard.py``."""

from __future__ import annotations

from lamp_compile.frontends.onnx.form import Form


def _pooled(form: Form, x: str, name: str) -> str:
    """``[B, H, S]`` or ``[B, G, S, T]`` -> ``[B, G, 1]``; ``[1, G, 1]`` where the batch shares one state."""
    batch = f"\n  {name} = ReduceSum({name}_each, first)" if not form.cache else f"\n  {name} = Identity({name}_each)"
    return f"""{name}_grouped = Reshape({x}, grouped)
  {name}_each = ReduceSum({name}_grouped, last){batch}"""


def guard(form: Form) -> str:
    """State ``[B, G, 4]`` and statistics ``[B, G, 7]`` after this step."""
    missing = """
  needs_exact = GreaterOrEqual(effective, two)
  missing_number = Cast<to = 1>(needs_exact)
  had_missing0 = Mul(flags, half)
  had_missing = Floor(had_missing0)
  not_missing = Sub(one, had_missing)
  add_missing0 = Mul(missing_number, not_missing)
  add_missing = Mul(add_missing0, two)
  flags_new = Add(flags_seen, add_missing)"""
    return f"""Guard <guard_window: int = 16, guard_hold: int = 64, hysteresis: float = 0.5>
(out, lse, certificate, levels, state, stats, floor, budget) => (state_new, stats_new) {{
  last = Constant<value_ints = [-1]>()
  first = Constant<value_ints = [0]>()
  zero = Constant<value = float {{0.0}}>()
  one = Constant<value = float {{1.0}}>()
  two = Constant<value = float {{2.0}}>()
  half = Constant<value = float {{0.5}}>()
  tiny = Constant<value = float {{1.17549435e-38}}>()
  never = Constant<value = float {{-inf}}>()
  level_lead = Shape<start = 0, end = 2>(levels)
  grouped = Concat<axis = 0>(level_lead, last)
  unseen = Equal(lse, never)
  seen = Not(unseen)
  out_float = Cast<to = 1>(out)
  out_square = Mul(out_float, out_float)
  size = ReduceSum<keepdims = 0>(out_square, last)
  c0, c1, c2 = Split<axis = 3, num_outputs = 3>(certificate)
  c0_row = Squeeze(c0, last)
  c1_row = Squeeze(c1, last)
  c2_row = Squeeze(c2, last)
  from_out = Mul(c0_row, size)
  estimate0 = Add(from_out, c1_row)
  estimate = Add(estimate0, c2_row)
  evidence0 = Add(estimate, size)
  lse_seen = Where(seen, lse, zero)
  evidence = Add(evidence0, lse_seen)
  difference = Sub(evidence, evidence)
  finite = Equal(difference, zero)
  infinite = Not(finite)
  good = And(seen, finite)
  divisor = Max(size, tiny)
  relative0 = Div(estimate, divisor)
  relative = Where(good, relative0, zero)
  good_number = Cast<to = 1>(good)
  seen_number = Cast<to = 1>(seen)
  spoilt = And(seen, infinite)
  spoilt_number = Cast<to = 1>(spoilt)
  {_pooled(form, "relative", "error_sum")}
  {_pooled(form, "good_number", "row_sum")}
  {_pooled(form, "seen_number", "seen_sum")}
  {_pooled(form, "spoilt_number", "spoilt_sum")}
  rows = Max(row_sum, one)
  error = Div(error_sum, rows)
  stepped = Greater(seen_sum, zero)
  bad = Greater(spoilt_sum, zero)
  mean0, level, hold0, flags = Split<axis = 2, num_outputs = 4>(state)
  window0 = Constant<value_int: int = @guard_window>()
  window = Cast<to = 1>(window0)
  moved = Sub(error, mean0)
  share = Div(moved, window)
  mean = Add(mean0, share)
  hold1 = Sub(hold0, one)
  held = Max(hold1, zero)
  budget0 = Cast<to = 1>(budget)
  budget1 = Unsqueeze(budget0, last)
  limit = Mul(budget1, budget1)
  above = Greater(mean, limit)
  over = And(above, stepped)
  ratio = Constant<value_float: float = @hysteresis>()
  ratio_square = Mul(ratio, ratio)
  low_limit = Mul(limit, ratio_square)
  below = Less(mean, low_limit)
  free = Equal(held, zero)
  lifted = Greater(level, zero)
  not_over = Not(over)
  sink0 = And(below, free)
  sink1 = And(sink0, lifted)
  sink2 = And(sink1, not_over)
  under = And(sink2, stepped)
  up0 = Add(level, one)
  up = Min(up0, two)
  down = Sub(level, one)
  kept = Where(under, down, level)
  moved_level = Where(over, up, kept)
  level_new = Where(bad, two, moved_level)
  changed = Or(over, bad)
  floor0 = Cast<to = 1>(floor)
  floor1 = Unsqueeze(floor0, last)
  effective = Max(level_new, floor1)
  had_bad = Mod<fmod = 1>(flags, two)
  not_had = Sub(one, had_bad)
  bad_number = Cast<to = 1>(bad)
  add_bad = Mul(bad_number, not_had)
  flags_seen = Add(flags, add_bad)
  {missing.strip() if form.cache else "flags_new = Identity(flags_seen)"}
  mean_new = Where(changed, zero, mean)
  hold_steps0 = Constant<value_int: int = @guard_hold>()
  hold_steps = Cast<to = 1>(hold_steps0)
  hold_new = Where(changed, hold_steps, held)
  state_moved = Concat<axis = 2>(mean_new, level_new, hold_new, flags_new)
  touched = Or(stepped, bad)
  state_new = Where(touched, state_moved, state)
  level_number = Cast<to = 1>(levels)
  read0 = Greater(level_number, zero)
  refined_above = Constant<value = float {{1.5}}>()
  exact_above = Constant<value = float {{2.5}}>()
  refined0 = Greater(level_number, refined_above)
  exact0 = Greater(level_number, exact_above)
  read_number = Cast<to = 1>(read0)
  refined_number = Cast<to = 1>(refined0)
  exact_number = Cast<to = 1>(exact0)
  {_pooled(form, "read_number", "live_tiles")}
  {_pooled(form, "refined_number", "refined_tiles")}
  {_pooled(form, "exact_number", "exact_tiles")}
  stepped_number = Cast<to = 1>(stepped)
  raised0 = Greater(level_new, level)
  raised = Cast<to = 1>(raised0)
  lowered0 = Less(level_new, level)
  lowered = Cast<to = 1>(lowered0)
  counts0 = Concat<axis = 2>(stepped_number, live_tiles, refined_tiles, exact_tiles, raised, lowered, bad_number)
  counts = Cast<to = 7>(counts0)
  stats_new = Add(stats, counts)
}}"""
