"""Attention at the chosen precisions: ``Attend``, with the residual planes read as its ``Form`` says.

Shape letters as in ``functions``; M = B * G. One product with keys gives ``[M, N, R]``: keys come first, because they
are the larger operand and stand as they are.
"""

from __future__ import annotations

from lamp_compile.frontends.onnx.bodies import certificate
from lamp_compile.frontends.onnx.form import Form


def _some_tiles(plane: str) -> str:
    """The storage tiles of a plane that ``hot`` names, and where they came from."""
    return f"""  last = Constant<value_ints = [-1]>()
  one = Constant<value_ints = [1]>()
  tail = Shape<start = 3>({plane})
  tile_shape = Concat<axis = 0>(last, tail)
  tiles = Reshape({plane}, tile_shape)
  found = NonZero(hot)
  index = Reshape(found, last)
  some = Gather<axis = 0>(tiles, index)
"""


def gathered_keys() -> str:
    """Products with the residual plane of some storage tiles only; zeros elsewhere."""
    return (
        "ResidualProductsOfSome (k_residual, query, hot) => (products) {\n"
        + _some_tiles("k_residual")
        + """  per_head = Shape<start = 2, end = 3>(k_residual)
  owner = Div(index, per_head)
  queries = Gather<axis = 0>(query, owner)
  y = ai.lamp.NibbleProducts(some, queries)
  count = Shape(hot)
  tile = Shape<start = 3, end = 4>(k_residual)
  rows = Shape<start = 1, end = 2>(query)
  all_shape = Concat<axis = 0>(count, tile, rows)
  nothing = ConstantOfShape(all_shape)
  at = Unsqueeze(index, one)
  placed = ScatterND(nothing, at, y)
  flat = Concat<axis = 0>(last, rows)
  heads = Shape<start = 0, end = 1>(query)
  out_shape = Concat<axis = 0>(heads, last, rows)
  products = Reshape(placed, out_shape)
}"""
    )


def dense_keys() -> str:
    """Products with all of the residual plane."""
    return """ResidualProducts (k_residual, query) => (products) {
  last = Constant<value_ints = [-1]>()
  heads = Shape<start = 0, end = 1>(query)
  width = Shape<start = 4>(k_residual)
  shape = Concat<axis = 0>(heads, last, width)
  plane = Reshape(k_residual, shape)
  products = ai.lamp.NibbleProducts(plane, query)
}"""


def gathered_values() -> str:
    """Weighted sums over the residual plane of some storage tiles only."""
    return (
        "ResidualSumsOfSome (v_residual, weight, hot) => (sums) {\n"
        + _some_tiles("v_residual")
        + """  tile = Shape<start = 4>(v_residual)
  rows = Shape<start = 1, end = 2>(weight)
  weight_lead = Shape<start = 0, end = 2>(weight)
  weight_shape = Concat<axis = 0>(weight_lead, last, tile)
  tiled = Reshape(weight, weight_shape)
  by_tile = Transpose<perm = [0, 2, 1, 3]>(tiled)
  flat_weight_shape = Concat<axis = 0>(last, rows, tile)
  flat_weight = Reshape(by_tile, flat_weight_shape)
  weights = Gather<axis = 0>(flat_weight, index)
  y = ai.lamp.NibbleSums(some, weights)
  per_head = Shape<start = 2, end = 3>(v_residual)
  owner = Div(index, per_head)
  heads1 = Shape<start = 0, end = 1>(weight)
  heads = Squeeze(heads1)
  zero = Constant<value = int64 {0}>()
  step = Constant<value = int64 {1}>()
  every = Range(zero, heads, step)
  each = Unsqueeze(every, one)
  mine = Equal(each, owner)
  chosen = Cast<to = 1>(mine)
  size = Shape<start = 1>(y)
  some_count = Shape(index)
  flat_size = ReduceProd(size)
  flat_shape = Concat<axis = 0>(some_count, flat_size)
  flat = Reshape(y, flat_shape)
  summed = MatMul(chosen, flat)
  out_shape = Concat<axis = 0>(heads1, size)
  sums = Reshape(summed, out_shape)
}"""
    )


def dense_values() -> str:
    """Weighted sums over a whole plane ``[B, G, P, W, tile]`` of values."""
    return """ValueSums (plane, weight) => (sums) {
  last = Constant<value_ints = [-1]>()
  heads = Shape<start = 0, end = 1>(weight)
  width = Shape<start = 3, end = 4>(plane)
  keys = Shape<start = 2>(weight)
  rows = Transpose<perm = [0, 1, 3, 2, 4]>(plane)
  shape = Concat<axis = 0>(heads, width, keys)
  flat = Reshape(rows, shape)
  sums = ai.lamp.NibbleSums(flat, weight)
}"""


def _branch(form: Form, name: str, some: str, every: str, after: str, before: str) -> str:
    """``name``: ``before`` with what the residual plane adds, ``after`` being the nodes that add it to ``residual``;
    by the refined tiles where there are few, else by all, not at all where there are none."""
    if form.guard == "select":
        return f"residual_{name} = {every}\n{after}"
    return f"""{name} = If (any_hot) <
    then_branch = refined () => ({name}_refined) {{
      residual_{name} = If (few_hot) <
        then_branch = by_tile () => (some) {{ some = {some} }},
        else_branch = whole_plane () => (every) {{ every = {every} }}>
      {after.replace(f"{name} =", f"{name}_refined =")}
    }},
    else_branch = high_only () => ({name}_high) {{ {name}_high = Identity({before}) }}>"""


_ADD_SCORES = """
  y_rows0 = Transpose<perm = [0, 2, 1]>(residual_y_stored)
  y_rows = Reshape(y_rows0, weight_shape)
  y_whole = Mul(y_rows, sixteenth)
  y_even = Add(y_whole, query_half)
  y_scaled = Mul(y_even, factor)
  y_added0 = Mul(y_scaled, k_scale1)
  y_added = Reshape(y_added0, score_shape)
  y_both = Add(scores, y_added)
  y_stored = Where(hot, y_both, scores)"""
_ADD_VALUES = """
  value_whole = Mul(residual_stored_sums, sixteenth)
  stored_sums = Add(high_sums, value_whole)"""

_HOT_TILES = """
  tiles1 = Shape<start = 2, end = 3>(k_residual)
  level_lead = Shape<start = 0, end = 3>(level)
  tile_shape = Concat<axis = 0>(level_lead, tiles1, last)
  level_tiled = Reshape(level, tile_shape)
  over = Constant<value_ints = [2, 4]>()
  tile_level = ReduceMax<keepdims = 0>(level_tiled, over)
  flat_level = Reshape(tile_level, last)
  hot_tile = Greater(flat_level, refined_above)
  hot_number = Cast<to = 1>(hot_tile)
  hot_share = ReduceMean<keepdims = 0>(hot_number)
  any_hot = Greater(hot_share, zero)
  most = Constant<value = float {0.5}>()
  few_hot = Less(hot_share, most)
"""


def _exact_scores(form: Form) -> tuple[str, str, str]:
    """Nodes for level 2 from the original keys and values, and the names of scores and of weights for stored ones."""
    if form.cache:
        return "", "", ""
    padded = """
  missing_keys = Sub(keys, given_keys)
  pad_begin = Constant<value_ints = [0]>()
  exact_pads = Concat<axis = 0>(pad_begin, missing_keys)
  exact_axis = Constant<value_ints = [2]>()"""
    scores = f"""
  exact_above = Constant<value = float {{2.5}}>()
  is_exact = Greater(level_of, exact_above)
  given_keys = Shape<start = 2, end = 3>(k_exact){padded}
  k_exact0 = Cast<to = 1>(k_exact)
  k_exact1 = Pad(k_exact0, exact_pads, , exact_axis)
  q_exact0 = Cast<to = 1>(q)
  q_exact = Reshape(q_exact0, row_shape)
  k_columns = Transpose<perm = [0, 1, 3, 2]>(k_exact1)
  exact_products = MatMul(q_exact, k_columns)
  exact_scaled = Mul(exact_products, scale)
  exact_scores = Reshape(exact_scaled, score_shape)
  y = Where(is_exact, exact_scores, y_stored)"""
    values = """
  p_stored0 = Where(is_exact, zero, p)
  p_exact0 = Sub(p, p_stored0)
  p_exact = Reshape(p_exact0, weight_shape)
  v_exact0 = Cast<to = 1>(v_exact)
  v_exact1 = Pad(v_exact0, exact_pads, , exact_axis)
  exact_out = MatMul(p_exact, v_exact1)"""
    return scores, values, "\n  out_rows = Add(out_rows0, exact_out)"


def attend(form: Form) -> str:
    """Look-ahead scores and levels -> output, log-sum-exp, certificate."""
    cap = ", softcap: float = 1.0" if form.softcap else ""
    capped = "<softcap: float = @softcap>" if form.softcap else ""
    turned_k = (", rotate_k" if form.rotation else "") + (", balance" if form.balance else "")
    turned = (", rotate_k, rotate_v" if form.rotation else "") + (", balance" if form.balance else "")
    exact = "" if form.cache else ", k_exact, v_exact"
    bias, sinks = (", bias" if form.bias else ""), (", sinks" if form.sinks else "")
    exact_scores, exact_values, exact_out = _exact_scores(form)
    keys = _branch(
        form,
        "y_stored",
        "ai.lamp.ResidualProductsOfSome(k_residual, query_rows, hot_tile)",
        "ai.lamp.ResidualProducts(k_residual, query_rows)",
        _ADD_SCORES,
        "scores",
    )
    values = _branch(
        form,
        "stored_sums",
        "ai.lamp.ResidualSumsOfSome(v_residual, hot_weight, hot_tile)",
        "ai.lamp.ValueSums(v_residual, hot_weight)",
        _ADD_VALUES,
        "high_sums",
    )
    back = (
        "rotate_back = Transpose<perm = [1, 0]>(rotate_v)\n  out_flat = MatMul(both_sums, rotate_back)"
        if form.rotation
        else "out_flat = Identity(both_sums)"
    )
    planes = "k_residual, k_scale, v_high, v_residual, v_scale"
    return f"""Attend <scale: float = 1.0{cap}> (q, scores, levels, live, {planes}{turned}{bias}{sinks}{exact})
=> (out, lse, certificate) {{
  last = Constant<value_ints = [-1]>()
  minus_two = Constant<value_ints = [-2]>()
  zero = Constant<value = float {{0.0}}>()
  half = Constant<value = float {{0.5}}>()
  sixteenth = Constant<value = float {{0.0625}}>()
  scale = Constant<value_float: float = @scale>()
  refined_above = Constant<value = float {{1.5}}>()
  query, step = ai.lamp.PrepareQuery(q, k_scale{turned_k})
  query_tail = Shape<start = 2, end = 4>(query)
  flat_shape = Concat<axis = 0>(last, query_tail)
  query_rows = Reshape(query, flat_shape)
  row_lead = Shape<start = 0, end = 3>(query)
  row_tail = Shape<start = 3>(query)
  row_shape = Concat<axis = 0>(row_lead, row_tail)
  keys = Shape<start = 2, end = 3>(k_scale)
  weight_shape = Concat<axis = 0>(row_lead, keys)
  score_shape = Shape(scores)
  k_scale0 = Cast<to = 1>(k_scale)
  k_scale1 = Unsqueeze(k_scale0, minus_two)
  v_scale0 = Cast<to = 1>(v_scale)
  v_scale1 = Unsqueeze(v_scale0, minus_two)
  level = Cast<to = 1>(levels)
  {_HOT_TILES}
  {_LEVEL_OF_KEY.replace("SUBTILE", str(form.subtile))}
  hot = Greater(level_of, refined_above)
  query_sum = ReduceSum(query, last)
  query_half = Mul(query_sum, half)
  factor = Mul(step, scale)
  {keys}
  {exact_scores or "y = Identity(y_stored)"}
  logits = ai.lamp.Logits{capped}(y, live{bias})
  p = ai.lamp.Weights(logits, live{sinks})
  {exact_values}
  p_rows = Reshape({"p" if form.cache else "p_stored0"}, weight_shape)
  weighted = Mul(p_rows, v_scale1)
  hot_rows = Reshape(hot, weight_shape)
  hot_weighted = Where(hot_rows, weighted, zero)
  rows1 = Shape<start = 2, end = 3>(query)
  flat_weight_shape = Concat<axis = 0>(last, rows1, keys)
  weight = Reshape(weighted, flat_weight_shape)
  hot_weight = Reshape(hot_weighted, flat_weight_shape)
  high_sums = ai.lamp.ValueSums(v_high, weight)
  {values}
  weight_sum = ReduceSum(weight, last)
  hot_sum = ReduceSum(hot_weight, last)
  cold_sum = Sub(weight_sum, hot_sum)
  value_half = Mul(cold_sum, half)
  both_sums = Sub(stored_sums, value_half)
  {back}
  value_width = Shape<start = 2>(out_flat)
  out_row_shape = Concat<axis = 0>(row_lead, value_width)
  out_rows0 = Reshape(out_flat, out_row_shape){exact_out or chr(10) + "  out_rows = Identity(out_rows0)"}
  q_lead = Shape<start = 0, end = 3>(q)
  out_shape = Concat<axis = 0>(q_lead, value_width)
  out0 = Reshape(out_rows, out_shape)
  out = CastLike(out0, q)
  {certificate.log_sum_exp()}
  {certificate.sums(form)}
}}"""


_LEVEL_OF_KEY = """
  all_heads = Shape<start = 1, end = 2>(q)
  kv_heads = Shape<start = 1, end = 2>(k_scale)
  group1 = Div(all_heads, kv_heads)
  one1 = Constant<value_ints = [1]>()
  subtile1 = Constant<value_ints = [SUBTILE]>()
  repeat = Concat<axis = 0>(one1, one1, group1, one1, one1, subtile1)
  spread_axes = Constant<value_ints = [2, 5]>()
  level6 = Unsqueeze(level, spread_axes)
  level_spread = Expand(level6, repeat)
  level_of = Reshape(level_spread, score_shape)
"""
