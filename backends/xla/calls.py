"""One call of a user's step as arrays in, arrays out, by the convention of the library it is written in.

    jax        leaves are arrays and numbers; anything else in the arguments is refused
    nnx        modules, optimizers and metrics are split into arrays; what the step does to them in place comes
               out beside its result and is written back to the user's own objects
    equinox    leaves that are no arrays are static, in the arguments and in the result

A step without a wrapper is read by what it is given: nnx objects make it nnx's, and in equinox modules what is no
array is static. What is static (graph definitions and leaves too) is part of the key of a call.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from ...ir.errors import CaptureError
from .compat import Tracer
from .steps import UserStep, argument_names, equinox, is_nnx, nnx, nnx_node, parameter_names


@dataclass
class Ends:
    """What a trace found out about a step's two ends, beyond the arrays that go in and come out.

    Results are those of the step first, then those of `objects`: what nnx objects hold after it.
    """

    tree: Any = None  # of what comes out: the result, or (result, objects) where there are objects
    result: Any = (
        None  # tree of the result alone, without what is fixed and with a list for each nnx object
    )
    pairs: tuple[tuple[int, int], ...] = ()  # of input and output: the same variable of an object
    input_names: dict[int, str] = field(default_factory=dict)  # of variables
    output_names: tuple[str, ...] = ()
    objects: tuple[Any, ...] = ()  # nnx's graph definitions
    nodes: Any = None  # tree of the result with nnx objects as leaves
    made: dict[int, Any] = field(default_factory=dict)  # leaf of it -> graph definition
    whole: Any = None  # tree of the result with what is fixed
    fixed: dict[int, Any] = field(default_factory=dict)  # leaf of it -> what is no array
    lost: tuple[
        str, ...
    ] = ()  # arguments that the step changes in place; their new values are the last results

    @property
    def is_plain(self) -> bool:
        """Whether what comes out is the user's result as it is."""
        return not (self.objects or self.made or self.fixed)


@contextmanager
def calling(step: UserStep, args: tuple, kwargs: Mapping[str, Any]) -> Iterator[Call]:
    """A call under way: inside, it is traced, run and finished."""
    args, kwargs = (*step.given, *args), {**step.given_names, **kwargs}
    if not _is_for_nnx(step, args, kwargs):
        yield Call(step, args, kwargs)
        return
    with nnx().update_context(step):
        with nnx().split_context(step) as context:
            call = Call(step, args, kwargs, context)
        yield call


def _is_for_nnx(step: UserStep, args: tuple, kwargs: Mapping[str, Any]) -> bool:
    if step.convention == "nnx" or nnx() is None or step.convention != "plain":
        return step.convention == "nnx"
    leaves = jax.tree.leaves((args, kwargs), is_leaf=is_nnx)
    return any(isinstance(leaf, nnx_node()) for leaf in leaves)


class Call:
    """A step and its arguments, taken apart. `leaves` are the arrays; `tree` that of (args, kwargs) which holds them,
    without static arguments; `static` what else decides which program it is."""

    def __init__(self, step: UserStep, args: tuple, kwargs: Mapping[str, Any], split: Any = None):
        self.step, self.args, self.kwargs, self.for_nnx = step, args, kwargs, split is not None
        hidden = step.static | step.constant
        self.places = [i for i in range(len(args)) if i not in hidden]
        opened = tuple(args[i] for i in self.places)
        named = {k: v for k, v in kwargs.items() if k not in step.static_names}
        self.graphs: dict[int, Any] = {}
        self._nodes: Any = None
        tree = self._split((opened, named), split) if split is not None else (opened, named)
        every, self._whole = jax.tree.flatten(tree)
        self.fixed = (
            {k: every[k] for k in _fixed_leaves(step, tree, every)} if split is None else {}
        )
        self.leaves = [leaf for k, leaf in enumerate(every) if k not in self.fixed]
        self.tree = self._whole
        if self.fixed:
            kept = [None if k in self.fixed else 0 for k in range(len(every))]
            self.tree = jax.tree.structure(jax.tree.unflatten(self._whole, kept))

    @property
    def is_plain(self) -> bool:
        """Whether its arguments are arrays by position, as jax's own dispatch takes them."""
        return not (
            self.graphs
            or self.fixed
            or self.kwargs
            or len(self.places) != len(self.args)
            or self.step.given
        )

    @property
    def style(self) -> str:
        """The library whose convention this call follows."""
        if self.for_nnx:
            return "nnx"
        return "equinox" if self.fixed or self.step.convention == "equinox" else "jax"

    @property
    def static(self) -> Hashable:
        step = self.step
        chosen = [(i, self.args[i]) for i in sorted(step.static) if i < len(self.args)]
        chosen += [
            (name, self.kwargs[name]) for name in sorted(step.static_names) if name in self.kwargs
        ]
        return (tuple((name, type(value), value) for name, value in chosen), self.inner)

    @property
    def inner(self) -> Hashable:
        """What is static in the arguments that are not."""
        return (
            tuple((k, type(value), value) for k, value in self.fixed.items()),
            tuple(self.graphs),
            jax.tree.structure(
                tuple(self.graphs.values())
            ),  # compared as jax does, where a module holds a list
            self._whole if self.fixed else None,
        )

    def unhashable(self) -> tuple[str, Any]:
        """The argument that cannot be part of a key, or the part of it that is fixed."""
        names = argument_names(self.step.function, len(self.args))
        chosen = [(names[i], self.args[i]) for i in sorted(self.step.static) if i < len(self.args)]
        chosen += [
            (name, self.kwargs[name]) for name in self.step.static_names if name in self.kwargs
        ]
        chosen += [("one of its fixed leaves", value) for value in self.fixed.values()]
        chosen += [(names[i], jax.tree.structure(self.args[i])) for i in self.places]
        return next((part for part in chosen if not _is_hashable(part[1])), ("kwargs", self.kwargs))

    @property
    def donated(self) -> frozenset[int]:
        step = self.step
        if not step.donated and not step.donated_names and step.donates_rest is None:
            return frozenset()
        names = parameter_names(step.function)
        opened, named = jax.tree.unflatten(self.tree, range(len(self.leaves)))
        found: list[int] = []
        for place, part in zip(self.places, opened, strict=True):
            by_name = place < len(names) and names[place] in step.donated_names
            rest = step.donates_rest is not None and place >= step.donates_rest
            if place in step.donated or by_name or rest:
                found += jax.tree.leaves(part)
        for name, part in named.items():
            by_number = name in names and names.index(name) in step.donated
            if name in step.donated_names or by_number or step.donates_rest is not None:
                found += jax.tree.leaves(part)
        return frozenset(found)

    @property
    def names(self) -> list[str]:
        """Of the leaves, as the user would write them."""
        return [
            name
            for name, _ in self.named_leaves(jax.tree.unflatten(self.tree, range(len(self.leaves))))
        ]

    def named_leaves(
        self, tree: Any, is_leaf: Callable[[Any], bool] | None = None
    ) -> Iterator[tuple[str, Any]]:
        """Leaves of a tree like (args, kwargs) of this call, by the names of its arguments."""
        names = argument_names(self.step.function, len(self.args))
        opened, named = tree
        for name, part in [
            *((names[i], p) for i, p in zip(self.places, opened, strict=True)),
            *sorted(named.items()),
        ]:
            for path, leaf in jax.tree_util.tree_leaves_with_path(part, is_leaf=is_leaf):
                yield name + jax.tree_util.keystr(path), leaf

    # ------------------------------------------------------------ in

    def _split(self, tree: Any, context: Any) -> Any:
        """Every nnx object as the list of what its variables hold."""
        flat, self._nodes = jax.tree.flatten(tree, is_leaf=is_nnx)
        for k, leaf in enumerate(flat):
            if is_nnx(leaf):
                self.graphs[k], values = context.flatten(leaf, with_paths=False)
                flat[k] = list(values)
        return jax.tree.unflatten(self._nodes, flat)

    def _rebuilt(self, leaves: Sequence[Any]) -> tuple[Any, list[Any]]:
        """(args, kwargs) as the function takes them, from arrays; and the nnx objects among them."""
        given = iter(leaves)
        every = [
            self.fixed[k] if k in self.fixed else next(given) for k in range(self._whole.num_leaves)
        ]
        tree = jax.tree.unflatten(self._whole, every)
        if not self.graphs:
            return tree, []
        flat = self._nodes.flatten_up_to(tree)
        with nnx().merge_context(self.step, inner=True) as context:
            for k, graph in self.graphs.items():
                flat[k] = context.unflatten(graph, flat[k])
        return jax.tree.unflatten(self._nodes, flat), [flat[k] for k in self.graphs]

    def _run(self, opened: tuple, named: dict) -> Any:
        args = list(self.args)
        for place, value in zip(self.places, opened, strict=True):
            args[place] = value
        return self.step.function(*args, **{**self.kwargs, **named})

    # ------------------------------------------------------------ out

    def pure(self, ends: Ends, keep_lost: bool = False) -> Callable[..., list[Any]]:
        """The step as a function of its leaves; what it returns besides arrays is left in `ends`."""

        def flat(*leaves: Any) -> list[Any]:
            tree, objects = self._rebuilt(leaves)
            before = self._mutable(tree)
            held = _variables(objects) if objects else []
            result = self._run(*tree)
            arrays, after = self._result(result, objects, ends)
            self._pair(held, after, ends)
            lost = self._lost(before, tree, arrays)
            ends.lost = tuple(lost)
            return [*arrays, *lost.values()] if keep_lost else arrays

        flat.__name__ = flat.__qualname__ = self.step.name.rpartition(".")[2] or "step"
        return flat

    def _result(self, result: Any, objects: list[Any], ends: Ends) -> tuple[list[Any], list[Any]]:
        updates: list[Any] = []
        if self.for_nnx:
            with nnx().split_context(self.step) as context:
                updates = [context.flatten(node, with_paths=True) for node in objects]
                nodes, ends.nodes = jax.tree.flatten(result, is_leaf=is_nnx)
                for k, node in enumerate(nodes):
                    if is_nnx(node):
                        ends.made[k], values = context.flatten(node, with_paths=False)
                        nodes[k] = list(values)
            result = jax.tree.unflatten(ends.nodes, nodes)
        every, ends.whole = jax.tree.flatten(result)
        ends.fixed = {k: leaf for k, leaf in enumerate(every) if self._is_fixed(leaf)}
        kept = jax.tree.unflatten(
            ends.whole, [None if k in ends.fixed else leaf for k, leaf in enumerate(every)]
        )
        ends.result = jax.tree.structure(kept)
        paths = jax.tree_util.tree_leaves_with_path(kept)
        ends.output_names = tuple("result" + jax.tree_util.keystr(path) for path, _ in paths)
        _check_results(ends.output_names, [leaf for _, leaf in paths])
        ends.objects = tuple(graph for graph, _ in updates)
        values = [[_raw(leaf) for leaf in state.leaves] for _, state in updates]
        ends.tree = jax.tree.structure((kept, values)) if updates else ends.result
        after = [
            list(zip(state.paths, value, strict=True))
            for (_, state), value in zip(updates, values, strict=True)
        ]
        return [leaf for _, leaf in paths] + jax.tree.leaves(values), after

    def _is_fixed(self, leaf: Any) -> bool:
        if self.step.convention == "equinox":
            return not _is_array(leaf)
        return bool(self.fixed) and not is_value(leaf)

    def _pair(self, before: list[Any], after: list[Any], ends: Ends) -> None:
        """Variables of nnx objects by their paths: their names, and which output updates which input."""
        if not before:
            return
        inputs = self._nodes.flatten_up_to(jax.tree.unflatten(self.tree, range(len(self.leaves))))
        places = iter(range(ends.result.num_leaves, ends.tree.num_leaves))
        names = self._object_names()
        pairs, made = [], []
        for k, name, old, new in zip(self.graphs, names, before, after, strict=True):
            known = {path: jax.tree.leaves(inputs[k][j]) for j, path in enumerate(old)}
            for path in old:
                ends.input_names.update(_named(known[path], _variable(name, path)))
            for path, value in new:
                outputs = [next(places) for _ in jax.tree.leaves(value)]
                made += _named(outputs, _variable(name, path)).values()
                if len(known.get(path, ())) == len(outputs):
                    pairs += zip(known[path], outputs, strict=True)
        ends.pairs, ends.output_names = tuple(pairs), (*ends.output_names, *made)

    def _object_names(self) -> list[str]:
        found = {
            k: name
            for name, k in self.named_leaves(
                jax.tree.unflatten(self._nodes, range(self._nodes.num_leaves))
            )
        }
        return [found[k] for k in self.graphs]

    def _mutable(self, tree: Any) -> dict[str, Any]:
        return dict(self.named_leaves(tree, is_nnx if self.for_nnx else None))

    def _lost(self, before: Mapping[str, Any], tree: Any, arrays: Sequence[Any]) -> dict[str, Any]:
        """What the step put into its arguments in place, where jax loses it, and does not return."""
        kept = set(map(id, arrays))
        return {
            name: getattr(leaf, "primal", leaf)  # where it was put there inside of jax.grad
            for name, leaf in self._mutable(tree).items()
            if before.get(name) is not leaf and isinstance(leaf, Tracer) and id(leaf) not in kept
        }

    def finish(self, found: Any, ends: Ends) -> Any:
        """The user's result from what came out; objects are updated."""
        result, updates = found if ends.objects else (found, ())
        if ends.fixed:
            arrays = iter(ends.result.flatten_up_to(result))
            every = [
                ends.fixed[k] if k in ends.fixed else next(arrays)
                for k in range(ends.whole.num_leaves)
            ]
            result = jax.tree.unflatten(ends.whole, every)
        if not (ends.objects or ends.made):
            return result
        with nnx().merge_context(self.step, inner=False) as context:
            for graph, values in zip(ends.objects, updates, strict=True):
                context.unflatten(graph, list(values))
            nodes = ends.nodes.flatten_up_to(result)
            for k, graph in ends.made.items():
                nodes[k] = context.unflatten(graph, nodes[k])
        return jax.tree.unflatten(ends.nodes, nodes)


# ---------------------------------------------------------------- leaves


def is_value(leaf: Any) -> bool:
    """Whether jax takes this as an array: one, a number, or the shape of one."""
    if isinstance(leaf, np.ndarray | np.generic):
        return leaf.dtype.kind in "biufcV"
    return isinstance(leaf, bool | int | float | complex) or _is_array(leaf)


def _is_array(leaf: Any) -> bool:
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def _fixed_leaves(step: UserStep, tree: Any, every: Sequence[Any]) -> list[int]:
    """Positions of leaves that are static by equinox's convention."""
    if step.convention == "equinox":
        return [k for k, leaf in enumerate(every) if not _is_array(leaf)]
    library = equinox()
    if library is None or all(map(_is_array, every)):
        return []
    found, start = [], 0
    for part in jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, library.Module)):
        stop = start + (len(jax.tree.leaves(part)) if isinstance(part, library.Module) else 1)
        if isinstance(part, library.Module):
            found += [k for k in range(start, stop) if not _is_array(every[k])]
        start = stop
    return found


def _check_results(names: Sequence[str], leaves: Sequence[Any]) -> None:
    for name, leaf in zip(names, leaves, strict=True):
        if not is_value(leaf):
            raise CaptureError(
                f"the step returns {shortened(leaf)}, a {type(leaf).__name__}, which is no array.",
                where=name,
                fix="return arrays, numbers and None; what is fixed is known outside the step",
            )


def _is_hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


def shortened(leaf: Any) -> str:
    text = repr(leaf).replace("\n", " ")
    return text if len(text) <= 60 else f"{text[:57]}..."


# ---------------------------------------------------------------- variables of nnx objects


def _variables(objects: Sequence[Any]) -> list[Any]:
    """Paths of each object's variables, shared ones where they are first met."""
    with nnx().split_context() as context:
        return [context.flatten(node, with_paths=True)[1].paths for node in objects]


def _raw(leaf: Any) -> Any:
    return leaf.get_raw_value() if isinstance(leaf, nnx().Variable) else leaf


def _variable(name: str, path: tuple) -> str:
    return ".".join([name, *map(str, path)])


def _named(places: Sequence[int], name: str) -> dict[int, str]:
    return {p: name if len(places) == 1 else f"{name}[{n}]" for n, p in enumerate(places)}
