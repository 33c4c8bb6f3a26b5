"""Reads the text of local programs: `parse_local(str(program)) == program`.

The types there are what one device holds. The whole value is larger by the axes of its layout and, with `/m`, by the
number of microbatches.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass, field

from ..errors import GraphError
from ..graph import ITEM_BYTES, Constant, TensorType
from ..lines import TEXT, Lines
from ..mesh import Axis, Mesh
from ..sharding import Sharding
from .program import TIMED, FactorCut, LocalOp, LocalProgram, LocalRegion, Shard

_DIMS = r"\[(?P<dims>[^\[\]]*)\]"
_VALUE = re.compile(r"%(?P<id>\d+): ")
_SHARD = re.compile(
    rf"(?P<dtype>\w+)\[(?P<shape>[\d, ]*)\] @ {_DIMS}"
    rf"(?: partial (?:(?P<by>max|min|and|or) )?(?P<partial>[^\s,]+))?"
)
_HEAD = re.compile(
    rf"local (?P<name>{TEXT}) on (?P<mesh>-|.+?)(?:, (?P<many>\d+) microbatches)? {{"
)
_NAMED = re.compile(rf"(?: (?P<name>{TEXT}))?")
_OUT = re.compile(rf"out %(?P<id>\d+)(?: (?P<name>{TEXT}))?")
_OP = re.compile(
    rf"\s?= (?P<kind>[\w.-]+)(?P<operands>(?: %\d+)*)(?: \((?P<attrs>.*)\))?"
    rf"(?: cut (?P<cuts>\d+=\S+(?: \d+=\S+)*))?(?: joint (?P<joint>[a-z]+=\S+(?: [a-z]+=\S+)*))?"
    rf"(?: in (?P<phase>\w+))?(?: of (?P<source>{TEXT}))?(?: for (?P<reader>{TEXT}) x(?P<times>\d+))?"
    rf"(?: at (?P<where>{TEXT}))?(?: tag (?P<tag>{TEXT}) x(?P<count>\d+))?(?P<open> {{)?"
)


def parse_local(text: str) -> LocalProgram:
    """Read what a program prints.

    Raises:
        GraphError: a line that is not understood, with its number.
    """
    reader = LocalReader(text)
    program = reader.read()
    if reader.next():
        raise reader.wrong()
    return program


@dataclass
class LocalReader(Lines):
    """Reads one program, from the line after the current one to its closing brace."""

    mesh: Mesh = field(default_factory=lambda: Mesh(()))
    many: int = 1  # microbatches
    shards: dict[int, Shard] = field(default_factory=lambda: {})

    def read(self) -> LocalProgram:
        self.next()
        head = self.match(_HEAD, self.line)
        self.mesh, self.many = self.read_mesh(head["mesh"]), int(head["many"] or 1)
        inputs, outputs, constants, ops = (
            list[int](),
            list[int](),
            list[Constant](),
            list[LocalOp](),
        )
        names: tuple[list[str], list[str]] = [], []
        while self.next() and self.line != "}":
            if self.line.startswith("in "):
                value, rest = self._value(self.line.removeprefix("in "))
                inputs.append(value)
                name = self.match(_NAMED, rest)["name"]
                names[0].extend([ast.literal_eval(name)] if name else [])
            elif self.line.startswith("const "):
                value, rest = self._value(self.line.removeprefix("const "))
                constants.append(Constant(value, self.literal(rest.removeprefix(" = "))))
            elif self.line.startswith("out "):
                found = self.match(_OUT, self.line)
                outputs.append(int(found["id"]))
                names[1].extend([ast.literal_eval(found["name"])] if found["name"] else [])
            else:
                ops.append(self._op())
        if self.line != "}":
            raise self.wrong()
        return LocalProgram(
            ast.literal_eval(head["name"]), self.mesh, self.many, self.shards, tuple(inputs), tuple(ops),
            tuple(outputs), tuple(constants), tuple(names[0]), tuple(names[1]),
        )  # fmt: skip

    def read_mesh(self, text: str) -> Mesh:
        """Of `x=2 × y=4`."""
        if text == "-":
            return Mesh(())
        axes: list[Axis] = []
        for part in text.split(" × "):
            name, _, size = part.partition("=")
            if not name or not size.isdigit():
                raise self.wrong()
            axes.append(Axis(name, int(size)))
        return Mesh(tuple(axes))

    # ------------------------------------------------------------ lines

    def _op(self) -> LocalOp:
        outputs, rest = list[int](), self.line
        while rest.startswith("%"):
            value, rest = self._value(rest)
            outputs.append(value)
            rest = rest.removeprefix(", ")
        found = self.match(_OP, rest)
        regions = list[LocalRegion]()
        more = bool(found["open"])
        while more:
            region, more = self._region()
            regions.append(region)
        return LocalOp(
            kind=found["kind"],
            inputs=tuple(int(word[1:]) for word in found["operands"].split()),
            outputs=tuple(outputs),
            attrs=self.attrs(found["attrs"] or ""),
            regions=tuple(regions),
            cuts=tuple(self._cut(word) for word in (found["cuts"] or "").split()),
            joint=tuple(self._joint(word) for word in (found["joint"] or "").split()),
            phase=found["phase"] or "",
            where=ast.literal_eval(found["where"]) if found["where"] else "",
            tag=ast.literal_eval(found["tag"]) if found["tag"] else "",
            source=ast.literal_eval(found["source"]) if found["source"] else "",
            reader=ast.literal_eval(found["reader"]) if found["reader"] else "",
            count=int(found["count"] or found["times"] or 1),
        )

    def _region(self) -> tuple[LocalRegion, bool]:
        """The lines up to the closing brace, and whether another region follows."""
        opened, inputs, ops, outputs = self.number, list[int](), list[LocalOp](), tuple[int, ...]()
        while self.next():
            if self.line in ("}", "} and {"):
                return LocalRegion(tuple(inputs), tuple(ops), outputs), self.line != "}"
            if self.line.startswith("in "):
                inputs.append(self._value(self.line.removeprefix("in "))[0])
            elif self.line == "out" or self.line.startswith("out "):
                outputs = tuple(int(word[1:]) for word in self.line.split()[1:])
            else:
                ops.append(self._op())
        raise GraphError("a region is never closed.", where=f"line {opened}", fix="add `}`")

    def _cut(self, word: str) -> FactorCut:
        factor, _, axes = word.partition("=")
        return FactorCut(int(factor), _axes(axes.removesuffix(TIMED)), axes.endswith(TIMED))

    def _joint(self, word: str) -> tuple[str, tuple[str, ...]]:
        how, _, axes = word.partition("=")
        return how, _axes(axes)

    def _value(self, text: str) -> tuple[int, str]:
        """Note the shard of `%3: f32[4, 8] @ [x, -]`; returns its id and what follows."""
        found = _VALUE.match(text)
        if found is None:
            raise self.wrong()
        value = int(found["id"])
        if value in self.shards:
            raise GraphError(f"%{value} is defined twice.", where=f"line {self.number}")
        self.shards[value], rest = self.read_shard(text[found.end() :])
        return value, rest

    def read_shard(self, text: str) -> tuple[Shard, str]:
        """Of `f32[4, 8] @ [x, -] ...`, and what follows."""
        found = _SHARD.match(text)
        if found is None:
            raise self.wrong()
        if found["dtype"] not in ITEM_BYTES:
            raise GraphError(
                f"`{found['dtype']}` is not an element type.",
                where=f"line {self.number}",
                fix=f"one of {', '.join(ITEM_BYTES)}",
            )
        shape = tuple(int(size) for size in found["shape"].split(",") if size.strip())
        return self._shard(found, TensorType(found["dtype"], shape)), text[found.end() :]

    def _shard(self, found: re.Match[str], local: TensorType) -> Shard:
        words = [word.strip() for word in found["dims"].split(",") if word.strip()]
        if len(words) != local.rank:
            raise self.wrong()
        timed = [d for d, word in enumerate(words) if word.endswith(TIMED)]
        dims = tuple(_axes(word.removesuffix(TIMED)) for word in words)
        partial = frozenset(_axes(found["partial"] or "-"))
        if unknown := [a for a in (*partial, *sum(dims, ())) if a not in self.mesh.sizes]:
            raise GraphError(
                f"the mesh has no axis `{unknown[0]}`.", where=f"line {self.number}", fix=f"one of {self.mesh}"
            )  # fmt: skip
        shape = [size * self.mesh.ways(axes) for size, axes in zip(local.shape, dims, strict=True)]
        for d in timed:
            shape[d] *= self.many
        whole = TensorType(local.dtype, tuple(shape))
        time = timed[0] if timed else None
        return Shard(whole, Sharding(dims, partial), found["by"] or "sum", time)

    def wrong(self) -> GraphError:
        return GraphError(
            f"`{self.line}` is no line of a local program.",
            where=f"line {self.number}",
            fix="`%2: f32[8, 4] @ [x, -] = kind %0 %1 (name=value)`, or `in`, `const`, `out`",
        )


def _axes(text: str) -> tuple[str, ...]:
    return () if text in ("-", "") else tuple(text.split("·"))
