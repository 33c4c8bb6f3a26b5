"""What the parts of a model cost under one pinned parallelism: embedding, one layer, head.

A short model (a few layers, one microbatch) is priced op by op through the same space as
any plan; what runs once per layer is one layer's, the rest belongs before or after the
layers. A job of any depth is then put together from the parts (`price`).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Literal

import numpy as np

from ...ir.analysis.roles import Role
from ...ir.composites.bodies import FORWARD
from ...ir.graph import Op
from ...ir.ops import COMPOSITES, CONTRACTIONS
from ...ir.plan import Collective
from ...ir.program import Program
from ...ir.rules import rule_of
from ...ir.sharding import Sharding
from ..cost.flop import flop
from ..cost.kernels import FREE, kernels_of
from ..cost.model import CostModel
from ..intra.layouts import Layouts
from ..intra.space import Space, build
from ..memory.ledger import Ledger
from ..memory.lifetimes import lifetimes, ticks_of
from ..memory.lives import Lifetimes
from ..memory.storage import storage_of
from ..report.chosen import prices_of
from .communication import communications
from .pinned import STATE_AXES, Parallelism, Pinned

Place = Literal["embedding", "layer", "head"]
GRADIENT = 4  # bytes per accumulated gradient: fp32, as Megatron-LM and PyTorch FSDP keep them
COPY = re.compile(r"~(forward|backward):\d+$")  # how tags of copies for one pass end
TENSOR_GATHER = ("all_gather", ("tp",))
PLACES: tuple[Place, ...] = ("embedding", "layer", "head")


@dataclass
class Work:
    """One pass over one part on one device, for one microbatch (an update: for one step).

    Seconds: `compute`; `exchange`, collectives between ops of the same layer (tensor,
    sequence, context, expert parallelism); `gather`, of parameters; `reduce`, of gradients.
    `collectives` lists them. Of `exchange`, `gathered` are all-gathers of tensor parallelism and
    `ring` what context parallelism moves; of `compute`, `attention` are products of attention.
    `flop` counts products on whole tensors.
    """

    compute: float = 0.0
    exchange: float = 0.0
    gather: float = 0.0
    reduce: float = 0.0
    gathered: float = 0.0
    ring: float = 0.0
    attention: float = 0.0
    flop: float = 0.0
    collectives: list[Collective] = field(default_factory=lambda: [])


@dataclass
class Part:
    """One part: seconds of its passes, bytes it holds on one device.

    `state` are parameters and optimizer state as they are kept between steps, `casts` the
    parameters in the element type of the computation, `saved` the activations of one
    microbatch that wait for the backward pass. `weights` counts this device's parameters,
    `shard` those of them whose optimizer state it holds.
    """

    forward: Work = field(default_factory=Work)
    backward: Work = field(default_factory=Work)
    prepare: Work = field(default_factory=Work)
    update: Work = field(default_factory=Work)
    state: float = 0.0
    casts: float = 0.0
    saved: float = 0.0
    weights: float = 0.0
    shard: float = 0.0

    @property
    def casts_whole(self) -> float:
        """Bytes of the gathered parameters where ZeRO-3 keeps shards of them."""
        return self.casts * self.weights / self.shard if self.shard else self.casts


@dataclass
class Parts:
    """All parts of one model; `transient` is what one device needs beside saved activations.

    `shared` holds what the head reads of the embedding's parameters (tied embeddings): a pipeline
    keeps a second copy of it on its last stage.
    """

    parts: dict[Place, Part]
    shared: Part
    transient: float

    def __getitem__(self, place: Place) -> Part:
        return self.parts[place]


def parts_of(program: Program, layers: int, parallelism: Parallelism, cost: CostModel) -> Parts:
    """Price a program of `layers` layers, folded and prepared, that stands for one microbatch.

    Under context parallelism sequences come with head and tail on each device, as Megatron-LM and torchtitan deal them.
    """
    pinned = Pinned(program, parallelism)
    space = build(program, 1, cost, Layouts(cost.collectives(pinned.mesh)), pinned, dealt=True)
    return _Sorting(space, layers, cost, pinned).run()


class _Sorting:
    def __init__(self, space: Space, layers: int, cost: CostModel, pinned: Pinned):
        self.space, self.layers, self.cost, self.pinned = space, layers, cost, pinned
        self.program, self.graph = space.program, space.program.graph
        self.kernels = kernels_of(
            self.program, cost.fused_attention, cost.fusion, cost.execution_model.redone_inside
        )
        self.tags = self.program.value_tags
        self.choices = (0,) * len(space.nodes)
        self.parts: dict[Place, Part] = {place: Part() for place in PLACES}
        self.shared = Part()
        self.phase: dict[str, str] = {}
        self.place: dict[str, Place] = {}
        self._counts = {v: op.count for op in self.graph.ops for v in op.outputs}
        self.gradients = self._gradients()
        self._sort()

    # ------------------------------------------------------------ where ops belong

    def _sort(self) -> None:
        """Ops of all layers share a tag that runs once per layer; of the others, those that
        read layers come after them in their pass."""
        runs = defaultdict[str, int](int)
        for op in self.graph.ops:
            runs[op.tag] += op.count
        after: dict[str, set[int]] = {"forward": set(), "backward": set()}
        for op, phase in zip(self.graph.ops, self.program.phases, strict=True):
            self.phase[op.tag] = phase
            seen = after.setdefault(phase, set())
            if runs[op.tag] >= self.layers - 1:
                place: Place = "layer"
            elif phase == "backward":
                place = "head" if seen.isdisjoint(op.inputs) else "embedding"
            else:
                place = "embedding" if seen.isdisjoint(op.inputs) else "head"
            self.place.setdefault(op.tag, place)
            if place == "layer" or not seen.isdisjoint(op.inputs):
                seen.update(op.outputs)

    def run(self) -> Parts:
        for op in self._once():
            if op.tag in self.space.own:
                work, share = self._work(op.tag), self._share(op.tag)
                seconds = max(float(self.space.own[op.tag][0]), self._accumulating(op))
                work.compute += seconds * share
                if op in self.pinned.attention:
                    work.attention += seconds * share
                if op.kind in CONTRACTIONS | COMPOSITES:
                    rule = rule_of(op, self.graph.types)
                    work.flop += flop(op, rule, self.graph.types) * share
        self._communicate()
        transient = self._hold()
        return Parts(self.parts, self.shared, transient)

    def _accumulating(self, op: Op) -> float:
        """Least seconds of a product that adds a weight's gradient to that of the step, which it reads and
        writes in fp32 (Megatron-LM, gradient accumulation fusion). Binds where few tokens meet a weight, as in
        experts. ZeRO-2 and 3 reduce fresh gradients instead."""
        if (
            op.kind not in CONTRACTIONS
            or op.outputs[0] not in self.gradients
            or self.pinned.asked.zero >= 2
        ):
            return 0.0
        home = self.space.homes[self.tags[op.outputs[0]]]
        size = self.graph.types[op.outputs[0]].size / int(self.space.layouts.ways(home.layouts)[0])
        return self.space.layouts.collectives.cluster.device.stream_seconds(2 * GRADIENT * size)

    def _once(self) -> Iterator[Op]:
        seen: set[str] = set()
        for op in self.graph.ops:
            if op.tag not in seen:
                seen.add(op.tag)
                yield op

    def _share(self, tag: str) -> float:
        """Runs that belong to one part: of a layer's op, one per layer."""
        runs = self.space.runs.get(tag, 1)
        return runs / self.layers if self.place.get(tag) == "layer" else runs

    def _work(self, tag: str) -> Work:
        part = self.parts[self.place.get(tag, "head")]
        return getattr(part, self.phase.get(tag, "update"))

    # ------------------------------------------------------------ communication

    def _communicate(self) -> None:
        """What several ops read in one layout travels once per pass; what an all-to-all brought
        is as large as what it took, so the backward pass finds it kept. Sums of what the update makes (a norm of all
        gradients) wait for the gradients, and hide behind nothing."""
        origin, seen = self._origins(), set[tuple[str, Sharding, str]]()
        orders = {op.tag: order for op in self.graph.ops if (order := self.pinned.order(op))}
        for each in communications(prices_of(self.space, self.choices, self.cost, orders)):
            if each.wanted is None:
                for entry in each.entries:
                    self._add(entry, each.reader, "exchange")
                continue
            maker = each.source.rpartition(":")[0]
            reader = each.reader if each.reader in self.phase else maker
            swapped = all(entry.kind == "all_to_all" for entry in each.entries)
            key = origin(each.source), each.wanted, "" if swapped else each.phase
            for entry in each.entries if key not in seen else ():
                payer = self._payer(each.source, reader, entry)
                self._add(entry, payer, self._kind(each.source, each.phase))
            seen.add(key)

    def _origins(self) -> Callable[[str], str]:
        """Leads a value's tag to what it is a copy of: made for one pass, held by a barrier, or made
        again by cheap ops alone (where products are made again, everything really travels again)."""
        held = {
            self.tags[v]: self.tags[u]
            for op in self.graph.ops
            if op.kind == "optimization_barrier"
            for u, v in zip(op.inputs, op.outputs, strict=True)
        }
        attention = self.pinned.attention
        redone = any(
            "~again" in op.tag and op.kind in CONTRACTIONS and op not in attention
            for op in self.graph.ops
        )

        def origin(tag: str) -> str:
            tag = COPY.sub("", tag)
            return held.get(tag, tag) if redone else held.get(tag, tag).replace("~again", "")

        return origin

    def _kind(self, source: str, phase: str) -> str:
        maker = source.rpartition(":")[0]
        if phase == "update":
            return "exchange" if self.phase.get(maker) == "update" else "reduce"
        prepared = maker not in self.phase or self.phase[maker] == "prepare"
        return "gather" if prepared else "exchange"

    def _payer(self, source: str, reader: str, entry: Collective) -> str:
        """What travels into one layer alone, as the embedding does into the first, belongs where it was made."""
        maker = source.rpartition(":")[0]
        alone = self.place.get(reader) == "layer" and entry.count < self.layers - 1
        outside = (
            self.place.get(maker, "layer") != "layer" and self.phase[maker] == self.phase[reader]
        )
        return maker if alone and outside else reader

    def _add(self, entry: Collective, tag: str, kind: str) -> None:
        work = self._work(tag)
        scale = 1 / self.layers if self.place.get(tag) == "layer" else 1.0
        setattr(work, kind, getattr(work, kind) + entry.seconds * scale)
        work.gathered += (
            entry.seconds
            * scale
            * (kind == "exchange" and (entry.kind, entry.axes) == TENSOR_GATHER)
        )
        work.ring += entry.seconds * scale * (kind == "exchange" and entry.axes == ("cp",))
        work.collectives.append(entry)

    # ------------------------------------------------------------ memory

    def _hold(self) -> float:
        """Fill in bytes held by each part; returns bytes beside them at the worst moment."""
        known = self._roles()
        model = self.cost.execution_model
        lives = lifetimes(self.program, 1, known, storage_of(self.program, model, self.kernels))
        local = Ledger(self.space, lives).local_bytes(self.choices)
        self._inputs(local, known)
        saved = self._kept(lives, local) if model.fuses_into_readers else self._counted(local)
        for value, nbytes in saved.items():
            place = self.place[self._maker(value)]
            self.parts[place].saved += nbytes / (self.layers if place == "layer" else 1)
        peak = float(_passing(lives, self.gradients).profile(self._moving(local)).max())
        return max(0.0, peak - sum(saved.values()))

    def _counted(self, local: Mapping[int, float]) -> dict[int, float]:
        """Bytes of what is saved, of all layers."""
        saved = self._saved(local) | self._swapped_results(local)
        return {value: nbytes * self._counts[value] for value, nbytes in saved.items()}

    def _kept(self, lives: Lifetimes, local: Mapping[int, float]) -> dict[int, float]:
        """The same where readers make values again: what the backward pass finds of the forward pass, when most of that
        is alive."""
        pairs = list(zip(self.graph.ops, self.program.phases, strict=True))
        begins = accumulate((ticks_of(op) for op in self.graph.ops), initial=1)
        back = min(
            (t for t, (_, phase) in zip(begins, pairs, strict=False) if phase == "backward"),
            default=0,
        )
        found = {s.value for s in lives.segments if s.end >= back}
        made = {
            v
            for op, phase in pairs
            if phase == "forward"
            for v in op.outputs
            if v in found and self.pinned.is_activation(v)
        }
        sizes = {v: nbytes if v in made else 0.0 for v, nbytes in local.items()}
        moment, tick = divmod(int(lives.profile(sizes).argmax()), lives.ticks)
        return {v: sizes[v] * n for v, n in lives.alive(moment, tick).items() if sizes[v]}

    def _roles(self) -> dict[int, Role]:
        """Roles of the inputs. What the forward pass does not read is no parameter, whatever its dims look like:
        moments of a table of positions have a row for each place of the one sequence that a rank has."""
        known = dict(self.pinned.roles)
        unread = [
            p
            for p, role in known.items()
            if role == "parameter" and not self._read(self.graph.inputs[p])
        ]
        for position in unread:
            known[position] = "optimizer"
        return known

    def _swapped_results(self, local: Mapping[int, float]) -> dict[int, float]:
        """What attention makes under `a2a`, kept with its heads cut beside what the all-to-all makes of it:
        the fused kernel's backward pass reads the one, the output product the other (TransformerEngine,
        context_parallel.py)."""
        if self.pinned.asked.cp == 1 or self.pinned.asked.cp_kind != "a2a":
            return {}
        attention = self.pinned.attention
        return {
            op.outputs[0]: local[op.outputs[0]]
            for op, phase in zip(self.graph.ops, self.program.phases, strict=True)
            if phase == "forward" and op.kind in CONTRACTIONS | {FORWARD} and op in attention
            if op.outputs[0] not in attention.scores and op.outputs[0] in local
        }

    def _moving(self, local: Mapping[int, float]) -> dict[int, float]:
        """Bytes of activations and of fresh gradients, which are added to those of the step."""
        passing, pinned = self.gradients, self.pinned
        return {v: b if pinned.is_activation(v) or v in passing else 0.0 for v, b in local.items()}

    def _gradients(self) -> frozenset[int]:
        """What the backward pass makes of parameters: sums over examples."""
        return frozenset(
            v
            for op, phase in zip(self.graph.ops, self.program.phases, strict=True)
            if phase == "backward" and op.kind != "copy"
            for v in op.outputs
            if not self.pinned.is_activation(v) and self.graph.types[v].rank > 1
        )

    def _inputs(self, local: Mapping[int, float], known: Mapping[int, str]) -> None:
        counts = self.graph.input_counts or (1,) * len(self.graph.inputs)
        readers: dict[int, str] = {}
        for op in reversed(self.graph.ops):
            readers.update(dict.fromkeys(op.inputs, op.tag))
        casts: dict[int, Op] = {
            op.inputs[0]: op
            for op, phase in zip(self.graph.ops, self.program.phases, strict=True)
            if phase == "prepare" and op.kind == "convert_element_type"
        }
        totals: dict[str, int] = defaultdict(int)
        for tag, count in zip(self.graph.input_tags, counts, strict=True):
            totals[tag] += count
        for position, value in enumerate(self.graph.inputs):
            if known.get(position) not in ("parameter", "optimizer"):
                continue
            tag = self.graph.input_tags[position]
            layered = totals[tag] >= self.layers - 1
            places: list[Place] = ["layer"] if layered else self._places(position, value, known)
            scale = counts[position] / (self.layers if layered else 1)
            holders = [self.parts[places[0]], *([self.shared] if len(places) > 1 else [])]
            for part in holders:
                part.state += local.get(value, 0.0) * scale
                if known[position] == "parameter":
                    self._weights(part, value, casts.get(value), scale)

    def _places(self, position: int, value: int, known: Mapping[int, str]) -> list[Place]:
        """Where a parameter outside the layers is read; its moments are where it is, told by name and shape."""

        if known[position] == "parameter":
            return self._readers(value)
        owners = [
            (_common_end(self.graph.input_tags[at], self.graph.input_tags[position]), owner)
            for at, owner in enumerate(self.graph.inputs)
            if known.get(at) == "parameter"
            and self.graph.types[owner].shape == self.graph.types[value].shape
        ]
        most, owner = max(owners, default=(0, value))
        return self._readers(owner) if most else ["head"]

    def _readers(self, value: int) -> list[Place]:
        """The parts that hold a parameter: those whose forward pass reads it, in order."""
        return self._read(value) or ["head"]

    def _read(self, value: int) -> list[Place]:
        """The parts whose forward pass reads a value, in order."""
        shown, found = {value}, list[Place]()
        for op, phase in zip(self.graph.ops, self.program.phases, strict=True):
            if shown.isdisjoint(op.inputs):
                continue
            if phase == "forward" and op.kind not in FREE:
                if self.place[op.tag] not in found:
                    found.append(self.place[op.tag])
            elif phase in ("prepare", "forward"):
                shown.update(op.outputs)
        return found

    def _weights(self, part: Part, value: int, cast: Op | None, scale: float) -> None:
        kind, home = self.graph.types[value], self.space.homes[self.tags[value]]
        held = kind.size / int(self.space.layouts.ways(home.layouts)[0])
        spread = held
        for dim in self.pinned.state.dims.get(value, {}):
            layout: int = home.layouts[0]
            axes = self.space.layouts.known[layout].dims[dim]
            spread = held * self.space.mesh.ways(tuple(a for a in axes if a in STATE_AXES))
        part.weights += spread * scale
        part.shard += held * scale
        if cast is not None:
            each = self.graph.types[cast.outputs[0]].nbytes / kind.size
            part.casts += (held if self.pinned.asked.zero == 3 else spread) * each * scale

    def _maker(self, value: int) -> str:
        return self.tags[value].rpartition(":")[0]

    def _saved(self, local: Mapping[int, float]) -> dict[int, float]:
        """Forward values that the backward pass reads, each once, whatever it is called."""
        phase_of = {
            v: phase
            for op, phase in zip(self.graph.ops, self.program.phases, strict=True)
            for v in op.outputs
        }
        writer = {v: op for op in self.graph.ops for v in op.outputs}
        found: dict[int, float] = {}
        for op, phase in zip(self.graph.ops, self.program.phases, strict=True):
            for value in op.inputs if phase == "backward" else ():
                if phase_of.get(value) != "forward":
                    continue
                while writer[value].kind in ("copy", "reshape", "squeeze") and self._same_bytes(
                    value, writer[value]
                ):
                    source = writer[value].inputs[0]
                    if phase_of.get(source) != "forward":
                        break
                    value = source
                if value in local and local[value] > 0:
                    found[value] = local[value]
        return found

    def _same_bytes(self, value: int, op: Op) -> bool:
        have, had = (self.space.homes[self.tags[v]] for v in (value, op.inputs[0]))
        ways = self.space.layouts.ways
        return bool(np.all(ways(have.layouts)[0] == ways(had.layouts)[0]))


def _passing(lives: Lifetimes, values: frozenset[int]) -> Lifetimes:
    """The same lives, but these values are gone as soon as they are made."""
    segments = tuple(
        replace(s, end=s.start, last=s.first) if s.value in values else s for s in lives.segments
    )
    return replace(lives, segments=segments)


def _common_end(a: str, b: str) -> int:
    """How many names two paths into the state share at their ends."""
    count = 0
    for mine, theirs in zip(
        reversed(re.findall(r"\w+", a)), reversed(re.findall(r"\w+", b)), strict=False
    ):
        if mine != theirs:
            break
        count += 1
    return count
