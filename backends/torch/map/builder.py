"""Where mapped operations go: values with types, constants, and the attributes that each kind has.

    b.op("dot_general", [x, w], kind, lhs_contracting=(1,), ...)     one op
    b.mul(x, 0.5)      b.broadcast(x, (4, 8), (1,))                  helpers that several families use

A mapping is a function `(b, *arguments)`, the arguments as ATen's schema has them, tensors as `Value`; it
returns a `Value`, or a tuple of them. `b.result` is the type that torch says the result has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ....ir.attrs import Attr
from ....ir.errors import CaptureError
from ....ir.fingerprint import digest_of
from ....ir.graph import Constant, Op, TensorType
from ....ir.ops import ELEMENTWISE
from ..dtypes import dtype_name, torch_dtype
from .counted import Counted, followed

# What else the kinds say that a mapping leaves unsaid.
DEFAULTS: Mapping[str, Mapping[str, Attr]] = {
    "dot_general": {"lhs_batch": (), "rhs_batch": ()},
    "ragged_dot_general": {"lhs_batch": (), "rhs_batch": ()},
    "conv_general_dilated": {"batch_group_count": 1},
    "gather": {
        "indices_are_sorted": False, "mode": "promise_in_bounds", "operand_batching_dims": (),
        "start_indices_batching_dims": (), "unique_indices": False,
    },
    **{kind: {
        "indices_are_sorted": False, "mode": "promise_in_bounds", "operand_batching_dims": (),
        "scatter_indices_batching_dims": (), "unique_indices": False,
    } for kind in ("scatter", "scatter-add", "scatter-max", "scatter-min")},
    "cumsum": {"reverse": False}, "cumprod": {"reverse": False}, "cummax": {"reverse": False},
    "sort": {"is_stable": True, "num_keys": 1},
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Value:
    """A value of the graph being made."""

    number: int
    type: TensorType

    @property
    def shape(self) -> tuple[int, ...]:
        return self.type.shape

    @property
    def dtype(self) -> str:
        return self.type.dtype


Operand = Value | bool | int | float


@dataclass
class Builder:
    """A graph in the making. `where` is the user's line of what is mapped now, `module` the path of the module
    that it is of, `result` what torch says it is. `modules` keeps the paths, by result."""

    types: dict[int, TensorType] = field(default_factory=dict)
    ops: list[Op] = field(default_factory=list)
    constants: list[Constant] = field(default_factory=list)
    arrays: dict[int, torch.Tensor] = field(default_factory=dict)
    where: str = ""
    module: str = ""
    result: Any = None
    modules: dict[int, str] = field(default_factory=dict)
    _constants: dict[Any, Value] = field(default_factory=dict)
    _known: dict[Any, tuple[Value, ...]] = field(default_factory=dict)
    _free: set[int] = field(default_factory=set)  # values made of constants alone
    counted: dict[int, Counted] = field(default_factory=dict)  # what is known of integers

    # ------------------------------------------------------------ values

    def value(self, kind: TensorType) -> Value:
        number = len(self.types)
        self.types[number] = kind
        return Value(number, kind)

    def number(self, number: bool | int | float, dtype: str) -> Value:
        """A constant of rank 0, one per number and type; a float is what it is rounded to."""
        held = torch.tensor(number, dtype=torch_dtype(dtype))
        data = held.double().item() if held.is_floating_point() else held.item()
        return self._constant((dtype, repr(data)), TensorType(dtype, ()), data)

    def array(self, tensor: torch.Tensor) -> Value:
        """A constant array, known by its digest; one of rank 0 is a number."""
        held = tensor.detach().cpu().contiguous()
        kind = type_of(held, self.where)
        if not kind.shape:
            return self.number(held.item(), kind.dtype)
        digest = digest_of(held.view(torch.uint8).numpy() if kind.dtype != "bool" else held.numpy())
        value = self._constant((kind, digest), kind, digest)
        self.arrays.setdefault(value.number, held)
        return value

    def _constant(self, key: Any, kind: TensorType, data: bool | int | float | str) -> Value:
        if key not in self._constants:
            self._constants[key] = self.value(kind)
            number = self._constants[key].number
            self._free.add(number)
            self.constants.append(Constant(number, data))
            if isinstance(data, int):
                self.counted[number] = Counted(int(data), ())
        return self._constants[key]

    def results(self) -> tuple[TensorType, ...]:
        """The types that torch says the results have; None where there is none."""
        found = self.result if isinstance(self.result, list | tuple) else (self.result,)
        return tuple(type_of(one, self.where) for one in found if one is not None)

    def type_of(self, tensor: torch.Tensor) -> TensorType:
        return type_of(tensor, self.where)

    @property
    def made(self) -> TensorType:
        """The type of the (first) result."""
        return self.results()[0]

    # ------------------------------------------------------------ ops

    def op(
        self,
        kind: str,
        inputs: Sequence[Value],
        made: TensorType | Sequence[TensorType],
        **attrs: Attr,
    ) -> Any:
        """Append an op; its result, or a tuple of results where several types are given.

        The same op on the same operands is written once in a module: gradients compute again what its forward pass
        has. Not so masks and the like, which are made of constants alone, where they are read.
        """
        if isinstance(made, TensorType):
            return (
                self._folded(kind, inputs, made, attrs)
                or self._append(kind, inputs, (made,), attrs)[0]
            )
        return self._append(kind, inputs, tuple(made), attrs)

    def _append(
        self, kind: str, inputs: Sequence[Value], kinds: tuple[TensorType, ...], attrs: Mapping[str, Attr]
    ) -> tuple[Value, ...]:  # fmt: skip
        given = tuple(sorted({**DEFAULTS.get(kind, {}), **attrs}.items()))
        numbers = tuple(value.number for value in inputs)
        key = (self.module, kind, numbers, given, kinds)
        if key in self._known:
            return self._known[key]
        values = tuple(map(self.value, kinds))
        results = tuple(value.number for value in values)
        self.modules |= dict.fromkeys(results, self.module)
        self.ops.append(Op(kind, numbers, results, given, where=self.where))
        if self._free.issuperset(numbers):
            self._free.update(results)
        else:
            self._known[key] = values
        return values

    # ------------------------------------------------------------ what counts

    def _folded(
        self, kind: str, inputs: Sequence[Value], made: TensorType, attrs: Mapping[str, Attr]
    ) -> Value | None:
        """A shorter way to what an op on integers or truth values makes, if there is one."""
        operands = [(self.counted.get(value.number), value.type) for value in inputs]
        found = followed(kind, {**DEFAULTS.get(kind, {}), **attrs}, operands, made)
        if found is None:
            return self._other_operand(kind, inputs, made)
        several = len(found.moving) > 1
        value = (
            self._append(kind, inputs, (made,), attrs)[0] if several else self._count(found, made)
        )
        self.counted[value.number] = found
        return value

    def _count(self, found: Counted, made: TensorType) -> Value:
        """What differs along one dim at most, of a number and an iota."""
        if not found.moving:
            return self._spread(self.number(found.start, made.dtype), made, ())
        [dim] = found.moving
        row = TensorType(made.dtype, (made.shape[dim],))
        attrs: dict[str, Attr] = {"dimension": 0, "dtype": row.dtype, "shape": row.shape}
        [value] = self._append("iota", [], (row,), attrs)
        for kind, number, nothing in (("mul", found.steps[dim], 1), ("add", found.start, 0)):
            if number != nothing:
                operands = [value, self.number(number, row.dtype)]
                [value] = self._append(kind, operands, (row,), {})
        return self._spread(value, made, (dim,))

    def _spread(self, value: Value, made: TensorType, dims: tuple[int, ...]) -> Value:
        if value.type == made:
            return value
        attrs: dict[str, Attr] = {"shape": made.shape, "broadcast_dimensions": dims}
        return self._append("broadcast_in_dim", [value], (made,), attrs)[0]

    def _other_operand(self, kind: str, inputs: Sequence[Value], made: TensorType) -> Value | None:
        """Of an op one of whose operands changes nothing: x and True, x + 0, a choice that is made."""
        if kind == "select_n" and (which := self.counted.get(inputs[0].number)) is not None:
            return None if which.moving else inputs[1 + which.start]
        nothing = {"and": 1, "or": 0, "add": 0}.get(kind)
        if nothing is None or (kind != "add" and made.dtype != "bool") or made.is_float:
            return None
        for value, other in (inputs, inputs[::-1]):
            known = self.counted.get(other.number)
            if known is not None and known == Counted(nothing, (0,) * other.type.rank):
                return self.expand(value, made.shape)
        return None

    def as_value(self, operand: Operand, dtype: str) -> Value:
        if isinstance(operand, Value):
            return self.convert(operand, dtype)
        return self.number(operand, dtype)

    def convert(self, value: Value, dtype: str) -> Value:
        if value.dtype == dtype:
            return value
        return self.op(
            "convert_element_type", [value], TensorType(dtype, value.shape), new_dtype=dtype
        )

    def elementwise(self, kind: str, *operands: Operand, dtype: str = "", made: str = "") -> Value:
        """An op whose operands are brought to one type and rank; numbers and dims of 1 are repeated by the op.

        `dtype` is what it is computed in, that of the first value if not given; `made` of the result.
        """
        assert kind in ELEMENTWISE, kind
        dtype = dtype or next(o.dtype for o in operands if isinstance(o, Value))
        values = [self.as_value(o, dtype) for o in operands]
        shape = torch.broadcast_shapes(*(value.shape for value in values))
        values = [self.ranked(value, len(shape)) for value in values]
        if all(value.shape != shape for value in values):
            values[0] = self.expand(values[0], tuple(shape))
        return self.op(kind, values, TensorType(made or dtype, tuple(shape)))

    def ranked(self, value: Value, rank: int) -> Value:
        """With dims of 1 in front; a number stays one."""
        missing = rank - len(value.shape)
        if not value.shape or not missing:
            return value
        return self.broadcast(value, (1,) * missing + value.shape, tuple(range(missing, rank)))

    def select(self, which: Value, yes: Operand, no: Operand, dtype: str) -> Value:
        """`yes` where `which` holds; all of one shape, as `select_n` wants them."""
        cases = [self.as_value(no, dtype), self.as_value(yes, dtype)]
        shape = tuple(torch.broadcast_shapes(which.shape, *(case.shape for case in cases)))
        operands = [self.expand(value, shape) for value in (which, *cases)]
        return self.op("select_n", operands, TensorType(dtype, shape))

    # ------------------------------------------------------------ shapes

    def reshape(self, value: Value, shape: Sequence[int]) -> Value:
        shape = tuple(shape)
        if shape == value.shape:
            return value
        return self.op("reshape", [value], TensorType(value.dtype, shape), new_sizes=shape)

    def broadcast(self, value: Value, shape: Sequence[int], dims: Sequence[int]) -> Value:
        """Dim k of the value becomes dim `dims[k]`."""
        made = TensorType(value.dtype, tuple(shape))
        return self.op(
            "broadcast_in_dim", [value], made, shape=made.shape, broadcast_dimensions=tuple(dims)
        )

    def expand(self, value: Value, shape: Sequence[int]) -> Value:
        """As `Tensor.expand`: dims of 1 repeated, new ones in front."""
        shape = tuple(shape)
        if value.shape == shape:
            return value
        new = len(shape) - len(value.shape)
        return self.broadcast(value, shape, tuple(range(new, len(shape))))

    def transpose(self, value: Value, order: Sequence[int]) -> Value:
        order = tuple(d % len(value.shape) for d in order)
        if order == tuple(range(len(order))):
            return value
        made = TensorType(value.dtype, tuple(value.shape[d] for d in order))
        return self.op("transpose", [value], made, permutation=order)

    def slice(self, value: Value, dim: int, start: int, stop: int, step: int = 1) -> Value:
        shape = list(value.shape)
        if (start, stop, step) == (0, shape[dim], 1):
            return value
        starts, limits, strides = [0] * len(shape), list(shape), [1] * len(shape)
        starts[dim], limits[dim], strides[dim] = start, stop, step
        shape[dim] = max(0, -(-(stop - start) // step))
        return self.op(
            "slice", [value], TensorType(value.dtype, tuple(shape)), start_indices=tuple(starts),
            limit_indices=tuple(limits), **({} if step == 1 else {"strides": tuple(strides)}),
        )  # fmt: skip

    def squeeze(self, value: Value, dims: Sequence[int]) -> Value:
        gone = tuple(sorted(dims))
        if not gone:
            return value
        shape = tuple(size for d, size in enumerate(value.shape) if d not in gone)
        return self.op("squeeze", [value], TensorType(value.dtype, shape), dimensions=gone)

    def pad(self, value: Value, config: Sequence[tuple[int, int, int]], fill: Operand = 0) -> Value:
        """By (before, after, between) of each dim."""
        shape = tuple(
            low + high + size + max(size - 1, 0) * between
            for size, (low, high, between) in zip(value.shape, config, strict=True)
        )
        if all(one == (0, 0, 0) for one in config):
            return value
        made = TensorType(value.dtype, shape)
        return self.op(
            "pad", [value, self.as_value(fill, value.dtype)], made, padding_config=tuple(config)
        )

    def concatenate(self, values: Sequence[Value], dim: int) -> Value:
        if len(values) == 1:
            return values[0]
        shape = list(values[0].shape)
        shape[dim] = sum(value.shape[dim] for value in values)
        made = TensorType(values[0].dtype, tuple(shape))
        return self.op("concatenate", values, made, dimension=dim)

    def full(self, number: Operand, kind: TensorType) -> Value:
        return self.expand(self.as_value(number, kind.dtype), kind.shape)

    def iota(self, shape: Sequence[int], dim: int, dtype: str) -> Value:
        made = TensorType(dtype, tuple(shape))
        return self.op("iota", [], made, dimension=dim, dtype=dtype, shape=made.shape)

    # ------------------------------------------------------------ reductions, products

    def reduce(self, kind: str, value: Value, axes: Sequence[int], keep: bool = False) -> Value:
        """`reduce_sum` and its like; kept dims come back with size 1."""
        axes = tuple(sorted({d % len(value.shape) for d in axes} if value.shape else ()))
        rest = [d for d in range(len(value.shape)) if d not in axes]
        made = TensorType(value.dtype, tuple(value.shape[d] for d in rest))
        found: Value = self.op(kind, [value], made, axes=axes) if axes else value
        if not keep:
            return found
        return self.broadcast(
            found, [1 if d in axes else n for d, n in enumerate(value.shape)], rest
        )

    def dot(
        self, left: Value, right: Value, contracting: tuple[Sequence[int], Sequence[int]],
        batch: tuple[Sequence[int], Sequence[int]] = ((), ()),
    ) -> Value:  # fmt: skip
        """Batch dims come first in the result, then what is left of either side."""
        free = [
            [side.shape[d] for d in range(len(side.shape)) if d not in (*summed, *kept)]
            for side, summed, kept in zip((left, right), contracting, batch, strict=True)
        ]
        shape = (*(left.shape[d] for d in batch[0]), *free[0], *free[1])
        return self.op(
            "dot_general", [left, right], TensorType(left.dtype, shape),
            lhs_contracting=tuple(contracting[0]), rhs_contracting=tuple(contracting[1]),
            lhs_batch=tuple(batch[0]), rhs_batch=tuple(batch[1]), out_dtype=left.dtype,
        )  # fmt: skip

    # ------------------------------------------------------------ what is refused

    def refuse(self, what: str, fix: str) -> CaptureError:
        return CaptureError(what, where=self.where or "the step", fix=fix)


Mapping_ = Callable[..., Any]
MAPPED: dict[Any, Mapping_] = {}
OF_LIBRARIES: dict[str, Mapping_] = {}


def maps(*names: str) -> Callable[[Mapping_], Mapping_]:
    """Register a mapping for overloads of ATen, `add.Tensor`."""

    def registered(function: Mapping_) -> Mapping_:
        for name in names:
            packet, _, overload = name.partition(".")
            op = getattr(getattr(torch.ops.aten, packet), overload)
            assert op not in MAPPED, name
            MAPPED[op] = function
        return function

    return registered


def maps_library(name: str) -> Callable[[Mapping_], Mapping_]:
    """Register a mapping for another library's operation by its name, as the library need not be there."""

    def registered(function: Mapping_) -> Mapping_:
        OF_LIBRARIES[name] = function
        return function

    return registered


def type_of(tensor: torch.Tensor, where: str = "") -> TensorType:
    """The type of a tensor.

    Raises:
        CaptureError: its elements are complex.
    """
    if tensor.is_complex():
        raise CaptureError(
            f"the step has values of {tensor.dtype}, which cannot be planned.",
            where=where or "the step",
            fix="real numbers: cos and sin instead of complex rotations, pairs instead of complex values",
        )
    return TensorType(dtype_name(tensor.dtype), tuple(map(int, tensor.shape)))
