"""What torch keeps to itself, and what differs between its versions (2.13 and 2.14): used nowhere else.

FakeTensorMode                      tensors that have a type and no values; torch traces with them
aot_export_joint_with_descriptors   forward and backward as one graph, whose ends say of which parameter they are
core_aten_decompositions            operations as others of a smaller set
TracerBase._filter_traceback_frames which lines of the user's a node remembers
clip_grad._get_total_norm           the norm of all gradients together
Optimizer._opt_called               whether it took a step
make_fx                             a function of tensors as a graph
pytree                              trees of tensors as leaves, with the path of each
"""

from __future__ import annotations

import contextlib
import re
import sysconfig
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from traceback import StackSummary
from typing import Any, Literal
from unittest import mock

import torch
from torch import nn
from torch._decomp import core_aten_decompositions, get_decompositions
from torch._functorch.aot_autograd import aot_export_joint_with_descriptors
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, make_fx
from torch.fx.proxy import TracerBase
from torch.utils import _pytree as pytree

Decompositions = Mapping[Any, Callable[..., Any]]
Role = Literal["parameter", "buffer", "argument", "tangent", "gradient", "mutated", "result"]
_LIBRARIES = (str(Path(torch.__file__).parent), str(Path(__file__).parent), "<")
_STANDARD = sysconfig.get_path("stdlib")
_FRAME = re.compile(r'File "([^"]+)", line (\d+)')


def fakes() -> FakeTensorMode:
    """A mode whose tensors have types and no values; the constants of a model may be real ones."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def fake_like(mode: FakeTensorMode, tensor: torch.Tensor) -> torch.Tensor:
    """A fake on the CPU, whatever the device: a build without CUDA cannot make fakes of it."""
    with mode:
        return torch.empty_strided(
            tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu",
        )  # fmt: skip


def decompositions(names: Sequence[str], kept: Sequence[str]) -> dict[Any, Callable[..., Any]]:
    """Those of core ATen, and of more packets by name, without those `kept`."""
    table = dict(core_aten_decompositions())
    table |= get_decompositions([getattr(torch.ops.aten, name) for name in names])
    left_out = {getattr(torch.ops.aten, name) for name in kept}
    return {
        op: rule for op, rule in table.items() if getattr(op, "overloadpacket", op) not in left_out
    }


# ---------------------------------------------------------------- trees


def leaves_with_names(tree: Any, root: str) -> tuple[list[tuple[str, Any]], Any]:
    """Leaves by path, `batch.tokens` or `batch.0`, and the tree itself."""
    found, spec = pytree.tree_flatten_with_path(tree)
    return [(".".join([root, *map(_word, path)]), leaf) for path, leaf in found], spec


def mapped(function: Callable[[Any], Any], tree: Any) -> Any:
    return pytree.tree_map(function, tree)


def _word(key: Any) -> str:
    for name in ("key", "idx", "name"):
        if hasattr(key, name):
            return str(getattr(key, name))
    return str(key).strip(".[]'")


# ---------------------------------------------------------------- tracing


@dataclass(frozen=True)
class End:
    """An input or output of the joint graph: of which parameter or buffer, or its number."""

    role: Role
    name: str | int


@dataclass(frozen=True)
class Joint:
    """Forward and backward as one graph. `outputs` leaves out what is None."""

    graph: torch.fx.GraphModule
    inputs: tuple[tuple[End, torch.fx.Node], ...]
    outputs: tuple[tuple[End, torch.fx.Node], ...]


def exported(
    module: nn.Module, args: tuple[Any, ...], prepare: Callable[[torch.fx.GraphModule], None]
) -> torch.fx.GraphModule:
    """The module as `torch.export` sees it, on which `prepare` may write, and on the parts that it calls."""
    with mock.patch.object(TracerBase, "_filter_traceback_frames", _user_frames):
        found = torch.export.export(module, args, strict=False).module(check_guards=False)
    prepare(found)
    return found


def _user_frames(_: Any, frames: StackSummary) -> StackSummary:
    """Of a node's trace, in place of those of `forward`: a loss is any function."""
    return StackSummary.from_list([frame for frame in frames if _is_users(frame.filename)])


def joint(module: nn.Module, args: tuple[Any, ...], table: Decompositions) -> Joint:
    """Forward and backward of a module that returns its loss."""
    with contextlib.ExitStack() as stack:
        made = aot_export_joint_with_descriptors(stack, module, args, decompositions=dict(table))
        graph = made.graph_module
        inputs = [
            (_end(node.meta["desc"]), node)
            for node in graph.graph.nodes
            if node.op == "placeholder"
        ]
        [output] = [node for node in graph.graph.nodes if node.op == "output"]
        pairs = zip(output.meta["desc"], output.args[0], strict=True)
        outputs = [(_end(desc), node) for desc, node in pairs if node is not None]
    return Joint(graph, tuple(inputs), tuple(outputs))


def _end(described: Any) -> End:
    match type(described).__name__:
        case "ParamAOTInput":
            return End("parameter", described.target)
        case "BufferAOTInput":
            return End("buffer", described.target)
        case "TangentAOTInput":
            return End("tangent", 0)
        case "GradAOTOutput":
            source = _end(described.grad_of)
            return End("gradient", source.name)
        case "InputMutationAOTOutput":
            return End("mutated", _end(described.mutated_input).name)
        case "PlainAOTOutput":
            return End("result", described.idx)
        case _:
            return End("argument", described.idx)


def traced(
    function: Callable[..., Any], args: Sequence[torch.Tensor], table: Decompositions
) -> torch.fx.GraphModule:
    """A function that writes over its arguments, as one that returns them: nothing is in place."""
    return make_fx(torch.func.functionalize(function), decomposition_table=dict(table))(*args)


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """As `torch.compile` sees it: optimizers then leave counts of steps in tensors, on CPUs too."""
    with mock.patch("torch.compiler.is_compiling", return_value=True):
        yield


@contextlib.contextmanager
def norm_of_all(ours: Callable[..., torch.Tensor]) -> Iterator[None]:
    """Within, `clip_grad_norm_` measures gradients by a function of ours, however it was imported."""
    with mock.patch("torch.nn.utils.clip_grad._get_total_norm", ours):
        yield


def is_fake(tensor: Any) -> bool:
    return isinstance(tensor, FakeTensor)


def untraced() -> contextlib.AbstractContextManager[Any]:
    """Within, what runs is in no graph."""
    return disable_proxy_modes_tracing()


def is_alias(one: Any, other: torch.Tensor) -> bool:
    """Whether both are one tensor, up to `detach`."""
    return isinstance(one, torch.Tensor) and torch._C._is_alias_of(one, other)  # type: ignore[attr-defined]


def mark_stepped(optimizer: torch.optim.Optimizer) -> None:
    """As its own step does: schedulers warn where they are ahead of it."""
    optimizer._opt_called = True  # type: ignore[attr-defined]


def is_bookkeeping(node: torch.fx.Node) -> bool:
    """Whether a node marks a stretch of the profile, or says again of what type something is."""
    return str(node.target).startswith(("profiler.", "aten._assert_tensor_metadata."))


def _is_users(file: str) -> bool:
    """Whether a file is neither torch's, Python's nor of this package."""
    standard = file.startswith(_STANDARD) and "site-packages" not in file
    return not file.startswith(_LIBRARIES) and not standard


def user_line(node: torch.fx.Node) -> str:
    """`model.py:12` of the innermost frame outside torch and this package that made a node, if one is known."""
    found = ""
    for file, line in _FRAME.findall(node.meta.get("stack_trace") or ""):
        if _is_users(file):
            found = f"{Path(file).name}:{line}"
    return found


def module_path(node: torch.fx.Node) -> str:
    """The module that a node is of, `h.0.attn`, or whose gradient it is of; nothing where torch does not say."""
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack") or {}
    return str([*stack.values()][-1][0]) if stack else ""


def user_place(error: BaseException) -> str:
    """`model.py:12` of the innermost frame outside torch and this package that an error passed."""
    found, place = "", error.__traceback__
    while place is not None:
        file = place.tb_frame.f_code.co_filename
        if _is_users(file):
            found = f"{Path(file).name}:{place.tb_lineno}"
        place = place.tb_next
    return found
