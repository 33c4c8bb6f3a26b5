"""A lowered step with the user's own signature."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from .backends.xla.audit import audit, audit_single
from .backends.xla.audit_pipeline import audit_pipeline
from .backends.xla.calls import Call, calling
from .backends.xla.capture import Binding, Captured
from .backends.xla.compat import weakened
from .backends.xla.donation import check_given_twice
from .backends.xla.lower import AnyLowered, OtherShapes
from .backends.xla.lower_single import LoweredSingle
from .backends.xla.pipeline import LoweredPipeline
from .backends.xla.steps import UserStep
from .ir.audit import Audit
from .ir.errors import LoweringError, MismatchError
from .ir.local.pipeline import PipelineProgram
from .ir.local.program import LocalProgram
from .ir.plan import Plan
from .together import same_start


@dataclass(frozen=True)
class RunningStep:
    """A lowered step with the user's own signature (static arguments left out).

    `step` is what was lowered; `inner` what is static inside its arguments, as graph definitions of nnx.
    """

    lowered: AnyLowered
    step: UserStep | None = None
    inner: Any = None

    _started: list[bool] = field(default_factory=list)
    _elsewhere: set[int] = field(default_factory=set)  # leaves that the user places otherwise

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        step = (
            UserStep(lambda *args, **kwargs: None, self.plan.name)
            if self.step is None
            else self.step.without_static()
        )
        with calling(step, args, kwargs) as call:
            self._check(call)
            return call.finish(self.run(call.leaves), self.binding.ends)

    def _check(self, call: Call) -> None:
        other = self.step is not None and call.inner != self.inner
        if other or not _takes(self.binding, call):
            raise MismatchError(
                "the program was made for other arguments.",
                where=f"plan `{self.plan.name}`",
                origin=_first_other(call, self.binding),
                fix="call it as it was lowered, keywords included; or lower it again for these arguments",
            )
        check_given_twice(call, self.captured.graph.donated)

    @property
    def captured(self) -> Captured:
        """The step as it was written, also where its layers were taken apart."""
        apart = self.lowered.apart
        return self.lowered.captured if apart is None else apart.stacked

    @property
    def binding(self) -> Binding:
        return self.captured.binding

    def run(self, leaves: Sequence[Any]) -> Any:
        """Run on the leaves of all arguments, which are not checked; what comes out, as a tree."""
        lowered, apart = self.lowered, self.lowered.apart
        if apart is not None:
            leaves = apart.apart(leaves)
        if lowered.joint:
            if not self._started:
                same_start(lowered, leaves)
                self._started.append(True)
            return self._tree(lowered.run(leaves))
        try:
            results = lowered.jitted(*self.placed(leaves))
        except ValueError as error:
            if "device" not in str(error):
                raise
            self.look_where(leaves)
            results = lowered.jitted(*lowered.placed(leaves))
        return self._tree(results)

    def _tree(self, results: Sequence[Any]) -> Any:
        apart, avals = self.lowered.apart, self.lowered.captured.binding.out_avals
        found = weakened(results, avals)
        return jax.tree.unflatten(
            self.binding.out_tree, found if apart is None else apart.together(found)
        )

    def placed(self, leaves: Sequence[Any]) -> Sequence[Any]:
        """Leaves as the program takes them: the state before the first run, where later runs will find it,
        and always what the user places otherwise.

        jax compiles a program anew when its inputs come placed otherwise than before.
        """
        if self.lowered.joint:
            return leaves
        moved: set[int] = self._elsewhere
        if not self._started:
            self._started.append(True)
            self.look_where(leaves)
            moved = self._elsewhere | {
                position for position, _ in self.lowered.captured.graph.state
            }
        found = list(leaves)
        for position in moved:
            found[position] = jax.device_put(
                found[position], self.lowered.input_shardings[position]
            )
        return found

    def look_where(self, leaves: Sequence[Any]) -> None:
        """Remember which leaves the user has placed otherwise than the program takes them.

        jax refuses these at every step, and to try first and put all leaves in place after takes milliseconds.
        """
        for position, (leaf, layout) in enumerate(
            zip(leaves, self.lowered.input_shardings, strict=True)
        ):
            chosen = getattr(leaf, "committed", False)
            if chosen and not leaf.sharding.is_equivalent_to(layout, leaf.ndim):
                self._elsewhere.add(position)

    def by_tree(self) -> Callable[..., Any] | None:
        """The program's `by_tree`, with what the user places otherwise put in place first."""
        quick, tree = self.lowered.by_tree, self.lowered.captured.binding.in_tree
        if quick is None or not self._elsewhere:
            return quick

        def moving(*args: Any) -> Any:
            leaves, found = jax.tree.flatten((args, {}))
            if found != tree:
                raise OtherShapes
            return quick(*jax.tree.unflatten(tree, self.placed(leaves))[0])

        return moving

    @property
    def plan(self) -> Plan:
        return self.lowered.plan

    def audit(self) -> Audit:
        """Predicted against compiled communication and memory."""
        if isinstance(self.lowered, LoweredSingle):
            return audit_single(self.lowered)
        return (
            audit_pipeline(self.lowered)
            if isinstance(self.lowered, LoweredPipeline)
            else audit(self.lowered)
        )

    @property
    def program(self) -> LocalProgram | PipelineProgram:
        """What each device runs, as planned: ops on shards and collectives. Of a pipeline what each rank runs: its
        passes, sends and receives. It prints as text.

        Raises:
            LoweringError: the plan's pipeline is one program.
        """
        if isinstance(self.lowered, LoweredSingle):
            raise LoweringError(
                "a pipeline as a single program is not printed yet.",
                where=f"plan `{self.plan.name}`", fix="program=stages, or `hlo()` for what XLA made of it",
            )  # fmt: skip
        return self.lowered.program

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


def aval(leaf: Any) -> Any:
    """Shape and type of a leaf as jax sees it; a number is an array without dims, of weak type."""
    if not hasattr(leaf, "dtype") or isinstance(leaf, np.ndarray | np.generic):
        try:
            leaf = jax.typeof(leaf)
        except (TypeError, OverflowError):  # refused when it is traced
            return (type(leaf),)
    return (leaf.shape, leaf.dtype, bool(getattr(leaf, "weak_type", False)))


def _takes(binding: Binding, call: Call) -> bool:
    wanted = [aval(found)[:2] for found in binding.in_avals]
    return call.tree == binding.in_tree and [aval(leaf)[:2] for leaf in call.leaves] == wanted


def _first_other(call: Call, binding: Binding) -> str:
    if call.tree != binding.in_tree:
        return f"it takes {binding.in_tree}, was given {call.tree}"
    for leaf, wanted in zip(call.leaves, binding.in_avals, strict=True):
        found = aval(leaf)
        if found[:2] != (wanted.shape, wanted.dtype):
            shape, dtype = (*found, found[0])[:2]
            return f"it takes {wanted.dtype}{list(wanted.shape)}, was given {dtype}{list(shape)}"
    return "what is static in its arguments differs"
