"""Train with a plan on torch: a process of this host for each device, which meet over gloo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np

from .backends.xla.dtypes import jax_dtype
from .backends.xla.verify import verify_outputs
from .emulation import check_room
from .ir.errors import LoweringError, VerificationError
from .ir.graph import TensorType
from .ir.plan import Plan
from .recipe import Made
from .saved import Kept, check_torch, names_of, steps_taken
from .training import Trained, loss_of, start, unsharded


def train_on_torch(
    plan: Plan, made: Made, steps: int, data: Path | None, verify: bool, seed: int | None, kept: Kept, emulated: bool
) -> Trained:  # fmt: skip
    """Train for some steps.

    Args:
        emulated: run a plan for accelerators on this host's processors.

    Raises:
        MismatchError, LoweringError: the plan is not for this step, or torch cannot run it.
        ProcessError: a rank ended, or did not answer by the deadline.
        UsageError: torch is not installed; text for a model that reads none; a step without a loss.
    """
    check_torch("--backend torch")
    from .backends.torch.lower import arrays_in, lower
    from .backends.torch.ranks import Ranks

    if plan.cluster.device.kind != "cpu" and not emulated:
        raise LoweringError(
            f"the ranks of torch run on CPUs; the plan is for {plan.cluster.device.name}.",
            where=f"plan `{plan.name}`", fix="--emulate, to run it on this host's processors",
        )  # fmt: skip
    check_room(plan, plan.device_count)
    captured = made.capture(plan.pipeline is not None)
    graph, binding = captured.graph, captured.binding
    program = lower(plan, graph)
    state, batches, taken = kept.begin(*start(made, data, seed))
    first = next(batches)
    truth = unsharded(plan, made, captured, None, state, *first) if verify else None
    leaves, results = jax.tree.leaves((state, *first)), Trained(taken)
    own = len(jax.tree.leaves(state))
    arrays = {value: np.asarray(array) for value, array in binding.arrays.items()}
    kinds = [graph.types[value] for value in graph.outputs]
    scalars = [k for k, kind in enumerate(kinds) if kind.size == 1]
    with Ranks(program, arrays_in(program, graph, arrays), graph.state) as ranks:
        ranks.give(dict(enumerate(map(np.asarray, leaves))))
        for number in range(steps):
            if number:
                batch = jax.tree.leaves(next(batches))
                ranks.give(dict(enumerate(map(np.asarray, batch), start=own)))
            results.seconds.append(ranks.step())
            wanted = list(range(len(kinds))) if number == 0 and truth is not None else scalars
            found = dict(zip(wanted, ranks.results(wanted), strict=True))
            out = jax.tree.unflatten(
                binding.out_tree, [_leaf(found.get(k), kind) for k, kind in enumerate(kinds)]
            )
            if number == 0 and truth is not None:
                try:
                    verify_outputs(truth, out, graph.output_names)
                    results.verified = True
                except VerificationError as error:
                    results.wrong = error
            results.losses.append(loss_of(out))
            if results.wrong is not None:
                return results
        if kept.save is not None:
            ranks.save(kept.save, names_of(state), steps_taken(taken + steps))
    return results


def _leaf(found: np.ndarray[Any, Any] | None, kind: TensorType) -> Any:
    """A result as jax has it; one that was not fetched has no numbers of its own."""
    dtype = jax_dtype(kind.dtype)
    if found is None:
        return np.broadcast_to(np.zeros((), dtype), kind.shape)
    return found if found.dtype == dtype else found.view(dtype)
