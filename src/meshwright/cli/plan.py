"""The command that searches for a plan."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from ..ir.errors import UsageError
from ..ir.graph import Graph
from ..ir.units import counted, parse_bytes
from .options import Backend, Format, FormatOption, app
from .replan import print_plan, save_frontier


@app.command()
def plan(
    cluster: Annotated[
        str, typer.Option(help="8xcpu, 4xh100x8@ib400, v5p-256, a YAML file; see `clusters`.")
    ],
    model: Annotated[
        str,
        typer.Option(
            help="A model of the zoo (see `models`), FILE.py:FUNCTION, or a FILE.graph.json from --save-graph."
        ),
    ],
    global_batch: Annotated[
        int | None, typer.Option("--global-batch", "--batch", help="Examples per step.")
    ] = None,
    seq: Annotated[int | None, typer.Option(help="Tokens per sequence.")] = None,
    layers: Annotated[int | None, typer.Option(help="Depth.")] = None,
    optimizer: Annotated[str | None, typer.Option(help="adamw or sgd.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Of the computation: bf16 or f32.")] = None,
    batch_argnums: Annotated[
        str | None,
        typer.Option(
            help="Which arguments of the step are the batch: 1,2 or x=0,mask=1 with dims."
        ),
    ] = None,
    profile: Annotated[
        Path | None,
        typer.Option(help="Measured figures of the cluster's devices, from `calibrate`."),
    ] = None,
    memory: Annotated[
        str | None, typer.Option(help="Bytes per device that may be used, as in 60GiB.")
    ] = None,
    mesh: Annotated[str | None, typer.Option(help="Pin the mesh, as in 128x8.")] = None,
    microbatches: Annotated[int | None, typer.Option(help="Pin the microbatch count.")] = None,
    recompute: Annotated[
        str | None, typer.Option(help="Pin recompute: none, elementwise, selective, full.")
    ] = None,
    batch_stats: Annotated[
        str | None,
        typer.Option(
            help="microbatch: batch norm and the like are of each microbatch, which changes numbers."
        ),
    ] = None,
    attention: Annotated[
        str | None,
        typer.Option(
            help="fused: one op that keeps no scores (by default on GPUs and TPUs); ring: fused, keys go round; "
            "plain: as the step writes it."
        ),
    ] = None,
    loss: Annotated[
        str,
        typer.Option(
            help="fused: cross-entropy makes few logits at a time; plain: as the step writes it."
        ),
    ] = "plain",
    overlap: Annotated[
        str | None,
        typer.Option(
            help="What runs beside computation: parameters,gradients,tensor, with stages: stages; all; none. "
            "By default parameters,gradients,stages on GPUs and TPUs."
        ),
    ] = None,
    pp: Annotated[
        str,
        typer.Option(
            help="Stages of a pipeline, or auto: planned. The mesh is then that of a stage."
        ),
    ] = "1",
    schedule: Annotated[
        str | None, typer.Option(help="Pin the schedule: 1f1b, interleaved, zb-h1, ...")
    ] = None,
    chunks: Annotated[
        int | None, typer.Option(help="Stages per rank, for interleaved; planned if not given.")
    ] = None,
    program: Annotated[
        str | None,
        typer.Option(help="stages: programs of each stage; single: one for all stages, as gpipe."),
    ] = None,
    time_limit: Annotated[float, typer.Option(help="Seconds of search.")] = 60.0,
    gap: Annotated[
        float | None,
        typer.Option(help="Good enough: 0.01 (the default; 0.02 with --pp) stops at a proven 1 %."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Equal seeds give equal plans.")] = 0,
    search: Annotated[
        str,
        typer.Option(help="exact, or mcmc: FlexFlow's search, for comparison; it proves nothing."),
    ] = "exact",
    backend: Annotated[
        Backend,
        typer.Option(help="What runs the plan: jax's XLA, or torch, a process for each device."),
    ] = Backend.xla,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Where to save; MODEL.plan.json if not given."),
    ] = None,
    frontier: Annotated[
        Path | None,
        typer.Option(help="Save what `replan` needs when devices are lost or gained; with --pp."),
    ] = None,
    save_graph: Annotated[
        Path | None,
        typer.Option(help="Also save the graph of the step, to be planned where jax is missing."),
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Print all rows of every table.")
    ] = False,
    format: FormatOption = Format.text,
) -> None:
    """Plan a training step for a cluster, print the plan and save it.

    Ctrl-C ends the search with the best plan so far and its gap.
    """
    from ..graph_file import check_graph_place, graph_of, is_graph_file, name_of
    from ..ir.cluster.cluster import Cluster
    from ..ir.codec import check_writable, save_plan
    from ..planner.request import Request, parse_mesh, parse_pp

    options = {
        "batch": global_batch, "seq": seq, "layers": layers, "optimizer": optimizer, "dtype": dtype,
        "batch_argnums": batch_argnums,
    }  # fmt: skip
    recipe = {"model": model, **{k: v for k, v in options.items() if v is not None}}
    if not is_graph_file(model):
        from ..emulation import trace_on_cpu

        trace_on_cpu()
    where = Cluster.parse(cluster)
    if profile is not None:
        where = where.with_profile(profile)
    request = Request(
        memory=None if memory is None else parse_bytes(memory),
        mesh=None if mesh is None else parse_mesh(mesh),
        microbatches=microbatches,
        recompute=cast(Any, recompute),
        batch_stats=cast(Any, batch_stats),
        attention=cast(Any, attention),
        loss=cast(Any, loss),
        overlap=overlap,
        pp=parse_pp(pp),
        schedule=schedule,
        chunks=chunks,
        program=cast(Any, program),
        time_limit=time_limit,
        gap=gap,
        seed=seed,
        search=cast(Any, search),
        backend=backend.value,
    )
    if is_graph_file(model):
        if save_graph is not None:
            raise UsageError(
                f"{model:.200} is a saved graph already.", where="--save-graph", fix="leave it out"
            )
        made, name = graph_of(recipe), name_of(model)
    else:
        from ..recipe import make

        made = make(recipe)
        name = made.name
    place = output or Path(f"{name}.plan.json")
    for written in (place, frontier or place):
        check_writable(written)
    if save_graph is not None:
        check_graph_place(save_graph)
    if frontier is not None and request.pp == 1:
        save_frontier([], recipe, frontier)
    kept: list[Any] = []
    if isinstance(made, Graph):
        found = searched_graph(made, name, where, request, kept.append)
    else:
        found = searched(made, where, request, kept.append, save_graph)
    found = found.model_copy(update={"recipe": recipe})
    save_plan(found, place)
    print_plan(found, format, everything)
    print(f"saved to {place}", file=sys.stderr)
    if frontier is not None:
        save_frontier(kept, recipe, frontier)


def searched_graph(graph: Graph, name: str, where: Any, request: Any, keep: Any = None) -> Any:
    """Plan a saved graph, telling stderr what happens.

    Raises:
        UsageError: a pipeline is asked for, and the graph has loops, of which only whole steps can be taken apart.
    """
    from ..planner.request import check_early
    from ..planning import plan_graph
    from ..progress import Progress

    check_early(request, where)
    if request.pp != 1 and any(op.kind == "scan" for op in graph.ops):
        raise UsageError(
            "the graph has loops over layers, which stages cannot be made of.",
            where=name,
            fix="--pp 1; the model itself where jax is installed; or a model without `scan`",
        )
    with Progress() as progress:
        progress.say(f"searching plans for {counted(where.size, 'device')} (Ctrl-C: best so far)")
        return plan_graph(graph, where, request, name, None, progress.line, progress.now, keep)


def searched(
    made: Any, where: Any, request: Any, keep: Any = None, save_graph: Path | None = None
) -> Any:
    """Trace and plan, telling stderr what happens."""
    from ..api import plan_captured
    from ..graph_file import save_graph as write_graph
    from ..planner.request import check_early
    from ..progress import Progress

    check_early(request, where)
    with Progress() as progress:
        progress.say(f"tracing {made.name}")
        captured = made.capture(request.pp != 1)
        if save_graph is not None:
            write_graph(captured.graph, save_graph)
        progress.say(f"searching plans for {counted(where.size, 'device')} (Ctrl-C: best so far)")
        return plan_captured(captured, where, request, made.name, progress.line, progress.now, keep)
