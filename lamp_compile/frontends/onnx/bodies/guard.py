"""``Guard``: estimated error against budget. Definition: ``runtime/guard.py``."""

from __future__ import annotations

from lamp_compile.frontends.onnx.form import Form


def _pooled(form: Form, x: str, axes: list[int], name: str) -> str:
    """Sums over these axes, ``[B, G, fields]``; ``[1, G, fields]`` where the batch shares one state."""
    each = f"{name}_axes = Constant<value_ints = {axes}>()\n  "
    if form.cache:
        return f"{each}{name} = ReduceSum<keepdims = 0>({x}, {name}_axes)"
    return f"{each}{name}_each = ReduceSum<keepdims = 0>({x}, {name}_axes)\n  {name} = ReduceSum({name}_each, first)"


def guard(form: Form) -> str:
    """State ``[B, G, 4]`` and statistics ``[B, G, 7]`` after this step. A row of no weight saw no key. An estimate is
    finite only where its output is, because the size of the output is in it."""
    missing = """
  needs_exact = GreaterOrEqual(effective, two)
  missing_new = Where(needs_exact, two, had_missing)
  flags_new = Add(bad_new, missing_new)"""
    return f"""Guard <guard_window: int = 16, guard_hold: int = 64, hysteresis: float = 0.5>
(estimate, square, mass, levels, state, stats, floor, budget) => (state_new, stats_new) {{
  last = Constant<value_ints = [-1]>()
  first = Constant<value_ints = [0]>()
  zero = Constant<value = float {{0.0}}>()
  one = Constant<value = float {{1.0}}>()
  two = Constant<value = float {{2.0}}>()
  tiny = Constant<value = float {{1.17549435e-38}}>()
  unseen = Equal(mass, zero)
  seen = Not(unseen)
  nothing = Sub(estimate, estimate)
  finite = Equal(nothing, zero)
  good = And(seen, finite)
  size = Max(square, tiny)
  relative0 = Div(estimate, size)
  relative = Where(finite, relative0, zero)
  good_number = Cast<to = 1>(good)
  seen_number = Cast<to = 1>(seen)
  evidence = Concat<axis = 3>(relative, good_number, seen_number)
  {_pooled(form, "evidence", [2], "sums")}
  error_sum, row_sum, seen_sum = Split<axis = 2, num_outputs = 3>(sums)
  rows = Max(row_sum, one)
  error = Div(error_sum, rows)
  stepped = Greater(seen_sum, zero)
  bad = Less(row_sum, seen_sum)
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
  over = Greater(mean, limit)
  ratio = Constant<value_float: float = @hysteresis>()
  ratio_square = Mul(ratio, ratio)
  low_limit = Mul(limit, ratio_square)
  below = Less(mean, low_limit)
  free = Equal(held, zero)
  under = And(below, free)
  up = Cast<to = 1>(over)
  down = Cast<to = 1>(under)
  change = Sub(up, down)
  level0 = Add(level, change)
  moved_level = Clip(level0, zero, two)
  level_new = Where(bad, two, moved_level)
  changed = Or(over, bad)
  floor0 = Cast<to = 1>(floor)
  floor1 = Unsqueeze(floor0, last)
  effective = Max(level_new, floor1)
  had_bad = Mod<fmod = 1>(flags, two)
  had_missing = Sub(flags, had_bad)
  bad_new = Where(bad, one, had_bad)
  {missing.strip() if form.cache else "flags_new = Add(bad_new, had_missing)"}
  mean_new = Where(changed, zero, mean)
  hold_steps0 = Constant<value_int: int = @guard_hold>()
  hold_steps = Cast<to = 1>(hold_steps0)
  hold_new = Where(changed, hold_steps, held)
  state_moved = Concat<axis = 2>(mean_new, level_new, hold_new, flags_new)
  state_new = Where(stepped, state_moved, state)
  above = Constant<value = float[3] {{0.5, 1.5, 2.5}}>()
  levels1 = Unsqueeze(levels, last)
  counted = Greater(levels1, above)
  counted_number = Cast<to = 1>(counted)
  {_pooled(form, "counted_number", [2, 3], "tiles")}
  higher = Greater(level_new, level)
  well = Not(bad)
  raised = And(higher, well)
  lowered = Less(level_new, level)
  events = Concat<axis = 2>(raised, lowered, bad)
  events_number = Cast<to = 1>(events)
  stepped_number = Cast<to = 1>(stepped)
  counts0 = Concat<axis = 2>(stepped_number, tiles, events_number)
  counts = Cast<to = 7>(counts0)
  stats_moved = Add(stats, counts)
  stats_new = Where(stepped, stats_moved, stats)
}}"""
