"""The few places where jax 0.10 and 0.12 differ, or say a thing only in private.

    scan's counts     num_consts, num_carry (0.10); a tree `ft_in` of consts, carry, xs (0.11)
    a call's body     an open or a closed jaxpr, under the names of `CALLS`
    coordination      the client of jax's service for several processes, and who this one is
    array types       jax's functions know arrays by their type, in tables of its own
    user's line       off the raw traceback: the public `summarize` cannot skip other libraries

Tried with 0.10.2, 0.11.2 (also on CUDA) and 0.12.0.1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.core import Trace, Tracer
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, Primitive, Var

__all__ = [
    "CALLS", "IDENTITIES", "PLACEMENTS", "ClosedJaxpr", "Coordination", "Jaxpr", "Literal", "Primitive", "Trace",
    "Tracer", "Var", "as_arrays", "barrier_primitive", "bind", "call_body", "coordination", "held_back", "is_jitted",
    "is_library", "is_vacant", "line_in_code", "scan_counts", "under_trace", "user_line", "weakened",
]  # fmt: skip

# Primitives that only call a body, and the parameter that holds it.
CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "closed_call": "call_jaxpr",
    "core_closed_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "fun_jaxpr",
    "custom_vmap_call": "call",
    "remat2": "jaxpr",
    "remat": "jaxpr",
    "checkpoint": "jaxpr",
    "composite": "jaxpr",
}
# Primitives whose results are their operands. They mattered while jax traced.
IDENTITIES = frozenset({"copy", "name", "stop_gradient", "copy_p"})
# Primitives by which a user places data himself.
PLACEMENTS = frozenset(
    {"sharding_constraint", "shard_map", "reshard", "mesh_cast", "layout_constraint", "shard_alike"}
)


@dataclass(frozen=True)
class Coordination:
    """jax's service for the processes of a run, which the runtime agrees by (`KeyValueStore`); asking it looks for
    no devices, unlike `jax.process_index`."""

    client: Any
    process: int
    process_count: int

    def put(self, key: str, text: str) -> None:
        with _as_of_the_system():
            self.client.key_value_set(key, text)

    def get(self, key: str, seconds: float) -> str:
        with _as_of_the_system():
            return self.client.blocking_key_value_get(key, int(seconds * 1000))


@contextmanager
def _as_of_the_system() -> Iterator[None]:
    """Errors of jax's service as Python names those of networks."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        kind = TimeoutError if "DEADLINE" in str(error) else ConnectionError
        raise kind(str(error)) from error


def coordination() -> Coordination | None:
    """The service, where this process has joined others."""
    from jax._src.distributed import global_state as state

    return (
        None
        if state.client is None
        else Coordination(state.client, state.process_id, state.num_processes)
    )


UPDATES: dict[str, Callable[..., jax.Array]] = {
    "scatter-add": lax.scatter_add, "scatter-sub": lax.scatter_sub, "scatter-mul": lax.scatter_mul,
    "scatter-max": lax.scatter_max, "scatter-min": lax.scatter_min,
}  # fmt: skip


def bind(primitive: Any, operands: Sequence[Any], params: dict[str, Any]) -> list[jax.Array]:
    """Apply a primitive found in a jaxpr. Its parameters there aren't always those of `bind`.

    Updates are added, multiplied and so on by a program of the type of what they are applied to, which jax makes.
    """
    if primitive.name in UPDATES:
        own = {k: v for k, v in params.items() if k not in ("update_jaxpr", "update_consts")}
        return [UPDATES[primitive.name](*operands, **own)]
    found = primitive.get_bind_params(params)
    functions, given = found if isinstance(found, tuple) else ((), found)
    made = primitive.bind(*functions, *operands, **given)
    return list(made) if primitive.multiple_results else [made]


def is_vacant(sharding: Any) -> bool:
    """Whether a sharding says nothing: it belongs to the empty mesh."""
    return getattr(getattr(sharding, "mesh", None), "empty", False)


def is_jitted(function: Any) -> bool:
    """Whether `jax.jit` made this function; it then knows its static and donated arguments."""
    return type(function) is type(_jitted())


def under_trace() -> bool:
    """Whether jax is tracing or transforming something at this moment."""
    from jax._src import core

    return not core.trace_state_clean()


def weakened(results: Sequence[Any], avals: Sequence[Any]) -> list[Any]:
    """Results of weak type where these are, so that a Python number in the state keeps its type from step to step."""
    return [
        jax.lax.convert_element_type_p.bind(x, new_dtype=x.dtype, weak_type=True, sharding=None)  # type: ignore[attr-defined]
        if aval.weak_type and not x.weak_type and (isinstance(x, Tracer) or x.is_fully_addressable)
        else x
        for x, aval in zip(results, avals, strict=True)
    ]


def as_arrays(kind: type, whole: Callable[[Any], jax.Array]) -> None:
    """Let jax's functions take arrays of this type, as what `whole` makes of them when a program is called."""
    from jax._src import core, dtypes
    from jax._src.interpreters import mlir, pxla

    def shard(arrays: Sequence[Any], shardings: Any, layouts: Any, semantics: Any) -> Any:
        return pxla.shard_args(shardings, layouts, semantics, [whole(array) for array in arrays])

    core.pytype_aval_mappings[kind] = lambda array: core.update_aval_with_sharding(
        array.aval, array.sharding
    )
    dtypes.register_canonicalize_value_handler(kind, None)
    pxla.shard_arg_handlers[kind] = shard
    mlir.register_constant_handler(kind, lambda val, aval: mlir.ir_constant(np.asarray(val)))


@lru_cache(maxsize=1)
def _jitted() -> Callable[..., Any]:
    return jax.jit(lambda: 0)


@lru_cache(maxsize=1)
def barrier_primitive() -> Primitive:
    """The primitive behind `jax.lax.optimization_barrier`, which jax does not export."""
    return jax.make_jaxpr(jax.lax.optimization_barrier)(0.0).eqns[0].primitive


def call_body(eqn: Any) -> tuple[Jaxpr, Sequence[Any]]:
    """The program that a call runs, and its constants."""
    body = eqn.params[CALLS[eqn.primitive.name]]
    return getattr(body, "jaxpr", body), getattr(body, "consts", ())


# Collectives over a dim that a `vmap` named, once it is known by its place: what reduces over that dim.
OVER_DIMS: dict[str, Callable[..., Any]] = {
    "psum": lax.reduce_sum,
    "pmax": lax.reduce_max,
    "pmin": lax.reduce_min,
}


def reduces_dims(eqn: Any) -> bool:
    """Whether a collective is over dims of its operands alone, which the axes of a `vmap` have become."""
    return (
        eqn.primitive.name in OVER_DIMS
        and not eqn.params.get("axis_index_groups")
        and _are_dims(eqn)
    )


def _are_dims(eqn: Any) -> bool:
    return all(isinstance(axis, int) for axis in eqn.params["axes"])


def reduction(eqn: Any, aval: Any) -> Any:
    """The equation that reduces one operand of such a collective; None where no dims are left."""
    axes = tuple(eqn.params["axes"])
    if not axes:
        return None
    shape = jax.ShapeDtypeStruct(aval.shape, aval.dtype)
    [reduced] = jax.make_jaxpr(lambda x: OVER_DIMS[eqn.primitive.name](x, axes))(shape).eqns
    return reduced


def linear_solve(eqn: Any) -> tuple[ClosedJaxpr, slice, slice]:
    """The solver of a `custom_linear_solve`, and which operands are its constants and its right-hand side."""
    counts = eqn.params["const_lengths"]
    first = counts.matvec + counts.vecmat
    last = first + counts.solve + counts.transpose_solve
    return eqn.params["jaxprs"].solve, slice(first, first + counts.solve), slice(last, None)


def scan_counts(params: dict[str, Any]) -> tuple[int, int]:
    """(constants, carries) of a scan's operands."""
    if "num_carry" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()
    return len(consts), len(carry)


def held_back(eqn: Any, always: bool = False) -> tuple[bool, ...]:
    """Which operands of a `checkpoint` jax holds back by a barrier, to keep the recomputation.

    With `always`, all of them, also where the user said `prevent_cse=False`.
    """
    wanted = always or eqn.params.get("prevent_cse", False)
    each = wanted if isinstance(wanted, tuple) else (bool(wanted),) * len(eqn.invars)
    return tuple(eqn.params.get("differentiated", False) and one for one in each)


# ---------------------------------------------------------------- lines of the user


_HERE = (
    __file__.replace("\\", "/").rpartition("/")[0] + "/"
)  # what calls the step is nobody's line either
_LIBRARIES = ("jax", "jaxlib", "optax", "flax", "equinox", "chex", "einops", "haiku", "distrax")


@lru_cache(maxsize=4096)
def is_library(file: str) -> bool:
    parts = file.replace("\\", "/").split("/")
    if file.startswith(("<", _HERE)) or "contextlib.py" in parts or "functools.py" in parts:
        return True
    after = next((parts[i + 1] for i, p in enumerate(parts[:-1]) if p == "site-packages"), "")
    return after in _LIBRARIES


def user_line(source_info: Any, known: dict[tuple[int, int], str]) -> str:
    """`file.py:line` of the innermost frame that no library owns; "" where jax has none.

    `known` spares looking up the same place twice; it lives as long as one capture.
    """
    traceback = source_info.traceback
    if traceback is None:
        return ""
    codes, places = traceback.raw_frames()
    for code, place in zip(codes, places, strict=True):
        if not is_library(code.co_filename):
            key = (id(code), place)
            if key not in known:
                known[key] = line_in_code(code, place)
            return known[key]
    return ""


def line_in_code(code: Any, place: int) -> str:
    """`file.py:line` of one instruction."""
    line = next(islice(code.co_positions(), place // 2, None), (None,))[0] or code.co_firstlineno
    return f"{code.co_filename.replace(chr(92), '/').rpartition('/')[2]}:{line}"
