"""Emulated CPU devices: threads of this machine that jax takes for devices."""

from __future__ import annotations

import jax

from .ir.errors import LoweringError, UsageError

MOST = 64  # more threads than this say nothing about anything


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
    try:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError as error:
        if len(jax.devices()) < count:
            raise LoweringError(
                f"{count} devices are asked for, and jax already runs with {len(jax.devices())}.",
                fix="a fresh process",
            ) from error
