"""How much memory a step takes: the bytes of all storages that live at a time, counted as torch's ops make them.

    with LiveStorages() as live:
        steps.run()
    live.peak, live.bytes     # the most that lived at a moment, and what lives now

What lived before counts if it is told. What an op allocates for itself and gives back is not seen; the work of an op
that torch composes of others is.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveStorages(TorchDispatchMode):
    """Counts bytes of storages while ops run in this thread.

    Args:
        held: tensors that live already.
    """

    def __init__(self, held: Iterable[torch.Tensor] = ()):
        super().__init__()
        self.bytes, self.peak = 0, 0
        self._known: dict[int, int] = {}
        self._see(held)

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:  # fmt: skip
        found = func(*args, **(kwargs or {}))
        self._see(x for x in tree_iter(found) if isinstance(x, torch.Tensor))
        return found

    def _see(self, tensors: Iterable[torch.Tensor]) -> None:
        for x in tensors:
            storage = x.untyped_storage()
            key = storage._cdata
            if key not in self._known:
                self._known[key] = storage.nbytes()
                self.bytes += storage.nbytes()
                weakref.finalize(storage, self._gone, key)
        self.peak = max(self.peak, self.bytes)

    def _gone(self, key: int) -> None:
        self.bytes -= self._known.pop(key)
