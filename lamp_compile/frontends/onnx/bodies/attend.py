"""Attention at the chosen precisions: ``Attend``, with the residual planes read as its ``Form`` says.

Shape letters as in ``functions``; five axes and rows as in ``scores``.
"""

from __future__ import annotations

from lamp_compile.frontends.onnx.bodies import certificate
from lamp_compile.frontends.onnx.form import Form


def gathered_keys() -> str:
    """Products with the residual plane of the storage tiles at ``at [1, K, 3]`` only; zeros elsewhere."""
    return """ResidualProductsOfSome (k_residual, query, at) => (products) {
  parts = Constant<value_ints = [2, 1]>()
  some = GatherND(k_residual, at)
  owner, place = Split<axis = 2>(at, parts)
  queries = GatherND(query, owner)
  y = ai.lamp.NibbleProducts(some, queries)
  tiles = Shape<start = 0, end = 3>(k_residual)
  rows = Shape<start = 2, end = 3>(query)
  tile = Shape<start = 3, end = 4>(k_residual)
  shape = Concat<axis = 0>(tiles, rows, tile)
  nothing = ConstantOfShape(shape)
  placed = ScatterND(nothing, at, y)
  turned = Transpose<perm = [0, 1, 3, 2, 4]>(placed)
  flat = Constant<value_ints = [0, 0, 0, -1]>()
  products = Reshape(turned, flat)
}"""


def dense_keys() -> str:
    """Products with all of the residual plane."""
    return """ResidualProducts (k_residual, query) => (products) {
  plane = ai.lamp.KeyRows(k_residual)
  products = ai.lamp.NibbleProducts(plane, query)
}"""


def gathered_values() -> str:
    """Weighted sums over the residual plane of the storage tiles at ``at [1, K, 3]`` only."""
    return """ResidualSumsOfSome (v_residual, weight, at) => (sums) {
  some = GatherND(v_residual, at)
  copies = Constant<value_ints = [0, 0, 0, -1]>()
  tile = Shape<start = 4>(v_residual)
  tiled_shape = Concat<axis = 0>(copies, tile)
  tiled = Reshape(weight, tiled_shape)
  by_tile = Transpose<perm = [0, 1, 3, 2, 4]>(tiled)
  weights = GatherND(by_tile, at)
  y = ai.lamp.NibbleSums(some, weights)
  parts = Constant<value_ints = [2, 1]>()
  owner, place = Split<axis = 2>(at, parts)
  one = Constant<value_ints = [1]>()
  last = Constant<value_ints = [-1]>()
  groups = Shape<start = 1, end = 2>(weight)
  strides = Concat<axis = 0>(groups, one)
  head = MatMul(owner, strides)
  lead = Shape<start = 0, end = 2>(weight)
  heads = ReduceProd<keepdims = 0>(lead)
  off_on = Constant<value = float[2] {0.0, 1.0}>()
  chosen = OneHot<axis = 0>(head, heads, off_on)
  flat = Flatten<axis = 2>(y)
  summed = MatMul(chosen, flat)
  rows = Shape<start = 0, end = 3>(weight)
  shape = Concat<axis = 0>(rows, last)
  sums = Reshape(summed, shape)
}"""


def dense_values() -> str:
    """Weighted sums over a whole plane ``[B, G, P, W, tile]`` of values."""
    return """ValueSums (plane, weight) => (sums) {
  rows = Transpose<perm = [0, 1, 3, 2, 4]>(plane)
  shape = Constant<value_ints = [0, 0, 0, -1]>()
  flat = Reshape(rows, shape)
  sums = ai.lamp.NibbleSums(flat, weight)
}"""


def high_values(form: Form) -> str:
    """Scores at their precisions -> weights p, weights times scales of the stored values (0 where a key is exact), and
    their sums over the high plane alone."""
    cap = " <softcap: float = 1.0>" if form.softcap else ""
    capped = "<softcap: float = @softcap>" if form.softcap else ""
    bias, sinks = (", bias" if form.bias else ""), (", sinks" if form.sinks else "")
    stored = "p_stored = Identity(p)" if form.cache else "p_stored = Where(is_exact, zero, p)"
    return f"""HighValues{cap} (y, live, v_high, v_scale5, row_shape{bias}{sinks}{"" if form.cache else ", is_exact"})
=> (p, weighted, sums) {{
  zero = Constant<value = float {{0.0}}>()
  half = Constant<value = float {{0.5}}>()
  last = Constant<value_ints = [-1]>()
  logits = ai.lamp.Logits{capped}(y, live{bias})
  p0 = ai.lamp.Weights(logits{sinks})
  p = Where(live, p0, zero)
  {stored}
  weighted = Mul(p_stored, v_scale5)
  weight = Reshape(weighted, row_shape)
  whole = ai.lamp.ValueSums(v_high, weight)
  total = ReduceSum(weight, last)
  value_half = Mul(total, half)
  sums = Sub(whole, value_half)
}}"""


def _arm(form: Form, name: str, keys: str, values: str) -> str:
    """Nodes from the scores of the high plane to ``p_<name>`` and ``sums_<name>``; ``keys`` and ``values`` read the
    residual planes. Axes are constants of their own: inference of shapes does not see those around a branch."""
    capped = "<softcap: float = @softcap>" if form.softcap else ""
    added = (", bias" if form.bias else "") + (", sinks" if form.sinks else "")
    added += "" if form.cache else ", is_exact"
    chosen = f"Identity(stored_{name})" if form.cache else f"Where(is_exact, exact_scores, stored_{name})"
    high = f"ai.lamp.HighValues{capped}(y_{name}, live, v_high, v_scale5, row_shape{added})"
    return f"""rest_{name} = {keys}
  rest_whole_{name} = Mul(rest_{name}, sixteenth)
  rest_even_{name} = Add(rest_whole_{name}, half)
  rest_scaled_{name} = Mul(rest_even_{name}, unit)
  rest_scores_{name} = Reshape(rest_scaled_{name}, grouped)
  refined_{name} = Add(scores, rest_scores_{name})
  stored_{name} = Where(hot, refined_{name}, scores)
  y_{name} = {chosen}
  p_{name}, weighted_{name}, high_{name} = {high}
  hot_weighted_{name} = Where(hot, weighted_{name}, zero)
  weight_{name} = Reshape(hot_weighted_{name}, row_shape)
  rest_sums_{name} = {values.replace("WEIGHT", f"weight_{name}")}
  rest_values_{name} = Mul(rest_sums_{name}, sixteenth)
  keys_{name} = Constant<value_ints = [-1]>()
  hot_total_{name} = ReduceSum(weight_{name}, keys_{name})
  hot_half_{name} = Mul(hot_total_{name}, one_half)
  with_rest_{name} = Add(high_{name}, rest_values_{name})
  sums_{name} = Add(with_rest_{name}, hot_half_{name})"""


_HOT_TILES = """
  copies = Constant<value_ints = [0, 0, 0]>()
  tiles1 = Shape<start = 2, end = 3>(k_residual)
  tile_shape = Concat<axis = 0>(copies, tiles1, last)
  by_tile = Reshape(levels, tile_shape)
  over = Constant<value_ints = [2, 4]>()
  tile_level = ReduceMax<keepdims = 0>(by_tile, over)
  hot_tile = Greater(tile_level, refined_above)
  hot_number = Cast<to = 1>(hot_tile)
  hot_share = ReduceMean<keepdims = 0>(hot_number)
  most = Constant<value = float {0.5}>()
  few_hot = Less(hot_share, most)
"""
"""Storage tiles ``[B, G, P]`` that some query refines, and whether these are fewer than half."""


def _weighing(form: Form) -> str:
    """Nodes that make ``p`` and ``stored_sums``."""
    every = _arm(form, "every", "ai.lamp.ResidualProducts(k_residual, query)", "ai.lamp.ValueSums(v_residual, WEIGHT)")
    if form.guard == "select":
        return f"{every}\n  p = Identity(p_every)\n  stored_sums = Identity(sums_every)"
    some = _arm(
        form,
        "some",
        "ai.lamp.ResidualProductsOfSome(k_residual, query, at)",
        "ai.lamp.ResidualSumsOfSome(v_residual, WEIGHT, at)",
    )
    return f"""{_HOT_TILES}
  p, stored_sums = If (few_hot) <
    then_branch = by_tile () => (p_some, sums_some) {{
      found = NonZero(hot_tile)
      turned = Transpose<perm = [1, 0]>(found)
      first = Constant<value_ints = [0]>()
      at = Unsqueeze(turned, first)
      {some}
    }},
    else_branch = whole_plane () => (p_every, sums_every) {{ {every} }}>"""


def _exact_parts(form: Form) -> tuple[str, str]:
    """Nodes for level 2 from the original keys and values: before the softmax and after it."""
    if form.cache:
        return "", "out_rows = Identity(out_stored)"
    before = """exact_above = Constant<value = float {2.5}>()
  is_exact = Greater(level_of, exact_above)
  keys = Shape<start = 2, end = 3>(k_scale)
  given_keys = Shape<start = 2, end = 3>(k_exact)
  missing_keys = Sub(keys, given_keys)
  pad_begin = Constant<value_ints = [0]>()
  exact_pads = Concat<axis = 0>(pad_begin, missing_keys)
  exact_axis = Constant<value_ints = [2]>()
  k_exact0 = Cast<to = 1>(k_exact)
  k_exact1 = Pad(k_exact0, exact_pads, , exact_axis)
  q_exact0 = Cast<to = 1>(q)
  q_exact = Reshape(q_exact0, by_group)
  k_columns = Transpose<perm = [0, 1, 3, 2]>(k_exact1)
  exact_products = MatMul(q_exact, k_columns)
  exact_scaled = Mul(exact_products, scale)
  exact_scores = Reshape(exact_scaled, grouped)"""
    after = """p_exact0 = Where(is_exact, p, zero)
  p_exact = Reshape(p_exact0, row_shape)
  v_exact0 = Cast<to = 1>(v_exact)
  v_exact1 = Pad(v_exact0, exact_pads, , exact_axis)
  exact_out = MatMul(p_exact, v_exact1)
  out_rows = Add(out_stored, exact_out)"""
    return before, after


def attend(form: Form) -> str:
    """Look-ahead scores and levels -> output; per row its squared norm, the squared error estimate and the sum of its
    weights, which is 0 where no key is live."""
    cap = ", softcap: float = 1.0" if form.softcap else ""
    turned_k = (", rotate_k" if form.rotation else "") + (", balance" if form.balance else "")
    turned = (", rotate_k, rotate_v" if form.rotation else "") + (", balance" if form.balance else "")
    exact = "" if form.cache else ", k_exact, v_exact"
    bias, sinks = (", bias" if form.bias else ""), (", sinks" if form.sinks else "")
    before, after = _exact_parts(form)
    back = (
        "rotate_back = Transpose<perm = [1, 0]>(rotate_v)\n  out_stored = MatMul(stored_sums, rotate_back)"
        if form.rotation
        else "out_stored = Identity(stored_sums)"
    )
    planes = "k_residual, k_scale, v_high, v_residual, v_scale"
    return f"""Attend <scale: float = 1.0{cap}> (q, scores, levels, live, {planes}{turned}{bias}{sinks}{exact})
=> (out, square, estimate, mass) {{
  last = Constant<value_ints = [-1]>()
  minus_two = Constant<value_ints = [-2]>()
  zero = Constant<value = float {{0.0}}>()
  one_half = Constant<value = float {{0.5}}>()
  sixteenth = Constant<value = float {{0.0625}}>()
  scale = Constant<value_float: float = @scale>()
  refined_above = Constant<value = float {{1.5}}>()
  by_group, grouped, row_shape, by_head = ai.lamp.Shapes(q, k_scale)
  query, half, factor = ai.lamp.PrepareQuery<scale: float = @scale>(q, k_scale, by_group{turned_k})
  k_scale0 = Cast<to = 1>(k_scale)
  k_scale1 = Unsqueeze(k_scale0, minus_two)
  unit = Mul(factor, k_scale1)
  v_scale0 = Cast<to = 1>(v_scale)
  v_scale1 = Unsqueeze(v_scale0, minus_two)
  v_scale5 = Unsqueeze(v_scale1, minus_two)
  outer = Constant<value_ints = [2, 5]>()
  spread = Constant<value_ints = [1, 1, 1, 1, 1, {form.subtile}]>()
  by_key = Constant<value_ints = [0, 0, 0, 0, -1]>()
  level6 = Unsqueeze(levels, outer)
  level_spread = Expand(level6, spread)
  level_of = Reshape(level_spread, by_key)
  hot = Greater(level_of, refined_above)
  {before}
  {_weighing(form)}
  {back}
  {after}
  out0 = Reshape(out_rows, by_head)
  out = CastLike(out0, q)
  square = ReduceSumSquare(out_rows, last)
  {certificate.estimate(form)}
  mass = ReduceSum(p_rows, last)
}}"""
