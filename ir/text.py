"""Graphs as text, both ways: `parse(show(graph)) == graph`.

    in %0: f32[16, 4] 'w' donated
    in %1: f32[8, 16] 'x'
    const %2: f32[] = 0.5
    %3: f32[8, 4] = dot_general %1 %0 (lhs_contracting=(1,), rhs_contracting=(0,)) @ 'model.py:3'
    %6: f32[8, 4] = scan %3 (length=3, num_carry=1, num_consts=0, reverse=False) {
      in %4: f32[8, 4]
      %5: f32[8, 4] = tanh %4
      out %5
    }
    out %6 'y'

One line per input, constant, op and output; `updates %0` on an output pairs it
with the input it carries on; `batch %1.0 'told' ''` names the batch dims, where known. Attributes are Python literals.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from .attrs import spelled_all
from .errors import GraphError
from .graph import ITEM_BYTES, Batch, Constant, Graph, Op, Region, TensorType
from .lines import TEXT, Lines

INDENT = "  "

# ---------------------------------------------------------------- show


def show(graph: Graph) -> str:
    """The graph as text, ending in a newline."""
    updates = {out: graph.inputs[position] for position, out in graph.state}
    lines = [_input(graph, position) for position in range(len(graph.inputs))]
    lines += [] if graph.batch is None else [_batch(graph, graph.batch)]
    lines += [f"const %{c.value}: {graph.types[c.value]} = {c.data!r}" for c in graph.constants]
    lines += _ops(graph, graph.ops, "")
    for position, value in enumerate(graph.outputs):
        name = f" {graph.output_names[position]!r}" if graph.output_names else ""
        pair = f" updates %{updates[position]}" if position in updates else ""
        lines.append(f"out %{value}{name}{pair}")
    return "\n".join(lines) + "\n"


def _batch(graph: Graph, batch: Batch) -> str:
    """`batch %1.0 %2.0 'told' ''`: values and dims, evidence, doubt."""
    dims = "".join(f"%{graph.inputs[position]}.{dim} " for position, dim in batch.dims)
    return f"batch {dims}{batch.evidence!r} {batch.doubt!r}"


def _input(graph: Graph, position: int) -> str:
    value = graph.inputs[position]
    parts = [f"in {_typed(graph, value)}"]
    if graph.input_names:
        parts.append(repr(graph.input_names[position]))
    if position in graph.donated:
        parts.append("donated")
    if graph.input_tags:
        parts.append(_tag(graph.input_tags[position], graph.input_counts[position]))
    return " ".join(parts)


def _typed(graph: Graph, value: int) -> str:
    return f"%{value}: {graph.types[value]}"


def _tag(tag: str, count: int) -> str:
    return f"tag {tag!r} x{count}"


def _ops(graph: Graph, ops: tuple[Op, ...], margin: str) -> Iterator[str]:
    for op in ops:
        results = ", ".join(_typed(graph, value) for value in op.outputs)
        operands = "".join(f" %{value}" for value in op.inputs)
        attrs = spelled_all(op.attrs)
        line = f"{margin}{results} = {op.kind}{operands}" + (f" ({attrs})" if attrs else "")
        line += f" @ {op.where!r}" if op.where else ""
        line += f" {_tag(op.tag, op.count)}" if op.tag else ""
        if not op.regions:
            yield line
            continue
        for region in op.regions:
            yield f"{line} {{"
            inner = margin + INDENT
            yield from (f"{inner}in {_typed(graph, value)}" for value in region.inputs)
            yield from _ops(graph, region.ops, inner)
            yield f"{inner}out" + "".join(f" %{value}" for value in region.outputs)
            line = f"{margin}}} and"
        yield f"{margin}}}"


# ---------------------------------------------------------------- parse

_TYPE = r"(?P<dtype>\w+)\[(?P<shape>[\d, ]*)\]"
_VALUE = re.compile(rf"%(?P<id>\d+): {_TYPE}")
_TAIL = re.compile(
    rf"(?: (?P<name>{TEXT}))?(?P<donated> donated)?(?: tag (?P<tag>{TEXT}) x(?P<count>\d+))?"
)
_BATCH = re.compile(rf"batch (?P<dims>(?:%\d+\.\d+ )*)(?P<evidence>{TEXT}) (?P<doubt>{TEXT})")
_OUT = re.compile(rf"out %(?P<id>\d+)(?: (?P<name>{TEXT}))?(?: updates %(?P<input>\d+))?")
_OP = re.compile(
    rf"(?P<results>(?:%\d+: [^=]*)?)\s?= (?P<kind>[\w.-]+)(?P<operands>(?: %\d+)*)"
    rf"(?: \((?P<attrs>.*)\))?(?: @ (?P<where>{TEXT}))?(?: tag (?P<tag>{TEXT}) x(?P<count>\d+))?(?P<open> {{)?"
)


def parse(text: str) -> Graph:
    """Read what `show` prints.

    Raises:
        GraphError: a line that is not understood, with its number.
    """
    return _Reader(text).read()


@dataclass
class _Reader(Lines):
    types: dict[int, TensorType] = field(default_factory=lambda: {})

    def read(self) -> Graph:
        inputs: list[int] = []
        names: list[str] = []
        donated: set[int] = set()
        tags: list[str] = []
        counts: list[int] = []
        constants: list[Constant] = []
        ops: list[Op] = []
        outputs: list[tuple[int, str | None, int | None]] = []
        batch: re.Match[str] | None = None
        while (line := self.next()) is not None:
            if line.startswith("in "):
                value, rest = self._value(line.removeprefix("in "))
                tail = self.match(_TAIL, rest)
                if tail["donated"]:
                    donated.add(len(inputs))
                if tail["name"]:
                    names.append(ast.literal_eval(tail["name"]))
                if tail["tag"]:
                    tags.append(ast.literal_eval(tail["tag"]))
                    counts.append(int(tail["count"]))
                inputs.append(value)
            elif line.startswith("batch "):
                batch = self.match(_BATCH, line)
            elif line.startswith("const "):
                value, rest = self._value(line.removeprefix("const "))
                constants.append(Constant(value, self.literal(rest.removeprefix(" = "))))
            elif line.startswith("out "):
                found = self.match(_OUT, line)
                name = ast.literal_eval(found["name"]) if found["name"] else None
                pair = int(found["input"]) if found["input"] else None
                outputs.append((int(found["id"]), name, pair))
            else:
                ops.append(self._op(line))
        place = {value: position for position, value in enumerate(inputs)}
        self._check_named(inputs, names, outputs, place)
        return Graph(
            types=self.types,
            inputs=tuple(inputs),
            ops=tuple(ops),
            outputs=tuple(value for value, _, _ in outputs),
            constants=tuple(constants),
            input_names=tuple(names),
            output_names=tuple(name for _, name, _ in outputs if name is not None),
            state=tuple(
                sorted((place[p], k) for k, (_, _, p) in enumerate(outputs) if p is not None)
            ),
            donated=frozenset(donated),
            input_tags=tuple(tags),
            input_counts=tuple(counts),
            batch=None if batch is None else self._batch(batch, place),
        )

    def _batch(self, found: re.Match[str], place: dict[int, int]) -> Batch:
        pairs = [tuple(map(int, word[1:].split("."))) for word in found["dims"].split()]
        if any(value not in place for value, _ in pairs):
            raise GraphError(
                "the batch is of values that are no inputs.", fix="`batch %1.0 'told' ''`"
            )
        dims = tuple((place[value], dim) for value, dim in pairs)
        return Batch(dims, ast.literal_eval(found["evidence"]), ast.literal_eval(found["doubt"]))

    def _check_named(
        self,
        inputs: list[int],
        names: list[str],
        outputs: list[tuple[int, str | None, int | None]],
        place: dict[int, int],
    ) -> None:
        if len(names) not in (0, len(inputs)):
            raise GraphError(
                f"{len(names)} of {len(inputs)} inputs have a name.", fix="all or none"
            )
        named = sum(name is not None for _, name, _ in outputs)
        if named not in (0, len(outputs)):
            raise GraphError(f"{named} of {len(outputs)} outputs have a name.", fix="all or none")
        for value, _, pair in outputs:
            if pair is not None and pair not in place:
                raise GraphError(f"output %{value} updates %{pair}, which is no input.")

    # ------------------------------------------------------------ lines

    def _op(self, line: str) -> Op:
        found = self.match(_OP, line)
        outputs: list[int] = []
        rest = found["results"]
        while rest.strip():
            value, rest = self._value(rest.removeprefix(", "))
            outputs.append(value)
        regions: list[Region] = []
        more = bool(found["open"])
        while more:
            region, more = self._region()
            regions.append(region)
        return Op(
            kind=found["kind"],
            inputs=tuple(int(word[1:]) for word in found["operands"].split()),
            outputs=tuple(outputs),
            attrs=self.attrs(found["attrs"] or ""),
            regions=tuple(regions),
            where=ast.literal_eval(found["where"]) if found["where"] else "",
            tag=ast.literal_eval(found["tag"]) if found["tag"] else "",
            count=int(found["count"] or 1),
        )

    def _region(self) -> tuple[Region, bool]:
        """The lines up to the closing brace, and whether another region follows."""
        opened, inputs, ops = self.number, list[int](), list[Op]()
        outputs: tuple[int, ...] = ()
        while (line := self.next()) is not None:
            if line in ("}", "} and {"):
                return Region(tuple(inputs), tuple(ops), outputs), line != "}"
            if line.startswith("in "):
                inputs.append(self._value(line.removeprefix("in "))[0])
            elif line == "out" or line.startswith("out "):
                outputs = tuple(int(word[1:]) for word in line.split()[1:])
            else:
                ops.append(self._op(line))
        raise GraphError("a region is never closed.", where=f"line {opened}", fix="add `}`")

    def _value(self, text: str) -> tuple[int, str]:
        """Note the type of `%3: f32[8, 4]`; returns its id and what follows."""
        found = _VALUE.match(text)
        if found is None:
            raise self.wrong()
        if found["dtype"] not in ITEM_BYTES:
            raise GraphError(
                f"`{found['dtype']}` is not an element type.",
                where=f"line {self.number}",
                fix=f"one of {', '.join(ITEM_BYTES)}",
            )
        value = int(found["id"])
        if value in self.types:
            raise GraphError(f"%{value} is defined twice.", where=f"line {self.number}")
        shape = tuple(int(size) for size in found["shape"].split(",") if size.strip())
        self.types[value] = TensorType(found["dtype"], shape)
        return value, text[found.end() :]

    def wrong(self) -> GraphError:
        return GraphError(
            f"`{self.line}` is no line of a graph.",
            where=f"line {self.number}",
            fix="`%2: f32[8, 4] = kind %0 %1 (name=value)`, or `in`, `const`, `out`",
        )
