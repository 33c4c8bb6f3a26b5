"""What all processes of a run must have alike, compared before it matters.

    agree("the command line", lambda: {"--seed": "0", "--steps": "10"})

Each process says what it has through jax's coordination service, which works before devices are looked for
and between unlike versions. Every process hears all of them, so all refuse, with the values and whose they are.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from itertools import count
from threading import Timer
from time import monotonic
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ...ir.errors import MeshwrightError, MismatchError, ProcessError
from ...ir.plan import Plan
from ...ir.version import VERSION
from .compat import coordination
from .rendezvous import deadline_seconds, ended, late, leave

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
LONGEST = 60  # characters of a value in a message
TOLD = 4  # differences in one message
READ = 10.0  # seconds that the coordinator gives the others to read before it ends

_turns = count()
_refused: list[MeshwrightError] = []


def refused() -> MeshwrightError | None:
    """Why this process is ending, if the processes did not agree: jax aborts those that lose the coordinator."""
    return _refused[-1] if _refused else None


def agree(what: str, facts: Callable[[], Mapping[str, str]]) -> None:
    """Go on only if all processes say the same; every process calls it, and alone it does nothing.

    Args:
        what: what the facts are of: "the command line".
        facts: give them by name, as text that a user can read; not asked where the process is alone.

    Raises:
        MismatchError: what differs, in which processes, with the values.
        ProcessError: a process did not say anything in time.
    """
    found = coordination()
    if found is None or found.count == 1:
        return
    text = json.dumps({**facts()})
    turn = f"meshwright/{next(_turns)}"
    marks = _everyone(found, f"{turn}/digest", what, sha256(text.encode()).hexdigest())
    if len(set(marks)) == 1:
        return
    said = [json.loads(each) for each in _everyone(found, f"{turn}/facts", what, text)]
    error = _difference(what, said, found.process)
    _refused.append(error)
    _part(found, f"{turn}/read")
    raise error


def _everyone(found: Any, key: str, what: str, text: str) -> list[str]:
    """What each process says, in their order."""
    seconds, process = deadline_seconds(), 0
    begin = monotonic()
    try:
        found.client.key_value_set(f"{key}/{found.process}", text)
        said = []
        for process in range(found.count):
            left = max(0.001, min(seconds - (monotonic() - begin), 1e6))
            said.append(found.client.blocking_key_value_get(f"{key}/{process}", int(left * 1000)))
        return said
    except jax.errors.JaxRuntimeError as error:
        compared = f"the comparison of {what}"
        if "DEADLINE" in str(error):
            raise late(compared, f"process {process}", seconds) from error
        raise ended(compared, f"process {process}", error) from error


def _part(found: Any, key: str) -> None:
    """Say that all was read; the first process waits for that, as with it ends the service that others read from."""
    try:
        found.client.key_value_set(f"{key}/{found.process}", "")
        for process in range(1, found.count if found.process == 0 else 0):
            found.client.blocking_key_value_get(f"{key}/{process}", int(READ * 1000))
    except jax.errors.JaxRuntimeError:
        return  # the other has ended, which is what this one is about to do


def _difference(what: str, said: Sequence[Mapping[str, str]], process: int) -> MismatchError:
    names = list(dict.fromkeys(name for each in said for name in each))
    rows = [(name, [each.get(name, "not there") for each in said]) for name in names]
    unlike = [f"{name} is {_by_process(values)}" for name, values in rows if len(set(values)) > 1]
    more = f"; and {len(unlike) - TOLD} more" if len(unlike) > TOLD else ""
    return MismatchError(
        f"{unlike[0] if unlike else f'the order of {what} is not the same'}.",
        where=f"process {process} of {len(said)}", origin="; ".join(unlike[1:TOLD]) + more or None,
        fix=f"the same for all processes: {what} must be alike in each",
    )  # fmt: skip


def _by_process(values: Sequence[str]) -> str:
    """`0 in process 0, 1 in processes 1 and 2`."""
    holders: dict[str, list[int]] = {}
    for process, value in enumerate(values):
        holders.setdefault(value, []).append(process)
    return ", ".join(
        f"{value or 'nothing'} in {_processes(held)}" for value, held in holders.items()
    )


def _processes(numbers: Sequence[int]) -> str:
    if len(numbers) == 1:
        return f"process {numbers[0]}"
    if len(numbers) > 4:
        return f"process {numbers[0]} and {len(numbers) - 1} others"
    return f"processes {', '.join(map(str, numbers[:-1]))} and {numbers[-1]}"


@contextmanager
def watched(seconds: float, error: Callable[[], ProcessError]) -> Iterator[None]:
    """End this process with an error if what is inside takes longer: it waits where Python cannot raise."""
    timer = Timer(seconds, lambda: leave(error()))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def look_for_devices() -> None:
    """Let jax look for the devices of all processes, which waits for all of them.

    Raises:
        ProcessError: one of them did not show its own.
    """
    found, seconds = coordination(), min(deadline_seconds(), 1e6)
    if found is None or found.count == 1:
        return
    others = f"the other {found.count - 1} process{'es' if found.count > 2 else ''}"
    try:
        with watched(seconds, lambda: late("the look for devices", others, seconds)):
            jax.devices()
    except jax.errors.JaxRuntimeError as error:
        raise ProcessError(
            "jax found no devices.", where=f"process {found.process} of {found.count}",
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


def decisions(plan: Plan) -> dict[str, str]:
    """A plan, field by field."""
    return {
        f"the plan's {name}": short(value) for name, value in plan.model_dump(mode="json").items()
    }


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


def short(value: Any) -> str:
    """A value as it is, or its beginning and a digest where it is long."""
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    if len(text) <= LONGEST:
        return text
    return f"{text[: LONGEST // 2]}... (digest {sha256(text.encode()).hexdigest()[:12]})"
