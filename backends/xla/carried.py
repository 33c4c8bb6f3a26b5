"""Which arguments a step hands back to itself: the state.

    step(state, batch)           -> (state, metrics)        state is result[0]
    step(params, opt, batch)     -> loss, params, opt       params is result[1], opt result[2]
    step((params, opt), batch)   -> params, opt, loss       parts of an argument, too

An argument subtree (a whole argument first, else its children) is carried when a
result subtree (the whole result, its children, their children) has the same tree and
types, and at least one of its leaves reaches its counterpart elementwise: every op on
the way keeps the element in its place. So a learning rate is not carried to a loss of the
same type, nor images to reconstructions made by matrix products. Random keys, which
are split rather than updated, need only depend on their counterpart.

Pairs that are known, of objects updated in place, are only asked for their types.

Where several result subtrees fit, one whose key is the argument's name wins, else the
first; likewise the first of several arguments takes it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from ...ir.graph import Graph, Op
from ...ir.rules import rule_of

_KEYLIKE = frozenset({"key", "u32"})


@dataclass(frozen=True)
class _Part:
    """A subtree: its leaves are `start .. start + tree.num_leaves`; `key` is its place above."""

    tree: Any
    start: int
    key: str = ""

    @property
    def leaves(self) -> range:
        return range(self.start, self.start + self.tree.num_leaves)

    @property
    def is_leaf(self) -> bool:
        return jax.tree_util.treedef_is_leaf(self.tree)


def carried_state(
    graph: Graph, in_tree: Any, out_tree: Any, known: Sequence[tuple[int, int]] = ()
) -> tuple[tuple[int, int], ...]:
    """Pairs of (input position, output position), by input.

    `out_tree` is of the result alone, whose leaves are the first outputs.
    """
    reach = _reached_by(graph)
    names = _keys(in_tree, 1, graph.input_names)
    args, kwargs = _children(_Part(in_tree, 0))
    whole = [*_children(args), *_children(kwargs)]
    whole = [_Part(p.tree, p.start, names.get(p.start, "")) for p in whole]
    pairs = {
        i: o for i, o in known if graph.types[graph.inputs[i]] == graph.types[graph.outputs[o]]
    }
    objects = {i for i, _ in known}
    taken: set[int] = set()
    for part in whole:
        mixed = not objects.isdisjoint(part.leaves)
        found = (
            None if mixed else _match(graph, part, out_tree, reach, taken, deep=not part.is_leaf)
        )
        if found is None:
            for child in (c for c in _children(part) if objects.isdisjoint(c.leaves)):
                pairs.update(_match(graph, child, out_tree, reach, taken, deep=False) or {})
        else:
            pairs.update(found)
    return tuple(sorted(pairs.items()))


def _match(
    graph: Graph, part: _Part, out_tree: Any, reach: Mapping[int, frozenset[int]],
    taken: set[int], deep: bool,
) -> dict[int, int] | None:  # fmt: skip
    """The result subtree this part is carried to; its leaves are then taken."""
    fits = [
        goal for goal in _goals(out_tree, graph.output_names, deep)
        if goal.tree == part.tree and part.tree.num_leaves
        and taken.isdisjoint(goal.leaves) and _is_carried(graph, part, goal, reach)
    ]  # fmt: skip
    if not fits:
        return None
    best = next((goal for goal in fits if goal.key == part.key), fits[0])
    taken.update(best.leaves)
    return dict(zip(part.leaves, best.leaves, strict=True))


def _is_carried(
    graph: Graph, part: _Part, goal: _Part, reach: Mapping[int, frozenset[int]]
) -> bool:
    pairs = list(zip(part.leaves, goal.leaves, strict=True))
    types = graph.types
    if any(types[graph.inputs[i]] != types[graph.outputs[o]] for i, o in pairs):
        return False
    return any(i in reach.get(graph.outputs[o], ()) for i, o in pairs)


# ---------------------------------------------------------------- trees


def _children(part: _Part) -> list[_Part]:
    if part.is_leaf:
        return []
    parts, start = [], part.start
    for tree in part.tree.children():
        parts.append(_Part(tree, start))
        start += tree.num_leaves
    return parts


def _goals(out_tree: Any, names: Sequence[str], deep: bool) -> list[_Part]:
    """The whole result, its children and, where wanted, theirs."""
    root = _Part(out_tree, 0)
    children = _children(root)
    keys = _keys(out_tree, 0, names)
    named = [_Part(p.tree, p.start, keys.get(p.start, "")) for p in children]
    if deep:
        inner_keys = _keys(out_tree, 1, names)
        for child in children:
            named += [_Part(p.tree, p.start, inner_keys.get(p.start, "")) for p in _children(child)]
    return [root, *named]


def _keys(tree: Any, depth: int, names: Sequence[str]) -> dict[int, str]:
    """First leaf -> the name at this depth of its path (for arguments: their own names)."""
    paths = jax.tree_util.tree_leaves_with_path(jax.tree.unflatten(tree, range(tree.num_leaves)))
    found: dict[int, str] = {}
    for position, (path, _) in enumerate(paths):
        if len(path) > depth:
            key = path[depth]
            word = getattr(key, "name", getattr(key, "key", None))
            found[position] = word if isinstance(word, str) else _leading_word(names, position)
    return found


def _leading_word(names: Sequence[str], position: int) -> str:
    """`state` of "state.params['w']"."""
    name = names[position] if position < len(names) else ""
    return name.partition(".")[0].partition("[")[0]


# ---------------------------------------------------------------- elementwise reach


def _reached_by(graph: Graph) -> dict[int, frozenset[int]]:
    """Value -> positions of the inputs whose elements it holds in place, changed or not."""
    reach = {v: frozenset({p}) for p, v in enumerate(graph.inputs)}
    _follow(graph, graph.ops, reach)
    return reach


def _follow(graph: Graph, ops: Sequence[Op], reach: dict[int, frozenset[int]]) -> None:
    for op in ops:
        if not any(v in reach for v in op.inputs):
            continue
        if op.regions:
            _follow_loop(graph, op, reach)
            continue
        for result, sources in zip(op.outputs, _in_place(graph, op, reach), strict=True):
            found = frozenset().union(*(reach[v] for v in sources))
            if found:
                reach[result] = found


def _in_place(graph: Graph, op: Op, reach: Mapping[int, frozenset[int]]) -> Iterator[list[int]]:
    """For each result, the operands whose elements stay where they were."""
    types = graph.types
    if op.kind == "optimization_barrier":
        yield from ([v] if v in reach else [] for v in op.inputs)
        return
    rule = None
    for k, result in enumerate(op.outputs):
        sources = []
        for i, v in enumerate(op.inputs):
            if v not in reach:
                continue
            if types[v].dtype in _KEYLIKE and types[result].dtype in _KEYLIKE:
                sources.append(v)
            elif types[v].shape == types[result].shape:
                rule = rule or rule_of(op, types)
                if not rule.opaque and rule.operands[i] == rule.results[k]:
                    sources.append(v)
        yield sources


def _follow_loop(graph: Graph, op: Op, reach: dict[int, frozenset[int]]) -> None:
    for region in op.regions:
        for outside, inside in zip(op.inputs, region.inputs, strict=True):
            if outside in reach:
                reach[inside] = reach[outside]
        _follow(graph, region.ops, reach)
    for region in op.returning:
        for outside, inside in zip(op.outputs, region.outputs, strict=True):
            if inside in reach:
                reach[outside] = reach.get(outside, frozenset()) | reach[inside]
