"""A step's graph as a file: planned and looked into where the framework that the step is written in is missing.

meshwright plan --model gpt-tiny --cluster 8xcpu --save-graph gpt.graph.json     needs jax
meshwright plan --model gpt.graph.json --cluster h100x8                          does not
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .ir.codec import check_writable, dump_graph, load_graph, write_whole
from .ir.errors import GraphError, UsageError
from .ir.files import MIB, FileKind, read_text
from .ir.graph import Graph

SUFFIX = ".graph.json"
FILE = FileKind("graph", 1024 * MIB, "a file from `meshwright plan --save-graph`", GraphError)


def is_graph_file(model: str) -> bool:
    """Whether a model is named by the file of its graph."""
    return model.endswith(SUFFIX)


def name_of(model: str) -> str:
    """`gpt` for runs/gpt.graph.json."""
    return Path(model).name.removesuffix(SUFFIX)


def graph_of(recipe: Mapping[str, Any]) -> Graph:
    """The graph in the file that a recipe names.

    Raises:
        UsageError: an option that graphs do not have.
        GraphError: no such file, or another content than was written.
    """
    for name in recipe:
        if name != "model":
            raise UsageError(
                f"--{name.replace('_', '-')} is for models; the graph of a step has it fixed.",
                where=str(recipe["model"]),
                fix="leave it out, or save a graph made with it",
            )
    path = str(recipe["model"])
    try:
        return load_graph(read_text(path, FILE))
    except GraphError as error:
        raise GraphError.at(error, None, path) from error


def check_graph_place(path: Path) -> None:
    """Refuse a place from which the graph would not be read again.

    Raises:
        UsageError: a name that does not say that it is a graph's.
        PlanError: it cannot be written.
    """
    if not is_graph_file(path.name):
        raise UsageError(
            f"{path!s:.200} does not say that it holds a graph.",
            where="--save-graph",
            fix=f"a name that ends in {SUFFIX}",
        )
    check_writable(path)


def save_graph(graph: Graph, path: Path) -> None:
    """Write a graph whole, or not at all."""
    write_whole(path, dump_graph(graph) + "\n")
