"""What the processes of a run of jax have, as text that they compare: software, constants, arguments."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ...ir.errors import ProcessError
from ...ir.version import VERSION
from ..runtime.agreement import watched
from ..runtime.rendezvous import deadline_seconds, late
from .compat import coordination

PACKAGES = (
    "jax", "jaxlib", "numpy", "ml_dtypes", "flax", "optax", "equinox", "dm-haiku", "libtpu", "jax-cuda12-plugin",
    "jax-cuda13-plugin", "jax-rocm7-plugin",
)  # fmt: skip
VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "NVIDIA_TF32_OVERRIDE")
HARMLESS = (
    "--xla_dump",
    "--xla_force_host_platform_device_count",
    "--xla_gpu_dump",
    "--xla_hlo_profile",
)
SETTINGS = (
    "jax_enable_x64", "jax_default_matmul_precision", "jax_default_prng_impl", "jax_threefry_partitionable",
    "jax_numpy_dtype_promotion", "jax_random_seed_offset", "jax_disable_jit",
)  # fmt: skip


def look_for_devices() -> None:
    """Let jax look for the devices of all processes, which waits for all of them.

    Raises:
        ProcessError: one of them did not show its own.
    """
    found, seconds = coordination(), min(deadline_seconds(), 1e6)
    if found is None or found.process_count == 1:
        return
    count = found.process_count
    others = f"the other {count - 1} process{'es' if count > 2 else ''}"
    try:
        with watched(seconds, lambda: late("the look for devices", others, seconds, found)):
            jax.devices()
    except jax.errors.JaxRuntimeError as error:
        raise ProcessError(
            "jax found no devices.", where=f"process {found.process} of {count}",
            origin=str(error).strip().splitlines()[0], fix="see what the other processes say",
        ) from error  # fmt: skip


# ---------------------------------------------------------------- facts


def software() -> dict[str, str]:
    """Versions and settings that numbers or programs depend on."""
    found = {
        "the version of meshwright": VERSION,
        "the version of Python": platform.python_version(),
    }
    for name in PACKAGES:
        try:
            found[f"the version of {name}"] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[f"the version of {name}"] = "none (not installed)"
    for name in VARIABLES:
        words = [word for word in os.environ.get(name, "").split() if not word.startswith(HARMLESS)]
        found[name] = " ".join(sorted(words))
    return found | {name: str(getattr(jax.config, name, None)) for name in SETTINGS}


def constants(arrays: Mapping[int, Any]) -> dict[str, str]:
    """Arrays that a step holds itself."""
    return {f"constant {number} in the step": described(array) for number, array in arrays.items()}


def arguments(leaves: Sequence[Any], name: Callable[[int], str]) -> dict[str, str]:
    """What a process gives of its own to a step; what lies over all of them already is one thing."""
    own = [not (isinstance(leaf, jax.Array) and not leaf.is_fully_addressable) for leaf in leaves]
    return {name(k): described(leaf) for k, leaf in enumerate(leaves) if own[k]}


def described(leaf: Any) -> str:
    """`float32[64, 8] from 0.173 (digest 8f3a90c1d2e4)`; equal for equal bytes only."""
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    array = np.asarray(leaf)
    if array.dtype == object:
        return type(leaf).__name__
    flat = np.ascontiguousarray(array).reshape(-1)
    kind = f"{array.dtype}{list(array.shape)}"
    if flat.size == 1:
        return f"{flat[0]} ({kind}, {flat.tobytes().hex()})"
    first = f" from {flat[0]}" if flat.size else ""
    return f"{kind}{first} (digest {sha256(flat.view(np.uint8).data).hexdigest()[:12]})"
