"""What must hold of every graph and every dim rule, each law by its name.

    typed               every value of the graph has a type
    defined-once        no value is defined twice, not even in different regions
    defined-before-use  an op reads only earlier values of its own region, and constants
    region-arity        operands, regions and results of loops and branches agree in number and type
    state-pairs         a state input and the output that carries it on have equal types
    positions           donated inputs, names, tags and batch dims belong to inputs and outputs that exist
    attributes          attributes are sorted by name, and such as the kind may have (`attribute_table.py`)

And of one that is cut over time (`verify_time`):

    held-apart          a barrier outside loops holds only what exists per microbatch
    in-time             what runs for each microbatch reads nothing that is known only after the last one
    handed-on           of what microbatches make, others read only parts of the batch and totals

`backends` build graphs that pass; `codec` checks what it reads from files.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from .attribute_table import unfit
from .errors import GraphError
from .graph import Graph, Op, TensorType
from .passes.microbatch import TimeAxis
from .rules.rule import Rule


def verify(graph: Graph) -> None:
    """Check a graph.

    Raises:
        GraphError: the first broken law, by name, with the value or op that breaks it.
    """
    _Check(graph).run()


def verify_time(graph: Graph, time: TimeAxis) -> None:
    """Check a prepared graph against its time axis.

    Raises:
        GraphError: the first broken law, by name, with the op that breaks it.
    """
    made: set[int] = set()
    late: set[int] = set()
    for position, op in enumerate(graph.ops):
        if position in time.body:
            if not late.isdisjoint(op.inputs):
                raise _broken("in-time", f"%{min(late & set(op.inputs))} is not known yet", op)
            if op.kind == "optimization_barrier" and not time.split.keys() >= set(op.outputs):
                what = f"%{min(set(op.outputs) - time.split.keys())} is of no microbatch"
                raise _broken("held-apart", what, op)
            made.update(op.outputs)
        elif not (made.isdisjoint(op.inputs) and late.isdisjoint(op.inputs)):
            _check_handed(made & set(op.inputs), time, op)
            late.update(op.outputs)
    _check_handed(made & set(graph.outputs), time, "the outputs")


def _check_handed(values: set[int], time: TimeAxis, where: Op | str) -> None:
    for value in values:
        if value not in time.split and value not in time.totals:
            raise _broken("handed-on", f"%{value} is neither split nor a total", where)


def verify_rule(op: Op, rule: Rule, types: Mapping[int, TensorType]) -> None:
    """Check that a rule fits an op: one entry per dim, whose factors multiply to its size.

    Raises:
        GraphError: law `rule-shapes` is broken.
    """
    sides = (("operand", rule.operands, op.inputs), ("result", rule.results, op.outputs))
    for side, described, values in sides:
        if len(described) != len(values):
            raise _broken("rule-shapes", f"{len(described)} {side}s for {len(values)} values", op)
        for number, (dims, value) in enumerate(zip(described, values, strict=True)):
            sizes = [_size(rule, dim) for dim in dims]
            if tuple(sizes) != types[value].shape:
                what = f"{side} {number} is described as {sizes}, it is {types[value]}"
                raise _broken("rule-shapes", what, op)
    for group in rule.linear:
        if any(not 0 <= operand < len(op.inputs) for operand in group):
            raise _broken("rule-shapes", f"linear in operands {group} of {len(op.inputs)}", op)


def _size(rule: Rule, dim: tuple[int, ...]) -> int:
    size = 1
    for factor in dim:
        size *= rule.factors[factor].size
    return size


class _Check:
    def __init__(self, graph: Graph):
        self.graph, self.types = graph, graph.types
        self.defined: set[int] = set()

    def run(self) -> None:
        graph = self.graph
        constants = [c.value for c in graph.constants]
        self._define(graph.inputs, "the inputs")
        self._define(constants, "the constants")
        self._ops(graph.ops, {*graph.inputs, *constants}, frozenset(constants))
        self._state()
        self._positions()

    def _define(self, values: Iterable[int], where: Op | str) -> None:
        for value in values:
            if value not in self.types:
                raise _broken("typed", f"%{value} has no type", where)
            if value in self.defined:
                raise _broken("defined-once", f"%{value} is defined again", where)
            self.defined.add(value)

    def _ops(self, ops: Iterable[Op], known: set[int], constants: frozenset[int]) -> set[int]:
        for op in ops:
            self._known(op.inputs, known, op)
            for region in op.regions:
                self._define(region.inputs, op)
                inside = self._ops(region.ops, {*region.inputs, *constants}, constants)
                self._known(region.outputs, inside, op)
            if op.regions:
                self._regions(op)
            self._attributes(op)
            self._define(op.outputs, op)
            known.update(op.outputs)
        return known

    def _known(self, values: Iterable[int], known: set[int], where: Op | str) -> None:
        for value in values:
            if value not in known:
                raise _broken("defined-before-use", f"%{value} is not known here", where)

    def _regions(self, op: Op) -> None:
        wanted = {"scan": 1, "while": 2, "cond": len(op.regions)}.get(op.kind)
        if len(op.regions) != wanted:
            raise _broken("region-arity", f"{len(op.regions)} regions", op)
        consts, carry = op.loop_inputs
        for region in op.regions:
            self._alike(op, op.inputs, region.inputs, consts + carry)
        for region in op.returning:
            self._alike(
                op, op.outputs, region.outputs, carry if op.kind == "scan" else len(op.outputs)
            )
            for start, end in zip(
                region.inputs[consts : consts + carry], region.outputs, strict=False
            ):
                if self.types[start] != self.types[end]:
                    raise _broken("region-arity", f"the carry %{start} changes its type", op)
        self._decides(op)

    def _alike(
        self, op: Op, outer: tuple[int, ...], inner: tuple[int, ...], first_row: int
    ) -> None:
        """What goes in or comes out is what regions see of it; rows are slices of it."""
        if len(outer) != len(inner):
            raise _broken(
                "region-arity", "operands or results differ in number from the region", op
            )
        for k, (whole, part) in enumerate(zip(outer, inner, strict=True)):
            kind, body = self.types[whole], self.types[part]
            shape = (op.trips, *body.shape) if k >= first_row else body.shape
            if (kind.dtype, kind.shape) != (body.dtype, shape):
                raise _broken("region-arity", f"%{whole} is {kind}, its body has {body}", op)

    def _decides(self, op: Op) -> None:
        """One number says which branch is taken, or whether a loop goes on."""
        deciding = {"while": op.regions[0].outputs, "cond": op.inputs[:1]}.get(op.kind)
        if deciding is not None and [self.types[v].rank for v in deciding] != [0]:
            raise _broken("region-arity", f"{len(deciding)} values decide", op)

    def _attributes(self, op: Op) -> None:
        names = [name for name, _ in op.attrs]
        if names != sorted(set(names)):
            raise _broken("attributes", f"attributes {names} are not sorted", op)
        for name, value in op.attrs:
            if (wrong := unfit(op.kind, name, value)) is not None:
                raise _broken("attributes", wrong, op)

    def _state(self) -> None:
        graph = self.graph
        self._known(
            graph.outputs, {*graph.inputs, *graph.constant_ids, *_results(graph)}, "outputs"
        )
        for position, output in graph.state:
            if position >= len(graph.inputs) or output >= len(graph.outputs):
                raise _broken("positions", f"state pair {(position, output)}", "the state")
            before, after = graph.inputs[position], graph.outputs[output]
            if self.types[before] != self.types[after]:
                what = f"{self.types[before]} is carried on as {self.types[after]}"
                raise _broken("state-pairs", what, graph.input_name(position))

    def _positions(self) -> None:
        graph = self.graph
        if any(not 0 <= position < len(graph.inputs) for position in graph.donated):
            raise _broken("positions", f"donated {sorted(graph.donated)}", "the inputs")
        for what, found, wanted in (
            ("input names", graph.input_names, graph.inputs),
            ("output names", graph.output_names, graph.outputs),
            ("input tags", graph.input_tags, graph.inputs),
            ("input counts", graph.input_counts, graph.inputs),
        ):
            if found and len(found) != len(wanted):
                raise _broken("positions", f"{len(found)} {what} for {len(wanted)}", "the graph")
        for position, dim in graph.batch.dims if graph.batch else ():
            if not (
                0 <= position < len(graph.inputs)
                and 0 <= dim < graph.types[graph.inputs[position]].rank
            ):
                raise _broken(
                    "positions", f"dim {dim} of input {position} is the batch", "the graph"
                )


def _results(graph: Graph) -> set[int]:
    return {value for op in graph.ops for value in op.outputs}


def _broken(law: str, what: str, where: Op | str) -> GraphError:
    place = where if isinstance(where, str) else f"{where.kind} at {where.where or where.outputs}"
    return GraphError(f"a graph breaks `{law}`: {what}.", where=place)
