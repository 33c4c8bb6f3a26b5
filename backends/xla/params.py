"""A jax equation's parameters as attributes, in the words of `ir/attribute_table.py`: plain, sorted, hashable.

    {"axes": (np.int64(0),), "out_sharding": None}  ->  (("axes", (0,)),)

Equal attributes mean equal parameters, so a backend may key its binding by them (`kept` says what it binds):

    None                   is not said; so is a sharding that names no mesh, as jax's transposition rules leave behind
    dtype                  its short name, "bf16"
    dimension numbers      an attribute for each field, as StableHLO has them: `lhs_contracting`, `start_index_map`, ...
    enum                   its name: "clip", "to_nearest_even"; an algorithm for products: "bf16_bf16_f32"
    named tuple            a plain tuple of its fields
    jaxpr                  a digest of its content

Kinds that are not in the vocabulary are opaque. What their attributes hold is only told apart, but for `flop` and
`nbytes`, which kernels of jax may state (exponentials count as one each):

    enum                   "Class.NAME"
    text                   itself; "<str>..." where it could be mistaken for one of the others
    jaxpr, array, object   "<kind>digest" of the content if it has one, else of the object itself
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import re
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np

from ...ir.attrs import Attr, real
from ...ir.ops import CONTRACTIONS, KINDS
from ...ir.rules.random import DRAWN
from .compat import UPDATES, is_vacant
from .user_kernels import UserFunction

_SHORT = {
    "bool": "bool", "int4": "s4", "uint4": "u4", "int8": "s8", "uint8": "u8", "int16": "s16",
    "uint16": "u16", "int32": "s32", "uint32": "u32", "int64": "s64", "uint64": "u64",
    "float8_e4m3fn": "f8e4m3fn", "float8_e5m2": "f8e5m2", "bfloat16": "bf16", "float16": "f16",
    "float32": "f32", "float64": "f64", "complex64": "c64", "complex128": "c128",
}  # fmt: skip
_PLAIN = re.compile(r"[\w /:+-]*")


def dtype_name(dtype: Any) -> str:
    """`float32` -> "f32"; a PRNG key's type -> "key"; one we have no name for keeps jax's."""
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return "key"
    name = np.dtype(dtype).name
    return _SHORT.get(name, name)


# What the vocabulary calls a parameter where jax's name for it is another.
_NAMES = {
    ("dot_general", "preferred_element_type"): "out_dtype",
    ("ragged_dot_general", "preferred_element_type"): "out_dtype",
    ("conv_general_dilated", "preferred_element_type"): "out_dtype",
    ("select_and_scatter_add", "select_prim"): "select",
    ("select_and_gather_add", "select_prim"): "select",
}
_UNSAID = ("update_consts", "update_jaxpr", "weak_type")  # see `kept`


def attrs_of(primitive_name: str, params: Mapping[str, Any]) -> tuple[tuple[str, Attr], ...]:
    """The parameters of one equation of `primitive_name` that say something, sorted by name."""
    fields = dict[str, Any]()
    for name, value in params.items():
        fields |= _numbers(primitive_name, name, value) or {name: value}
    if primitive_name in KINDS:
        fields = {name: value for name, value in fields.items() if name not in _UNSAID}
    if (told := params.get("cost_estimate")) is not None:
        fields["flop"] = float(told.flops + told.transcendentals)
        fields["nbytes"] = float(told.bytes_accessed)
    if primitive_name == "scatter" and (program := params["update_jaxpr"]) is not None:
        consts = repr(_attr(tuple(params["update_consts"])))
        fields["update"] = _hash(_jaxpr(program) + consts.encode())
    found = (
        (_NAMES.get((primitive_name, name), name), _field(primitive_name, name, value))
        for name, value in fields.items()
    )
    return tuple(sorted((name, value) for name, value in found if value is not None))


def kept(kind: str, params: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters without what changes nothing: whether a type is jax's for plain numbers, which results get back at
    the end, and programs that jax makes of the kind."""
    found = dict(params)
    if kind == "convert_element_type":
        found["weak_type"] = False
    if kind in UPDATES:
        found |= {"update_jaxpr": None, "update_consts": ()}
    return found


def placed_by(params: Mapping[str, Any]) -> str | None:
    """The parameter by which an equation places its result itself, if it does."""
    names = ("sharding", "out_sharding")
    told = (name for name in names if params.get(name) is not None)
    return next((name for name in told if not is_vacant(params[name])), None)


def _numbers(kind: str, name: str, value: Any) -> dict[str, Any]:
    """Dimension numbers by name; nothing of other parameters."""
    if name == "ragged_dot_dimension_numbers":
        return {
            **_numbers("dot_general", "dimension_numbers", value.dot_dimension_numbers),
            "lhs_ragged_dimensions": tuple(value.lhs_ragged_dimensions),
            "rhs_group_dimensions": tuple(value.rhs_group_dimensions),
        }
    if name != "dimension_numbers":
        return {}
    if kind == "dot_general":
        (left, right), (left_batch, right_batch) = value
        return {
            "lhs_contracting": tuple(left), "rhs_contracting": tuple(right),
            "lhs_batch": tuple(left_batch), "rhs_batch": tuple(right_batch),
        }  # fmt: skip
    return value._asdict() if hasattr(value, "_asdict") else {}


def _field(kind: str, name: str, value: Any) -> Attr:
    """A parameter in words of no framework, where there are some."""
    if kind not in KINDS:
        return _attr(value)
    if kind in CONTRACTIONS and name == "precision":
        return _precision(value)
    match value:
        case str():
            return value
        case enum.Enum():
            return value.name.lower()
        case jax.lax.Tolerance():
            return (real(value.atol), real(value.rtol), value.ulps)
        case jax.extend.core.Primitive() | UserFunction():
            return value.name
    if _is_prng_impl(value):
        return value.name
    if hasattr(value, "eqns") or hasattr(value, "jaxpr"):
        return _hash(_jaxpr(value))
    return _attr(value)


def _precision(value: Any) -> Attr:
    """A level, one for each operand, or an algorithm, which has types in its name."""
    if isinstance(value, tuple):
        return tuple(map(_precision, value))
    if isinstance(value, jax.lax.Precision):
        return value.name.lower()
    if isinstance(value, jax.lax.DotAlgorithmPreset):
        own = value is not jax.lax.DotAlgorithmPreset.DEFAULT  # which leaves it to the types
        return value.name.lower() if own else "any_any_any"
    return _attr(value)


def marks_of(eqn: Any) -> tuple[tuple[str, Attr], ...]:
    """What parameters leave out: on what the random numbers made here depend (`ir/rules/random.py`)."""
    kind = eqn.primitive.name
    if kind not in DRAWN:
        return ()
    spread, generator = eqn.ctx.threefry_partitionable, str(eqn.invars[0].aval.dtype)
    if generator == "key<fry>":
        drawn = "by_place" if spread else "by_key"
    else:  # rbg splits and folds by threefry; all else that it and others do runs on over a batch of keys
        by_threefry = generator == "key<rbg>" and kind in ("random_split", "random_fold_in")
        drawn = "by_key" if by_threefry else "whole"
    return (("drawn", drawn), ("partitionable", bool(spread)))


def _attr(value: Any) -> Attr:
    match value:
        case None | bool():
            return value
        case jax.sharding.Sharding() if is_vacant(value):
            return None
        case enum.Enum():
            return f"{type(value).__name__}.{value.name}"
        case int():
            return int(value)
        case float() if type(value) is float:
            return real(value)
        case str():
            return value if _is_plain(value) else f"<str>{value}"
        case np.integer():
            return int(value)
        case np.bool_():
            return bool(value)
    return _container(value)


def _is_plain(text: str) -> bool:
    return bool(_PLAIN.fullmatch(text)) and text not in _DTYPE_WORDS


_DTYPE_WORDS = {*_SHORT, *_SHORT.values(), "key"}


def _container(value: Any) -> Attr:
    if _is_prng_impl(value):
        return f"<prng>{value.name}"
    match value:
        case tuple():
            return tuple(_attr(item) for item in value)
        case list():
            return ("<list>", *(_attr(item) for item in value))
        case set() | frozenset():
            return ("<set>", *sorted((_attr(item) for item in value), key=repr))
        case dict():
            return ("<dict>", *((_attr(k), _attr(v)) for k, v in value.items()))
    if isinstance(value, UserFunction):
        return f"<function>{value.name}"  # what it computes is its program, another parameter
    if _is_extended(value):
        return f"<key>{value}"
    if isinstance(value, np.dtype) or _is_scalar_type(value):
        return dtype_name(value)
    return _digest(value)


def _is_extended(value: Any) -> bool:
    return hasattr(value, "type") and jnp.issubdtype(value, jax.dtypes.extended)


def _is_scalar_type(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, np.generic)


def _is_prng_impl(value: Any) -> bool:
    """Names of PRNG implementations are unique: jax refuses to register one twice."""
    return (
        isinstance(value, tuple) and hasattr(value, "key_shape") and hasattr(value, "random_bits")
    )


def _digest(value: Any) -> Attr:
    """What has no plain form: content where we can see it, else the object's identity.

    An identity holds as long as the object lives; a binding keeps its params alive.
    """
    if hasattr(value, "eqns") or hasattr(value, "jaxpr"):
        return f"<jaxpr>{_hash(_jaxpr(value))}"
    if isinstance(value, (np.ndarray, np.generic, jax.Array)):
        return _array(value)
    if isinstance(value, jax.extend.core.Primitive):
        return f"<primitive>{value.name}"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = (getattr(value, field.name) for field in dataclasses.fields(value))
        return (f"<{type(value).__name__}>", *map(_attr, fields))
    if (path := _import_path(value)) is not None:
        return f"<import>{path}"
    return _identity(value)


def _array(value: Any) -> str:
    try:
        host = np.asarray(value)
    except (TypeError, jax.errors.TracerArrayConversionError):  # PRNG keys, values being traced
        return _identity(value)
    return f"<{dtype_name(host.dtype)}{list(host.shape)}>{_hash(host.tobytes())}"


def _identity(value: Any) -> str:
    return f"<object>{type(value).__name__}@{id(value):x}"


def _import_path(value: Any) -> str | None:
    """`module.name` of a function or class that can be found again under it."""
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    if not (isinstance(module, str) and isinstance(name, str)):
        return None
    found = getattr(sys.modules.get(module), name, None)
    return f"{module}.{name}" if found is value else None


def _jaxpr(value: Any) -> bytes:
    """The program with its variables numbered in order of appearance."""
    jaxpr = value if hasattr(value, "eqns") else value.jaxpr
    numbers: dict[Any, int] = {}

    def name(atom: Any) -> Attr:
        if hasattr(atom, "val"):
            return ("literal", str(atom.aval), _attr(np.asarray(atom.val)))
        return numbers.setdefault(atom, len(numbers))

    def names(atoms: Iterable[Any]) -> list[Attr]:
        return [(name(atom), str(atom.aval)) for atom in atoms]

    lines: list[Any] = [names(jaxpr.constvars), names(jaxpr.invars)]
    lines += [_attr(const) for const in getattr(value, "consts", ())]
    for eqn in jaxpr.eqns:
        attrs = attrs_of(eqn.primitive.name, eqn.params)
        lines.append((eqn.primitive.name, names(eqn.invars), attrs, names(eqn.outvars)))
    return repr((lines, names(jaxpr.outvars), sorted(map(str, jaxpr.effects)))).encode()


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:24]
