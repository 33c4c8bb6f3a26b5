"""The main job: plan, train, compare and audit a byte-level GPT; then plan gpt3-175b."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .api import RunningStep, plan_captured
from .backends.xla.lower import lower
from .backends.xla.measure import measured_cluster
from .emulation import emulate
from .ir.cluster.cluster import Cluster
from .ir.codec import save_plan
from .ir.plan import Plan
from .output import say
from .planner.request import Request
from .progress import Progress as Status
from .recipe import Made, make
from .text_data import Text, read_text
from .training import loss_of
from .view import audit_text, plan_text

MODEL = "gpt-bytes"
LARGE, LARGE_CLUSTER, LARGE_BATCH = "gpt3-175b", "128xa100x8@hdr200", 1536
LARGE_PLAN = Path(f"{LARGE}.plan.json")
ROWS = 10  # of the side-by-side table


def run_demo(data: Path | None, steps: int, devices: int, large: bool) -> None:
    """Everything on one screen after the other; results to stdout, progress to stderr."""
    emulate(devices)
    text = read_text(data)
    made = make({"model": MODEL})
    with Status() as status:
        status.say(f"measuring {devices} emulated devices")
        cluster = measured_cluster()
        status.say("tracing and searching")
        captured = made.capture()
        plan = plan_captured(captured, cluster, Request(time_limit=30), MODEL, status.line)
    say(f"{MODEL} on {len(text.data):,} bytes of {text.source}\n\n{plan_text(plan)}\n")
    running = RunningStep(lower(plan, captured))
    sharded = _train("sharded", running, made, text, steps)
    single = _train("one device", jax.jit(made.step, donate_argnums=0), made, text, steps)
    say(_side_by_side(sharded, single))
    say(audit_text(running.audit()))
    if large:
        say(f"\n{plan_text(_plan_large())}\nsaved to {LARGE_PLAN}")


def _train(title: str, step: Callable[..., Any], made: Made, text: Text, steps: int) -> list[float]:
    """Losses of each step, with a progress bar."""
    assert made.example is not None
    state = made.example.init(jax.random.key(0))
    batches = text.batches(*made.example.batch["tokens"].shape, seed=0)
    losses: list[float] = []
    with _bar() as bar:
        task = bar.add_task(title, total=steps, loss="")
        for batch in itertools.islice(batches, steps):
            state, metrics = jax.block_until_ready(step(state, batch))
            losses.append(loss_of((state, metrics)))
            bar.update(task, advance=1, loss=f"loss {losses[-1]:.4f}")
    return losses


def _bar() -> Progress:
    return Progress(
        TextColumn("{task.description:12}"), BarColumn(30), MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"), TimeElapsedColumn(),
        console=Console(stderr=True),
    )  # fmt: skip


def _side_by_side(sharded: list[float], single: list[float]) -> str:
    """Some of the losses, and the largest difference of all."""
    count = len(sharded)
    shown = sorted({0, count - 1, *range(0, count, max(1, count // ROWS))})
    rows = [
        f"  {k + 1:4d}  {sharded[k]:10.6f}  {single[k]:10.6f}  {_apart(sharded, single, k):.1e}"
        for k in shown
    ]
    worst = max(range(count), key=lambda k: _apart(sharded, single, k))
    last = (
        f"largest relative difference of {count} steps: {_apart(sharded, single, worst):.1e}, "
        f"at step {worst + 1}"
    )
    return "\n".join(["losses  sharded   one device  relative difference", *rows, f"  {last}", ""])


def _apart(a: Iterable[float], b: Iterable[float], k: int) -> float:
    x, y = list(a)[k], list(b)[k]
    return abs(x - y) / max(abs(y), 1e-12)


def _plan_large() -> Plan:
    recipe = {"model": LARGE, "batch": LARGE_BATCH}
    with Status() as status:
        status.say(f"tracing {LARGE}")
        made = make(recipe)
        captured = made.capture()
        status.say("searching plans for 1024 devices")
        cluster = Cluster.parse(LARGE_CLUSTER)
        plan = plan_captured(captured, cluster, Request(time_limit=45), LARGE, status.line)
    plan = plan.model_copy(update={"recipe": recipe})
    save_plan(plan, LARGE_PLAN)
    return plan
