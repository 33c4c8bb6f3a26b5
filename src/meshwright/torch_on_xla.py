"""A step that torch captured, run by XLA on the devices of this process: to its caller one rank that has all whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import torch

from .backends.torch.capture import Captured
from .backends.torch.dtypes import array_of, tensor_of
from .backends.torch.handover import RankMesh
from .backends.torch.held import Shard, place, whole
from .backends.xla.dtypes import jax_dtype
from .backends.xla.foreign import adopted
from .backends.xla.lower import lower
from .ir.graph import TensorType
from .ir.mesh import Mesh
from .ir.plan import Plan
from .ir.sharding import Sharding, replicated


class XlaSteps:
    """Step after step, as `ranks.WholeSteps`. torch counts in 64 bits, which jax does only where it is told to.

    Raises:
        MismatchError: the plan was made for another graph.
        LoweringError: too few devices, or an operation that jax has not.
    """

    def __init__(self, plan: Plan, captured: Captured):
        self.graph = captured.graph
        arrays = {v: array_of(tensor) for v, tensor in captured.binding.arrays.items()}
        typed = {v: array.view(jax_dtype(self.graph.types[v].dtype)) for v, array in arrays.items()}
        with jax.enable_x64(True):
            self.lowered = lower(plan, adopted(self.graph, typed))
        self.leaves: list[Any] = [None] * len(self.graph.inputs)
        self.outputs: Sequence[Any] = ()

    @property
    def places(self) -> list[tuple[RankMesh, Sharding]]:
        """Where each result lies: whole, here."""
        here = RankMesh(Mesh(()), 0)
        return [(here, replicated(self.graph.types[v].rank)) for v in self.graph.outputs]

    def give(self, position: int, whole: torch.Tensor) -> None:
        dtype = jax_dtype(self._kind(position).dtype)
        self.leaves[position] = np.array(array_of(whole)).view(dtype)

    def run(self) -> None:
        with jax.enable_x64(True):
            self.outputs = self.lowered.run(self.leaves)
        for into, out in self.graph.state:
            self.leaves[into] = self.outputs[out]

    def result(self, position: int) -> torch.Tensor:
        return tensor_of(np.asarray(self.outputs[position]))

    def held(self, position: int) -> Shard:
        return whole(tensor_of(np.asarray(self.leaves[position])))

    def room(self, position: int) -> Shard:
        return place(self._kind(position))

    def put(self, position: int, shard: Shard | None) -> None:
        assert shard is not None
        self.give(position, shard.tensor)

    def _kind(self, position: int) -> TensorType:
        return self.graph.types[self.graph.inputs[position]]
