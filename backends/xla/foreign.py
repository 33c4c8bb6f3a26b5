"""A step that jax has not captured, as if it had: its primitives and their parameters, from attributes alone.

    add                                        lax.add_p
    dot_general lhs_contracting=(1,) ...       lax.dot_general_p, its four tuples as one `dimension_numbers`
    convert_element_type new_dtype='s64' ...   lax.convert_element_type_p, with the dtype of that name

So what torch captured runs on XLA. Attributes are those of `params.attrs_of`, read backwards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax import lax

from ...ir.attribute_table import ATTRIBUTES
from ...ir.attrs import Attr
from ...ir.errors import LoweringError
from ...ir.graph import Graph, Op
from ...ir.ops import COMPOSITES, KINDS
from .capture import Binding, Bound, Captured
from .compat import UPDATES
from .dtypes import jax_dtype

Attrs = tuple[tuple[str, Attr], ...]


def adopted(graph: Graph, arrays: Mapping[int, np.ndarray[Any, Any]]) -> Captured:
    """A graph of another front end with a binding to jax. Inputs and results are flat tuples in its order.

    Args:
        arrays: constants that are no plain numbers.

    Raises:
        LoweringError: it has an operation that jax has not.
    """
    ops = {(visit.op.kind, visit.op.attrs): _bound(visit.op) for visit in graph.visits}
    given, made = (
        tuple(
            jax.ShapeDtypeStruct(graph.types[v].shape, jax_dtype(graph.types[v].dtype))
            for v in values
        )
        for values in (graph.inputs, graph.outputs)
    )
    trees = jax.tree.structure((given, {})), jax.tree.structure(made)
    return Captured(graph, Binding(ops, arrays, *trees, given, made))


def _bound(op: Op) -> Bound:
    """The primitive of an op, and its parameters."""
    if op.kind in _FUNCTIONS:
        return _Function(op.kind, _FUNCTIONS[op.kind]), _params(op)
    primitive = getattr(lax, f"{op.kind}_p", None)
    if primitive is None or op.regions or op.kind in COMPOSITES:
        raise LoweringError(
            f"`{op.kind}` of another front end cannot run on XLA yet.",
            where=op.where or "the step",
            fix="--backend torch",
        )
    return primitive, _params(op)


@dataclass(frozen=True)
class _Function:
    """Stands for a primitive that has no public name, or whose parameters depend on the types of its operands."""

    name: str
    function: Callable[..., Any]
    multiple_results = False

    def get_bind_params(self, params: dict[str, Any]) -> dict[str, Any]:
        return params

    def bind(self, *operands: Any, **params: Any) -> Any:
        return self.function(*operands, **params)


_FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    **UPDATES,
    "scatter": lax.scatter,
    "log2": lambda x: lax.log(x) / np.log(2).astype(x.dtype),
    "ragged_dot_general": lax.ragged_dot_general,
}

_NUMBERS: Mapping[str, Any] = {
    "gather": lax.GatherDimensionNumbers,
    "conv_general_dilated": lax.ConvDimensionNumbers,
    **dict.fromkeys((*UPDATES, "scatter"), lax.ScatterDimensionNumbers),
}
_DTYPES = ("dtype", "new_dtype", "index_dtype", "out_dtype")
# What jax calls an attribute.
_NAMES = {"out_dtype": "preferred_element_type", "select": "select_prim"}
# What jax wants to be told of a kind, where attributes leave it out.
_UNSAID: Mapping[str, Mapping[str, Any]] = {
    "broadcast_in_dim": {"sharding": None},
    "conv_general_dilated": {
        "precision": None,
        "preferred_element_type": None,
        "out_sharding": None,
    },
    "convert_element_type": {"weak_type": False, "sharding": None},
    "dot_general": {"precision": None, "preferred_element_type": None, "out_sharding": None},
    "gather": {"fill_value": None},
    "iota": {"sharding": None},
    "reduce_sum": {"out_sharding": None},
    "reshape": {"dimensions": None, "sharding": None},
    "slice": {"strides": None},
    **{
        kind: {"accuracy": None}
        for kind in KINDS
        if "accuracy" in ATTRIBUTES[kind] and kind != "log2"
    },
}


def _params(op: Op) -> dict[str, Any]:
    told = {_NAMES.get(name, name): _param(name, attr) for name, attr in op.attrs}
    given = {**_UNSAID.get(op.kind, {}), **told}
    if op.kind in ("dot_general", "ragged_dot_general"):
        numbers = _numbers_of_product(op.kind, given)
        return given | numbers
    if (numbers := _NUMBERS.get(op.kind)) is not None:
        own = {name: given.pop(name) for name in numbers._fields if name in given}
        given["dimension_numbers"] = numbers(**own)
    return given


def _numbers_of_product(kind: str, given: dict[str, Any]) -> dict[str, Any]:
    """Which dims meet, taken out of what is given."""
    contracting, batch = (
        (given.pop(f"lhs_{which}"), given.pop(f"rhs_{which}")) for which in ("contracting", "batch")
    )
    if kind == "dot_general":
        return {"dimension_numbers": (contracting, batch)}
    ragged, groups = given.pop("lhs_ragged_dimensions"), given.pop("rhs_group_dimensions")
    numbers = lax.RaggedDotDimensionNumbers((contracting, batch), ragged, groups)
    return {"ragged_dot_dimension_numbers": numbers}


def _param(name: str, attr: Attr) -> Any:
    if name == "precision" and isinstance(attr, tuple):
        return tuple(_param(name, each) for each in attr)
    if not isinstance(attr, str):
        return attr
    if name in _DTYPES:
        return jax_dtype(attr)
    match name:
        case "mode":
            return lax.GatherScatterMode[attr.upper()]
        case "precision":
            return lax.Precision[attr.upper()]
        case "rounding_method":
            return lax.RoundingMethod[attr.upper()]
        case "select":
            return {"ge": lax.ge_p, "le": lax.le_p}[attr]
        case _:
            return attr
