"""What comes before values are read: ``PrepareQuery``, ``Visible``, ``LookAhead``, ``Select``."""

from __future__ import annotations

from lamp_compile.frontends.onnx.form import Form

TINY = "1.17549435e-38"


def prepare_query(form: Form) -> str:
    """Query ``[B, H, S, D]`` -> ``[B, G, R, D]`` (R = H / G * S), balanced, rotated, in whole steps of ``step``
    ``[B, G, R, 1]`` where it is rounded to 8 bits (steps of 1 otherwise). G is that of ``k_scale``."""
    inputs = "q, k_scale" + (", rotate_k" if form.rotation else "") + (", balance" if form.balance else "")
    balanced = "factor = Unsqueeze(balance, minus_two)\n  x2 = Mul(x1, factor)" if form.balance else "x2 = Identity(x1)"
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
    return f"""PrepareQuery ({inputs}) => (query, step) {{
  last = Constant<value_ints = [-1]>()
  minus_two = Constant<value_ints = [-2]>()
  x0 = Cast<to = 1>(q)
  lead = Shape<start = 0, end = 2>(k_scale)
  width = Shape<start = 3, end = 4>(q)
  shape = Concat<axis = 0>(lead, last, width)
  x1 = Reshape(x0, shape)
  {balanced}
  {turned}
  {rounded}
}}"""


def visible(form: Form) -> str:
    """Which key each query sees: boolean, broadcastable to ``[B, H, S, N]``, with all N columns."""
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
        steps.append(f"live4 = And({live}, mask)")
        live = "live4"
    body = "\n  ".join(steps)
    return f"""Visible{window} ({inputs}) => (live) {{
  zero = Constant<value = int64 {{0}}>()
  one = Constant<value = int64 {{1}}>()
  first1 = Constant<value_ints = [1]>()
  outer = Constant<value_ints = [1, 2, 3]>()
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
    """Softmax over live keys and sinks; a row with no live key has weights 0."""
    if not form.sinks:
        return """Weights (logits, live) => (p) {
  zero = Constant<value = float {0.0}>()
  p0 = Softmax<axis = -1>(logits)
  p = Where(live, p0, zero)
}"""
    return """Weights (logits, live, sinks) => (p) {
  zero = Constant<value = float {0.0}>()
  outer = Constant<value_ints = [0, 2, 3]>()
  one = Constant<value_ints = [1]>()
  lead = Shape<start = 0, end = 3>(logits)
  column = Concat<axis = 0>(lead, one)
  sinks0 = Cast<to = 1>(sinks)
  sinks1 = Unsqueeze(sinks0, outer)
  sinks2 = Expand(sinks1, column)
  extended = Concat<axis = 3>(logits, sinks2)
  p0 = Softmax<axis = -1>(extended)
  begin = Constant<value_ints = [0]>()
  end = Constant<value_ints = [-1]>()
  axis = Constant<value_ints = [3]>()
  p1 = Slice(p0, begin, end, axis)
  p = Where(live, p1, zero)
}"""


_RULES = {
    "energy": """
  square = Mul(p, p)
  tiled = Reshape(square, by_subtile)
  energy = ReduceSum<keepdims = 0>(tiled, last)
  importance0 = Sqrt(energy)""",
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
  never = Constant<value = float {-inf}>()
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
    return f"""LookAhead <scale: float = 1.0{cap}> (q, k_high, k_scale, live{turned}{added}) => (importance, scores) {{
  last = Constant<value_ints = [-1]>()
  query, step = ai.lamp.PrepareQuery(q, k_scale{turned})
  keys = Shape<start = 2, end = 3>(k_scale)
  width = Shape<start = 4, end = 5>(k_high)
  plane_shape = Concat<axis = 0>(last, keys, width)
  plane = Reshape(k_high, plane_shape)
  query_tail = Shape<start = 2, end = 4>(query)
  query_shape = Concat<axis = 0>(last, query_tail)
  flat = Reshape(query, query_shape)
  products = ai.lamp.NibbleProducts(plane, flat)
  turned = Transpose<perm = [0, 2, 1]>(products)
  lead = Shape<start = 0, end = 3>(query)
  row_shape = Concat<axis = 0>(lead, keys)
  rows = Reshape(turned, row_shape)
  half = Constant<value = float {{0.5}}>()
  total = ReduceSum(query, last)
  offset = Mul(total, half)
  unbiased = Sub(rows, offset)
  scale = Constant<value_float: float = @scale>()
  factor = Mul(step, scale)
  scaled = Mul(unbiased, factor)
  k_scale0 = Cast<to = 1>(k_scale)
  minus_two = Constant<value_ints = [-2]>()
  k_scale1 = Unsqueeze(k_scale0, minus_two)
  scores0 = Mul(scaled, k_scale1)
  q_lead = Shape<start = 0, end = 3>(q)
  score_shape = Concat<axis = 0>(q_lead, keys)
  scores = Reshape(scores0, score_shape)
  logits = ai.lamp.Logits{capped}(scores, live{", bias" if form.bias else ""})
  p = ai.lamp.Weights(logits, live{", sinks" if form.sinks else ""})
  by_subtile = Constant<value_ints = [0, 0, 0, -1, {form.subtile}]>()
  {rule}
  live0 = Cast<to = 1>(live)
  live1 = Reshape(live0, by_subtile)
  live2 = ReduceMax<keepdims = 0>(live1, last)
  live3 = Cast<to = 9>(live2)
  dead = Constant<value = float {{-1.0}}>()
  importance1 = Where(live3, importance0, dead)
  groups = Shape<start = 0, end = 2>(k_scale)
  tail = Shape<start = 2, end = 4>(importance1)
  grouped = Concat<axis = 0>(groups, last, tail)
  importance2 = Reshape(importance1, grouped)
  two = Constant<value_ints = [2]>()
  importance = ReduceMax<keepdims = 0>(importance2, two)
}}"""


def select(form: Form) -> str:
    """Importance, tau, floor and state -> precision of each sub-tile, uint8 ``[B, G, S, T]`` (``ir.Precision``)."""
    exact = (
        "two = Constant<value = float {2.0}>()\n  three = Constant<value = float {3.0}>()\n"
        "  called = GreaterOrEqual(level, two)\n  chosen = Where(called, three, precision)"
    )
    return f"""Select (importance, tau, floor, state) => (levels) {{
  tail = Constant<value_ints = [-1, -2]>()
  tau1 = Unsqueeze(tau, tail)
  floor1 = Unsqueeze(floor, tail)
  begin = Constant<value_ints = [1]>()
  end = Constant<value_ints = [2]>()
  axis = Constant<value_ints = [2]>()
  last = Constant<value_ints = [-1]>()
  raised0 = Slice(state, begin, end, axis)
  raised = Unsqueeze(raised0, last)
  level = Max(floor1, raised)
  below = LessOrEqual(importance, tau1)
  above = Not(below)
  one = Constant<value = float {{1.0}}>()
  high = Constant<value = float {{1.0}}>()
  both = Constant<value = float {{2.0}}>()
  forced = GreaterOrEqual(level, one)
  refine = Or(above, forced)
  precision = Where(refine, both, high)
  {"chosen = Identity(precision)" if form.cache else exact}
  dead = Constant<value = float {{-1.0}}>()
  skip = Constant<value = float {{0.0}}>()
  nobody = Equal(importance, dead)
  levels0 = Where(nobody, skip, chosen)
  {"levels = Cast<to = 2>(levels0)" if form.arithmetic == "integer" else "levels = Identity(levels0)"}
}}"""
