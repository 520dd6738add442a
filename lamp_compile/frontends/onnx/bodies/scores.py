"""What comes before values are read: ``PrepareQuery``, ``Visible``, ``LookAhead``, ``Select``.

Shape letters as in ``functions``. Scores and weights have five axes, ``[B, G, H / G, S, N]``, so that what belongs to a
kv head is broadcast to its query heads; products are formed in rows ``[B, G, R, N]``, which lie in the same order.
"""

from __future__ import annotations

from lamp_compile.frontends.onnx.form import Form

TINY = "1.17549435e-38"

SHAPES = """Shapes (q, k_scale) => (by_group, grouped, rows, by_head) {
  copy = Constant<value_ints = [0]>()
  copies = Constant<value_ints = [0, 0, -1]>()
  rest = Constant<value_ints = [-1, 0]>()
  groups = Shape<start = 1, end = 2>(k_scale)
  heads = Shape<start = 1, end = 2>(q)
  queries = Shape<start = 2, end = 3>(q)
  keys = Shape<start = 2, end = 3>(k_scale)
  by_group = Concat<axis = 0>(copy, groups, rest)
  grouped = Concat<axis = 0>(copies, queries, keys)
  rows = Concat<axis = 0>(copies, keys)
  by_head = Concat<axis = 0>(copy, heads, rest)
}"""
"""Shapes for Reshape: ``[B, H, S, x]`` to ``[B, G, R, x]``; rows to five axes; five axes to rows; and rows to heads."""

BY_GROUP = """ByGroup (x, q, k_scale) => (y) {
  one = Constant<value_ints = [1]>()
  copy = Constant<value_ints = [0]>()
  last = Constant<value_ints = [-1]>()
  heads = Shape<start = 1, end = 2>(q)
  groups = Shape<start = 1, end = 2>(k_scale)
  every_head = Concat<axis = 0>(one, heads, one, one)
  spread = Expand(x, every_head)
  tail = Shape<start = 2, end = 4>(spread)
  shape = Concat<axis = 0>(copy, groups, last, tail)
  y = Reshape(spread, shape)
}"""
"""A mask or bias that may be broadcast over heads, with five axes."""

KEY_ROWS = """KeyRows (plane) => (rows) {
  copies = Constant<value_ints = [0, 0, -1]>()
  width = Shape<start = 4>(plane)
  shape = Concat<axis = 0>(copies, width)
  rows = Reshape(plane, shape)
}"""


def prepare_query(form: Form) -> str:
    """Query ``[B, H, S, D]`` -> ``[B, G, R, D]``, balanced, rotated, in whole steps where it is rounded to 8 bits;
    half of each row's sum; and ``factor``: a step times the scale of scores (that scale where it is not rounded)."""
    inputs = "q, k_scale, by_group" + (", rotate_k" if form.rotation else "") + (", balance" if form.balance else "")
    balanced = "ratio0 = Unsqueeze(balance, minus_two)\n  x2 = Mul(x1, ratio0)" if form.balance else "x2 = Identity(x1)"
    turned = "x3 = MatMul(x2, rotate_k)" if form.rotation else "x3 = Identity(x2)"
    if form.query_bits == 8:
        rounded = f"""
  size = Abs(x3)
  peak = ReduceMax(size, last)
  total = ReduceSum(x3, last)
  zero = Constant<value = float {{0.0}}>()
  nothing = Mul(total, zero)
  most = Constant<value = float {{127.0}}>()
  step0 = Div(peak, most)
  step = Add(step0, nothing)
  tiny = Constant<value = float {{{TINY}}}>()
  divisor = Max(step, tiny)
  ratio = Div(x3, divisor)
  query = Round(ratio)"""
    else:
        bf16 = "y = Cast<to = 16>(x3)\n  query = Cast<to = 1>(y)"
        if form.arithmetic == "float":  # no cast there and back: see store.rounded_to_half
            bf16 = (
                "split = Constant<value = float {65537.0}>()\n  y = Mul(x3, split)\n  rest = Sub(y, x3)\n"
                "  query = Sub(y, rest)"
            )
        whole_step = "step = Constant<value = float[1,1,1,1] {1.0}>()"
        rounded = f"{bf16 if form.query_bits == 16 else 'query = Identity(x3)'}\n  {whole_step}"
    return f"""PrepareQuery <scale: float = 1.0> ({inputs}) => (query, half, factor) {{
  last = Constant<value_ints = [-1]>()
  minus_two = Constant<value_ints = [-2]>()
  x0 = Cast<to = 1>(q)
  x1 = Reshape(x0, by_group)
  {balanced}
  {turned}
  {rounded}
  one_half = Constant<value = float {{0.5}}>()
  query_sum = ReduceSum(query, last)
  half = Mul(query_sum, one_half)
  scale = Constant<value_float: float = @scale>()
  factor = Mul(step, scale)
}}"""


def visible(form: Form) -> str:
    """Which key each query sees, boolean, broadcastable to ``[B, G, H / G, S, N]`` with all N columns; and which
    sub-tile holds any such key, ``[.., T]``."""
    inputs = "q, k_scale, lengths" + (", start" if form.start else "") + (", mask" if form.mask else "")
    window = " <window: int = 0>" if form.window else ""
    steps = ["live0 = Less(key, end)"]
    live = "live0"
    if form.causal:
        steps.append("query0 = Range(zero, queries, one)\n  query1 = Unsqueeze(query0, first1)")
        if form.causal == "bottom_right":
            steps.append("behind = Sub(end, queries)\n  at = Add(query1, behind)\n  live1 = LessOrEqual(key, at)")
        else:
            steps.append("at = Identity(query1)\n  past = LessOrEqual(key, at)\n  live1 = And(live0, past)")
        live = "live1"
    if form.window:
        steps.append(
            f"width = Constant<value_int: int = @window>()\n  oldest = Sub(at, width)\n"
            f"  near = Greater(key, oldest)\n  live2 = And({live}, near)"
        )
        live = "live2"
    if form.start:
        steps.append(
            f"begin = Unsqueeze(start, outer)\n  begun = GreaterOrEqual(key, begin)\n  live3 = And({live}, begun)"
        )
        live = "live3"
    if form.mask:
        steps.append(f"allowed = ai.lamp.ByGroup(mask, q, k_scale)\n  live4 = And({live}, allowed)")
        live = "live4"
    if form.causal == "bottom_right" and live == "live1":
        steps.append(f"""subtile = Constant<value = int64 {{{form.subtile}}}>()
  first_key = Range(zero, keys, subtile)
  tiles = LessOrEqual(first_key, at)""")
    else:
        steps.append(f"""by_subtile = Constant<value_ints = [0, 0, 0, 0, -1, {form.subtile}]>()
  number = Cast<to = 1>({live})
  tiled = Reshape(number, by_subtile)
  any = ReduceMax<keepdims = 0>(tiled, last)
  tiles = Cast<to = 9>(any)""")
    body = "\n  ".join(steps)
    return f"""Visible{window} ({inputs}) => (live, tiles) {{
  zero = Constant<value = int64 {{0}}>()
  one = Constant<value = int64 {{1}}>()
  first1 = Constant<value_ints = [1]>()
  last = Constant<value_ints = [-1]>()
  outer = Constant<value_ints = [1, 2, 3, 4]>()
  keys1 = Shape<start = 2, end = 3>(k_scale)
  keys = Squeeze(keys1)
  queries1 = Shape<start = 2, end = 3>(q)
  queries = Squeeze(queries1)
  key = Range(zero, keys, one)
  end = Unsqueeze(lengths, outer)
  {body}
  live = Identity({live})
}}"""


def logits(form: Form) -> str:
    """Scaled products -> what the softmax takes: soft-cap, bias, minus infinity where nothing is live."""
    attribute = " <softcap: float = 1.0>" if form.softcap else ""
    capped = (
        "cap = Constant<value_float: float = @softcap>()\n  ratio = Div(scores, cap)\n  bent = Tanh(ratio)\n"
        "  capped = Mul(bent, cap)"
        if form.softcap
        else "capped = Identity(scores)"
    )
    biased = "biased = Add(capped, bias)" if form.bias else "biased = Identity(capped)"
    return f"""Logits{attribute} (scores, live{", bias" if form.bias else ""}) => (logits) {{
  never = Constant<value = float {{-inf}}>()
  {capped}
  {biased}
  logits = Where(live, biased, never)
}}"""


def weights(form: Form) -> str:
    """Softmax over live keys and sinks. Rows with no live key are left undefined."""
    if not form.sinks:
        return """Weights (logits) => (p) {
  p = Softmax<axis = -1>(logits)
}"""
    return """Weights (logits, sinks) => (p) {
  one = Constant<value_ints = [1]>()
  last = Constant<value_ints = [-1]>()
  groups = Shape<start = 1, end = 2>(logits)
  by_group = Concat<axis = 0>(one, groups, last, one, one)
  lead = Shape<start = 0, end = 4>(logits)
  column = Concat<axis = 0>(lead, one)
  sinks0 = Cast<to = 1>(sinks)
  sinks1 = Reshape(sinks0, by_group)
  sinks2 = Expand(sinks1, column)
  extended = Concat<axis = 4>(logits, sinks2)
  p0 = Softmax<axis = -1>(extended)
  begin = Constant<value_ints = [0]>()
  axis = Constant<value_ints = [4]>()
  p = Slice(p0, begin, last, axis)
}"""


_RULES = {
    "energy": """
  tiled = Reshape(p, by_subtile)
  importance0 = ReduceL2<keepdims = 0>(tiled, last)""",
    "lamp_strict": """
  rest = Sub(one, p)
  spread = Mul(p, rest)
  double = Add(spread, spread)
  weighted = Mul(double, size)
  tiled = Reshape(weighted, by_subtile)
  importance0 = ReduceMax<keepdims = 0>(tiled, last)""",
    "lamp_relaxed": f"""
  weighted = Mul(p, size)
  row_peak = ReduceMax(weighted, last)
  tiny = Constant<value = float {{{TINY}}}>()
  largest = Max(row_peak, tiny)
  relative = Div(weighted, largest)
  tiled = Reshape(relative, by_subtile)
  importance0 = ReduceMax<keepdims = 0>(tiled, last)""",
}
_SIZE = """
  one = Constant<value = float {1.0}>()
  zero = Constant<value = float {0.0}>()
  at_live = Where(live, score_of_rule, zero)
  size = Abs(at_live)"""


def look_ahead(form: Form) -> str:
    """Scores from the high plane of the keys alone, and the importance of each sub-tile; -1 where no key is live."""
    turned = (", rotate_k" if form.rotation else "") + (", balance" if form.balance else "")
    added = (", bias" if form.bias else "") + (", sinks" if form.sinks else "")
    cap = ", softcap: float = 1.0" if form.softcap else ""
    capped = "<softcap: float = @softcap>" if form.softcap else ""
    rule = _RULES[form.rule]
    if form.rule != "energy":
        seen = (
            "cap = Constant<value_float: float = @softcap>()\n  ratio = Div(scores, cap)\n  bent = Tanh(ratio)\n"
            "  score_of_rule = Mul(bent, cap)"
            if form.softcap
            else "score_of_rule = Identity(scores)"
        )
        rule = f"{seen}{_SIZE}{rule}"
    return f"""LookAhead <scale: float = 1.0{cap}> (q, k_high, k_scale, live, tiles{turned}{added})
=> (importance, scores) {{
  last = Constant<value_ints = [-1]>()
  by_group, grouped, row_shape, by_head = ai.lamp.Shapes(q, k_scale)
  query, half, factor = ai.lamp.PrepareQuery<scale: float = @scale>(q, k_scale, by_group{turned})
  plane = ai.lamp.KeyRows(k_high)
  products = ai.lamp.NibbleProducts(plane, query)
  unbiased = Sub(products, half)
  k_scale0 = Cast<to = 1>(k_scale)
  minus_two = Constant<value_ints = [-2]>()
  k_scale1 = Unsqueeze(k_scale0, minus_two)
  unit = Mul(factor, k_scale1)
  scaled = Mul(unbiased, unit)
  scores = Reshape(scaled, grouped)
  logits = ai.lamp.Logits{capped}(scores, live{", bias" if form.bias else ""})
  p = ai.lamp.Weights(logits{", sinks" if form.sinks else ""})
  by_subtile = Constant<value_ints = [0, 0, 0, 0, -1, {form.subtile}]>()
  {rule}
  dead = Constant<value = float {{-1.0}}>()
  importance1 = Where(tiles, importance0, dead)
  two = Constant<value_ints = [2]>()
  importance = ReduceMax<keepdims = 0>(importance1, two)
}}"""


def select(form: Form) -> str:
    """Importance, tau, floor and state -> precision of each sub-tile, float ``[B, G, S, T]`` (``ir.Precision``). A
    raised level refines whatever is live: a number between that of dead sub-tiles and 0 takes the place of tau."""
    exact = """
  two = Constant<value = float {2.0}>()
  called = GreaterOrEqual(level1, two)
  chosen = Where(called, three, precision)"""
    return f"""Select (importance, tau, floor, state) => (levels) {{
  last = Constant<value_ints = [-1]>()
  begin = Constant<value_ints = [1]>()
  end = Constant<value_ints = [2]>()
  axis = Constant<value_ints = [2]>()
  one = Constant<value = float {{1.0}}>()
  below_all = Constant<value = float {{-0.5}}>()
  tau1 = Unsqueeze(tau, last)
  floor1 = Unsqueeze(floor, last)
  raised = Slice(state, begin, end, axis)
  level = Max(floor1, raised)
  forced = GreaterOrEqual(level, one)
  limit0 = Where(forced, below_all, tau1)
  limit = Unsqueeze(limit0, last)
  level1 = Unsqueeze(level, last)
  unimportant = LessOrEqual(importance, limit)
  high = Constant<value = float {{1.0}}>()
  both = Constant<value = float {{2.0}}>()
  three = Constant<value = float {{3.0}}>()
  precision = Where(unimportant, high, both)
  {"chosen = Identity(precision)" if form.cache else exact.strip()}
  dead = Constant<value = float {{-1.0}}>()
  skip = Constant<value = float {{0.0}}>()
  nobody = Equal(importance, dead)
  levels = Where(nobody, skip, chosen)
}}"""
