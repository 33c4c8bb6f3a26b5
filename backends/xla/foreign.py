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

from ...ir.attrs import Attr, number
from ...ir.errors import LoweringError
from ...ir.graph import Graph, Op
from ...ir.ops import COMPOSITES
from .capture import Binding, Bound, Captured
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
        return _Function(_FUNCTIONS[op.kind]), _params(op)
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

    function: Callable[..., Any]
    multiple_results = False

    def get_bind_params(self, params: dict[str, Any]) -> dict[str, Any]:
        return params

    def bind(self, *operands: Any, **params: Any) -> Any:
        return self.function(*operands, **params)


_UPDATES: Mapping[str, Callable[..., Any]] = {
    "scatter": lax.scatter,
    "scatter-add": lax.scatter_add,
    "scatter-max": lax.scatter_max,
    "scatter-min": lax.scatter_min,
}
_FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    **_UPDATES,
    "log2": lambda x, accuracy: lax.log(x) / np.log(2).astype(x.dtype),
    "ragged_dot_general": lax.ragged_dot_general,
}

_NUMBERS: Mapping[str, Any] = {
    "gather": lax.GatherDimensionNumbers,
    "conv_general_dilated": lax.ConvDimensionNumbers,
    **dict.fromkeys(_UPDATES, lax.ScatterDimensionNumbers),
}
_DTYPES = ("dtype", "new_dtype", "index_dtype", "out_dtype", "preferred_element_type")


def _params(op: Op) -> dict[str, Any]:
    given = {name: _param(name, attr) for name, attr in op.attrs}
    if op.kind in _UPDATES:
        del given["update_jaxpr"], given["update_consts"]  # which the function makes
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
            return lax.RoundingMethod[attr.rpartition(".")[2]]
        case "select_prim":
            return {"<primitive>ge": lax.ge_p, "<primitive>le": lax.le_p}[attr]
        case _:
            found = number(attr)
            assert found is not None, (name, attr)
            return found
