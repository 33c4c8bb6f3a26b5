"""Ops that multiply and sum: dot_general, ragged_dot_general, conv_general_dilated."""

from __future__ import annotations

from .factors import Dims, Factors, OpCall, require, rule_for
from .rule import Dim, Rule

_PAIRS = ("lhs_contracting", "rhs_contracting", "lhs_batch", "rhs_batch")


@rule_for("dot_general")
def dot_general(call: OpCall) -> Rule:
    """Batch and free dims are parallel, contracted dims reduced.

    [b, m, k] · [b, k, n] -> [b, m, n]
    """
    left_sum, right_sum, left_batch, right_batch = map(call.integers, _PAIRS)
    factors = Factors()
    left: dict[int, Dim] = {}
    right: dict[int, Dim] = {}
    for i, j in zip(left_batch, right_batch, strict=True):
        left[i] = right[j] = factors.new(call.operands[0].shape[i])
    batch = [left[i] for i in left_batch]
    for i, j in zip(left_sum, right_sum, strict=True):
        left[i] = right[j] = factors.new(call.operands[0].shape[i], "sum")
    free = [*_rest(factors, call, 0, left), *_rest(factors, call, 1, right)]
    return factors.rule([_ordered(left), _ordered(right)], [(*batch, *free)], call.linear)


def _rest(factors: Factors, call: OpCall, operand: int, known: dict[int, Dim]) -> list[Dim]:
    """Give the dims not yet known a parallel factor; return them in order."""
    free = [d for d in range(call.operands[operand].rank) if d not in known]
    for d in free:
        known[d] = factors.new(call.operands[operand].shape[d])
    return [known[d] for d in free]


def _ordered(dims: dict[int, Dim]) -> Dims:
    return tuple(dims[d] for d in range(len(dims)))


@rule_for("ragged_dot_general")
def ragged_dot_general(call: OpCall) -> Rule:
    """Grouped matmul (experts): rows are parallel, groups too, or summed where all rows come out; sizes are whole.

    lhs [m, k], rhs [g, k, n], group_sizes [g] -> [m, n]   m ragged: k and g reduced (others' rows are 0)
    lhs [m, k], rhs [m, n],    group_sizes [g] -> [g, k, n]   m ragged and contracted: m reduced
    """
    left_sum, right_sum, left_batch, right_batch = map(call.integers, _PAIRS)
    ragged, groups = map(call.integers, ("lhs_ragged_dimensions", "rhs_group_dimensions"))
    require(not left_batch and not right_batch and len(ragged) == 1 and call.operands[2].rank == 1)
    require(len(call.operands) == 3 and call.attrs.get("group_offset") is None)
    factors, many = Factors(), call.operands[2].shape[0]
    left: dict[int, Dim] = {}
    right: dict[int, Dim] = {}
    contracted = ragged[0] in left_sum
    group = factors.new(many, "" if contracted else "sum")
    right.update(dict.fromkeys(groups, group))
    for i, j in zip(left_sum, right_sum, strict=True):
        left[i] = right[j] = factors.new(call.operands[0].shape[i], "sum")
    head = [group] if contracted else []
    result = (*head, *_rest(factors, call, 0, left), *_rest(factors, call, 1, right))
    sizes = (factors.whole(many),)
    return factors.rule([_ordered(left), _ordered(right), sizes], [result], call.linear)


@rule_for("conv_general_dilated")
def conv_general_dilated(call: OpCall) -> Rule:
    """Images and output features are parallel, input features reduced.

    A dim split into groups is (group, rest): only the groups may be cut there.
    Weight and input gradients are convolutions with permuted dims, so the same
    rule gives them theirs: a weight gradient sums over the images.
    """
    x, w, y = map(call.integers, ("lhs_spec", "rhs_spec", "out_spec"))
    (x_shape, w_shape), y_shape = (kind.shape for kind in call.operands), call.results[0].shape
    by_feature, by_batch = call.integer("feature_group_count"), call.integer("batch_group_count")
    require(1 in (by_feature, by_batch))
    factors = Factors()
    of_feature, of_batch = factors.new(by_feature), factors.new(by_batch)
    batch = factors.new(y_shape[y[0]])
    summed = factors.new(w_shape[w[1]], "sum")
    made = factors.new(w_shape[w[0]] // (by_feature * by_batch))
    left, right, result = dict[int, Dim](), dict[int, Dim](), dict[int, Dim]()
    left[x[0]], left[x[1]] = of_batch + batch, of_feature + summed
    right[w[0]], right[w[1]] = of_feature + of_batch + made, summed
    result[y[0]], result[y[1]] = batch, of_feature + of_batch + made
    for n, dims in enumerate(zip(x[2:], w[2:], y[2:], strict=True)):
        sizes = x_shape[dims[0]], w_shape[dims[1]], y_shape[dims[2]]
        found = _spatial(factors, call, n, sizes)
        left[dims[0]], right[dims[1]], result[dims[2]] = found
    return factors.rule([_ordered(left), _ordered(right)], [_ordered(result)], call.linear)


def _spatial(
    factors: Factors, call: OpCall, n: int, sizes: tuple[int, int, int]
) -> tuple[Dim, Dim, Dim]:
    """Image, window and result along one spatial dim.

    A window of 1 is a map, a window over everything a contraction; otherwise
    neighbours meet: halo where the size is kept, whole elsewhere.
    """
    image, window, made = sizes
    plain = (call.integers("lhs_dilation")[n], call.integers("rhs_dilation")[n]) == (1, 1)
    padding = call.tuples("padding")[n]
    if plain and padding == (0, 0) and window == 1 and made == image:
        dim = factors.new(image)
        return dim, (), dim
    if plain and padding == (0, 0) and window == image and made == 1:
        dim = factors.new(image, "sum")
        return dim, dim, ()
    if plain and made == image:
        dim = factors.halo(image)
        return dim, factors.whole(window), dim
    return factors.whole(image), factors.whole(window), factors.whole(made)
