"""Run a planned step for a number of steps on real or synthetic batches."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import repeat
from pathlib import Path
from typing import Any

import jax
import numpy as np

from .api import RunningStep
from .backends.xla.lower import lower
from .backends.xla.verify import Reference, reference, verify_outputs
from .ir.errors import UsageError
from .ir.graph import Graph
from .ir.plan import Plan
from .recipe import Made
from .text_data import read_text

Step = Callable[[Any, Any], tuple[Any, Any]]


def train(
    plan: Plan, made: Made, steps: int, data: Path | None, verify: bool, seed: int
) -> dict[str, list[float]]:
    """Losses and seconds of each step, compilation left out of the first one's.

    Raises:
        MismatchError, LoweringError: the plan is not for this step or these devices.
        UsageError: text for a model that reads none; a step without a loss.
        VerificationError: with `verify`, the first results differ from the unsharded step's.
    """
    captured = made.capture()
    running = RunningStep(lower(plan, captured))
    state, batches = start(made, data, seed)
    first = next(batches)
    truth = _unsharded(made, captured.graph, state, first) if verify else None
    results: dict[str, list[float]] = {"losses": [], "seconds": []}
    running.lowered.compiled  # noqa: B018  compiled before the clock runs
    for number in range(steps):
        batch = first if number == 0 else next(batches)
        begin = time.perf_counter()
        out = jax.block_until_ready(running(state, batch))
        results["seconds"].append(time.perf_counter() - begin)
        if number == 0 and truth is not None:
            verify_outputs(truth, out, captured.graph.output_names)
        state = out[0]
        results["losses"].append(loss_of(out))
    return results


def _unsharded(made: Made, graph: Graph, *args: Any) -> Reference:
    leaves, tree = jax.tree.flatten(args)
    step = jax.jit(lambda *flat: made.step(*jax.tree.unflatten(tree, flat)))
    return reference(step, graph, leaves)


def start(made: Made, data: Path | None, seed: int) -> tuple[Any, Iterator[Any]]:
    """Initial state and endless batches of a step."""
    if made.example is None:
        if data is not None:
            raise UsageError("--data is for byte-level models of the zoo.", where=made.name)
        zeros = [jax.tree.map(_materialise, argument) for argument in made.args]
        return zeros[0], repeat(zeros[1])
    example = made.example
    state = example.init(jax.random.key(seed))
    if data is None:
        return state, map(example.make_batch, repeat(np.random.default_rng(seed)))
    tokens = example.batch.get("tokens") if isinstance(example.batch, dict) else None
    if tokens is None or not example.name.startswith("gpt-bytes"):
        raise UsageError(
            f"{example.name} does not read bytes.", where="--data", fix="a plan for gpt-bytes"
        )
    batch, seq = tokens.shape
    return state, read_text(data).batches(batch, seq, seed)


def _materialise(leaf: Any) -> Any:
    return np.ones(leaf.shape, leaf.dtype) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf


def loss_of(out: Any) -> float:
    """The loss among a step's results: the metric called so, or the only scalar.

    Raises:
        UsageError: there is no telling.
    """
    found = out[1] if isinstance(out, tuple) and len(out) > 1 else None
    if isinstance(found, dict) and "loss" in found:
        return float(found["loss"])
    scalars = [leaf for leaf in jax.tree.leaves(found) if np.ndim(leaf) == 0]
    if len(scalars) == 1:
        return float(scalars[0])
    raise UsageError(
        "the step does not say what its loss is.",
        fix='return (state, {"loss": loss, ...}) from the step',
    )
