"""A training step that plans itself: what `mw.parallelize` returns."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax

from .backends.xla.agreement import look_for_devices
from .backends.xla.by_microbatch import by_microbatch
from .backends.xla.calls import Call, Ends, calling
from .backends.xla.capture import Captured
from .backends.xla.compat import under_trace
from .backends.xla.donation import check_given_twice, given_twice
from .backends.xla.lower import OtherShapes
from .backends.xla.lower import lower as lower_plan
from .backends.xla.steps import UserStep, is_nnx
from .backends.xla.trace import check_static
from .backends.xla.verify import reference, verify_outputs, verify_together
from .ir.cluster.cluster import Cluster
from .ir.errors import UsageError
from .ir.plan import Plan
from .planner.request import Request, check_early
from .running import RunningStep, aval
from .together import plan_once, same_call
from .told import BatchArgs, batch_told
from .tracing import Options, capture_call

Planner = Callable[[Captured, Cluster | str | Path | None, Request, str], Plan]


@dataclass(eq=False)
class ParallelStep:
    """A training step that plans itself once per argument shapes and runs sharded."""

    step: Callable
    cluster: Cluster | str | Path | None
    options: Options
    request: Request
    verify: bool
    fixed: Plan | None
    find: Planner
    batch: BatchArgs = None
    _known: dict[Any, RunningStep] = field(default_factory=dict)
    _found: dict[Any, tuple[Plan, Captured]] = field(default_factory=dict)
    _quick: tuple[Callable[..., Any] | None, frozenset[int]] = (
        None,
        frozenset(),
    )  # program, what it gives up

    def __post_init__(self) -> None:
        self._inner: UserStep = self.options.peel(self.step)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        quick, donated = self._quick
        if quick is None or kwargs or under_trace():
            return self._call(args, kwargs)
        if donated and given_twice(jax.tree.leaves(args), donated):
            return self._call(args, kwargs)
        try:
            return quick(*args)
        except (OtherShapes, ValueError, TypeError):  # new shapes, trees or devices
            self._quick = (None, frozenset())
            return self._call(args, kwargs)

    def _call(self, args: tuple, kwargs: dict) -> Any:
        """Look the program up by the shapes of all arguments, making it where there is none.

        With positional arrays alone, jax looks from then on.
        """
        if under_trace():
            raise UsageError(
                "a parallelized step is a program of its own and cannot be part of a function that jax transforms "
                "(jit, grad, vmap, scan, eval_shape).",
                where=f"step `{self._inner.name}`",
                fix="call it outside; inside, use the plain function, `.__wrapped__`",
            )
        with calling(self._inner, args, kwargs) as call:
            key = _key(call)
            running = self._known.get(key)
            first = running is None
            if running is None:
                running = self._known[key] = self._prepare(key, call)
            check_given_twice(call, running.captured.graph.donated, thorough=first)
            found = (
                self._verified(running, call)
                if first and self.verify
                else self._run(running, call, call.leaves)
            )
            return call.finish(found, running.binding.ends)

    def _run(self, running: RunningStep, call: Call, leaves: Sequence[Any]) -> Any:
        """Run by jax's own dispatch where it takes these arguments; else on flat leaves."""
        lowered = running.lowered
        plain = call.is_plain and lowered.captured.binding.ends.is_plain
        quick = lowered.by_tree if plain and not lowered.joint else None
        if quick is None:
            return running.run(leaves)
        placed, _ = jax.tree.unflatten(call.tree, running.placed(leaves))
        try:
            results = quick(*placed)
        except (OtherShapes, ValueError, TypeError):  # placed otherwise than before
            return running.run(leaves)
        self._quick = (running.by_tree(), lowered.captured.graph.donated)
        return results

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        if instance is None:
            return self
        if is_nnx(instance) or not jax.tree_util.all_leaves([instance]):
            return partial(self, instance)  # a module: its arrays are an argument
        raise UsageError(
            "a method cannot be parallelized where it is defined: `self` is no array.",
            where=self._inner.name,
            fix="self.train = mw.parallelize(self.train) in __init__, or a function of arrays",
        )

    def __copy__(self) -> ParallelStep:
        return self

    def __deepcopy__(self, known: Any) -> ParallelStep:
        """As functions are copied: they are not."""
        return self

    def __reduce__(self) -> Any:
        """As functions are pickled: by name."""
        name, home = (
            getattr(self, "__qualname__", ""),
            sys.modules.get(getattr(self, "__module__", "")),
        )
        found: Any = home
        for part in name.split("."):
            found = getattr(found, part, None)
        if found is not self:
            raise UsageError(
                "a parallelized step is pickled by its name, and that name is of something else.",
                where=f"step `{self._inner.name}`",
                fix="decorate a function of a module, @mw.parallelize; or pickle the plain function and "
                "parallelize it where it is loaded",
            )
        return name

    def plan(self, *args: Any, **kwargs: Any) -> Plan:
        """The plan for these arguments (abstract ones do), found now if it was not yet."""
        with calling(self._inner, args, kwargs) as call:
            return self._plan(_key(call), call)[0]

    def lower(self, *args: Any, **kwargs: Any) -> RunningStep:
        """The program for these arguments."""
        with calling(self._inner, args, kwargs) as call:
            key = _key(call)
            if key not in self._known:
                self._known[key] = self._prepare(key, call)
            return self._known[key]

    def explain(self, *args: Any, **kwargs: Any) -> str:
        """The plan in words."""
        from .view.text import plan_text

        return plan_text(self.plan(*args, **kwargs))

    def _plan(self, key: Any, call: Call) -> tuple[Plan, Captured]:
        if key not in self._found:
            stages = self.request.pp != 1 if self.fixed is None else self.fixed.pipeline is not None
            look_for_devices()
            where = None if self.fixed else place(self.cluster, self.request)
            captured = batch_told(capture_call(call, stages), self.step, self.batch)
            same_call(captured, where, self.request, self.verify)
            found = self.fixed or plan_once(
                lambda: self.find(captured, where, self.request, self._inner.name)
            )
            self._found[key] = (found, captured)
        return self._found[key]

    def _prepare(self, key: Any, call: Call) -> RunningStep:
        return RunningStep(lower_plan(*self._plan(key, call)), self._inner, call.inner)

    def _verified(self, running: RunningStep, call: Call) -> Any:
        """Run both, compare, and return what the sharded step gave."""
        unsharded: Callable[..., Any] = jax.jit(call.pure(Ends()))
        graph, leaves, apart = running.lowered.captured.graph, call.leaves, running.lowered.apart
        unsharded = by_microbatch(running.lowered.plan, running.lowered.captured) or unsharded
        if apart is not None:
            unsharded, leaves = apart.in_pieces(unsharded), apart.apart(leaves)
        truth = reference(unsharded, running.lowered.captured, leaves)
        results = self._run(running, call, call.leaves)
        found = results if apart is None else apart.split(jax.tree.leaves(results))
        if running.lowered.joint:
            verify_together(truth, found, graph.output_names, running.lowered.rendezvous)
        else:
            verify_outputs(truth, found, graph.output_names)
        return results


def _key(call: Call) -> tuple[Any, Any, Any]:
    """What a program is cached by."""
    check_static(call)
    return (call.tree, call.static, tuple(map(aval, call.leaves)))


def place(cluster: Cluster | str | Path | None, request: Request) -> Cluster:
    """The cluster that is meant; what contradicts it is refused before anything is traced."""
    where = Cluster.local() if cluster is None else Cluster.parse(cluster)
    check_early(request, where)
    return where
