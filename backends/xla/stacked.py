"""An array that lies in pieces, one per layer: what a pipeline returns for state that the step stacks for a scan.

    params, loss = train_step(params, batch)       # pp=2
    params["w"]                 f32[12, 64, 64], layers 0 to 5 on the devices of stage 0, 6 to 11 on those of stage 1
    params["w"][3]              layer 3, where it lies
    jnp.sum(params["w"])        as of any array: it is put together first

It is a leaf with the shape and type that the user gave. The step takes its pieces as they are, so nothing moves from
step to step. Whoever needs the whole gets it anew each time, as it would take the memory once more if it were kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import groupby
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import ShapedArray
from jax.sharding import Mesh as DeviceMesh
from jax.sharding import NamedSharding, PartitionSpec

from ...ir.errors import LoweringError
from ...ir.mesh import STAGE
from .compat import as_arrays

LAYERS = "its layers, leaf[0], leaf[1], ...: each is an array of its stage's processes"
Row = tuple[tuple[int, int], ...]  # (dim, row) to be taken one after another, as of a `Piece`


def join(rows: Sequence[tuple[Row, Any]], stack: Callable[..., Any]) -> Any:
    """Stack pieces, inner rows first. `stack(values, axis=dim)` makes one of several."""
    if not rows[0][0]:
        return rows[0][1]
    dim = rows[0][0][0][0]
    groups = groupby(rows, key=lambda row: row[0][0])
    return stack([join([(at[1:], v) for at, v in group], stack) for _, group in groups], axis=dim)


class StackedArray(jax.Array):
    """`StackedArray(shape, pieces)`: a `jax.Array` of this shape, of pieces that stay where they lie.

    `pieces` are in order, by what of the whole they are. What is not written here is done to `whole`.
    """

    __slots__ = ("__dict__",)
    __array_priority__ = 100  # as jax's: NumPy's operators leave it to ours
    __hash__ = None  # type: ignore[assignment]  as of any array

    def __init__(self, shape: tuple[int, ...], pieces: Iterable[tuple[Row, Any]]):
        self._shape, self.pieces = shape, dict(pieces)

    @property
    def _one(self) -> Any:
        """Any of its pieces."""
        return next(iter(self.pieces.values()))

    @property
    def _at(self) -> Row:
        """Where in the whole its first piece is."""
        return next(iter(self.pieces))

    # ------------------------------------------------------------ what it is

    @property
    def shape(self) -> tuple[int, ...]:
        return self._shape

    @property
    def dtype(self) -> Any:
        return self._one.dtype

    @property
    def weak_type(self) -> bool:
        return getattr(self._one, "weak_type", False)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return sum(piece.nbytes for piece in self.pieces.values())

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize

    @property
    def aval(self) -> Any:
        return ShapedArray(self.shape, self.dtype, weak_type=self.weak_type)

    @property
    def is_fully_addressable(self) -> bool:
        return all(piece.is_fully_addressable for piece in self.pieces.values())

    @property
    def committed(self) -> bool:
        return True

    _committed = committed

    def devices(self) -> set[Any]:
        return set().union(*(piece.devices() for piece in self.pieces.values()))

    def __len__(self) -> int:
        return self.shape[0]

    # ------------------------------------------------------------ whether it is there

    def block_until_ready(self) -> StackedArray:
        jax.block_until_ready(list(self.pieces.values()))
        return self

    def is_ready(self) -> bool:
        return all(piece.is_ready() for piece in self.pieces.values())

    def delete(self) -> None:
        for piece in self.pieces.values():
            piece.delete()

    def is_deleted(self) -> bool:
        return any(piece.is_deleted() for piece in self.pieces.values())

    def copy_to_host_async(self) -> None:
        for piece in self.pieces.values():
            piece.copy_to_host_async()

    # ------------------------------------------------------------ its parts

    def __getitem__(self, index: Any) -> Any:
        """A layer lies where it lies; anything else is of the whole."""
        layered = (
            not isinstance(index, bool)
            and isinstance(index, int | np.integer)
            and self._at[0][0] == 0
        )
        if not layered or not -len(self) <= index < len(self):
            return self.whole()[index]
        return self._row(int(index) % len(self))

    def __iter__(self) -> Iterator[Any]:
        return (self[number] for number in range(len(self)))

    def _row(self, number: int) -> Any:
        found = [(at[1:], piece) for at, piece in self.pieces.items() if at[0][1] == number]
        if found[0][0]:
            return StackedArray(self.shape[1:], found)
        [(_, piece)] = found  # a copy, for the array itself may be donated
        return jnp.copy(piece) if piece.is_fully_addressable else piece

    # ------------------------------------------------------------ the whole

    def __array__(
        self, dtype: Any = None, context: Any = None, copy: bool | None = None
    ) -> np.ndarray:
        if not self.is_fully_addressable:
            raise LoweringError(
                f"an array of shape {self.shape} has layers on devices of other processes, which this one cannot read.",
                where=f"{len(self.pieces)} layers on {len(self.devices())} devices",
                fix="process_allgather(jnp.asarray(leaf), tiled=True) of multihost_utils"
                if self._even
                else LAYERS,
            )
        found = join([(at, np.asarray(piece)) for at, piece in self.pieces.items()], np.stack)
        return found if dtype is None else found.astype(dtype)

    def __jax_array__(self) -> jax.Array:
        return self.whole()

    def whole(self) -> jax.Array:
        """One array on the devices of all layers, made where the layers lie if they are dealt out evenly; else on
        those of the first."""
        with jax.ensure_compile_time_eval():  # where a traced function closes over it
            return self._whole()

    def _whole(self) -> jax.Array:
        if jnp.issubdtype(self.dtype, jax.dtypes.prng_key):
            data = [(at, jax.random.key_data(piece)) for at, piece in self.pieces.items()]
            inner = StackedArray((*self.shape, *data[0][1].shape[self._one.ndim :]), data)
            return jax.random.wrap_key_data(inner.whole(), impl=jax.random.key_impl(self._one))
        layout, moved = self._layout, list(self.pieces.items())
        if not self._even:
            if not self.is_fully_addressable:
                raise LoweringError(
                    f"an array of shape {self.shape} lies unevenly over several processes, and is no single array.",
                    where=f"{len(self.pieces)} layers on {len(self.devices())} devices",
                    fix=LAYERS,
                )
            home = self._one.sharding
            moved = [(at, jax.device_put(piece, home)) for at, piece in self.pieces.items()]
        parts: dict[Any, list[tuple[Row, Any]]] = {}
        for at, piece in moved:
            for shard in piece.addressable_shards:
                parts.setdefault(shard.device, []).append((at, shard.data))
        local = [join(rows, jnp.stack) for rows in parts.values()]
        return jax.make_array_from_single_device_arrays(self.shape, layout, local, dtype=self.dtype)

    @property
    def sharding(self) -> Any:
        return self._layout

    @cached_property
    def _runs(self) -> list[tuple[Any, int]]:
        """Of neighbouring outer rows with the same layout: that, and their number."""
        groups = groupby(self.pieces.items(), key=lambda row: row[0][0])
        outer = [{piece.sharding for _, piece in group} for _, group in groups]
        layouts = [found.pop() if len(found) == 1 else None for found in outer]
        return [(layout, len(list(group))) for layout, group in groupby(layouts)]

    @cached_property
    def _even(self) -> bool:
        """Whether neighbours lie alike, and as many of them on each of several equal meshes."""
        layouts = [layout for layout, _ in self._runs]
        if len({many for _, many in self._runs}) > 1 or not all(
            isinstance(x, NamedSharding) for x in layouts
        ):
            return False
        devices = [d for layout in layouts for d in layout.mesh.devices.flat]
        alike = (
            len(
                {
                    (layout.mesh.devices.shape, layout.mesh.axis_names, layout.spec)
                    for layout in layouts
                }
            )
            == 1
        )
        return alike and len(set(devices)) == len(devices)

    @cached_property
    def _layout(self) -> Any:
        first = self._one.sharding
        spec = list(first.spec) if isinstance(first, NamedSharding) else []
        spec += [None] * (self._one.ndim - len(spec))
        for dim, _ in reversed(self._at):
            spec.insert(dim, None)
        if not isinstance(first, NamedSharding):
            return first
        if not self._even or len(self._runs) == 1:
            return NamedSharding(first.mesh, PartitionSpec(*spec))
        spec[self._at[0][0]] = STAGE
        devices = np.stack([layout.mesh.devices for layout, _ in self._runs])
        return NamedSharding(
            DeviceMesh(devices, (STAGE, *first.mesh.axis_names)), PartitionSpec(*spec)
        )

    # ------------------------------------------------------------ as any array

    def copy(self) -> StackedArray:
        return StackedArray(
            self.shape, [(at, jnp.copy(piece)) for at, piece in self.pieces.items()]
        )

    def __copy__(self) -> StackedArray:
        return self.copy()

    def __deepcopy__(self, known: Any) -> StackedArray:
        return self.copy()

    def __reduce__(self) -> Any:
        return jnp.asarray, (np.asarray(self),)

    def __repr__(self) -> str:
        return (
            repr(self.whole())
            if self.is_fully_addressable
            else f"StackedArray({self.shape}, {self.dtype})"
        )

    def __format__(self, spec: str) -> str:
        return format(str(self), spec)


def stacked(shape: tuple[int, ...], pieces: Iterable[tuple[Row, Any]]) -> jax.Array:
    """The pieces as a leaf; random keys, which jax takes apart by their type, are put together at once."""
    found = StackedArray(shape, pieces)
    keys = jnp.issubdtype(found.dtype, jax.dtypes.prng_key)
    return found.whole() if keys and found.is_fully_addressable else found


_ALSO = [
    "lt", "le", "eq", "ne", "gt", "ge", "bool", "int", "float", "complex", "index", "reversed", "dlpack",
    "dlpack_device",
]  # fmt: skip


def _of_the_whole(name: str) -> property:
    return property(lambda self: getattr(self.whole(), name))


for _name in (
    (set(dir(jax.Array)) - set(dir(object))) | {f"__{name}__" for name in _ALSO} | {"tolist"}
):
    if _name not in vars(StackedArray):
        setattr(StackedArray, _name, _of_the_whole(_name))
as_arrays(StackedArray, StackedArray.whole)
