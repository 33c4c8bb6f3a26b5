"""Recompute: drop forward values after use and compute them again in the backward pass.

    none         keep everything the backward pass reads; stages of pipelines see to cheap values (`saved.py`)
    elementwise  keep results of heavy ops; redo elementwise chains
    selective    also redo products of activations with activations (attention scores)
    full         keep only what one block hands to the next

Four more describe frameworks that run one fused kernel at a time and keep its operands
(PyTorch, Megatron-LM); they price what others ran, no plan of ours chooses them:

    fused            keep what products read and make, what is dropped out and by which mask; fused
                     kernels redo their insides
    fused-selective  the same, but for the attention scores and weights
    fused-alternate  keep attention's results and every other product with a weight (torchtitan's
                     `selective` by op: pytorch/torchtitan, activation_checkpoint.py)
    fused-full       run a block's whole forward pass again, also what nobody reads of it

`recompute(graph, phases, policy)` returns a graph in which backward readers of a
dropped value read a copy of the op instead, placed before its first reader behind
an `optimization_barrier` on a value of the backward pass, so that a compiler
neither merges it with the original nor starts it early. The backward pass goes on
from the barrier's result: XLA drops what a barrier holds and nobody reads. Loops over
layers: the forward loop hands over fewer stacked values and the backward loop redoes its body.

Source of `selective`: Korthikanti et al., "Reducing Activation Recomputation in
Large Transformer Models", MLSys 2023, section 4.2.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal
from zlib import crc32

from ..graph import Graph, Op, Region, TensorType
from ..ops import CONTRACTIONS, CONTROL_FLOW, KERNELS, MOVEMENT, REDUCTIONS
from ..values import BlockInstance, FreshIds, block_instances

Policy = Literal[
    "none",
    "elementwise",
    "selective",
    "full",
    "fused",
    "fused-selective",
    "fused-alternate",
    "fused-full",
]
POLICIES: tuple[Policy, ...] = (
    "none",
    "elementwise",
    "selective",
    "full",
)  # what a plan may choose

AGAIN = "~again"  # ends the tags of ops that are computed again
COSTLY = (KERNELS - MOVEMENT) | REDUCTIONS | CONTROL_FLOW


def recompute(
    graph: Graph, phases: Sequence[str], policy: Policy, per_example: Collection[int] | None = None
) -> Graph:
    """Apply one policy; see the module's docstring.

    Args:
        phases: one entry per top-level op.
        per_example: values that exist once per microbatch. Only these may hold
            a copy back, or the copy would wait for the whole batch. None: any value.
    """
    if policy == "none":
        return graph
    fresh = FreshIds(graph)
    gates = graph.types.keys() if per_example is None else per_example
    graph = _recompute_loops(graph, phases, policy, gates, fresh)
    graph = _recompute_flat(graph, phases, policy, gates, fresh)
    return replace(graph, types=fresh.types)


# ---------------------------------------------------------------- ops outside loops


@dataclass(frozen=True)
class _Flat:
    """The facts one policy is decided on."""

    writer: dict[int, int]  # value -> position of the top-level op that makes it
    group: Sequence[BlockInstance]  # block instance of each op
    kept: frozenset[int]


def _recompute_flat(
    graph: Graph, phases: Sequence[str], policy: Policy, gates: Collection[int], fresh: FreshIds
) -> Graph:
    facts = _facts(graph, phases, policy)
    wanted: dict[BlockInstance, list[int]] = {}
    readers: dict[BlockInstance, int] = {}
    for position, op in enumerate(graph.ops):
        if phases[position] != "backward":
            continue
        for value in op.inputs:
            at = facts.writer.get(value)
            if at is None or phases[at] != "forward" or value in facts.kept:
                continue
            if at < readers.setdefault(
                facts.group[at], position
            ):  # else made later: a loss that is made again
                wanted.setdefault(facts.group[at], []).append(value)
    if not wanted:
        return graph
    again: dict[BlockInstance, list[int]] = {}
    for position, phase in enumerate(phases) if policy == "fused-full" else ():
        if (
            phase == "forward"
            and facts.group[position] in wanted
            and facts.group[position] is not None
        ):
            again.setdefault(facts.group[position], []).append(position)
    return _splice(graph, phases, facts, wanted, again, readers, gates, fresh)


def _facts(graph: Graph, phases: Sequence[str], policy: Policy) -> _Flat:
    writer = {v: i for i, op in enumerate(graph.ops) for v in op.outputs}
    group = block_instances(graph.ops)
    forward = [i for i, phase in enumerate(phases) if phase == "forward"]
    products = _activation_products(graph, forward)
    readers: dict[int, list[int]] = {}
    for i in forward:
        for value in graph.ops[i].inputs:
            readers.setdefault(value, []).append(i)
    kept = set(graph.outputs)
    if policy == "fused-alternate":
        redone = _every_other(graph, forward, products, group)
        products = products - _attention_results(graph, products) | redone
    for i in forward:
        if _stays(graph.ops[i], policy, i in products, group[i] is not None):
            kept.update(graph.ops[i].outputs)
        if policy in ("fused", "fused-selective") and graph.ops[i].kind == "select_n":
            within = policy == "fused-selective" and bool(
                _reached(graph, graph.ops[i], readers) & products
            )
            kept.update(() if within else _dropped(graph, graph.ops[i], writer))
        if policy in ("fused", "fused-selective") and graph.ops[i].kind in CONTRACTIONS:
            skip = policy == "fused-selective" and i in products
            kept.update(() if skip else (v for v in graph.ops[i].inputs if v in writer))
            kept -= {graph.ops[i].outputs[0]}
            kept.update(() if skip else [_added_up(graph, graph.ops[i].outputs[0], readers)])
        for value in graph.ops[i].inputs:
            at = writer.get(value)
            if at is not None and group[at] != group[i]:
                kept.add(value)
    return _Flat(writer, group, frozenset(kept))


def _every_other(
    graph: Graph, forward: list[int], activations: set[int], group: Sequence[BlockInstance]
) -> set[int]:
    """The second, fourth, ... product with a weight of each block."""
    count: dict[BlockInstance, int] = {}
    found: set[int] = set()
    for i in forward:
        if graph.ops[i].kind in CONTRACTIONS and i not in activations and group[i] is not None:
            count[group[i]] = count.get(group[i], 0) + 1
            if count[group[i]] % 2 == 0:
                found.add(i)
    return found


def _attention_results(graph: Graph, activations: set[int]) -> set[int]:
    """Products of activations that are not larger than what they are made of."""
    return {
        i
        for i in activations
        if graph.types[graph.ops[i].outputs[0]].size
        <= max(graph.types[v].size for v in graph.ops[i].inputs)
    }


def _added_up(graph: Graph, value: int, readers: Mapping[int, list[int]]) -> int:
    """Where a product ends up after a bias and a residual were added to it: what is kept
    instead of the product itself, which may still owe a sum over devices."""
    while len(found := readers.get(value, [])) == 1 and graph.ops[found[0]].kind == "add":
        result = graph.ops[found[0]].outputs[0]
        if graph.types[result] != graph.types[value]:
            break
        value = result
    return value


def _dropped(graph: Graph, op: Op, writer: Mapping[int, int]) -> tuple[int, ...]:
    """Of a dropout (a choice by a hash or by random bits): its mask, and what it drops of."""
    at = writer.get(op.inputs[0])
    if (
        at is None
        or graph.ops[at].kind not in ("ge", "lt", "gt", "le")
        or _is_known(graph, op.inputs[0], writer)
    ):
        return ()
    scaled = writer.get(op.inputs[-1])
    source = (
        graph.ops[scaled].inputs[0]
        if scaled is not None and graph.ops[scaled].kind in ("div", "mul")
        else None
    )
    return (op.inputs[0],) if source is None else (op.inputs[0], source)


def _is_known(graph: Graph, value: int, writer: Mapping[int, int]) -> bool:
    """Whether it is made of constants alone, as a causal mask is."""
    if value not in writer:
        return value in graph.constant_ids
    return all(_is_known(graph, v, writer) for v in graph.ops[writer[value]].inputs)


def _reached(graph: Graph, op: Op, readers: Mapping[int, list[int]]) -> set[int]:
    """Positions of the forward ops that read a result, also through a conversion."""
    found: set[int] = set()
    for value in op.outputs:
        for i in readers.get(value, ()):
            found |= (
                _reached(graph, graph.ops[i], readers)
                if graph.ops[i].kind == "convert_element_type"
                else {i}
            )
    return found


def _stays(op: Op, policy: Policy, activations_only: bool, in_block: bool) -> bool:
    if policy in ("full", "fused-full") and in_block:
        return op.kind in CONTROL_FLOW
    if policy not in ("elementwise", "fused") and activations_only:
        return False
    return op.kind in COSTLY


def _activation_products(graph: Graph, forward: list[int]) -> set[int]:
    """Forward products none of whose operands comes straight from a parameter."""
    made = {v for i in forward for v in graph.ops[i].outputs}
    return {
        i
        for i in forward
        if graph.ops[i].kind in CONTRACTIONS and all(v in made for v in graph.ops[i].inputs)
    }


def _splice(
    graph: Graph,
    phases: Sequence[str],
    facts: _Flat,
    wanted: Mapping[BlockInstance, list[int]],
    whole: Mapping[BlockInstance, list[int]],
    readers: Mapping[BlockInstance, int],
    gates: Collection[int],
    fresh: FreshIds,
) -> Graph:
    """Put each group's copies before its first backward reader and redirect the readers."""
    starts = {position: group for group, position in readers.items()}
    redirect: dict[int, int] = {}
    last = {v: i for i, op in enumerate(graph.ops) if phases[i] == "backward" for v in op.inputs}
    made: list[int] = []  # by the backward pass so far, and fit to hold back
    ops: list[Op] = []
    for position, op in enumerate(graph.ops):
        if position in starts:
            group = starts[position]
            gate = next((v for v in reversed(made) if last.get(v, -1) >= position), None)
            again, names = _again(
                graph, phases, facts, wanted[group], whole.get(group, ()), gate, redirect, op, fresh
            )
            ops.extend(again)
            redirect.update(names)
        if phases[position] == "backward":
            made.extend(v for v in op.outputs if v in gates)
            op = replace(op, inputs=tuple(redirect.get(v, v) for v in op.inputs))
        ops.append(op)
    return replace(graph, ops=tuple(ops))


def _again(
    graph: Graph,
    phases: Sequence[str],
    facts: _Flat,
    wanted: Iterable[int],
    whole: Sequence[int],
    gate: int | None,
    redirect: Mapping[int, int],
    reader: Op,
    fresh: FreshIds,
) -> tuple[list[Op], dict[int, int]]:
    """The copies, and by what the backward pass reads from here on: dropped values, and the gate."""
    needed: set[int] = set(whole)
    frontier: dict[int, None] = {}
    stack = [
        *wanted,
        *(v for at in whole for v in graph.ops[at].inputs if facts.writer.get(v) not in needed),
    ]
    while stack:
        value = stack.pop()
        at = facts.writer.get(value)
        if at is None or phases[at] != "forward":
            continue
        if value in facts.kept:
            frontier[value] = None
        elif at not in needed:
            needed.add(at)
            stack.extend(graph.ops[at].inputs)
    gates = () if gate is None or not frontier else (gate,)
    tag = f"{reader.tag}~hold{_digest(graph, facts, (*frontier, *gates))}"
    barrier = fresh.barrier((*frontier, *(redirect.get(v, v) for v in gates)), tag, reader.count)
    names = dict(zip((*frontier, *gates), barrier.outputs, strict=True))
    clones = [fresh.clone(graph.ops[i], names, AGAIN, reader.count) for i in sorted(needed)]
    kept_names = {v: n for v, n in names.items() if v not in frontier}
    return ([barrier, *clones] if frontier else clones), kept_names


def _digest(graph: Graph, facts: _Flat, held: Iterable[int]) -> str:
    """Tells barriers apart that hold different things, as a first and a last layer's may."""
    names = [
        f"{graph.ops[at].tag}:{graph.ops[at].outputs.index(v)}"
        for v in held
        for at in [facts.writer[v]]
    ]
    return f"{crc32(' '.join(names).encode()):08x}"


# ---------------------------------------------------------------- loops over layers


def _recompute_loops(
    graph: Graph, phases: Sequence[str], policy: Policy, gates: Collection[int], fresh: FreshIds
) -> Graph:
    ops = list(graph.ops)
    writer = {v: i for i, op in enumerate(ops) for v in op.outputs}
    for position, op in enumerate(graph.ops):
        if phases[position] != "backward" or op.kind != "scan":
            continue
        sources = {writer[v] for v in _xs(op) if v in writer}
        for at in sorted(sources):
            if ops[at].kind == "scan" and phases[at] == "forward" and ops[at].trips == op.trips:
                others = _read_elsewhere(graph, at, position)
                ops[at], ops[position] = _redo_loop(
                    ops[at], ops[position], others, policy, gates, fresh
                )
    return replace(graph, ops=tuple(ops))


def _xs(op: Op) -> tuple[int, ...]:
    return op.inputs[sum(op.loop_inputs) :]


def _read_elsewhere(graph: Graph, forward: int, backward: int) -> set[int]:
    """Results of the forward loop that someone other than the backward loop's xs reads."""
    read = set(graph.outputs) | set(graph.ops[backward].inputs[: -len(_xs(graph.ops[backward]))])
    for i, op in enumerate(graph.ops):
        if i != backward:
            read.update(op.inputs)
    return read & set(graph.ops[forward].outputs)


def _redo_loop(
    forward: Op,
    backward: Op,
    read_elsewhere: set[int],
    policy: Policy,
    gates: Collection[int],
    fresh: FreshIds,
) -> tuple[Op, Op]:
    body, (_, carry) = forward.regions[0], forward.loop_inputs
    handed = dict(
        zip(forward.outputs[carry:], body.outputs[carry:], strict=True)
    )  # stacked -> inner
    kept = _kept_in_loop(body, policy)
    dropped = {s: v for s, v in handed.items() if v not in kept and s in _xs(backward)}
    if not dropped:
        return forward, backward
    needed, frontier = _trace_back(body, list(dropped.values()), kept)
    stay = [s for s in handed if s not in dropped or s in read_elsewhere]
    have = {handed[s]: s for s in stay}
    save = [v for v in frontier if v not in have and v not in _given(forward)]
    stacks = {v: fresh.value(_stacked(fresh.types[v], forward.trips)) for v in save}
    new_forward = replace(
        forward,
        outputs=(*forward.outputs[:carry], *stay, *stacks.values()),
        regions=(
            replace(body, outputs=(*body.outputs[:carry], *(handed[s] for s in stay), *save)),
        ),
    )
    return new_forward, _redo_in_backward(
        forward, backward, dropped, needed, frontier, {**have, **stacks}, gates, fresh
    )


def _kept_in_loop(body: Region, policy: Policy) -> frozenset[int]:
    made = {v for op in body.ops for v in op.outputs}
    kept = set(body.inputs)
    for op in body.ops:
        activations = op.kind in CONTRACTIONS and all(v in made for v in op.inputs)
        if _stays(op, policy, activations, True):
            kept.update(op.outputs)
    return frozenset(kept)


def _trace_back(
    body: Region, wanted: list[int], kept: frozenset[int]
) -> tuple[list[Op], list[int]]:
    """Ops to redo, in order, and the kept values they start from."""
    writer = {v: op for op in body.ops for v in op.outputs}
    redo: set[int] = set()
    frontier: dict[int, None] = {}
    while wanted:
        value = wanted.pop()
        if value in kept:
            frontier[value] = None
        elif value in writer and id(writer[value]) not in redo:
            redo.add(id(writer[value]))
            wanted.extend(writer[value].inputs)
    return [op for op in body.ops if id(op) in redo], list(frontier)


def _given(loop: Op) -> dict[int, tuple[str, int]]:
    """Inner name -> how it is handed in: a constant or an xs of the loop, by outer value."""
    consts, first_xs = loop.loop_inputs[0], sum(loop.loop_inputs)
    pairs = list(zip(loop.regions[0].inputs, loop.inputs, strict=True))
    return {
        **{inner: ("const", outer) for inner, outer in pairs[:consts]},
        **{inner: ("xs", outer) for inner, outer in pairs[first_xs:]},
    }


def _redo_in_backward(
    forward: Op, backward: Op, dropped: dict[int, int], needed: list[Op], frontier: list[int],
    stacks: dict[int, int], gates: Collection[int], fresh: FreshIds,
) -> Op:  # fmt: skip
    given, body = _given(forward), backward.regions[0]
    consts, first_xs = backward.loop_inputs[0], sum(backward.loop_inputs)
    new_consts: list[tuple[int, int]] = []  # (outer, inner)
    new_xs: list[tuple[int, int]] = []
    names: dict[int, int] = {}
    for value in frontier:
        kind, outer = given.get(value, ("xs", stacks.get(value, -1)))
        inner = fresh.value(fresh.types[value])
        (new_consts if kind == "const" else new_xs).append((outer, inner))
        names[value] = inner
    saved = [names[v] for v in frontier if v not in given]
    gate = [v for v in body.inputs[consts:first_xs] if v in gates][:1]
    barrier = fresh.barrier((*saved, *gate), f"{backward.tag}/hold", 1)
    held = dict(zip((*saved, *gate), barrier.outputs, strict=True))
    names = {v: held.get(n, n) for v, n in names.items()}
    clones = [fresh.clone(op, names, AGAIN, 1) for op in needed]
    outer_xs = list(zip(_xs(backward), body.inputs[first_xs:], strict=True))
    swap = {inner: names[dropped[outer]] for outer, inner in outer_xs if outer in dropped}
    swap |= {v: held[v] for v in gate if saved}
    left = [(outer, inner) for outer, inner in outer_xs if outer not in dropped]
    ops = (*([barrier] if saved else []), *clones, *(_renamed(op, swap) for op in body.ops))
    old_consts = list(zip(backward.inputs[:consts], body.inputs[:consts], strict=True))
    old_carry = list(
        zip(backward.inputs[consts:first_xs], body.inputs[consts:first_xs], strict=True)
    )
    pairs = [*old_consts, *new_consts, *old_carry, *left, *new_xs]
    return replace(
        backward,
        inputs=tuple(outer for outer, _ in pairs),
        attrs=tuple(
            (k, len(old_consts) + len(new_consts)) if k == "num_consts" else (k, v)
            for k, v in backward.attrs
        ),
        regions=(
            Region(
                tuple(inner for _, inner in pairs),
                ops,
                tuple(swap.get(v, v) for v in body.outputs),
            ),
        ),
    )


def _renamed(op: Op, names: dict[int, int]) -> Op:
    return replace(op, inputs=tuple(names.get(v, v) for v in op.inputs))


def _stacked(kind: TensorType, trips: int) -> TensorType:
    return TensorType(kind.dtype, (trips, *kind.shape))
