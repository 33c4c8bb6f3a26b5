"""From a jax function and the shapes of its arguments to a `Graph`.

    captured = capture(train_step, state, batch)      # arrays or ShapeDtypeStructs
    captured.graph       what happens: plain data, no framework
    captured.binding     how to do it again: primitives, arrays, pytrees

jax traces the step abstractly; nothing is materialised. Calls (`jit`, `checkpoint`,
custom derivatives) are inlined, loops and branches become ops with regions, dead code goes. What
cannot be kept is refused by a CaptureError.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ...ir.analysis.branches import dearest
from ...ir.attrs import Attr
from ...ir.errors import CaptureError
from ...ir.fingerprint import digest_of
from ...ir.graph import Constant, Graph, Op, Region, TensorType
from ...ir.passes.dead import drop_dead_ops
from . import compat
from .batching_dims import with_batching_dims
from .calls import Ends
from .carried import carried_state
from .joined import JaxprBody, joined
from .params import attrs_of, dtype_name, kept, marks_of, placed_by
from .trace import Traced, trace

Bound = tuple[Any, dict[str, Any]]  # a jax primitive and its parameters
_PLATFORMS = ("cpu", "cuda", "rocm", "tpu")  # as jax calls the kinds of device that a cluster has


@dataclass(frozen=True)
class Binding:
    """What a backend needs to run the graph, kept out of it.

    `in_tree` is the tree of `(args, kwargs)` without static arguments; its leaves
    are the graph's inputs in order. `out_tree` is the tree of what the step returns and
    updates; `ends` say how that becomes the user's result.
    """

    ops: Mapping[tuple[str, tuple[tuple[str, Attr], ...]], Bound]
    arrays: Mapping[int, Any]  # value id -> array, for constants that are not plain numbers
    in_tree: Any
    out_tree: Any
    in_avals: tuple[Any, ...]
    out_avals: tuple[Any, ...]
    ends: Ends = field(default_factory=Ends)


@dataclass(frozen=True)
class Captured:
    """A step as data, and its way back to jax."""

    graph: Graph
    binding: Binding


def capture(
    step: Callable[..., Any],
    *args: Any,
    static_argnums: int | Sequence[int] = (),
    static_argnames: str | Sequence[str] = (),
    donate_argnums: int | Sequence[int] = (),
    donate_argnames: str | Sequence[str] = (),
    **kwargs: Any,
) -> Captured:
    """Trace a step and convert it.

    Args:
        step: a jax function; one made by `jax.jit` keeps its static and donated arguments.
        args, kwargs: arrays, numbers or `jax.ShapeDtypeStruct`s in pytrees.
        static_*, donate_*: as for `jax.jit`.

    Raises:
        CaptureError: the step cannot be traced, takes something that is no array,
            or does something that a graph cannot hold (side effects, placements).
    """
    options = {
        "static_argnums": static_argnums, "static_argnames": static_argnames,
        "donate_argnums": donate_argnums, "donate_argnames": donate_argnames,
    }  # fmt: skip
    return convert(trace(step, args, kwargs, options))


def convert(traced: Traced, *, hold_in_loops: bool = False) -> Captured:
    """Turn what jax traced into a graph and its binding.

    `hold_in_loops` keeps every `checkpoint` in a loop apart from what it recomputes. The loop
    itself does so while it is one: users save the barrier by `prevent_cse=False`.
    """
    work = _Conversion(hold_in_loops=hold_in_loops)
    closed = traced.jaxpr
    inputs = [work.value(var.aval) for var in closed.jaxpr.invars]
    outputs = work.inline(closed.jaxpr, closed.consts, inputs)
    graph = Graph(
        types=work.types,
        inputs=tuple(inputs),
        ops=tuple(work.ops),
        outputs=tuple(outputs),
        constants=tuple(work.constants),
        input_names=traced.input_names,
        output_names=traced.ends.output_names,
        donated=traced.donated,
    )
    graph = with_batching_dims(drop_dead_ops(graph), work.bound, work.arrays)
    state = carried_state(graph, traced.in_tree, traced.ends.result, traced.ends.pairs)
    graph = replace(graph, state=state)
    used = {(visit.op.kind, visit.op.attrs) for visit in graph.visits}
    binding = Binding(
        ops={key: bound for key, bound in work.bound.items() if key in used},
        arrays={v: array for v, array in work.arrays.items() if v in graph.constant_ids},
        in_tree=traced.in_tree,
        out_tree=traced.ends.tree,
        in_avals=traced.in_avals,
        out_avals=tuple(closed.out_avals),
        ends=traced.ends,
    )
    return Captured(graph, binding)


@dataclass
class _Conversion:
    """One walk over a jaxpr. `ops` is where ops go at the moment: the step or a region."""

    hold_in_loops: bool = False
    types: dict[int, TensorType] = field(default_factory=dict)
    ops: list[Op] = field(default_factory=list)
    constants: list[Constant] = field(default_factory=list)
    arrays: dict[int, Any] = field(default_factory=dict)
    bound: dict[Any, Bound] = field(default_factory=dict)
    _kinds: dict[Any, TensorType] = field(default_factory=dict)
    _numbers: dict[Any, int] = field(default_factory=dict)
    _by_identity: dict[int, tuple[Any, int]] = field(default_factory=dict)
    _attrs: dict[Any, Any] = field(default_factory=dict)
    _lines: dict[tuple[int, int], str] = field(default_factory=dict)
    _loops: int = 0  # around the equation being converted
    _caller: str = ""  # line of the call being inlined: library code has none of its own

    # ------------------------------------------------------------ values

    def value(self, aval: Any) -> int:
        number = len(self.types)
        self.types[number] = self.kind(aval)
        return number

    def kind(self, aval: Any) -> TensorType:
        key = (aval.shape, aval.dtype)
        if key not in self._kinds:
            self._kinds[key] = TensorType(dtype_name(aval.dtype), tuple(map(int, aval.shape)))
        return self._kinds[key]

    def constant(self, data: Any, aval: Any) -> int:
        """One constant per content: a plain number, or an array known by its digest."""
        found = self._by_identity.get(id(data))
        if found is not None:
            return found[1]
        kind = self.kind(aval)
        number = _number(data, kind)
        key = (kind, repr(number)) if number is not None else (kind, _digest(data))
        if key not in self._numbers:
            value = self.value(aval)
            self._numbers[key] = value
            self.constants.append(Constant(value, key[1] if number is None else number))
            if number is None:
                self.arrays[value] = data
        self._by_identity[id(data)] = (data, self._numbers[key])
        return self._numbers[key]

    # ------------------------------------------------------------ equations

    def inline(self, jaxpr: Any, consts: Sequence[Any], inputs: Sequence[int]) -> list[int]:
        """Append a jaxpr's equations, its variables being these values."""
        known: dict[Any, int] = dict(zip(jaxpr.invars, inputs, strict=True))
        for var, const in zip(jaxpr.constvars, consts, strict=True):
            known[var] = self.constant(const, var.aval)

        def read(atom: Any) -> int:
            if isinstance(atom, compat.Literal):
                return self.constant(atom.val, atom.aval)
            return known[atom]

        for eqn in jaxpr.eqns:
            operands = [read(atom) for atom in eqn.invars]
            known.update(zip(eqn.outvars, self.equation(eqn, operands), strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def equation(self, eqn: Any, operands: list[int]) -> list[int]:
        name = eqn.primitive.name
        if name in compat.CALLS:
            return self._call(eqn, operands)
        if name in compat.IDENTITIES:
            return operands
        if (tables := eqn.params.get("branches_platforms")) is not None:
            return self._of_platform(eqn, _branch_of_all(tables), operands)
        if name in ("scan", "while", "cond"):
            return self._regions(eqn, operands)
        if name == "empty2" and self.kind(eqn.outvars[0].aval).dtype != "key":
            aval = eqn.outvars[
                0
            ].aval  # a number that nobody reads, where a branch leaves no residual
            return [self.constant(np.zeros(aval.shape, aval.dtype), aval)]
        if name in compat.PLACEMENTS or name == "device_put":
            if _says_nothing(eqn):
                return operands
            raise _placement(name, self._line(eqn))
        if name == "custom_linear_solve":
            solve, consts, given = compat.linear_solve(eqn)
            return self.inline(solve.jaxpr, solve.consts, [*operands[consts], *operands[given]])
        if compat.reduces_dims(eqn):
            return self._over_dims(eqn, operands)
        if eqn.effects:
            raise _effect(eqn, self._line(eqn))
        return self._plain(eqn, operands)

    def _plain(self, eqn: Any, operands: list[int], where: str = "") -> list[int]:
        if _is_nothing(eqn):
            where = self._line(eqn)
            return [self._zeros(var.aval, where) for var in eqn.outvars]
        return self._op(eqn, operands, where)

    def _zeros(self, aval: Any, where: str) -> int:
        """What is empty, or a sum of nothing, is made where it is read: nothing has to be brought for it."""
        scalar = jax.ShapeDtypeStruct((), aval.dtype)
        zero = self.constant(np.zeros((), aval.dtype), scalar)
        [eqn] = jax.make_jaxpr(lambda x: lax.broadcast_in_dim(x, aval.shape, ()))(scalar).eqns
        return self._op(eqn, [zero], where)[0]

    def _op(self, eqn: Any, operands: list[int], where: str) -> list[int]:
        kind, params = eqn.primitive.name, eqn.params
        if params.get("branches_platforms") is not None:
            kind = "platform_dependent"  # has no regions, as a `cond` has
        if name := placed_by(params):
            raise _placement(f"{kind}({name}=...)", where or self._line(eqn))
        attrs = self.attrs(kind, params)
        if marks := marks_of(eqn):
            attrs = tuple(sorted((*attrs, *marks)))
        self.bound.setdefault((kind, attrs), (eqn.primitive, kept(kind, params)))
        results = [self.value(var.aval) for var in eqn.outvars]
        self.ops.append(
            Op(kind, tuple(operands), tuple(results), attrs, where=where or self._line(eqn))
        )
        return results

    def _over_dims(self, eqn: Any, operands: list[int]) -> list[int]:
        """`psum` and the like over the axis of a `vmap`: ordinary reductions by now."""
        results: list[int] = []
        for var, operand in zip(eqn.invars, operands, strict=True):
            reduced = compat.reduction(eqn, var.aval)
            results += (
                [operand] if reduced is None else self._plain(reduced, [operand], self._line(eqn))
            )
        return results

    def _call(self, eqn: Any, operands: list[int]) -> list[int]:
        _check_placed(eqn, self)
        held = compat.held_back(eqn, always=self.hold_in_loops and self._loops > 0)
        if any(held):
            operands = self._barrier(operands, held, self._line(eqn))
        jaxpr, consts = compat.call_body(eqn)
        outside, self._caller = self._caller, self._line(eqn)
        results = self.inline(jaxpr, consts, operands)
        self._caller = outside
        return results

    def _barrier(self, operands: list[int], held: Sequence[bool], where: str) -> list[int]:
        """As jax lowers `checkpoint`; without it XLA would merge the recomputation away."""
        inside = [v for v, hold in zip(operands, held, strict=True) if hold]
        results = [len(self.types) + i for i in range(len(inside))]
        self.types.update(zip(results, [self.types[v] for v in inside], strict=True))
        self.bound.setdefault(("optimization_barrier", ()), (compat.barrier_primitive(), {}))
        self.ops.append(Op("optimization_barrier", tuple(inside), tuple(results), where=where))
        held_values = iter(results)
        return [next(held_values) if hold else v for v, hold in zip(operands, held, strict=True)]

    def _regions(self, eqn: Any, operands: list[int]) -> list[int]:
        """A loop or a branch: an op whose regions have an input for each operand."""
        found = joined(eqn)
        self._loops += eqn.primitive.name != "cond"
        regions = tuple(self._region(body, operands) for body in found.bodies)
        self._loops -= eqn.primitive.name != "cond"
        results = [self.value(var.aval) for var in eqn.outvars]
        attrs = found.attrs
        if eqn.primitive.name == "cond":
            attrs = (("dearest", dearest(regions, self.types)),)
        where = self._line(eqn)
        self.ops.append(
            Op(eqn.primitive.name, tuple(operands), tuple(results), attrs, regions, where)
        )
        return results

    def _of_platform(self, eqn: Any, branch: int | None, operands: list[int]) -> list[int]:
        """Branches of which each is for other devices; a program has only one of them."""
        if branch is None:
            return self._plain(eqn, operands)
        body = eqn.params["branches"][branch]
        return self.inline(body.jaxpr, body.consts, operands[1:])

    def _region(self, body: JaxprBody, operands: Sequence[int]) -> Region:
        inputs = [len(self.types) + i for i in range(len(operands))]
        kinds = [self.types[v] for v in operands]
        self.types.update(zip(inputs, kinds, strict=True))
        given = [inputs[i] for i in body.takes]
        self.types.update(
            zip(given, [self.kind(v.aval) for v in body.jaxpr.jaxpr.invars], strict=True)
        )
        outside, self.ops = self.ops, []
        ends = self.inline(body.jaxpr.jaxpr, body.jaxpr.consts, given)
        region, self.ops = Region(tuple(inputs), tuple(self.ops), tuple(ends)), outside
        return region

    def attrs(self, kind: str, params: dict[str, Any]) -> tuple[tuple[str, Attr], ...]:
        """`attrs_of`, once per distinct parameters where jax's can be hashed."""
        try:
            key = (kind, tuple((name, type(value), value) for name, value in params.items()))
            found = self._attrs.get(key)
        except TypeError:
            return attrs_of(kind, params)
        if found is None:
            found = self._attrs[key] = attrs_of(kind, params)
        return found

    def _line(self, eqn: Any) -> str:
        return compat.user_line(eqn.source_info, self._lines) or self._caller


def _branch_of_all(tables: Sequence[tuple[str, ...] | None]) -> int | None:
    """The branch that every platform takes which runs plans, if they take one; `None` names all others.

    (("mosaic",), None) -> 1        (("tpu",), None) -> None
    """
    taken = {
        next((i for i, names in enumerate(tables) if names is None or platform in names), None)
        for platform in _PLATFORMS
    }
    return taken.pop() if len(taken) == 1 else None


def _is_nothing(eqn: Any) -> bool:
    """Whether all results are empty, or a product sums over nothing."""
    kinds = [var.aval for var in eqn.outvars]
    if any(jnp.issubdtype(kind.dtype, jax.dtypes.extended) for kind in kinds):
        return False
    product = eqn.primitive.name in ("dot_general", "conv_general_dilated")
    return all(kind.size == 0 for kind in kinds) or (
        product and any(var.aval.size == 0 for var in eqn.invars)
    )


def _number(data: Any, kind: TensorType) -> bool | int | float | None:
    """A scalar as a plain Python number, if it is one."""
    if kind.shape or kind.dtype == "key" or kind.dtype.startswith("c"):
        return None
    number = (
        np.asarray(data).astype(np.float64).item()
        if kind.dtype.startswith(("f", "bf"))
        else np.asarray(data).item()
    )
    return number if isinstance(number, bool | int | float) else None


def _digest(data: Any) -> str:
    if jnp.issubdtype(data.dtype, jax.dtypes.prng_key):
        return f"{digest_of(np.asarray(jax.random.key_data(data)))}:{jax.random.key_impl(data)}"
    return digest_of(np.asarray(data))


# ---------------------------------------------------------------- what is refused


def _says_nothing(eqn: Any) -> bool:
    """A `device_put` to wherever the value is, or a constraint to the empty mesh."""
    if eqn.primitive.name == "device_put":
        return all(d is None for d in eqn.params.get("devices", ()))
    return eqn.primitive.name == "sharding_constraint" and compat.is_vacant(eqn.params["sharding"])


def _placement(name: str, where: str) -> CaptureError:
    return CaptureError(
        f"the step places data itself, by `{name}`; planning decides that here.",
        where=where or "the step",
        fix="remove it from the step, or pin what you want through the plan's request",
    )


def _effect(eqn: Any, where: str) -> CaptureError:
    kinds = ", ".join(sorted(str(effect) for effect in eqn.effects))
    return CaptureError(
        f"the step has a side effect, `{eqn.primitive.name}` ({kinds}), "
        "which a sharded step would repeat or reorder.",
        where=where or "the step",
        fix="return the value as a metric and print or check it outside the step",
    )


def _check_placed(eqn: Any, work: _Conversion) -> None:
    """Refuse an inner `jit` with shardings of its own."""
    for name in ("in_shardings", "out_shardings"):
        for sharding in eqn.params.get(name, ()):
            if isinstance(sharding, jax.sharding.Sharding) and not compat.is_vacant(sharding):
                raise _placement(f"jit({name}=...)", work._line(eqn))
