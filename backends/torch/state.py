"""Parameters, buffers and optimizer state in a folder and back, by `torch.distributed.checkpoint`.

    save(folder, {("model", "h.0.weight"): steps.held(0), ...})        # each rank writes what it holds
    load(folder, types, {("model", "h.0.weight"): steps.room(0)})      # each rank reads what it is to hold

A checkpoint has leaves by the names and shapes that they have on one device, so that it is loaded under any plan, by
any number of ranks, or by plain torch. It is written whole or not at all, and refused before anything is changed.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from itertools import starmap
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from ...ir.errors import LoweringError, MeshwrightError, MismatchError, ProcessError, UsageError
from ...ir.graph import TensorType
from .dtypes import dtype_name
from .held import Name, Shard

Leaves = Mapping[Name, Shard]
_T = TypeVar("_T")


# ---------------------------------------------------------------- out


def check_free(folder: Path) -> None:
    """Refuse a folder that holds something: what was saved before is not written over.

    Raises:
        UsageError: it does.
    """
    try:
        taken = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    except OSError as error:
        raise _unreadable(folder, error) from error
    if taken:
        raise UsageError(
            "there is something already, which is not written over.",
            where=f"checkpoint {folder}",
            fix="a folder for each checkpoint, as checkpoints/1000; or remove this one",
        )


def save(folder: Path, leaves: Leaves) -> None:
    """Write what all ranks hold, whole or not at all. All ranks of the default process group call it.

    Args:
        folder: none yet, or empty; all ranks see the same one.
        leaves: what this rank holds. Copies on several ranks are written once.

    Raises:
        UsageError: something is there already.
        LoweringError: it cannot be written.
        ProcessError: a rank ended.
    """
    beside = folder.with_name(f".{folder.name}.partial")
    _agreed(folder, lambda: _begin(folder, beside))
    try:
        _write(beside, _tree(leaves))
        _agreed(folder, lambda: _end(folder, beside))
    except MeshwrightError:
        if _first():
            shutil.rmtree(beside, ignore_errors=True)
        raise


def _begin(folder: Path, beside: Path) -> None:
    if _first():
        check_free(folder)
        with suppress(FileNotFoundError):
            shutil.rmtree(beside)  # of a run that ended as it wrote
        beside.mkdir(parents=True)


def _end(folder: Path, beside: Path) -> None:
    if _first():
        _check_files(beside, _metadata(beside))
        beside.rename(folder)


class _Saving(DefaultSavePlanner):
    """Torch's own, of which a rank has parts of leaves."""

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan([*starmap(_item, self.state_dict.items())], planner_data=self.mappings)
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> torch.Tensor:
        return self.state_dict[index.fqn].tensor


def _chunk(shard: Shard) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(shard.offsets), shard.tensor.size())


def _item(name: str, shard: Shard) -> WriteItem:
    properties = TensorProperties.create_from_tensor(shard.tensor)
    data = TensorWriteData(_chunk(shard), properties, torch.Size(shard.shape))
    index = MetadataIndex(name, _chunk(shard).offsets)
    return WriteItem(index, WriteItemType.SHARD, tensor_data=data)


def _write(folder: Path, tree: dict[str, Any]) -> None:
    writer = FileSystemWriter(folder)
    _meet(
        folder,
        lambda: state_dict_saver.save(
            tree, storage_writer=writer, planner=_Saving(), no_dist=_alone()
        ),
    )


def _tree(leaves: Leaves) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for (*outer, last), shard in leaves.items():
        inner = found
        for key in outer:
            inner = inner.setdefault(key, {})
        inner[last] = shard
    return found


# ---------------------------------------------------------------- in


def load(folder: Path, types: Mapping[Name, TensorType], leaves: Leaves) -> None:
    """Read what this rank is to hold into the tensors of `leaves`. All ranks of the default process group call it.

    Args:
        types: of all leaves of the step, whole, as on one device.
        leaves: those that have a place on this rank.

    Raises:
        UsageError: no checkpoint is there.
        MismatchError: a leaf is missing, has another shape or type, or has no place in the step.
        LoweringError: it cannot be read.
        ProcessError: a rank ended.
    """

    def check() -> None:
        metadata = _metadata(folder)
        _check_leaves(folder, metadata, types)
        _check_files(folder, metadata)

    _agreed(folder, check)
    _read(folder, leaves)


class _Loading(LoadPlanner):
    """Fills the part of each leaf that has a place on this rank from all saved parts that meet it."""

    def __init__(self, leaves: Mapping[str, Shard]):
        self.leaves = leaves

    def set_up_planner(
        self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        assert metadata is not None
        self.saved = metadata.state_dict_metadata

    def create_local_plan(self) -> LoadPlan:
        items: list[ReadItem] = []
        for name, shard in self.leaves.items():
            leaf = self.saved[name]
            assert isinstance(leaf, TensorStorageMetadata)
            items += create_read_items_for_chunk_list(name, leaf, [_chunk(shard)])
        return LoadPlan(items)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        raise AssertionError("leaves are tensors")

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        found = self.leaves[read_item.dest_index.fqn].tensor
        ranges = zip(read_item.dest_offsets, read_item.lengths, strict=True)
        for dim, (start, length) in enumerate(ranges):
            found = found.narrow(dim, start, length)
        return found

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        pass


def _read(folder: Path, leaves: Leaves) -> None:
    reader, planner = (
        FileSystemReader(folder),
        _Loading({".".join(name): shard for name, shard in leaves.items()}),
    )
    _meet(
        folder,
        lambda: state_dict_loader.load(
            {}, storage_reader=reader, planner=planner, no_dist=_alone()
        ),
    )


def _metadata(folder: Path) -> Metadata:
    try:
        return FileSystemReader(folder).read_metadata()
    except FileNotFoundError as error:
        raise UsageError(
            "there is no checkpoint of torch.distributed.checkpoint.",
            where=f"checkpoint {folder}",
            origin=f"{error.filename} is missing",
            fix="the folder that was saved to",
        ) from error
    except Exception as error:
        raise _unreadable(folder, error) from error


def _check_files(folder: Path, metadata: Metadata) -> None:
    """All that the checkpoint's list of contents speaks of is there."""
    files = {each.relative_path for each in (metadata.storage_data or {}).values()}
    if missing := sorted(name for name in files if not (folder / name).is_file()):
        raise LoweringError(
            f"`{missing[0]}` is missing of {len(files)} files.",
            where=f"checkpoint {folder}",
            fix="a folder that all ranks see, as on a shared file system",
        )


def _check_leaves(folder: Path, metadata: Metadata, types: Mapping[Name, TensorType]) -> None:
    saved = metadata.state_dict_metadata
    wanted = {".".join(name): kind for name, kind in types.items()}
    for name, kind in wanted.items():
        found = _type_of(saved.get(name))
        if found != kind:
            what = "misses" if found is None else f"has {found} for"
            raise MismatchError(
                f"the checkpoint {what} `{name}`, which is {kind} in the step.",
                where=f"checkpoint {folder}",
                fix="the model and the optimizer that were saved",
            )
    kept = {f"{name[0]}." for name in types if len(name) > 1}
    for name, leaf in saved.items():
        told = any(name.startswith(prefix) for prefix in kept)
        if told and name not in wanted and isinstance(leaf, TensorStorageMetadata):
            raise MismatchError(
                f"the checkpoint has `{name}`, which has no place in the step.",
                where=f"checkpoint {folder}",
                fix="the model and the optimizer that were saved",
            )


def _type_of(leaf: Any) -> TensorType | None:
    if not isinstance(leaf, TensorStorageMetadata):
        return None
    return TensorType(dtype_name(leaf.properties.dtype), tuple(leaf.size))


# ---------------------------------------------------------------- together


def _alone() -> bool:
    return not dist.is_initialized()


def _first() -> bool:
    return _alone() or dist.get_rank() == 0


def _agreed(folder: Path, do: Callable[[], None]) -> None:
    """What each rank does; the refusal of one is that of all."""
    told: MeshwrightError | None = None
    try:
        do()
    except MeshwrightError as error:
        told = error
    except OSError as error:
        told = _unwritable(folder, error)
    every: list[MeshwrightError | None] = [told]
    if not _alone():
        every = [None] * dist.get_world_size()
        _meet(folder, lambda: dist.all_gather_object(every, told))
    if found := next((each for each in every if each is not None), None):
        raise found


def _meet(folder: Path, do: Callable[[], _T]) -> _T:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            return do()
    except CheckpointException as error:
        rank, (reason, _) = next(iter(error.failures.items()))
        raise LoweringError(
            f"rank {rank} failed: {type(reason).__name__}: {_line(reason)}",
            where=f"checkpoint {folder}",
            fix="room on the disk, and a folder that all ranks may write and read",
        ) from error
    except RuntimeError as error:
        raise ProcessError(
            "another rank ended, or did not come by the deadline.",
            where=f"checkpoint {folder}",
            origin=_line(error),
            fix="see what the other ranks say",
        ) from error


def _unwritable(folder: Path, error: OSError) -> LoweringError:
    return LoweringError(
        f"it cannot be written: {os.strerror(error.errno) if error.errno else _line(error)}.",
        where=f"checkpoint {folder}",
        fix="a folder that can be written, with room for it",
    )


def _unreadable(folder: Path, error: Exception) -> LoweringError:
    return LoweringError(
        f"it cannot be read: {type(error).__name__}: {_line(error)}",
        where=f"checkpoint {folder}",
        fix="a folder that was saved to, and that may be read",
    )


def _line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
