"""Ops that move elements without computing: reshape, slices, joins, repeats."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import gcd

from ..graph import TensorType
from .factors import Dims, Factors, OpCall, require, rule_for
from .rule import Dim, Rule


@rule_for("reshape")
def reshape(call: OpCall) -> Rule:
    """Both shapes as products of the finest common factors.

    [B·T, 3·H] -> [B, T, 3, H]   dims (B, T) (3, H) -> (B,) (T,) (3,) (H,)

    `dimensions` is the order in which the operand's dims are read.
    """
    shape = call.operands[0].shape
    order = (
        range(len(shape)) if call.attrs.get("dimensions") is None else call.integers("dimensions")
    )
    factors = Factors()
    read = tuple(shape[d] for d in order)
    before, after = common_factors(factors, read, call.results[0].shape)
    operand = tuple(dim for _, dim in sorted(zip(order, before, strict=True)))
    return factors.rule([operand], [after], call.linear)


def common_factors(
    factors: Factors, before: tuple[int, ...], after: tuple[int, ...]
) -> tuple[Dims, Dims]:
    """Walk both shapes from the major end, taking what divides both as a shared factor.

    Where nothing does (6·4 -> 4·6 leaves 3·4 against 2·6 after a shared 2), the
    stretch up to the next common boundary is whole on each side.
    """
    require(0 not in before)
    left, right = _Side(before), _Side(after)
    while left.more() and right.more():
        shared = gcd(left.rest, right.rest)
        if shared == 1:
            _skip_to_boundary(factors, left, right)
            continue
        dim = factors.new(shared)
        left.take(dim, shared)
        right.take(dim, shared)
    return left.dims(), right.dims()


class _Side:
    """One shape while it is being factored: `rest` is what remains of the current dim."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape
        self.found: list[Dim] = [()] * len(shape)
        self.at = -1
        self.rest = 1
        self.taken = 1
        self._advance()

    def _advance(self) -> None:
        while self.rest == 1 and self.at + 1 <= len(self.shape):
            self.at += 1
            self.rest = self.shape[self.at] if self.at < len(self.shape) else 0

    def more(self) -> bool:
        return self.at < len(self.shape)

    def take(self, dim: Dim, size: int) -> None:
        self.found[self.at] = self.found[self.at] + dim
        self.rest //= size
        self.taken *= size
        self._advance()

    def dims(self) -> Dims:
        return tuple(self.found)


def _skip_to_boundary(factors: Factors, left: _Side, right: _Side) -> None:
    side = left
    while True:
        side.take(factors.whole(side.rest), side.rest)
        if left.taken == right.taken:
            return
        side = left if left.taken < right.taken else right


@rule_for("broadcast_in_dim")
def broadcast_in_dim(call: OpCall) -> Rule:
    require(len(call.operands) == 1)
    factors = Factors()
    shape = call.results[0].shape
    result = factors.like(shape)
    places = call.integers("broadcast_dimensions")
    operand = tuple(
        result[place] if size == shape[place] else ()
        for place, size in zip(places, call.operands[0].shape, strict=True)
    )
    return factors.rule([operand], [result], call.linear)


@rule_for("squeeze")
def squeeze(call: OpCall) -> Rule:
    factors = Factors()
    operand = factors.like(call.operands[0].shape)
    gone = {d % len(operand) for d in call.integers("dimensions")}
    result = tuple(dim for d, dim in enumerate(operand) if d not in gone)
    return factors.rule([operand], [result], call.linear)


@rule_for("transpose")
def transpose(call: OpCall) -> Rule:
    factors = Factors()
    operand = factors.like(call.operands[0].shape)
    result = tuple(operand[d] for d in call.integers("permutation"))
    return factors.rule([operand], [result], call.linear)


@rule_for("rev")
def rev(call: OpCall) -> Rule:
    reversed_dims = set(call.integers("dimensions"))
    factors = Factors()
    dims = tuple(
        factors.whole(size) if d in reversed_dims else factors.new(size)
        for d, size in enumerate(call.operands[0].shape)
    )
    return factors.rule([dims], [dims], call.linear)


@rule_for("concatenate")
def concatenate(call: OpCall) -> Rule:
    axis = call.integer("dimension")
    factors = Factors()
    *operands, result = _whole_along(factors, axis, [*call.operands, *call.results])
    return factors.rule(operands, [result], call.linear)


@rule_for("stack")
def stack(call: OpCall) -> Rule:
    axis = call.integer("axis")
    factors = Factors()
    dims = factors.like(call.operands[0].shape)
    result = (*dims[:axis], factors.whole(len(call.operands)), *dims[axis:])
    return factors.rule([dims for _ in call.operands], [result], call.linear)


@rule_for("unstack")
def unstack(call: OpCall) -> Rule:
    axis = call.integer("axis")
    factors = Factors()
    dims = factors.like(call.results[0].shape)
    operand = (*dims[:axis], factors.whole(len(call.results)), *dims[axis:])
    return factors.rule([operand], [dims for _ in call.results], call.linear)


@rule_for("split")
def split(call: OpCall) -> Rule:
    axis = call.integer("axis")
    factors = Factors()
    operand, *results = _whole_along(factors, axis, [*call.operands, *call.results])
    return factors.rule([operand], results, call.linear)


def _whole_along(factors: Factors, axis: int, kinds: Sequence[TensorType]) -> list[Dims]:
    """Tensors that differ only along one dim: the others are shared."""
    shared = factors.like(size for d, size in enumerate(kinds[0].shape) if d != axis)
    return [(*shared[:axis], factors.whole(kind.shape[axis]), *shared[axis:]) for kind in kinds]


@rule_for("tile")
def tile(call: OpCall) -> Rule:
    """Each result dim is (repeats, size): size may be cut only where it is not repeated."""
    factors = Factors()
    operand = factors.like(call.operands[0].shape)
    result = tuple(
        factors.new(times) + dim for times, dim in zip(call.integers("reps"), operand, strict=True)
    )
    return factors.rule([operand], [result], call.linear)


@rule_for("slice")
def slice_(call: OpCall) -> Rule:
    """Dims taken in full, in order, are parallel; the others whole."""
    shape = call.operands[0].shape
    starts, limits = call.integers("start_indices"), call.integers("limit_indices")
    strides = call.attrs.get("strides")
    steps = (1,) * len(shape) if strides is None else call.integers("strides")
    cuts = zip(starts, limits, steps, strict=True)
    return _window(call, [cut == (0, size, 1) for cut, size in zip(cuts, shape, strict=True)])


@rule_for("pad")
def pad(call: OpCall) -> Rule:
    """Not linear: a padding value other than 0 would be counted once per shard."""
    full = [config == (0, 0, 0) for config in call.tuples("padding_config")]
    factors = Factors()
    before, after = _shared_where(factors, full, call.operands[0].shape, call.results[0].shape)
    return factors.rule([before, ()], [after])


@rule_for("dynamic_slice")
def dynamic_slice(call: OpCall) -> Rule:
    """A dim taken in full is parallel: its start is clamped to 0, whatever it says."""
    shapes = zip(call.operands[0].shape, call.results[0].shape, strict=True)
    return _window(call, [before == after for before, after in shapes])


@rule_for("dynamic_update_slice")
def dynamic_update_slice(call: OpCall) -> Rule:
    target, update = call.operands[0].shape, call.operands[1].shape
    factors = Factors()
    full = [before == after for before, after in zip(target, update, strict=True)]
    dims, part = _shared_where(factors, full, target, update)
    return factors.rule([dims, part, *_scalars(call, 2)], [dims], call.linear)


def _window(call: OpCall, full: list[bool]) -> Rule:
    factors = Factors()
    before, after = _shared_where(factors, full, call.operands[0].shape, call.results[0].shape)
    return factors.rule([before, *_scalars(call, 1)], [after], call.linear)


def _scalars(call: OpCall, first: int) -> list[Dims]:
    require(all(kind.rank == 0 for kind in call.operands[first:]))
    return [() for _ in call.operands[first:]]


def _shared_where(
    factors: Factors, full: Iterable[bool], before: tuple[int, ...], after: tuple[int, ...]
) -> tuple[Dims, Dims]:
    """Two shapes with the same parallel factor where `full`, and whole ones elsewhere."""
    dims: list[tuple[Dim, Dim]] = []
    for same, left, right in zip(full, before, after, strict=True):
        if same:
            dim = factors.new(left)
            dims.append((dim, dim))
        else:
            dims.append((factors.whole(left), factors.whole(right)))
    return tuple(left for left, _ in dims), tuple(right for _, right in dims)


@rule_for("iota")
def iota(call: OpCall) -> Rule:
    """Parallel in every dim; along its own dimension a shard adds its offset."""
    require(not call.operands)
    factors = Factors()
    return factors.rule([], [factors.like(call.results[0].shape)])
