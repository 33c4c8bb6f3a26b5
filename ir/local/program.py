"""What one device runs of a plan: ops on local shards, with every collective an op of its own.

    local gpt-tiny on x=2 × y=4, 4 microbatches {
      in %0: f32[64, 64] @ [x·y, -] 'params.up'
      %1: f32[512, 64] @ [-, -] = all_gather %0 (axes=('x', 'y'), dim=0) in prepare of 'params.up' for 'b0.3~step' x1
      %9: f32[64, 64] @ [-, -] partial x = microbatches (groups=8, joins=('sum',)) {
        %2: f32[8, 64] @ [x/m, -] = take_microbatch %7 (dim=0, groups=1)
        %3: f32[8, 256] @ [x/m, y] = dot_general %2 %1 (...) cut 0=x/m 1=y in forward tag 'b0.3' x1
        ...
      }
      out %9 'params.up'
    }

A `Shard` is a value as one device has it: a local type, and how the whole lies on the mesh. Behind the dim of which
only the current microbatch is there stands `/m`. Ops of the graph keep their attributes, which speak of whole values;
`cuts` say which part of each factor the device has, for ops that must know (iota, random bits, look-ups).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from ..attrs import Attr, Attributed, spelled_all
from ..graph import Constant, Op, TensorType
from ..mesh import Mesh
from ..rules import rule_of
from ..rules.rule import Rule
from ..sharding import Sharding

COLLECTIVES = frozenset({"all_reduce", "all_gather", "reduce_scatter", "all_to_all"})
JOINED = COLLECTIVES - {"all_to_all"}  # those that may have several operands
ON_SHARDS = COLLECTIVES | {"local_slice", "keep_first", "take_microbatch", "join_microbatches"}
MICROBATCHES, BARRIER = "microbatches", "optimization_barrier"
INDENT = "  "
TIMED = "/m"  # stands behind the dim of which only one microbatch is there


@dataclass(frozen=True, slots=True)
class Shard:
    """One device's part of a value.

    `whole` is the type of all of it; what devices hold of a partial result is combined by `reduction`; of dim `time`
    only the current microbatch is there.
    """

    whole: TensorType
    sharding: Sharding
    reduction: str = "sum"
    time: int | None = None

    def local(self, mesh: Mesh, microbatches: int) -> TensorType:
        """The type of what one device holds."""
        shape = list(self.sharding.local_shape(self.whole.shape, mesh))
        if self.time is not None:
            shape[self.time] //= microbatches
        return TensorType(self.whole.dtype, tuple(shape))

    def stacked(self, count: int) -> Shard:
        """What `count` microbatches made of it, side by side in a new dim in front."""
        kind = TensorType(self.whole.dtype, (count, *self.whole.shape))
        layout = Sharding(((), *self.sharding.dims), self.sharding.partial)
        return Shard(kind, layout, self.reduction, None if self.time is None else self.time + 1)


@dataclass(frozen=True, slots=True)
class FactorCut:
    """Which part of a factor a device has: its place along `axes`, major to minor, then, if `time`, the microbatch."""

    factor: int
    axes: tuple[str, ...] = ()
    time: bool = False


@dataclass(frozen=True, slots=True)
class LocalRegion:
    """The body of a loop or branch. That of `microbatches` reads values from outside, others only their own."""

    inputs: tuple[int, ...]
    ops: tuple[LocalOp, ...]
    outputs: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LocalOp(Attributed):
    """One op on shards.

    An op of the graph has its `kind` and `attrs`; `joint` names axes whose devices work it out together ("ring": keys
    go round; "even": rows dealt out for equal work; "vocabulary": shared by a loss). Others are

        all_reduce         axes, reduction     all_gather    axes, dim            reduce_scatter   axes, dim
        all_to_all         axes, dim, to       local_slice   axes, dim            keep_first       axes
        take_microbatch    dim, groups         join_microbatches dim, groups
        microbatches       groups, joins: its region, once per microbatch; its results are totals, one for each of
                           `joins`, then stacks of what each microbatch leaves

    An all_reduce, all_gather or reduce_scatter may have several operands of one element type, each with its own result:
    one collective for all.

    `tag` is that of the op of the graph; `source` of the value that a collective brings, `reader` of what it brings it
    to: an op or a slot of the plan.
    """

    kind: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    attrs: tuple[tuple[str, Attr], ...] = ()
    regions: tuple[LocalRegion, ...] = ()
    cuts: tuple[FactorCut, ...] = ()
    joint: tuple[tuple[str, tuple[str, ...]], ...] = ()
    phase: str = ""
    where: str = ""
    tag: str = ""
    source: str = ""
    reader: str = ""
    count: int = 1

    @property
    def axes(self) -> tuple[str, ...]:
        """Of a collective."""
        axes = self.attr("axes")
        assert isinstance(axes, tuple)
        return tuple(map(str, axes))

    @property
    def whole(self) -> Op:
        """The op of the graph on whole values, under the numbers of this program."""
        assert not self.regions
        return Op(self.kind, self.inputs, self.outputs, self.attrs, (), self.where, self.tag)


@dataclass(frozen=True)
class LocalProgram:
    """One device's program, the same on all of a mesh.

    Invariants (`checks.verify_local` holds them): every value is defined once and before its use, and has a
    shard; what ops say of layouts agrees with their rules; axes belong to the mesh; nothing is partial at the end.
    """

    name: str
    mesh: Mesh
    microbatches: int
    shards: Mapping[int, Shard]
    inputs: tuple[int, ...]
    ops: tuple[LocalOp, ...]
    outputs: tuple[int, ...]
    constants: tuple[Constant, ...] = ()
    input_names: tuple[str, ...] = ()
    output_names: tuple[str, ...] = ()

    def local(self, value: int) -> TensorType:
        """The type of what a device holds of a value."""
        return self.shards[value].local(self.mesh, self.microbatches)

    @cached_property
    def whole_types(self) -> dict[int, TensorType]:
        return {value: shard.whole for value, shard in self.shards.items()}

    def rule(self, op: LocalOp) -> Rule:
        """The dim rule of an op of the graph."""
        return rule_of(op.whole, self.whole_types)

    def __str__(self) -> str:
        return show_local(self)

    def walk(self) -> Iterator[LocalOp]:
        """Every op, those of regions right after the one that has them."""
        yield from _walk(self.ops)


def _walk(ops: tuple[LocalOp, ...]) -> Iterator[LocalOp]:
    for op in ops:
        yield op
        for region in op.regions:
            yield from _walk(region.ops)


# ---------------------------------------------------------------- text


def show_local(program: LocalProgram) -> str:
    """The program as text, ending in a newline."""
    many = f", {program.microbatches} microbatches" if program.microbatches > 1 else ""
    lines = [f"local {program.name!r} on {program.mesh or '-'}{many} {{"]
    for position, value in enumerate(program.inputs):
        lines.append(f"{INDENT}in {_typed(program, value)}{_name(program.input_names, position)}")
    lines += [f"{INDENT}const {_typed(program, c.value)} = {c.data!r}" for c in program.constants]
    lines += _ops(program, program.ops, INDENT)
    for position, value in enumerate(program.outputs):
        lines.append(f"{INDENT}out %{value}{_name(program.output_names, position)}")
    return "\n".join([*lines, "}"]) + "\n"


def _name(names: tuple[str, ...], position: int) -> str:
    return f" {names[position]!r}" if names else ""


def _typed(program: LocalProgram, value: int) -> str:
    shard = program.shards[value]
    return f"%{value}: {program.local(value)} @ {show_shard(shard)}"


def show_shard(shard: Shard) -> str:
    """How a value lies: `[x·y/m, -] partial max z`."""
    dims = ["·".join(dim) or "-" for dim in shard.sharding.dims]
    if shard.time is not None:
        dims[shard.time] += TIMED
    text = f"[{', '.join(dims)}]"
    if not shard.sharding.partial:
        return text
    by = "" if shard.reduction == "sum" else f"{shard.reduction} "
    return f"{text} partial {by}{'·'.join(sorted(shard.sharding.partial))}"


def _ops(program: LocalProgram, ops: tuple[LocalOp, ...], margin: str) -> Iterator[str]:
    for op in ops:
        results = ", ".join(_typed(program, value) for value in op.outputs)
        line = f"{margin}{results} = {_call(op)}{_told(op)}"
        if not op.regions:
            yield line
            continue
        for region in op.regions:
            yield f"{line} {{"
            inner = margin + INDENT
            yield from (f"{inner}in {_typed(program, value)}" for value in region.inputs)
            yield from _ops(program, region.ops, inner)
            yield f"{inner}out" + "".join(f" %{value}" for value in region.outputs)
            line = f"{margin}}} and"
        yield f"{margin}}}"


def _call(op: LocalOp) -> str:
    operands = "".join(f" %{value}" for value in op.inputs)
    attrs = spelled_all(op.attrs)
    return op.kind + operands + (f" ({attrs})" if attrs else "")


def _told(op: LocalOp) -> str:
    cuts = " ".join(f"{c.factor}={'·'.join(c.axes) or '-'}{TIMED * c.time}" for c in op.cuts)
    joint = " ".join(f"{how}={'·'.join(axes)}" for how, axes in op.joint)
    told = [
        f"cut {cuts}" * bool(cuts), f"joint {joint}" * bool(joint), f"in {op.phase}" * bool(op.phase),
        f"of {op.source!r}" * bool(op.source), f"for {op.reader!r} x{op.count}" * bool(op.reader),
        f"at {op.where!r}" * bool(op.where), f"tag {op.tag!r} x{op.count}" * bool(op.tag),
    ]  # fmt: skip
    return "".join(f" {each}" for each in told if each)
