"""What `meshwright run` saves, and goes on from: the step's state by name, and how many steps were taken.

It is a checkpoint of `torch.distributed.checkpoint`, with names and shapes as on one device: any backend, plan and
number of devices go on from it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from .backends.xla.params import dtype_name
from .ir.errors import UsageError
from .ir.graph import TensorType

if TYPE_CHECKING:
    from .backends.torch.held import Name


def check_torch(where: str) -> None:
    """Refuse what needs torch, where it is not installed.

    Raises:
        UsageError: it is not.
    """
    if importlib.util.find_spec("torch") is None:
        raise UsageError(
            "torch is not installed.", where=where, fix="pip install 'meshwright[torch]'"
        )


def check_saving(folder: Path) -> None:
    """Refuse before hours of work what could not be saved after them.

    Raises:
        UsageError: torch is not installed, or there is something already.
    """
    check_torch("--save")
    from .backends.torch.state import check_free

    check_free(folder)


@dataclass(frozen=True)
class Kept:
    """The folders that a run saves to and goes on from."""

    save: Path | None = None
    resume: Path | None = None

    def begin(
        self, state: Any, batches: Iterator[tuple[Any, ...]]
    ) -> tuple[Any, Iterator[tuple[Any, ...]], int]:
        """Where the run that is resumed ended: its state, the batches after its last one, the steps that it took."""
        if self.resume is None:
            return state, batches, 0
        state, taken = resume(self.resume, state)
        return state, islice(batches, taken, None), taken


def names_of(state: Any) -> dict[Name, int]:
    """Of each leaf of a state, by its path, the number."""
    paths = [path for path, _ in jax.tree.leaves_with_path(state)]
    words = [jax.tree_util.keystr(path).removeprefix(".") for path in paths]
    return {("state", word): number for number, word in enumerate(words)}


def steps_taken(count: int) -> dict[Name, np.ndarray[Any, Any]]:
    """How many steps were taken, as a leaf of the checkpoint."""
    return {("steps",): np.array(count)}


def save(folder: Path, state: Any, steps: int) -> None:
    """Write a state that this process holds.

    Raises:
        UsageError: there is something already.
        LoweringError: it cannot be written, or torch has no such type.
    """
    from .backends.torch.dtypes import tensor_of
    from .backends.torch.held import whole
    from .backends.torch.state import save

    leaves = map(np.asarray, jax.tree.leaves(state))
    arrays = dict(zip(names_of(state), leaves, strict=True))
    save(folder, {name: whole(tensor_of(x)) for name, x in (arrays | steps_taken(steps)).items()})


def resume(folder: Path, state: Any) -> tuple[Any, int]:
    """A state as it was saved, like the given one in tree, shapes and types; and the steps that were taken before.

    Raises:
        UsageError: torch is not installed, or no checkpoint is there.
        MismatchError: a leaf is missing, or has another shape or type, or has no place in the step.
        LoweringError: it cannot be read, or torch has no such type.
    """
    check_torch("--resume")
    from .backends.torch.dtypes import array_of
    from .backends.torch.held import place
    from .backends.torch.state import load

    leaves, tree = jax.tree.flatten(state)
    like = dict(zip(names_of(state), map(_array, leaves), strict=True)) | steps_taken(0)
    types = {name: TensorType(dtype_name(x.dtype), x.shape) for name, x in like.items()}
    found = {name: place(kind) for name, kind in types.items()}
    load(folder, types, found)
    *arrays, steps = (
        array_of(shard.tensor).view(like[name].dtype) for name, shard in found.items()
    )
    return jax.tree.unflatten(tree, arrays), int(steps)


def _array(leaf: Any) -> Any:
    """A leaf that has a type: a plain number is what jax makes of it."""
    return leaf if hasattr(leaf, "dtype") else jnp.asarray(leaf)
