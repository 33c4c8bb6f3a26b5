"""Run a planned step for a number of steps on real or synthetic batches."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import count, repeat
from pathlib import Path
from typing import Any

import jax
import numpy as np

from .backends.runtime.recorder import Recorder
from .backends.xla.by_microbatch import by_microbatch
from .backends.xla.capture import Captured
from .backends.xla.lower import AnyLowered, lower
from .backends.xla.pipeline import LoweredPipeline
from .backends.xla.unstack import Unstacked
from .backends.xla.verify import Reference, reference, verify_outputs, verify_together
from .ir.codec import write_whole
from .ir.errors import UsageError, VerificationError
from .ir.pipeline.schedule import Passed
from .ir.pipeline.schedule import Step as Pass
from .ir.plan import Plan
from .output import say
from .pipeline_view import both_text, both_trace
from .recipe import Made
from .saved import Kept, save
from .text_data import read_text
from .together import same_start

Step = Callable[[Any, Any], tuple[Any, Any]]


@dataclass
class Trained:
    """What training has shown after some steps `taken` before: losses and seconds of each step, compilation left out of
    the first one's.

    `passes` are those of one more step of a pipeline, recorded; `verified`: the first step equals the
    unsharded one; `wrong`: it does not, and nothing was trained after it.
    """

    taken: int = 0
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    passes: list[Passed] = field(default_factory=list)
    verified: bool = False
    wrong: VerificationError | None = None


def train(
    plan: Plan, made: Made, steps: int, data: Path | None, verify: bool, seed: int | None,
    kept: Kept | None = None,
) -> Trained:  # fmt: skip
    """Train for some steps; a pipeline takes one more, which is recorded.

    Raises:
        MismatchError, LoweringError: the plan is not for this step or these devices.
        UsageError: text for a model that reads none; a step without a loss; nothing to go on from, or to save.
    """
    lowered = lower(plan, made.capture(plan.pipeline is not None))
    captured, apart = lowered.captured, lowered.apart
    kept = kept or Kept()
    _check_saved(lowered, kept)
    state, batches, taken = kept.begin(*start(made, data, seed))
    first = next(batches)
    truth = unsharded(plan, made, captured, apart, state, *first) if verify else None
    if apart is not None:
        leaves = apart.apart(jax.tree.leaves((state, *first)))
        state = jax.tree.unflatten(captured.binding.in_tree, leaves)[0][0]
    results = Trained(taken)
    if lowered.joint:
        same_start(lowered, jax.tree.leaves((state, *first)))
    else:
        _ = lowered.compiled  # before the clock runs
    for number in range(steps):
        batch = first if number == 0 else next(batches)
        begin = time.perf_counter()
        out = jax.block_until_ready(lowered.run(jax.tree.leaves((state, *batch))))
        out = jax.tree.unflatten(captured.binding.out_tree, out)
        results.seconds.append(time.perf_counter() - begin)
        if number == 0 and truth is not None:
            results.wrong = _verify(truth, out, lowered)
            results.verified = results.wrong is None
        state = _next_state(out, state, made.name)
        results.losses.append(loss_of(out))
        if results.wrong is not None:
            break
    if kept.save is not None and results.wrong is None:
        whole = state if apart is None else _stacked(apart, (state, *first))
        save(kept.save, whole, taken + len(results.losses))
    if isinstance(lowered, LoweredPipeline):
        results.passes = _recorded(lowered, jax.tree.leaves((state, *next(batches))))
    return results


def _check_saved(lowered: AnyLowered, kept: Kept) -> None:
    if lowered.joint and kept.save is not None:
        raise UsageError(
            "what several processes of jax share is not saved.",
            where="--save",
            fix="one process, or --backend torch, whose ranks each save their part",
        )


def _stacked(apart: Unstacked, pieces: Any) -> Any:
    """The state as the user has it, layers stacked, which is the step's first argument."""
    leaves = apart.whole(jax.tree.leaves(pieces))
    return jax.tree.unflatten(apart.stacked.binding.in_tree, leaves)[0][0]


def _verify(truth: Reference, out: Any, lowered: AnyLowered) -> VerificationError | None:
    names = lowered.captured.graph.output_names
    try:
        if lowered.joint:
            verify_together(truth, out, names, lowered.rendezvous)
        else:
            verify_outputs(truth, out, names)
    except VerificationError as error:
        return error
    return None


def _recorded(lowered: LoweredPipeline, leaves: Any) -> list[Passed]:
    """One more step, and when its passes ran; of several processes each records its own.

    Their clocks start when all of them have come here, which they learn within a millisecond or so.
    """
    leaves = jax.block_until_ready(lowered.placed(leaves))
    if lowered.joint:
        lowered.rendezvous.gather("the start of the record", np.zeros(1))
    with Recorder(lowered.driver) as recorder:
        jax.block_until_ready(lowered.jitted(*leaves))
    if not lowered.joint:
        return recorder.passes
    rows = [[*p.step, p.rank, p.start, p.seconds] for p in recorder.passes]
    texts = lowered.rendezvous.exchange("the record", json.dumps(rows))
    rows = [row for text in texts for row in json.loads(text)]
    return [Passed(rank, Pass(*step), start, seconds) for *step, rank, start, seconds in rows]


def show(plan: Plan, trained: Trained, trace: Path | None, as_json: bool) -> None:
    """Print losses, and the timeline of a pipeline; write it as a trace where one is asked for.

    Of several processes the first one does.

    Raises:
        UsageError: a trace of a plan without a pipeline.
        VerificationError: the first results differ from the unsharded step's; the trace is written first.
    """
    if jax.process_index() > 0:
        if trained.wrong is not None:
            raise trained.wrong
        return
    if trace is not None:
        if not trained.passes:
            what = "only a pipeline with programs for each stage has a measured timeline."
            raise UsageError(
                what, where="--trace", fix="meshwright simulate, or a plan with program=stages"
            )
        write_whole(trace, json.dumps(both_trace(plan, trained.passes)))
    if trained.wrong is not None:
        raise trained.wrong
    if as_json:
        found = {"losses": trained.losses, "seconds": trained.seconds}
        passes = [{**asdict(each), "step": str(each.step)} for each in trained.passes]
        say(json.dumps(found | ({"passes": passes} if passes else {})))
        return
    apart = (
        plan.batch is not None and plan.batch.statistics == "microbatch" and plan.microbatches > 1
    )
    how = ", run microbatch by microbatch" if apart else ""
    first = trained.taken + 1
    for number, (loss, seconds) in enumerate(
        zip(trained.losses, trained.seconds, strict=True), start=first
    ):
        same = f"  equals the unsharded step{how}" if number == first and trained.verified else ""
        say(f"step {number:4d}  loss {loss:.4f}  {seconds * 1e3:.1f} ms{same}")
    if trained.passes:
        say(f"\n{both_text(plan, trained.passes)}")


def _next_state(out: Any, state: Any, name: str) -> Any:
    """The step's first result, when it can be its next first argument."""
    found = out[0] if isinstance(out, tuple) and out else out
    (before, tree), after = jax.tree.flatten_with_path(state), jax.tree.leaves(found)
    if jax.tree.structure(found) != tree or any(
        np.shape(old) != np.shape(new) for (_, old), new in zip(before, after, strict=True)
    ):
        raise UsageError(
            "the step does not return its state first.",
            where=name,
            fix="return (state, metrics), the state as it came in",
        )
    for (path, old), new in zip(before, after, strict=True):
        if (was := jax.typeof(old).dtype) != (is_now := jax.typeof(new).dtype):
            raise UsageError(
                f"the step takes `state{jax.tree_util.keystr(path)}` as {was} and returns it as {is_now}.",
                where=name,
                fix="a step whose state keeps its types: `.astype` where it is returned, or the start in that type",
            )
    return found


def unsharded(
    plan: Plan, made: Made, captured: Captured, apart: Unstacked | None, *args: Any
) -> Reference:
    leaves, tree = jax.tree.flatten(args)
    step = jax.jit(lambda *flat: made.step(*jax.tree.unflatten(tree, flat)))
    if apart is None:
        return reference(by_microbatch(plan, captured) or step, captured, leaves)
    return reference(apart.in_pieces(step), captured, apart.apart(leaves))


def start(made: Made, data: Path | None, seed: int | None) -> tuple[Any, Iterator[tuple[Any, ...]]]:
    """Initial state, and endless tuples of the step's other arguments."""
    if made.example is None:
        if data is not None:
            raise UsageError("--data is for byte-level models of the zoo.", where=made.name)
        if seed is not None:
            what = (
                "--seed is for models of the zoo; this step's arguments are as its file makes them."
            )
            raise UsageError(what, where=made.name, fix="a seed in the file")
        zeros = [jax.tree.map(_materialise, argument) for argument in made.args]
        return zeros[0], repeat(tuple(zeros[1:]))
    example, seed = made.example, seed or 0
    state = example.init(jax.random.key(seed))
    if data is None:
        rng = np.random.default_rng(seed)
        return state, ((example.make_batch(rng),) for _ in count())
    tokens = example.batch.get("tokens") if isinstance(example.batch, dict) else None
    if tokens is None or not example.name.startswith("gpt-bytes"):
        raise UsageError(
            f"{example.name} does not read bytes.", where="--data", fix="a plan for gpt-bytes"
        )
    batch, seq = tokens.shape
    return state, ((found,) for found in read_text(data).batches(batch, seq, seed))


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
