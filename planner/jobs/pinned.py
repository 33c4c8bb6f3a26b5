"""A parallelization given as numbers (tp, dp, cp, ep, zero, sequence parallel), made into decisions.

Axes of a stage's mesh, outermost first as Megatron-LM ranks them: copy, dp, ep, cp, tp.

    copy cuts examples among groups that each hold all of ZeRO's shards (`shard_group`)
    dp   cuts examples; with ZeRO also optimizer state (1), gradients (2), parameters (3)
    ep   cuts experts in the experts' layers, examples elsewhere
    cp   cuts positions of a sequence; attention meets whole sequences (`CP_KINDS`)
    tp   cuts heads, feed-forward and vocabulary; with sequence parallelism, positions elsewhere

Which dims are heads or vocabulary is read off the zoo's names of parameters, whose letters
name their dims (`qkv_D3NH`, `up_DF`, `token_VD`). From there dims are followed through every op
by its dim rule, so the backward pass and the optimizer need no names. Source of the layouts:
Narayanan et al., SC'21, section 2.3; Korthikanti et al., MLSys 2023, section 4.2 (sequence
parallelism); Rajbhandari et al., SC'20 (ZeRO); Zhang et al., VLDB'22, arXiv 2205.00119
(MiCS: shards within a group, gradients summed inside it and then across groups).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

from ...ir.analysis.examples import Dims, Examples
from ...ir.analysis.roles import roles
from ...ir.errors import PlanError, did_you_mean
from ...ir.graph import Op
from ...ir.mesh import Axis, Mesh
from ...ir.mistakes import Mistakes
from ...ir.ops import ADDITION, ATTENTION, FORWARDING, INDEXED
from ...ir.passes.copies import settles
from ...ir.program import Program
from ...ir.rules import rule_of
from ...ir.rules.rule import NONE, Rule, Strategy, cuttable, owing, result_sharding
from ...ir.sharding import Sharding
from ..intra.strategies import follow
from ..report.usage import example_dims, followed
from .positions import Attention, Positions

# How attention under context parallelism meets the positions of other ranks: keys and values are
# gathered first (torchtitan, Megatron-LM `all_gather`); they go round a ring beside the blocks of
# attention (Megatron-LM `p2p`: Liu et al., arXiv 2310.01889); or heads are cut instead of
# positions, by all-to-all before and after (Megatron-LM `a2a`: Jacobs et al., arXiv 2309.14509).
CP_KINDS = ("all_gather", "p2p", "a2a")
LETTERS = re.compile(r"_([A-Z0-9]+)\W*$")
TENSOR, EXPERT = "NKFV", "E"
PASSING = FORWARDING - {"broadcast_in_dim"}
DEGREES = ("tp", "pp", "vpp", "dp", "cp", "ep")
STATE_AXES = ("dp", "ep", "cp")  # ZeRO's shards of state are cut over these


def check_degrees(zero: int, degrees: Mapping[str, int]) -> None:
    """Refuse what is no degree of parallelism, all of it at once."""
    wrong = Mistakes()
    for name, degree in degrees.items():
        if degree < 1:
            wrong.add(PlanError(f"{name} cannot be {degree}.", where=name, fix="1 or more"))
    if zero not in (0, 1, 2, 3):
        wrong.add(PlanError(f"zero cannot be {zero}.", where="zero", fix="0, 1, 2 or 3"))
    wrong.tell()


@dataclass(frozen=True)
class Parallelism:
    """Degrees of one training job; `dp` counts the ranks of `ep` too, as Megatron-LM does.

    `shard_group` data ranks next to each other hold one copy of what ZeRO shards, as in
    PyTorch's hybrid FSDP; all data ranks do where it is None. With `lean_ends` the first and the last
    stage have a layer fewer than the others, for the embedding and the head. Gradients are summed over
    dp x cp, and ZeRO cuts state over dp x cp, as in Megatron-LM and PyTorch FSDP; that of experts over
    dp / ep x cp.
    """

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    dp: int = 1
    cp: int = 1
    ep: int = 1
    zero: int = 0
    sequence_parallel: bool = False
    shard_group: int | None = None
    lean_ends: bool = False
    cp_kind: str = "all_gather"

    def __post_init__(self) -> None:
        if self.cp_kind not in CP_KINDS:
            raise PlanError(
                f"cp kind cannot be `{self.cp_kind}`.",
                where="cp kind",
                fix=did_you_mean(self.cp_kind, CP_KINDS),
            )
        check_degrees(self.zero, {name: getattr(self, name) for name in DEGREES})
        if self.dp % self.ep:
            raise PlanError(
                f"{self.ep} expert ranks do not divide {self.dp} data ranks.",
                where="ep",
                fix="an ep that divides dp",
            )
        if self.vpp > 1 and self.pp == 1:
            raise PlanError(
                f"{self.vpp} virtual stages need a pipeline.",
                where="vpp",
                fix="pp above 1, or vpp=1",
            )
        if self.lean_ends and self.pp == 1:
            raise PlanError(
                "one stage has no ends.", where="lean_ends", fix="pp above 1, or no lean_ends"
            )
        if self.shard_group is not None:
            self._check_group(self.shard_group)

    def _check_group(self, size: int) -> None:
        if not self.zero:
            raise PlanError(
                f"groups of {size} ranks share nothing without ZeRO.",
                where="shard_group",
                fix="zero of 1, 2 or 3",
            )
        if size < 1 or self.dp % size or size % self.ep:
            raise PlanError(
                f"{self.dp} data ranks cannot be grouped by {size}.",
                where="shard_group", fix=f"a multiple of ep = {self.ep} that divides {self.dp}",
            )  # fmt: skip

    @property
    def copies(self) -> int:
        """Groups of data ranks that each hold everything."""
        return self.dp // (self.shard_group or self.dp)

    @property
    def devices(self) -> int:
        return self.tp * self.pp * self.dp * self.cp

    @property
    def mesh(self) -> Mesh:
        """Of one pipeline stage; axes of size 1 are left out."""
        dp = self.dp // self.ep // self.copies
        sizes = {"copy": self.copies, "dp": dp, "ep": self.ep, "cp": self.cp, "tp": self.tp}
        axes = tuple(Axis(name, size) for name, size in sizes.items() if size > 1)
        return Mesh(axes or (Axis("dp", 1),))


class Pinned:
    """The decisions (`space.Decided`) that a `Parallelism` implies for one program.

    With `runs`, as a program of ours does it: devices that share positions exchange half of their queries for equal
    work in causal attention, where otherwise all have the positions that the data gives them; and ZeRO-2 and 3 reduce
    gradients where they are made, which prices of jobs count there by themselves.
    """

    def __init__(self, program: Program, parallelism: Parallelism, runs: bool = False):
        self.program, self.graph, self.asked = program, program.graph, parallelism
        self.runs = runs
        self.mesh = parallelism.mesh
        self.types, self.tags = self.graph.types, program.value_tags
        self._rules: dict[int, Rule] = {}
        self.phase_of = {
            op.tag: phase for op, phase in zip(self.graph.ops, program.phases, strict=True)
        }
        self.roles = roles(self.graph)
        self.batch = followed(self.graph, example_dims(self.graph))
        self.positions = Positions(self.graph)
        self.attention = Attention(program)
        self.tensor = self._follow(lambda tag, shape: _named(tag, shape, TENSOR, parallelism.tp))
        self.experts = self._follow(lambda tag, shape: _named(tag, shape, EXPERT, parallelism.ep))
        self._follow_sources(self.experts)
        self.state = self._follow(self._sharded_state, ("prepare", "update"))
        for tracker in (self.batch, self.positions, self.tensor):
            self._follow_readers(tracker)

    # ------------------------------------------------------------ what `build` asks

    def strategy(self, op: Op, rule: Rule) -> Strategy:
        if settles(op):
            return self._as_left(op, rule)
        allowed, owed = cuttable(rule), self._owed(op)
        codes: list[int] = []
        for axis in self.mesh.axes:
            if axis.name in owed:
                codes.append(owing(0))
                continue
            wanted = [f for f in self._factors(axis.name, op, rule) if f in allowed]
            padded = axis.name in STATE_AXES and not self._on_activations(op, rule)
            fits = (
                wanted
                if padded
                else [f for f in wanted if self._divides(rule, f, axis.size, codes)]
            )
            codes.append(fits[0] if fits else NONE)
        return Strategy(self._joined(op, rule, codes) if self.runs else tuple(codes))

    def _joined(self, op: Op, rule: Rule, codes: Sequence[int]) -> tuple[int, ...]:
        """The same with rows dealt out for equal work, where they divide, or with keys that go round beside them."""
        how = "ring" if self.asked.cp_kind == "p2p" else "even"
        joints = enumerate(rule.joints, len(rule.factors))
        for code, joint in ((c, j) for c, j in joints if j.how == how):
            pairs = zip(self.mesh.axes, codes, strict=True)
            ways = prod(axis.size for axis, each in pairs if each == joint.factors[0])
            if ways > 1 and joint.divides % ways == 0:
                return tuple(code if each == joint.factors[0] else each for each in codes)
        if how == "ring" and op.kind in ATTENTION and "cp" in self.mesh.names:
            raise PlanError(
                f"keys of this {op.kind} cannot go round {self.asked.cp} devices.",
                where=op.where or op.tag, fix="attention ring, a cp that divides the sequence, or cp kind all_gather",
            )  # fmt: skip
        return tuple(codes)

    def _owed(self, op: Op) -> frozenset[str]:
        """Of a sum of what products of tensor parallelism leave owing (of queries, keys and values; of a gate and
        what it gates): it owes as well, and is reduced once (Megatron-LM joins the products, DTensor adds partials)."""
        makers = [self._makers.get(v) for v in op.inputs] if op.kind in ADDITION else []
        found = [self._owed(m) | self._left(m) if m else frozenset[str]() for m in makers]
        return frozenset[str]({"tp"}).intersection(*found) if found else frozenset()

    def _left(self, op: Op) -> frozenset[str]:
        """Axes over which a product owes a sum."""
        if op.kind != "dot_general":
            return frozenset()
        rule = self._rule(op)
        return result_sharding(rule, self.strategy(op, rule), self.mesh, 0).partial

    def _as_left(self, op: Op, rule: Rule) -> Strategy:
        """A gradient owes its sum to the update, but for ZeRO-2 and 3: these keep the shard that the state has."""
        maker = self._makers[op.inputs[0]]
        made = self._rule(maker)
        which = maker.outputs.index(op.inputs[0])
        layout = result_sharding(made, self.strategy(maker, made), self.mesh, which)
        found = follow(rule, 0, layout, self.mesh.names)
        assert found is not None
        kept = self._shares(self.state, op, rule)[:1] if self.runs and self.asked.zero >= 2 else []
        settled = layout.partial.intersection(STATE_AXES) if kept else frozenset[str]()
        codes = zip(self.mesh.names, found.axes, strict=True)
        return Strategy(tuple(kept[0] if axis in settled else code for axis, code in codes))

    def _rule(self, op: Op) -> Rule:
        """The same as `rule_of`, kept: every tracker asks for it."""
        if id(op) not in self._rules:
            self._rules[id(op)] = rule_of(op, self.types)
        return self._rules[id(op)]

    @cached_property
    def _makers(self) -> dict[int, Op]:
        return {v: op for op in self.graph.ops for v in op.outputs}

    def layout(self, tag: str, value: int) -> Sharding:
        """Of an input: cut as the trackers say."""
        dims: list[tuple[str, ...]] = [() for _ in self.types[value].shape]
        for axis in self.mesh.axes:
            for dim in self._dims(axis.name, value):
                ways = self.mesh.ways(dims[dim]) * axis.size
                padded = axis.name in STATE_AXES and dim in self.state.dims.get(value, {})
                if padded or self.types[value].shape[dim] % ways == 0:
                    dims[dim] = (*dims[dim], axis.name)
                    break
        return Sharding(tuple(dims))

    # ------------------------------------------------------------ axes

    def _factors(self, axis: str, op: Op, rule: Rule) -> list[int]:
        """Factors that an axis may cut in this op, the preferred first."""
        if axis == "tp":
            found = self._shares(self.tensor, op, rule)
            whole = not self.asked.sequence_parallel or self._gathers(op)
            return found or ([] if whole else self.positions.factors(op, rule))
        if (
            axis == "ep"
            and op.kind not in INDEXED  # tokens are dispatched and combined on their own rank
            and (found := self._shares(self.experts, op, rule))
        ):
            return found
        if axis == "cp" and self.asked.cp_kind == "a2a" and op in self.attention:
            return self._shares(self.tensor, op, rule)
        found = (
            self.positions.factors(op, rule) if axis == "cp" else self._shares(self.batch, op, rule)
        )
        if found or axis == "copy" or not self._keeps_shards(op):
            return found
        return self._shares(self.state, op, rule)

    def order(self, op: Op) -> tuple[str, ...]:
        """Heads that tensor parallelism has cut are cut again by `a2a`, so `cp` is the minor axis there."""
        if self.asked.cp_kind != "a2a" or op not in self.attention:
            return ()
        return tuple(sorted(self.mesh.names, key=lambda name: name == "cp"))

    def is_activation(self, value: int) -> bool:
        """Whether a value exists per example or per position: a batch of one has no dim that tells."""
        return value in self.batch.dims or bool(self.positions.both.dims.get(value))

    def _on_activations(self, op: Op, rule: Rule) -> bool:
        return bool(self._shares(self.batch, op, rule) or self.positions.factors(op, rule))

    def _gathers(self, op: Op) -> bool:
        """Whether an op outside tensor parallelism works on whole sequences all the same: a copy
        for products that tensor parallelism cuts, or the optimizer."""
        if self.phase_of.get(op.tag) == "update":
            return True
        readers = self._readers.get(op.outputs[0], ()) if op.kind == "copy" else ()
        return any(
            reader.kind == "dot_general" and self._shares(self.tensor, reader, self._rule(reader))
            for reader in readers
        )

    @cached_property
    def _readers(self) -> dict[int, list[Op]]:
        found: dict[int, list[Op]] = {}
        for op in self.graph.ops:
            for value in op.inputs:
                found.setdefault(value, []).append(op)
        return found

    def _keeps_shards(self, op: Op) -> bool:
        """Whether an op on parameters or their state works on ZeRO's shards."""
        if op.kind == "copy":
            return op.tag.endswith("~update") or (op.tag.endswith("~step") and self.asked.zero == 3)
        return self.phase_of.get(op.tag) in ("prepare", "update")

    @staticmethod
    def _shares(tracker: Examples, op: Op, rule: Rule) -> list[int]:
        shares = tracker.shares(op, rule) if not rule.opaque else {}
        for result, dims in zip(op.outputs, rule.results, strict=True):
            for d in tracker.dims.get(result, {}):
                for factor in dims[d][:1]:
                    shares.setdefault(factor, rule.factors[factor].size)
        kept = {f for dims in rule.results for dim in dims for f in dim}
        return sorted(shares, key=lambda f: (f not in kept, f))

    def _dims(self, axis: str, value: int) -> list[int]:
        trackers = {
            "tp": [self.tensor],
            "cp": [self.positions, self.state],
            "ep": [self.experts, self.batch, self.state],
            "dp": [self.batch, self.state],
            "copy": [self.batch],
        }[axis]
        for tracker in trackers:
            if found := tracker.dims.get(value):
                return sorted(found)
        return []

    def _divides(self, rule: Rule, factor: int, size: int, codes: Collection[int]) -> bool:
        ways = size
        for axis, code in zip(self.mesh.axes, codes, strict=False):
            ways *= axis.size if code == factor else 1
        return rule.factors[factor].size % ways == 0

    # ------------------------------------------------------------ dims that are followed

    def _follow(
        self,
        seed: Callable[[str, tuple[int, ...]], Mapping[int, int]],
        where: Collection[str] = ("prepare", "forward", "backward", "update"),
    ) -> Examples:
        """Dims of state inputs that `seed(tag, shape)` names, followed through these phases and
        back from the optimizer to the gradients it reads."""
        found = Examples(self.types)
        for position, value in enumerate(self.graph.inputs):
            if self.roles.get(position) in ("parameter", "optimizer"):
                dims = seed(self.graph.input_tags[position], self.types[value].shape)
                if dims:
                    found.dims[value] = dict(dims)
                    found.depends.add(value)
        found.run(self._ops(where))
        self._follow_back(found)
        found.depends.update(found.dims)
        found.run(self._ops(["update"]))
        return found

    def _ops(self, phases: Collection[str]) -> list[Op]:
        return [
            op
            for op, phase in zip(self.graph.ops, self.program.phases, strict=True)
            if phase in phases
        ]

    def _follow_back(self, found: Examples) -> None:
        for op, phase in zip(reversed(self.graph.ops), reversed(self.program.phases), strict=True):
            if phase != "update" or op.regions or op.kind == "optimization_barrier":
                continue
            rule = self._rule(op)
            if rule.opaque:
                continue
            for value, mine in self._read_alike(found, op, rule):
                if value not in found.dims and value not in self.graph.inputs:
                    found.dims[value] = mine

    def _read_alike(self, found: Examples, op: Op, rule: Rule) -> Iterator[tuple[int, Dims]]:
        """Operands of an op, and which of their dims are those that are followed in it."""
        shares = set(self._shares(found, op, rule))
        for value, dims in zip(op.inputs, rule.operands, strict=True):
            shape = self.types[value].shape
            if mine := {d: shape[d] for d, dim in enumerate(dims) if dim and dim[0] in shares}:
                yield value, mine

    def _follow_sources(self, found: Examples) -> None:
        """What products of experts read is laid out for them where a look-up leaves it: it travels once for all that
        read it, in both passes."""
        for op in reversed(self.graph.ops):
            if op.kind != "dot_general" and found.dims.keys().isdisjoint(op.outputs):
                continue
            if op.kind == "dot_general" or op.kind in PASSING:
                for value, mine in self._read_alike(found, op, self._rule(op)):
                    maker = self._makers.get(value)
                    if value not in found.dims and maker is not None and maker.kind in PASSING:
                        found.dims[value] = mine

    def _follow_readers(self, found: Examples) -> None:
        """What scalars and constants make (the mask of a dropout) is made in the shards that its readers want."""
        for op in reversed(self.graph.ops):
            rule = self._rule(op)
            if rule.opaque or op.regions:
                continue
            for value, mine in self._read_alike(found, op, rule):
                if value in self._spread and value not in found.dims:
                    found.dims[value] = mine
                    found.depends.add(value)

    @cached_property
    def _spread(self) -> frozenset[int]:
        """Values of several elements that only scalars and constants go into."""
        known = {v for v, kind in self.types.items() if kind.size == 1} | set(
            self.graph.constant_ids
        )
        known |= {v for op in self.graph.ops if not op.inputs for v in op.outputs}
        for op in self.graph.ops:
            if known.issuperset(op.inputs):
                known.update(op.outputs)
        return frozenset(v for v in known if self.types[v].size > 1)

    def _sharded_state(self, tag: str, shape: tuple[int, ...]) -> Mapping[int, int]:
        """The longest dim of a weight that nobody else cuts. Shards of a dim that does not divide
        are padded, as frameworks pad the flat shards they keep."""
        letters = _letters(tag, shape)
        if not self.asked.zero or len(shape) < 2 or "bias" in tag or not letters:
            return {}
        taken = set(_named(tag, shape, TENSOR, self.asked.tp)) if self.asked.tp > 1 else set[int]()
        taken |= set(_named(tag, shape, EXPERT, self.asked.ep)) if self.asked.ep > 1 else set[int]()
        able = [d for d in range(len(shape)) if d not in taken]
        longest = max(able, key=lambda d: shape[d], default=None)
        return {} if longest is None else {longest: shape[longest]}


def _letters(tag: str, shape: tuple[int, ...]) -> str:
    match = LETTERS.search(tag)
    return match[1] if match and len(match[1]) == len(shape) else ""


def _named(tag: str, shape: tuple[int, ...], letters: str, ways: int) -> dict[int, int]:
    """The dim of an input whose letter is one of these: dim -> size. Experts come first in their
    own weights; a router's are whole."""
    named = enumerate(_letters(tag, shape))
    found = [
        d
        for d, letter in named
        if letter in letters and shape[d] % ways == 0 and (d == 0 or letter != EXPERT)
    ]
    return {found[0]: shape[found[0]]} if found else {}
