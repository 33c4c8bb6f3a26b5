"""What the processes of a run agree on before their first step, and the plan that one makes for all.

Alone, a process agrees with itself at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

import jax

from .backends.runtime.agreement import agree, decisions, short
from .backends.runtime.rendezvous import Rendezvous
from .backends.xla.agreement import arguments, constants, software
from .backends.xla.capture import Captured
from .backends.xla.compat import coordination
from .backends.xla.lower import AnyLowered
from .backends.xla.runtime import JaxDevices
from .ir.cluster.cluster import Cluster
from .ir.files import is_file
from .ir.fingerprint import fingerprint
from .ir.plan import Plan
from .planner.request import Request


def same_command(plan: Plan, options: dict[str, Any], data: Path | None) -> None:
    """All processes were started with the same plan and options of `meshwright run`.

    Raises:
        MismatchError: what differs, with the values.
    """
    agree(coordination(), "the command line", lambda: {
        **{f"--{name}": short(value) for name, value in options.items()},
        "--data": "not given" if data is None else _content(data), **decisions(plan),
    })  # fmt: skip


def same_call(captured: Captured, cluster: Cluster | None, request: Request, verify: bool) -> None:
    """All processes call one step, and want the same of it.

    Raises:
        MismatchError: what differs, with the values.
    """
    agree(coordination(), "the call of the step", lambda: {
        "the step's graph": fingerprint(captured.graph)[:12], "verify": str(verify),
        "the cluster": "the plan's" if cluster is None else f"{cluster.name} ({cluster.fingerprint()[:12]})",
        **{name: short(value) for name, value in asdict(request).items()},
    })  # fmt: skip


def same_start(lowered: AnyLowered, leaves: Sequence[Any]) -> None:
    """All processes have one plan, one step, and start from equal arrays.

    Raises:
        MismatchError: what differs, with the values.
    """
    captured = lowered.captured
    agree(coordination(), "what the step starts from", lambda: {
        **decisions(lowered.plan), "the step's graph": fingerprint(captured.graph)[:12],
        **constants(captured.binding.arrays), **arguments(leaves, captured.graph.input_name), **software(),
    })  # fmt: skip


def plan_once(make: Callable[[], Plan]) -> Plan:
    """Plan in the first process of the run; a search that is stopped by the clock may end elsewhere in another."""
    if jax.process_count() == 1:
        return make()
    text = make().model_dump_json() if jax.process_index() == 0 else ""
    return Plan.model_validate_json(
        Rendezvous(JaxDevices(), in_turn=True).exchange("the plan", text)[0]
    )


def _content(data: Path) -> str:
    """Size and digest of a file, which is read piece by piece."""
    if not is_file(data):
        return f"no file {data}"
    with data.open("rb") as file:
        digest = sha256()
        while piece := file.read(1 << 24):
            digest.update(piece)
        return f"{file.tell()} bytes (digest {digest.hexdigest()[:12]})"
