"""A pipeline of equal stages as one local program per device, under `shard_map` with an axis of stages.

    share      1 2       1 2        each stage: the front (embeddings) of its share of the microbatches
    stage 0    1 2 3 4 . .          forward ticks: the layers of one microbatch, then a `ppermute` to the next
    stage 1    . 1 2 3 4 .
    stage 2    . . 1 2 3 4
    share      1 2       1 2        the back (head, loss) of its share, forward and backward
    ...                             backward ticks, the last microbatch first; the front's backward pass; updates

In a tick all stages wait for the slowest; a stage without a microbatch does nothing. What the forward pass of
a tick leaves for the backward pass of the same tick is kept, so every stage holds all microbatches (GPipe).
Front and back, with their parameters and their updates, are on every stage alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ...ir.graph import Op
from ...ir.mesh import STAGE
from ...ir.passes.microbatch import TimeAxis
from ...ir.pipeline.layered import Layered
from ...ir.sharding import Sharding, replicated
from .dtypes import jax_dtype
from .joins import JOIN, settle, start
from .spmd import KnownValues, LocalArray, LocalStep, stacked

Values = dict[int, Any]  # value -> its local array


@dataclass
class SingleStep:
    """Callable on the local shards of inputs: those that all stages share, then each stage's own; returns
    those of results in the same order. `shared` are positions."""

    local: LocalStep
    parts: Layered
    time: TimeAxis
    shared_inputs: Sequence[int]
    shared_outputs: Sequence[int]
    layouts: dict[int, Sharding] = field(default_factory=dict)  # of values that leave a pass

    def __post_init__(self) -> None:
        graph, parts = self.local.graph, self.parts
        late = [op for each in parts.rounds for op in (*each.alike, *each.own)]
        self.summed = {v for op in late for v in op.inputs} | {
            v for each in parts.rounds for v in each.gathered
        }
        self.summed = (self.summed | set(graph.outputs)) & self.time.totals.keys()
        self.many, self.stages = self.local.plan.microbatches, parts.stages
        self.share = -(
            -self.many // self.stages
        )  # microbatches whose front and back one stage runs, at most
        self.batch = [v for v in graph.inputs if v in self.time.split]

    def __call__(self, *arrays: Any) -> tuple[Any, ...]:
        local, parts = self.local, self.parts
        self.here = lax.axis_index(STAGE)
        self.known = KnownValues()
        positions = (*self.shared_inputs, *(each[0] for each in parts.inputs))
        for position, array in zip(positions, arrays, strict=True):
            value = local.graph.inputs[position]
            whole = (
                array.reshape(local.types[value].shape) if local.types[value].rank == 0 else array
            )
            self.known.values[value] = LocalArray(
                whole, local.decisions.slot(local.decisions.tags[value])
            )
        local.run(parts.prepare, self.known)
        self._totals(self._passes())
        return self._results(*self._update())

    # ------------------------------------------------------------ passes

    def _passes(self) -> Values:
        """All passes of all microbatches; the totals."""
        parts, last = self.parts, self.parts.names[-1]
        of_back = _read(parts.front.backward)
        of_front = of_back | _read((*parts.back.forward, *parts.back.backward))
        borders = (*parts.taken, *parts.fed)

        front, sums = self._shares(parts.front.forward, {}, {*borders, *of_front})
        feed = self._feed(parts, front)
        left, forward = self._forward(feed)
        ends = {
            last[v]: self._dealt(left[v][self.stages - 1 :], self.stages - 1) for v in parts.to_back
        }
        self.layouts |= {last[v]: self.layouts[v] for v in parts.to_back}

        passes, returns = (
            (*parts.back.forward, *parts.back.backward),
            {last[v] for v in parts.wanted},
        )
        back, ending = self._shares(passes, {**front, **ends}, {*returns, *of_back})
        grads = {v: self._gathered(back[last[v]]) for v in parts.wanted}
        self.layouts |= {v: self.layouts[last[v]] for v in parts.wanted}

        begin, backward = self._backward(left, feed, grads)
        begin = {v: self._dealt(begin[v][: self.many], 0) for v in parts.to_front}
        _, starting = self._shares(parts.front.backward, {**front, **back, **begin}, set())
        alike = {
            v: settle(a, self.time.totals[v], STAGE)
            for v, a in {**sums, **ending, **starting}.items()
        }
        return {**alike, **forward, **backward}

    def _feed(self, parts: Layered, front: Values) -> Values:
        """What the front hands to the layers, of all microbatches, laid out as layers hand it on."""
        shapes = {v: self._first(front[v]) for v in (*parts.taken, *parts.fed)}
        self._shapes(parts.layers.forward, shapes, parts.made)
        for value, made in zip(parts.taken, parts.made, strict=True):
            front = {**front, value: self._brought(front[value], value, self.layouts[made])}
        return {v: self._gathered(front[v]) for v in shapes}

    def _forward(self, feed: Values) -> tuple[Values, Values]:
        """Forward ticks: what each leaves on its stage, and totals."""
        parts = self.parts
        made = {v for op in parts.layers.forward for v in op.outputs}
        keeps = (_read(parts.layers.backward) & (made | set(parts.taken))) | set(parts.to_back)

        def layers(moment: Any, came: Values, sums: Values) -> tuple[Values, Values, Values]:
            given = {v: jnp.where(self.here == 0, feed[v][moment], came[v]) for v in parts.taken}
            given |= {v: feed[v][moment] for v in parts.fed}
            inner, sums = self._run(parts.layers.forward, moment, given, sums)
            leaves = self._pack(inner, parts.made)
            return (
                dict(zip(parts.taken, leaves.values(), strict=True)),
                sums,
                self._pack(inner, keeps),
            )

        ahead = [(stage, stage + 1) for stage in range(self.stages - 1)]
        came = {v: jnp.zeros_like(feed[v][0]) for v in parts.taken}
        left, sums = self._ticks(
            layers, came, self._zeros(parts.layers.forward, feed), {}, ahead, reverse=False
        )
        return left, sums

    def _backward(self, left: Values, feed: Values, grads: Values) -> tuple[Values, Values]:
        """Backward ticks, the last one first: what the front needs of them, and totals."""
        parts, last = self.parts, self.stages - 1
        needs = _read(parts.layers.backward)
        left = {v: array for v, array in left.items() if v in needs}
        whole = {**{v: feed[v] for v in parts.fed}, **grads}
        self._shapes(
            parts.layers.backward,
            {v: self._first(a) for v, a in {**left, **whole}.items()},
            parts.returned,
        )
        for value, returned in zip(parts.wanted, parts.returned, strict=True):
            whole[value] = self._brought(whole[value], value, self.layouts[returned])

        def layers(
            moment: Any, came: Values, sums: Values, kept: Values
        ) -> tuple[Values, Values, Values]:
            given = kept | {
                v: jnp.where(self.here == last, whole[v][moment], came[v]) for v in parts.wanted
            }
            given |= {v: whole[v][moment] for v in parts.fed}
            inner, sums = self._run(parts.layers.backward, moment, given, sums)
            leaves = self._pack(inner, parts.returned)
            return (
                dict(zip(parts.wanted, leaves.values(), strict=True)),
                sums,
                self._pack(inner, parts.to_front),
            )

        behind = [(stage + 1, stage) for stage in range(self.stages - 1)]
        came = {v: jnp.zeros_like(whole[v][0]) for v in parts.wanted}
        zeros = self._zeros(parts.layers.backward, {**left, **whole})
        return self._ticks(layers, came, zeros, left, behind, reverse=True)

    def _ticks(
        self, layers: Callable[..., Any], came: Values, sums: Values, kept: Values, ways: Sequence[tuple[int, int]],
        reverse: bool,
    ) -> tuple[Values, Values]:  # fmt: skip
        """Ticks in which stage s has microbatch `tick - s`, or none."""

        def tick(state: Any, now: Any) -> Any:
            (came, sums), (at, kept) = state, now
            number = at - self.here
            moment = jnp.clip(number, 0, self.many - 1)
            args = (moment, came, sums, kept) if reverse else (moment, came, sums)
            shapes = jax.eval_shape(layers, *args)

            def idle(*_: Any) -> Any:
                gone, _, made = shapes
                return jax.tree.map(_zero, gone), sums, jax.tree.map(_zero, made)

            gone, sums, made = lax.cond((number >= 0) & (number < self.many), layers, idle, *args)
            came = {v: lax.ppermute(array, STAGE, ways) for v, array in gone.items()}
            return (came, sums), made

        count = self.many + self.stages - 1
        (_, sums), made = lax.scan(tick, (came, sums), (jnp.arange(count), kept), reverse=reverse)
        return made, sums

    def _shares(
        self, ops: Sequence[Op], given: Values, keeps: Iterable[int]
    ) -> tuple[Values, Values]:
        """Run a part for this stage's share of the microbatches: what is kept of each, and totals."""
        made = {v for op in ops for v in op.outputs}
        keeps = [v for v in keeps if v in made]
        read = _read(ops)
        given = {v: array for v, array in given.items() if v in read}
        sums = self._zeros(ops, given)

        def one(sums: Values, now: Any) -> Any:
            at, given = now
            number = self.here * self.share + at

            def run(moment: Any, given: Values, sums: Values) -> Any:
                inner, sums = self._run(ops, moment, given, sums)
                return sums, self._pack(inner, keeps)

            args = (jnp.minimum(number, self.many - 1), given, sums)
            shapes = jax.eval_shape(run, *args)
            idle = lambda *_: (sums, jax.tree.map(_zero, shapes[1]))  # noqa: E731
            return lax.cond(number < self.many, run, idle, *args)

        sums, kept = lax.scan(one, sums, (jnp.arange(self.share), given))
        return kept, sums

    # ------------------------------------------------------------ one pass

    def _run(
        self, ops: Sequence[Op], moment: Any, given: Values, sums: Values
    ) -> tuple[KnownValues, Values]:
        """One pass of one microbatch, and the totals with it."""
        local = self.local
        inner = KnownValues(dict(self.known.values), moment)
        for value in self.batch:
            held = inner.values[value]
            inner.values[value] = LocalArray(
                local.now(held, held.layout, self.time.split[value], inner), held.layout
            )
        inner.values |= {v: LocalArray(array, self.layouts[v]) for v, array in given.items()}
        local.run(ops, inner)
        parts = {v: inner.values[v].array.astype(total.dtype) for v, total in sums.items()}
        self.layouts |= {v: inner.values[v].layout for v in sums}
        return inner, {v: JOIN[self.time.totals[v]](total, parts[v]) for v, total in sums.items()}

    def _zeros(self, ops: Sequence[Op], given: Values) -> Values:
        """Totals before the first microbatch; `given` of all microbatches."""
        wanted = [v for op in ops for v in op.outputs if v in self.summed]
        read = _read(ops)
        shapes = self._shapes(
            ops, {v: self._first(a) for v, a in given.items() if v in read}, wanted
        )
        return {v: start(self.time.totals[v], shapes[v]) for v in wanted}

    def _shapes(self, ops: Sequence[Op], given: Values, values: Iterable[int]) -> Mapping[int, Any]:
        """Of what a pass makes; their layouts are known afterwards."""

        def run(moment: Any, given: Values) -> Values:
            return self._pack(self._run(ops, moment, given, {})[0], values)

        return jax.eval_shape(run, jax.ShapeDtypeStruct((), jnp.int32), given)

    def _pack(self, inner: KnownValues, values: Iterable[int]) -> Values:
        self.layouts |= {v: inner.values[v].layout for v in values}
        return {v: inner.values[v].array for v in values}

    @staticmethod
    def _first(array: Any) -> Any:
        return jax.ShapeDtypeStruct(array.shape[1:], array.dtype)

    # ------------------------------------------------------------ between stages

    def _brought(self, array: Any, value: int, layout: Sharding) -> Any:
        """A value of several microbatches in another layout, which is its from now on."""
        found = self.local.bring(LocalArray(array, stacked(self.layouts[value])), stacked(layout))
        self.layouts[value] = layout
        return found

    def _gathered(self, array: Any) -> Any:
        """All stages' shares, one after another."""
        return lax.all_gather(array, STAGE, tiled=True)

    def _dealt(self, array: Any, source: int) -> Any:
        """This stage's share of what one stage has of all microbatches."""
        spare = self.share * self.stages - self.many
        padded = (
            jnp.concatenate([array, jnp.zeros((spare, *array.shape[1:]), array.dtype)])
            if spare
            else array
        )
        blocks = lax.all_to_all(padded, STAGE, 0, 0, tiled=True)
        return blocks[source * self.share : (source + 1) * self.share]

    # ------------------------------------------------------------ after the last microbatch

    def _totals(self, totals: Values) -> None:
        types = self.local.types
        for value, array in totals.items():
            self.known.values[value] = LocalArray(
                array.astype(jax_dtype(types[value].dtype)), self.layouts[value]
            )

    def _update(self) -> tuple[KnownValues, KnownValues]:
        """What all stages have alike afterwards, and what this stage has."""
        alike, own = KnownValues(dict(self.known.values)), self.known
        for each in self.parts.rounds:
            alike.values |= self._scalars(each.gathered, own)
            self.local.run(each.alike, alike)
            own.values |= {v: alike.values[v] for op in each.alike for v in op.outputs}
            self.local.run(each.own, own)
        return alike, own

    def _scalars(self, values: Sequence[int], own: KnownValues) -> dict[int, LocalArray]:
        """Scalars of all stages, those of one type together, by their numbers in the step."""
        found: dict[int, LocalArray] = {}
        whole = replicated(0)
        for dtype in dict.fromkeys(self.local.types[v].dtype for v in values):
            names = [v for v in values if self.local.types[v].dtype == dtype]
            mine = jnp.stack([self.local.bring(own.values[v], whole) for v in names])
            every = lax.all_gather(mine, STAGE)
            for stage, known in enumerate(self.parts.names):
                found |= {known[v]: LocalArray(every[stage, k], whole) for k, v in enumerate(names)}
        return found

    def _results(self, alike: KnownValues, own: KnownValues) -> tuple[Any, ...]:
        graph, layouts = self.local.graph, self.local.decisions.output_layouts()
        shared = [(o, alike) for o in self.shared_outputs]
        results = []
        for o, scope in (*shared, *((each[0], own) for each in self.parts.outputs)):
            array = self.local.bring(scope.values[graph.outputs[o]], layouts[o])
            results.append(array[None] if scope is own and array.ndim == 0 else array)
        return tuple(results)


def _read(ops: Iterable[Op]) -> set[int]:
    return {v for op in ops for v in op.inputs}


def _zero(shape: jax.ShapeDtypeStruct) -> jax.Array:
    return jnp.zeros(shape.shape, shape.dtype)
