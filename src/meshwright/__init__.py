"""meshwright: an ordinary training step in, a proven plan and a sharded program out.

import meshwright as mw

@mw.parallelize
def train_step(state, batch): ...

mw.plan(train_step, state, batch, cluster="4xh100x8@ib400")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import torch
    from .api import ParallelStep, RunningStep, lower, parallelize, plan
    from .backends.xla.user_kernels import kernel
    from .emulation import emulate
    from .ir.cluster.cluster import Cluster
    from .ir.codec import load_plan, save_plan
    from .ir.errors import MeshwrightError
    from .ir.plan import Plan
    from .ir.version import VERSION as __version__
    from .planner.request import Request
    from .processes import connect
    from .simulation import simulate

# name -> module that has it; imported when first asked for, so that `meshwright --help` stays quick
_HOMES = {
    "Cluster": "ir.cluster.cluster",
    "MeshwrightError": "ir.errors",
    "ParallelStep": "api",
    "Plan": "ir.plan",
    "Request": "planner.request",
    "RunningStep": "api",
    "connect": "processes",
    "emulate": "emulation",
    "kernel": "backends.xla.user_kernels",
    "load_plan": "ir.codec",
    "lower": "api",
    "parallelize": "api",
    "plan": "api",
    "save_plan": "ir.codec",
    "simulate": "simulation",
}

__all__ = [
    "Cluster", "MeshwrightError", "ParallelStep", "Plan", "Request", "RunningStep", "__version__",
    "connect", "emulate", "kernel", "load_plan", "lower", "parallelize", "plan", "save_plan", "simulate",
    "torch",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.import_module(".ir.version", __name__).VERSION
    if name == "torch":
        return importlib.import_module(".torch", __name__)
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in ("Plan", "load_plan"):
        importlib.import_module(".view", __name__)  # gives plans their looks
    try:
        return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    except ImportError as error:
        from .ir.errors import MissingDependencyError

        raise MissingDependencyError.of(error) or error from error


def __dir__() -> list[str]:
    return sorted(__all__)
