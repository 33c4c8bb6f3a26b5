"""The front door: `plan`, `lower`, `parallelize`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import jax

from .backends.xla.agreement import look_for_devices
from .backends.xla.audit import Audit, audit, audit_single
from .backends.xla.audit_pipeline import audit_pipeline
from .backends.xla.capture import Binding, Captured, convert
from .backends.xla.lower import AnyLowered, OtherShapes
from .backends.xla.lower import lower as lower_plan
from .backends.xla.lower_single import LoweredSingle
from .backends.xla.pipeline import LoweredPipeline
from .backends.xla.trace import trace
from .backends.xla.unstack import unstack
from .backends.xla.verify import reference, verify_outputs, verify_together
from .collector import paused
from .interrupts import heard
from .ir.blocks import fold
from .ir.cluster import Cluster
from .ir.errors import LoweringError, MismatchError, PlanError, UsageError
from .ir.fingerprint import fingerprint
from .ir.plan import Plan
from .ir.verify import verify as verify_graph
from .planner.frontier import Frontier
from .planner.plans import search
from .planner.request import Request, check_early
from .planner.scouts import hired
from .together import plan_once, same_call, same_start

REQUEST_KEYS = tuple(Request.__dataclass_fields__)


@dataclass(frozen=True)
class Options:
    """How a step is traced: jit's own static and donated arguments."""

    static_argnums: tuple[int, ...] = ()
    static_argnames: tuple[str, ...] = ()
    donate_argnums: tuple[int, ...] = ()
    donate_argnames: tuple[str, ...] = ()

    @classmethod
    def of(cls, step: Callable, given: Mapping[str, Any]) -> Options:
        """From what the user gave; static parameters known by number are known by name too."""
        found = cls(
            _ints(given.get("static_argnums", ())),
            _strings(given.get("static_argnames", ())),
            _ints(given.get("donate_argnums", ())),
            _strings(given.get("donate_argnames", ())),
        )
        if not found.static_argnums and not found.static_argnames:
            return found
        names = _parameters(step)
        for number in found.static_argnums:
            if not -len(names) <= number < len(names):
                raise UsageError(
                    f"static_argnums has {number}; the step has {len(names)} positional parameters.",
                    where=_name(step),
                    fix="a number below that, or static_argnames",
                )
        numbers = {n % len(names) for n in found.static_argnums}
        numbers |= {i for i, name in enumerate(names) if name in found.static_argnames}
        known = set(found.static_argnames) | {names[i] for i in numbers}
        return replace(found, static_argnums=tuple(sorted(numbers)), static_argnames=tuple(sorted(known)))

    def capture(self, step: Callable, args: tuple, kwargs: dict, stages: bool = False) -> Captured:
        """Trace the step; with `stages`, so that loops over layers can be taken apart."""
        return convert(trace(step, args, kwargs, asdict(self)), hold_in_loops=stages)


@heard()
def plan(
    step: Callable,
    *args: Any,
    cluster: Cluster | str | Path | None = None,
    static_argnums: int | Sequence[int] = (),
    static_argnames: str | Sequence[str] = (),
    donate_argnums: int | Sequence[int] = (),
    donate_argnames: str | Sequence[str] = (),
    request: Request | None = None,
    tell: Callable[[str], None] = lambda line: None,
    **kwargs: Any,
) -> Plan:
    """Plan a training step for a cluster, without running anything.

    Args:
        step: an ordinary single-device JAX function.
        args, kwargs: its arguments, arrays or `jax.ShapeDtypeStruct`s.
        cluster: a `Cluster`, a shorthand (`"4xh100x8@ib400"`), a file; this process's devices when None.
        static_*, donate_*: as for `jax.jit`.
        request: pins and limits of the search.
        tell: hears one line per event of the search.

    Raises:
        CaptureError, ClusterError, PlanError, InfeasibleError: each says what to try.
    """
    if request is not None and not isinstance(request, Request):
        raise PlanError(
            f"request cannot be {request!r}.", where="plan", fix="mw.Request(mesh=(4, 2), memory=60e9)"
        )
    given = {
        "static_argnums": static_argnums, "static_argnames": static_argnames,
        "donate_argnums": donate_argnums, "donate_argnames": donate_argnames,
    }  # fmt: skip
    request = request or Request()
    where = _place(cluster, request)
    captured = Options.of(step, given).capture(step, args, kwargs, request.pp != 1)
    return plan_captured(captured, where, request, _name(step), tell)


def _place(cluster: Cluster | str | Path | None, request: Request) -> Cluster:
    """The cluster that is meant; what contradicts it is refused before anything is traced."""
    where = Cluster.local() if cluster is None else Cluster.parse(cluster)
    check_early(request, where)
    return where


@heard()
@paused()
def plan_captured(
    captured: Captured, cluster: Cluster | str | Path | None, request: Request, name: str,
    tell: Callable[[str], None] = lambda line: None, now: Callable[[str], None] = lambda line: None,
    keep: Callable[[Frontier], None] | None = None,
) -> Plan:  # fmt: skip
    """Plan a step that was captured before. `keep` is as for `planner.plans.search`."""
    where = _place(cluster, request)
    with hired(where, request) as scouts:
        layers = unstack(captured) if request.pp != 1 else None
        graph = captured.graph if layers is None else layers.captured.graph
        verify_graph(graph)
        known = fingerprint(captured.graph)
        apart = layers is not None and len(layers.inputs) != len(captured.graph.inputs)
        told = ("stacked parameters are held layer by layer", *layers.notes) if layers is not None and apart else ()

        def kept(frontier: Frontier) -> None:
            assert keep is not None
            keep(frontier.model_copy(update={"unstacked": apart, "notes": told}))

        same = {"name": name, "fingerprint": known, "tell": tell, "now": now}
        found = search(fold(graph), where, request, **same, keep=kept if keep else None, scouts=scouts)
    if not apart:
        return found
    if found.pipeline is None:
        again = search(fold(captured.graph), where, replace(request, pp=1, program=None), **same)
        return again.model_copy(update={"notes": tuple(dict.fromkeys((*again.notes, *found.notes)))})
    pipeline = found.pipeline.model_copy(update={"unstacked": True})
    return found.model_copy(update={"pipeline": pipeline, "notes": (*found.notes, *told)})


def lower(plan: Plan, step: Callable, *args: Any, devices: Sequence[Any] | None = None, **options: Any) -> RunningStep:
    """The runnable program of a plan, for the same step and argument shapes.

    Raises:
        MismatchError: the plan belongs to another step or other shapes.
        LoweringError: this process has too few devices.
    """
    given = {key: options.pop(key) for key in Options.__dataclass_fields__ if key in options}
    captured = Options.of(step, given).capture(step, args, options, plan.pipeline is not None)
    return RunningStep(lower_plan(plan, captured, devices))


@dataclass(frozen=True)
class RunningStep:
    """A lowered step with the user's own signature (static arguments left out)."""

    lowered: AnyLowered

    _started: list[bool] = field(default_factory=list)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves, tree = jax.tree.flatten((args, kwargs))
        binding = self.lowered.captured.binding
        if not any(_takes(known, leaves, tree) for known in self._bindings()):
            raise MismatchError(
                "the program was made for other arguments.",
                where=f"plan `{self.plan.name}`",
                origin=_first_other(leaves, tree, binding),
                fix="call it as it was lowered, keywords included; or lower it again for these arguments",
            )
        return self.run(leaves)

    def _bindings(self) -> list[Binding]:
        """As the step was written and, where its layers were taken apart, with a tuple for each stack."""
        apart = self.lowered.apart
        return [self.lowered.captured.binding, *([] if apart is None else [apart.stacked.binding])]

    def run(self, leaves: Sequence[Any]) -> Any:
        """Run on the leaves of all arguments, which are not checked."""
        lowered, apart = self.lowered, self.lowered.apart
        if apart is not None and len(leaves) != len(apart.inputs):
            leaves = apart.apart(leaves)
        if lowered.joint:
            if not self._started:
                same_start(lowered, leaves)
                self._started.append(True)
            return jax.tree.unflatten(lowered.captured.binding.out_tree, lowered.run(leaves))
        try:
            results = lowered.jitted(*self.placed(leaves))
        except ValueError as error:
            if "device" not in str(error):
                raise
            results = lowered.jitted(*lowered.placed(leaves))
        return jax.tree.unflatten(lowered.captured.binding.out_tree, results)

    def placed(self, leaves: Sequence[Any]) -> Sequence[Any]:
        """Before the first run, put the state where later runs will find it.

        jax compiles a program anew when its inputs come placed otherwise than before.
        """
        if self._started or self.lowered.joint:
            return leaves
        self._started.append(True)
        found = list(leaves)
        for position, _ in self.lowered.captured.graph.state:
            found[position] = jax.device_put(
                found[position], self.lowered.input_shardings[position]
            )
        return found

    @property
    def plan(self) -> Plan:
        return self.lowered.plan

    def audit(self) -> Audit:
        """Predicted against compiled communication and memory."""
        if isinstance(self.lowered, LoweredSingle):
            return audit_single(self.lowered)
        return audit_pipeline(self.lowered) if isinstance(self.lowered, LoweredPipeline) else audit(self.lowered)

    def hlo(self) -> str:
        """The compiled program as text.

        Raises:
            LoweringError: the plan has a pipeline of several programs.
        """
        if isinstance(self.lowered, LoweredPipeline):
            raise LoweringError(
                "the text is of one program; a pipeline is several.",
                where=f"plan `{self.plan.name}`",
                fix="a plan without a pipeline, or with program=single",
            )
        return self.lowered.hlo()


@dataclass(eq=False)
class ParallelStep:
    """A training step that plans itself once per argument shapes and runs sharded."""

    step: Callable
    cluster: Cluster | str | Path | None
    options: Options
    request: Request
    verify: bool
    fixed: Plan | None
    _known: dict[Any, RunningStep] = field(default_factory=dict)
    _found: dict[Any, tuple[Plan, Captured]] = field(default_factory=dict)
    _quick: tuple[Any, Callable[..., Any] | None] = (None, None)  # key of the last call, program

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        quick = self._quick[1]
        if quick is None or kwargs:
            return self._call(args, kwargs)
        try:
            return quick(*args)
        except (OtherShapes, ValueError, TypeError):  # new shapes, trees or devices
            self._quick = (None, None)
            return self._call(args, kwargs)

    def _call(self, args: tuple, kwargs: dict) -> Any:
        """Look the program up by the shapes of all arguments, making it where there is none.

        With positional arrays alone, jax looks from then on.
        """
        key, leaves = self._key(args, kwargs)
        running = self._known.get(key)
        if running is None:
            running = self._known[key] = self._prepare(key, args, kwargs)
            if self.verify:
                return self._verified(running, leaves, args, kwargs)
        return self._run(running, key, leaves, args, kwargs)

    def _run(
        self, running: RunningStep, key: Any, leaves: Sequence[Any], args: tuple, kwargs: dict
    ) -> Any:
        """Run by jax's own dispatch where it takes these arguments; else on flat leaves."""
        plain = not (kwargs or self.options.static_argnums)
        quick = running.lowered.by_tree if plain and not running.lowered.joint else None
        if quick is None:
            return running.run(leaves)
        placed, _ = jax.tree.unflatten(jax.tree.structure((args, kwargs)), running.placed(leaves))
        try:
            results = quick(*placed)
        except (OtherShapes, ValueError, TypeError):  # on other devices than the mesh's
            return running.run(leaves)
        self._quick = (key, quick)
        return results

    def __get__(self, instance: Any, owner: Any = None) -> ParallelStep:
        if instance is None:
            return self
        raise UsageError(
            "a method cannot be parallelized where it is defined: `self` is no array.",
            where=_name(self.step),
            fix="self.train = mw.parallelize(self.train) in __init__, or a function of arrays",
        )

    def plan(self, *args: Any, **kwargs: Any) -> Plan:
        """The plan for these arguments (abstract ones do), found now if it was not yet."""
        return self._plan(self._key(args, kwargs)[0], args, kwargs)[0]

    def lower(self, *args: Any, **kwargs: Any) -> RunningStep:
        """The program for these arguments."""
        key, _ = self._key(args, kwargs)
        if key not in self._known:
            self._known[key] = self._prepare(key, args, kwargs)
        return self._known[key]

    def explain(self, *args: Any, **kwargs: Any) -> str:
        """The plan in words."""
        from .view.text import plan_text

        return plan_text(self.plan(*args, **kwargs))

    def _key(self, args: tuple, kwargs: dict) -> tuple[Any, list[Any]]:
        """What a program is cached by, and the leaves of the array arguments."""
        arrays, static = self._split(args, kwargs)
        leaves, tree = jax.tree.flatten(arrays)
        return (tree, static, tuple([_aval(leaf) for leaf in leaves])), leaves

    def _plan(self, key: Any, args: tuple, kwargs: dict) -> tuple[Plan, Captured]:
        if key not in self._found:
            stages = self.request.pp != 1 if self.fixed is None else self.fixed.pipeline is not None
            look_for_devices()
            where = None if self.fixed else _place(self.cluster, self.request)
            captured = self.options.capture(self.step, args, kwargs, stages)
            same_call(captured, where, self.request, self.verify)
            found = self.fixed or plan_once(lambda: plan_captured(captured, where, self.request, _name(self.step)))
            self._found[key] = (found, captured)
        return self._found[key]

    def _prepare(self, key: Any, args: tuple, kwargs: dict) -> RunningStep:
        running = RunningStep(lower_plan(*self._plan(key, args, kwargs)))
        binding = running.lowered.captured.binding  # of what it returns, where layers were taken apart
        self._known[binding.in_tree, key[1], tuple([_aval(aval) for aval in binding.in_avals])] = running
        return running

    def _verified(self, running: RunningStep, leaves: list[Any], args: tuple, kwargs: dict) -> Any:
        """Run both, compare, and return what the sharded step gave."""
        unsharded = self._unsharded(args, kwargs)
        graph = running.lowered.captured.graph
        if running.lowered.apart is not None:
            unsharded, leaves = running.lowered.apart.in_pieces(unsharded), running.lowered.apart.apart(leaves)
        truth = reference(unsharded, running.lowered.captured, leaves)
        results = self._run(running, self._key(args, kwargs)[0], leaves, args, kwargs)
        if running.lowered.joint:
            verify_together(truth, results, graph.output_names, running.lowered.meetings)
        else:
            verify_outputs(truth, results, graph.output_names)
        return results

    def _unsharded(self, args: tuple, kwargs: dict) -> Callable[..., Any]:
        """The plain step, compiled, on the flat leaves of its array arguments."""
        arrays, _ = self._split(args, kwargs)
        tree = jax.tree.structure(arrays)
        numbers, names = self._static()

        def flat(*leaves: Any) -> Any:
            placed, named = jax.tree.unflatten(tree, leaves)
            rest = iter(placed)
            full = [a if i in numbers else next(rest) for i, a in enumerate(args)]
            return self.step(*full, **{k: v for k, v in kwargs.items() if k in names}, **named)

        return jax.jit(flat)

    def _split(self, args: tuple, kwargs: dict) -> tuple[Any, Any]:
        """Array arguments as capture sees them, and the static ones as part of the cache key."""
        numbers, names = self._static()
        if not numbers and not names:
            return (args, kwargs), ()
        arrays = tuple(a for i, a in enumerate(args) if i not in numbers)
        named = {k: v for k, v in kwargs.items() if k not in names}
        static = tuple(a for i, a in enumerate(args) if i in numbers)
        return (arrays, named), (
            static,
            tuple(sorted((k, v) for k, v in kwargs.items() if k in names)),
        )

    def _static(self) -> tuple[frozenset[int], frozenset[str]]:
        """Positions and names of static parameters."""
        return frozenset(self.options.static_argnums), frozenset(self.options.static_argnames)


def parallelize(
    step: Callable | None = None,
    *,
    cluster: Cluster | str | Path | None = None,
    plan: Plan | None = None,
    verify: bool = False,
    static_argnums: int | Sequence[int] = (),
    static_argnames: str | Sequence[str] = (),
    donate_argnums: int | Sequence[int] = (),
    donate_argnames: str | Sequence[str] = (),
    **request: Any,
) -> Any:
    """Plan, shard and run a training step: `@mw.parallelize` or `@mw.parallelize(cluster=..., verify=True)`.

    Args:
        step: an ordinary single-device JAX function of arrays in pytrees.
        cluster: what to plan for; by default the devices of this process.
        plan: use this plan instead of searching for one.
        verify: on the first call for each set of shapes, run the unsharded step too
            and compare every output; raises VerificationError beyond the stated tolerance.
        static_*, donate_*: as for `jax.jit`.
        request: fields of `Request`: memory, mesh, microbatches, recompute, time_limit, gap, seed.
    """
    if step is None:
        return functools.partial(
            parallelize, cluster=cluster, plan=plan, verify=verify, static_argnums=static_argnums,
            static_argnames=static_argnames, donate_argnums=donate_argnums, donate_argnames=donate_argnames, **request,
        )  # fmt: skip
    if not callable(step):
        raise UsageError(
            f"parallelize takes a function, not {step!r}.", fix="@mw.parallelize above a def"
        )
    if unknown := sorted(set(request) - set(REQUEST_KEYS)):
        raise UsageError(
            f"parallelize has no option {unknown[0]!r}.",
            where=_name(step),
            fix=f"one of {', '.join(REQUEST_KEYS)}",
        )
    given = {
        "static_argnums": static_argnums, "static_argnames": static_argnames,
        "donate_argnums": donate_argnums, "donate_argnames": donate_argnames,
    }  # fmt: skip
    wrapped = ParallelStep(step, cluster, Options.of(step, given), Request(**request), verify, plan)
    functools.update_wrapper(wrapped, step, updated=())
    return wrapped


def _aval(leaf: Any) -> Any:
    if not hasattr(leaf, "dtype"):
        return (type(leaf),)
    return (leaf.shape, leaf.dtype, getattr(leaf, "weak_type", False))


def _shape(leaf: Any) -> Any:
    """Shape and type of a leaf as jax sees it; a plain number has those of its array."""
    aval = leaf if hasattr(leaf, "dtype") else jax.typeof(leaf)
    return (aval.shape, aval.dtype)


def _takes(binding: Binding, leaves: Sequence[Any], tree: Any) -> bool:
    wanted = [_aval(aval)[:2] for aval in binding.in_avals]
    return tree == binding.in_tree and [_shape(leaf) for leaf in leaves] == wanted


def _first_other(leaves: Sequence[Any], tree: Any, binding: Any) -> str:
    if tree != binding.in_tree:
        return f"it takes {binding.in_tree}, was given {tree}"
    for leaf, aval in zip(leaves, binding.in_avals, strict=True):
        (shape, dtype), wanted = _shape(leaf), (aval.shape, aval.dtype)
        if (shape, dtype) != wanted:
            return f"it takes {aval.dtype}{list(aval.shape)}, was given {dtype}{list(shape)}"
    return ""


def _parameters(step: Callable) -> list[str]:
    """Names of the parameters that can be given by position."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    found = inspect.signature(step).parameters.values()
    return [parameter.name for parameter in found if parameter.kind in kinds]


def _name(step: Callable) -> str:
    while isinstance(step, functools.partial):
        step = step.func
    return getattr(step, "__qualname__", type(step).__name__)


def _ints(value: int | Sequence[int]) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(value)


def _strings(value: str | Sequence[str]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)
