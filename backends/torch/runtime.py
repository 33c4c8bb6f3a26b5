"""torch as the runtime asks for it: each rank is a process, a mesh is some of the ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ...ir.sharding import Sharding
from ..runtime.programs import Route, Transfer
from .collectives import part
from .handover import Handover, Post, RankMesh, Sent


@dataclass(frozen=True)
class Held:
    """A result of the step on the ranks of its stage; of it, the part of this one, None on others."""

    ranks: RankMesh
    part: torch.Tensor | None


@dataclass(frozen=True)
class RankDevices:
    """All ranks, seen from one of them. Leaves are whole tensors, or `Held` ones."""

    process: int
    process_count: int
    post: Post
    failure = ConnectionError

    def wait(self, results: Any) -> None:
        """Ops of torch on CPUs are done when they return: only what was sent may be on its way."""
        if isinstance(results, Sent):
            results.wait()

    def gather(self, array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        mine = torch.tensor(array)
        others = [rank for rank in range(self.process_count) if rank != self.process]
        found = {rank: torch.empty_like(mine) for rank in others} | {self.process: mine}
        moving = [self.post.send(mine, rank) for rank in others]
        moving += [self.post.receive(found[rank], rank) for rank in others]
        Sent(tuple(moving)).wait()
        return torch.stack([found[rank] for rank in range(self.process_count)]).numpy()

    def processes_of(self, mesh: RankMesh) -> set[int]:
        return set(mesh.ranks)

    def place(
        self, leaves: Sequence[Any], mesh: RankMesh, layouts: Sequence[Sharding]
    ) -> Sequence[Any]:
        return [self._place(*each, mesh) for each in zip(leaves, layouts, strict=True)]

    def _place(self, leaf: Any, layout: Sharding, mesh: RankMesh) -> Any:
        if isinstance(leaf, Held):
            return leaf.part
        if isinstance(leaf, torch.Tensor):
            return part(leaf, layout, mesh.mesh, self.process - mesh.first).clone()
        return leaf  # the number of a microbatch

    def lies_on(self, leaf: Any, mesh: RankMesh) -> bool:
        return isinstance(leaf, Held) and leaf.ranks == mesh

    def transfer(self, routes: Sequence[Route], sender: RankMesh, receiver: RankMesh) -> Transfer:
        return Handover(routes, sender, receiver, self.process, self.post)

    def scalars(self, vector: torch.Tensor) -> Sequence[torch.Tensor]:
        return vector.unbind()

    def is_ready(self, array: Any) -> bool:
        return True
