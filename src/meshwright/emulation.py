"""Emulated CPU devices: threads of this machine that jax takes for devices."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

import jax

from .ir.errors import LoweringError, UsageError
from .ir.plan import Plan
from .ir.units import format_bytes

MOST = 64  # more threads than this say nothing about anything
# Of glibc's `mallopt` (man 3 mallopt): memory at the heap's end that is given back; blocks mapped one by one.
TRIM_THRESHOLD, MAPPED_BLOCKS = -1, -4


def emulate(count: int) -> None:
    """Give this process `count` CPU devices, before jax looks for any.

    Raises:
        UsageError: more than one machine can emulate.
        LoweringError: jax runs already, with fewer devices.
    """
    if count > MOST:
        raise UsageError(
            f"{count} devices are too many to emulate on one machine.",
            fix=f"at most {MOST} devices",
        )
    keep_memory()
    try:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError as error:
        if len(jax.devices()) < count:
            raise LoweringError(
                f"{count} devices are asked for, and jax already runs with {len(jax.devices())}.",
                fix="a fresh process",
            ) from error


def check_room(plan: Plan, count: int) -> None:
    """Refuse to emulate `count` devices of a plan that need more memory than this machine has free.

    Raises:
        LoweringError: bytes needed and there.
    """
    if plan.pipeline is None:
        peaks = [plan.estimate.peak_bytes] * plan.device_count
    else:
        homes = plan.pipeline.read(plan.microbatches).homes
        ranks = dict(zip(homes, plan.pipeline.stages, strict=True))
        peaks = [stage.peak_bytes for stage in ranks.values() for _ in range(stage.mesh.size)]
    needed, free = sum(sorted(peaks)[-count:]), free_bytes()
    if free is not None and needed > free:
        raise LoweringError(
            f"the plan needs {format_bytes(needed)} for {count} emulated devices, this machine has "
            f"{format_bytes(free)} free.",
            where=f"plan `{plan.name}`", fix="a smaller model or batch, or real devices",
        )  # fmt: skip


def free_bytes() -> float | None:
    """Memory that new work can have without swapping, as Linux estimates it; None elsewhere."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = next((line.split() for line in lines if line.startswith("MemAvailable:")), None)
    return float(found[1]) * 1024 if found else None


def trace_on_cpu() -> None:
    """For commands that trace and run nothing: jax need not look for accelerators, whose libraries complain
    where there are none. A platform that the user chose stays."""
    if "JAX_PLATFORMS" not in os.environ:
        jax.config.update("jax_platforms", "cpu")


def keep_memory() -> None:
    """Let this process keep the memory that it frees, as the pool of a real device does.

    glibc hands blocks above 32 MiB back to the system at each free, and every step then waits for
    its pages again: a third of the processor time of llama-tiny, batch 64, on eight devices (39 of
    117 ms a step on two EPYC cores, getrusage; 5 ms with this). Other allocators stay as they are.
    """
    change = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if change is not None:
        change(MAPPED_BLOCKS, 0)
        change(TRIM_THRESHOLD, 2**31 - 1)
