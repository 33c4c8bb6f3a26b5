"""`meshwright price`: a training job given as numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..ir.errors import UsageError
from ..ir.mistakes import Mistakes
from ..ir.units import format_bytes, format_seconds
from ..output import say
from .figures import Changes, TraceFile, changes_of, likely, memory_words
from .options import Format, FormatOption, app

if TYPE_CHECKING:
    from ..pricing import Shape


@app.command()
def price(
    cluster: Annotated[str, typer.Option(help="128xa100x8@hdr200, a YAML file; see `clusters`.")],
    global_batch: Annotated[
        int, typer.Option("--global-batch", "--batch", help="Sequences per step.")
    ],
    model: Annotated[
        str | None, typer.Option(help="A decoder of the zoo; or give its numbers.")
    ] = None,
    family: Annotated[
        str | None,
        typer.Option(
            help="gpt (if not given), llama or mixtral, when the model is given as numbers."
        ),
    ] = None,
    layers: Annotated[int | None, typer.Option(help="Depth.")] = None,
    hidden: Annotated[int | None, typer.Option(help="Width.")] = None,
    heads: Annotated[int | None, typer.Option(help="Query heads.")] = None,
    kv_heads: Annotated[
        int | None, typer.Option(help="Key and value heads; as many as heads if not given.")
    ] = None,
    head_dim: Annotated[
        int | None, typer.Option(help="Width of one head; hidden / heads if not given.")
    ] = None,
    ffn: Annotated[
        int | None, typer.Option(help="Feed-forward width; 4 x hidden if not given.")
    ] = None,
    experts: Annotated[
        int | None, typer.Option(help="Experts of a mixtral, each of the feed-forward width.")
    ] = None,
    choices: Annotated[int | None, typer.Option(help="Experts per token; 2 if not given.")] = None,
    vocab: Annotated[int | None, typer.Option(help="Vocabulary; 51200 if not given.")] = None,
    seq: Annotated[int | None, typer.Option(help="Tokens per sequence.")] = None,
    dropout: Annotated[float, typer.Option(help="Part of activations that a gpt drops out.")] = 0.0,
    microbatch: Annotated[int, typer.Option(help="Sequences per microbatch and data rank.")] = 1,
    tp: Annotated[int, typer.Option(help="Tensor parallelism.")] = 1,
    pp: Annotated[int, typer.Option(help="Pipeline stages.")] = 1,
    vpp: Annotated[int, typer.Option(help="Virtual stages per rank (interleaving).")] = 1,
    lean_ends: Annotated[
        bool,
        typer.Option(
            "--lean-ends", help="First and last stage have a layer fewer, for embedding and head."
        ),
    ] = False,
    dp: Annotated[
        int | None, typer.Option(help="Data parallelism; the rest of the devices if not given.")
    ] = None,
    cp: Annotated[int, typer.Option(help="Context parallelism.")] = 1,
    cp_kind: Annotated[
        str,
        typer.Option(
            help="How attention meets other positions: all_gather, p2p (a ring), a2a (heads are cut)."
        ),
    ] = "all_gather",
    ep: Annotated[int, typer.Option(help="Expert parallelism, inside data parallelism.")] = 1,
    zero: Annotated[int, typer.Option(help="ZeRO stage: 0, 1, 2 or 3.")] = 0,
    shard_group: Annotated[
        int | None,
        typer.Option(
            help="Data ranks that ZeRO shards over (HSDP, MiCS), copies across; all if not given."
        ),
    ] = None,
    sequence_parallel: Annotated[
        bool, typer.Option("--sp", help="Sequence parallelism beside tp.")
    ] = False,
    recompute: Annotated[
        str,
        typer.Option(help="none, selective, alternate, full; with XLA everything, dots or blocks."),
    ] = "none",
    attention: Annotated[
        str | None,
        typer.Option(
            help="fused: no scores in memory (by default on GPUs and TPUs); plain: in memory."
        ),
    ] = None,
    loss: Annotated[str, typer.Option(help="plain: all logits in memory; fused: few.")] = "plain",
    products: Annotated[str, typer.Option(help="Products in bf16 or fp8.")] = "bf16",
    gathers: Annotated[
        str, typer.Option(help="Gathers for products in bf16, or in fp8 as these.")
    ] = "bf16",
    fusion: Annotated[
        str, typer.Option(help="What is fused: all, layers alone, none (PyTorch run eagerly).")
    ] = "all",
    redone_apart: Annotated[
        bool,
        typer.Option(
            "--redone-apart", help="What is computed again runs in kernels of its own, as with XLA."
        ),
    ] = False,
    overlap: Annotated[
        str | None,
        typer.Option(
            help="What runs beside computation: parameters,gradients,tensor,stages; all; none. "
            "By default parameters,gradients,stages on GPUs and TPUs."
        ),
    ] = None,
    separate_accumulation: Annotated[
        bool,
        typer.Option(
            "--separate-accumulation", help="Gradients are added up in passes of their own."
        ),
    ] = False,
    narrow_gradients: Annotated[
        bool,
        typer.Option(
            "--16-bit-gradients", help="Gradients are added up and reduced in 16 bits, not in fp32."
        ),
    ] = False,
    changes: Changes = None,
    trace: TraceFile = None,
    format: FormatOption = Format.text,
) -> None:
    """Price a training job given as numbers: seconds per step and memory per stage."""
    from ..emulation import trace_on_cpu
    from ..ir.cluster.cluster import Cluster
    from ..ir.codec import check_writable, write_whole
    from ..ir.composites.attention_op import AttentionKind
    from ..ir.composites.losses import LossKind
    from ..ir.execution import (
        OVERLAPS,
        WITHIN,
        Execution,
        parse_attention,
        parse_loss,
        parse_overlap,
        usual_execution,
    )
    from ..planner.pipeline.timeline import Timeline
    from ..planner.request import check_overlap
    from ..pricing import Setting, check_batch, fusion_of, parallelism_on, price_job

    if trace is not None:
        check_writable(trace)
    trace_on_cpu()
    where = Cluster.parse(cluster)
    for path, value in changes_of(changes).items():
        where = where.with_(path, value)
    wrong = Mistakes()
    usual = usual_execution(device.kind for device in where.devices.values())
    known = WITHIN if pp == 1 else OVERLAPS
    kind: AttentionKind | None = wrong.of(
        lambda: parse_attention(attention or usual.attention, ("fused", "plain"))
    )
    kept: LossKind | None = wrong.of(lambda: parse_loss(loss))
    beside = usual.overlap if overlap is None else wrong.of(lambda: parse_overlap(overlap, known))
    assumed = Execution(
        kind or usual.attention,
        tuple(each for each in beside or () if each in known),
        kept or usual.loss,
    )
    wrong.of(lambda: check_overlap(assumed.overlap, where))
    wrong.of(lambda: _no_idle_options(
        ("--sp", sequence_parallel, tp > 1, "--tp above 1"),
        ("--cp-kind", cp_kind != "all_gather", cp > 1, "--cp above 1"),
        ("--family", family is not None, model is None, "no --model, which has a family"),
        ("--gathers", gathers != "bf16", products != "bf16", "--products fp8, as products read what is gathered"),
    ))  # fmt: skip
    numbers = {
        "--hidden": hidden, "--heads": heads, "--kv-heads": kv_heads, "--head-dim": head_dim, "--ffn": ffn,
        "--vocab": vocab, "--experts": experts, "--choices": choices,
    }  # fmt: skip
    shape = wrong.of(
        lambda: replace(
            _shape(family or "gpt", layers, seq, numbers)
            if model is None
            else _named(model, layers, seq, numbers),
            dropout=dropout,
        )
    )
    degrees = {
        "tp": tp,
        "pp": pp,
        "vpp": vpp,
        "dp": dp,
        "cp": cp,
        "ep": ep,
        "zero": zero,
        "shard_group": shard_group,
    }
    parallelism = wrong.of(
        lambda: parallelism_on(
            where,
            **degrees,
            cp_kind=cp_kind,
            sequence_parallel=sequence_parallel,
            lean_ends=lean_ends,
        )
    )
    setting = wrong.of(
        lambda: Setting(
            recompute, assumed.attention, products, frozenset(assumed.overlap), reduce_in_fp32=not narrow_gradients,
            fused_accumulation=not separate_accumulation, gathers=gathers, fusion=fusion_of(fusion),
            redone_inside=not redone_apart, loss=assumed.loss,
        )
    )  # fmt: skip
    wrong.of(lambda: check_batch(global_batch, microbatch))
    wrong.tell()
    assert shape is not None and parallelism is not None and setting is not None
    found = price_job(
        shape, parallelism, where, global_batch=global_batch, microbatch=microbatch, setting=setting
    )
    if trace is not None:
        write_whole(trace, json.dumps(Timeline.of(found.run).perfetto()))
    beyond = "context parallelism" if cp > 1 else "experts" if shape.experts else ""
    job = {
        "cluster": where.name, "devices": where.size, "shape": asdict(shape), "parallelism": asdict(parallelism),
        "global_batch": global_batch, "microbatch": microbatch, "recompute": recompute,
    }  # fmt: skip
    _print_price(found, where, beyond, job | {"assumes": str(assumed)}, format)


def _named(
    model: str, layers: int | None, seq: int | None, numbers: Mapping[str, int | None]
) -> Shape:
    """A model of the zoo."""
    from ..pricing import shape_of

    for name, number in numbers.items():
        if number is not None:
            raise UsageError(
                f"{name} is for models given as numbers.",
                where=f"--model {model}",
                fix=f"leave {name} out",
            )
    return shape_of(model, seq, layers)


def _shape(
    family: str, layers: int | None, seq: int | None, numbers: Mapping[str, int | None]
) -> Shape:
    """A model given as numbers."""
    from ..pricing import Experts, Shape

    hidden, heads, kv_heads, head_dim, ffn, vocab, experts, choices = numbers.values()
    if layers is None or hidden is None or heads is None:
        lacking = [
            n
            for n, x in {"--layers": layers, "--hidden": hidden, "--heads": heads}.items()
            if x is None
        ]
        raise UsageError(
            f"{' and '.join(lacking)} {'is' if len(lacking) == 1 else 'are'} missing.",
            where="price", fix="--model NAME, or --layers, --hidden and --heads",
        )  # fmt: skip
    if choices is not None and experts is None:
        raise UsageError(
            "--choices is for mixtures of experts.", where="--choices", fix="--experts N as well"
        )
    width = 4 * hidden if ffn is None else ffn
    mixture = (
        None if experts is None else Experts(experts, 2 if choices is None else choices, width)
    )
    return Shape(
        family, layers, hidden, heads, heads if kv_heads is None else kv_heads, width,
        51_200 if vocab is None else vocab, 2048 if seq is None else seq, head_dim, experts=mixture,
    )  # fmt: skip


def _no_idle_options(*options: tuple[str, bool, bool, str]) -> None:
    """Refuse what would change nothing. Each: name, whether it is asked for, whether it can act, what it needs."""
    wrong = Mistakes()
    for name, asked, acts, needs in options:
        if asked and not acts:
            wrong.add(
                UsageError(
                    f"{name} changes nothing here.", where=name, fix=f"leave it out, or {needs}"
                )
            )
    wrong.tell()


def _print_price(found: Any, where: Any, beyond: str, job: dict[str, Any], format: Format) -> None:
    from ..planner.cost.bands import NONE, band_of, told

    band, words = (None, f"{NONE} with {beyond}") if beyond else (band_of(where), told(where))
    between = band.around(found.step) if band else None
    fits = bool(found.peak <= where.memory_per_device)
    worst = max(range(len(found.memory)), key=lambda i: sum(found.memory[i].values()))
    if format is Format.json:
        data = {
            "job": job, "seconds": found.step, "between": between, "by_cause": found.seconds,
            "memory": list(found.memory), "peak_bytes": found.peak, "limit_bytes": where.memory_per_device,
            "fits": fits, "band": words,
        }  # fmt: skip
        say(json.dumps(data, indent=1))
        return
    say(f"step    {format_seconds(found.step)}" + likely(between))
    say(
        "        "
        + ", ".join(f"{cause} {format_seconds(s)}" for cause, s in found.seconds.items() if s > 0)
    )
    say(
        f"memory  {memory_words(found.memory[worst])} of {format_bytes(where.memory_per_device)} (stage {worst})"
    )
    if not fits:
        say(f"        does not fit: {format_bytes(found.peak - where.memory_per_device)} too much")
    elif found.peak > 0.9 * where.memory_per_device:
        say("        above 90 % of the memory; measured runs lose much of their speed there")
    say(f"assumes {job['assumes']}")
    say(f"error   {words}")
