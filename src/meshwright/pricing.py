"""Price a training job given as numbers: `meshwright price`, and the replay of published runs.

The zoo's model of that shape is traced with a few layers, folded, laid out as the numbers
say and priced part by part; the parts are then put together to the whole depth.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from .ir.cluster.cluster import Cluster
from .ir.composites.attention_op import AttentionKind, composed
from .ir.composites.losses import LossKind
from .ir.errors import PlanError, UsageError, did_you_mean
from .ir.execution import parse_attention, parse_loss, parse_overlap
from .ir.execution_model import Backend
from .ir.mistakes import Mistakes
from .ir.passes.recompute import Policy
from .ir.program import Program, prepare
from .planner.cost.kernels import FUSIONS, Fusion
from .planner.cost.model import Roofline
from .planner.jobs.parts import Parts, parts_of
from .planner.jobs.pinned import DEGREES, Parallelism, check_degrees
from .planner.jobs.price import Job, Price, price

MOST_RUNS = 1_000_000  # of stages over microbatches
TRACED = 4  # layers of the model that is traced: a first, a repeated pair, a last
PRODUCTS: dict[str, str | None] = {"bf16": None, "fp8": "f8e4m3fn"}
RECOMPUTE: dict[str, Policy] = {
    "none": "fused",
    "selective": "fused-selective",
    "alternate": "fused-alternate",
    "full": "fused-full",
    # as XLA does it, which drops what nobody reads: keep all, products with weights, or only what blocks hand on
    "everything": "none",
    "dots": "selective",
    "blocks": "full",
}


FAMILIES = ("gpt", "llama", "mixtral", "deepseek")


@dataclass(frozen=True)
class Experts:
    """Of a mixture: `count` experts of width `hidden`, `choices` per token, shared ones of together
    `shared`; the first `dense` layers have a plain feed-forward instead."""

    count: int
    choices: int
    hidden: int
    shared: int = 0
    dense: int = 0

    def __post_init__(self) -> None:
        for name in ("count", "choices", "hidden"):
            if getattr(self, name) < 1:
                raise UsageError(
                    f"{name} of experts cannot be {getattr(self, name)}.",
                    where=name,
                    fix="1 or more",
                )
        if self.choices > self.count:
            raise UsageError(
                f"{self.choices} choices are more than {self.count} experts.",
                where="choices",
                fix="fewer choices",
            )


@dataclass(frozen=True)
class Latent:
    """Widths of multi-head latent attention: latents of queries and of keys and values, the rotary part."""

    query: int = 1536
    key_value: int = 512
    head: int = 128
    rotary: int = 64


@dataclass(frozen=True)
class Shape:
    """A decoder as numbers. `family` is the zoo's architecture, one of `FAMILIES`.

    `head_dim` is the width of one head where heads are not cut from the residual stream
    (Gemma, MaxText); hidden / heads if not given.
    """

    family: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    seq: int
    head_dim: int | None = None
    dropout: float = 0.0
    experts: Experts | None = None
    latent: Latent | None = None

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise UsageError(
                f"family `{self.family}` is not known.", fix=did_you_mean(self.family, FAMILIES)
            )
        if (self.experts is None) != (self.family in ("gpt", "llama")):
            raise UsageError(
                f"a {self.family} has {'experts' if self.experts is None else 'no experts'}.",
                where="family", fix="mixtral with --experts, gpt or llama without; deepseek as --model deepseek-v3",
            )  # fmt: skip
        for name in ("layers", "hidden", "heads", "kv_heads", "ffn", "vocab", "seq", "head_dim"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} cannot be {value}.", where=name, fix="1 or more")
        if self.head_dim is not None and self.experts is not None:
            raise UsageError(
                f"heads of {self.head_dim} cannot be asked of a {self.family}.",
                where="head_dim",
                fix="gpt or llama",
            )
        if not 0 <= self.dropout < 1 or (self.dropout and self.family != "gpt"):
            raise UsageError(
                f"dropout cannot be {self.dropout} in a {self.family}.",
                where="dropout", fix="0; the zoo's gpt takes 0 or more and below 1",
            )  # fmt: skip
        own_heads = self.head_dim is not None or self.latent is not None
        if (not own_heads and self.hidden % self.heads) or self.heads % self.kv_heads:
            raise UsageError(
                f"{self.heads} heads of {self.kv_heads} keys and values do not divide a width of {self.hidden}.",
                where="heads", fix="heads that divide hidden (or a head_dim), kv_heads that divide heads",
            )  # fmt: skip
        if self.family == "llama" and self.head_width % 2:
            raise UsageError(
                f"rotary positions turn pairs, so a head of {self.head_width} cannot be.",
                where="head_dim", fix="an even head_dim, or --family gpt",
            )  # fmt: skip
        if self.family == "gpt" and self.kv_heads != self.heads:
            raise UsageError(
                "the zoo's gpt has as many keys as queries.",
                where="kv_heads", fix="--family llama for grouped queries",
            )  # fmt: skip

    @property
    def head_width(self) -> int:
        """Width of one head."""
        return self.head_dim or self.hidden // self.heads


def shape_of(model: str, seq: int | None = None, layers: int | None = None) -> Shape:
    """The shape of a model of the zoo by name."""
    from .models import deepseek, gpt, llama, mixtral

    model = model.removesuffix("-scan")  # the same model
    if model in gpt.CONFIGS:
        g = gpt.CONFIGS[model]
        depth, length = g.layers if layers is None else layers, g.seq if seq is None else seq
        return Shape(
            "gpt",
            depth,
            g.width,
            g.heads,
            g.heads,
            g.hidden or 4 * g.width,
            g.vocab,
            length,
            g.head_dim,
        )
    if model in llama.CONFIGS:
        c = llama.CONFIGS[model]
        depth, length = c.layers if layers is None else layers, c.seq if seq is None else seq
        return Shape(
            "llama", depth, c.width, c.heads, c.kv_heads, c.hidden, c.vocab, length, c.head_dim
        )
    if model in mixtral.CONFIGS:
        m = mixtral.CONFIGS[model]
        depth, length = m.layers if layers is None else layers, m.seq if seq is None else seq
        experts = Experts(m.experts, m.choices, m.hidden)
        return Shape(
            "mixtral",
            depth,
            m.width,
            m.heads,
            m.kv_heads,
            m.hidden,
            m.vocab,
            length,
            experts=experts,
        )
    if model in deepseek.CONFIGS:
        d = deepseek.CONFIGS[model]
        depth, length = d.layers if layers is None else layers, d.seq if seq is None else seq
        experts = Experts(d.experts, d.choices, d.expert_hidden, d.shared_hidden, d.dense)
        latent = Latent(d.query_latent, d.latent, d.head, d.rotary)
        return Shape(
            "deepseek",
            depth,
            d.width,
            d.heads,
            d.heads,
            d.hidden,
            d.vocab,
            length,
            experts=experts,
            latent=latent,
        )
    known = [*gpt.CONFIGS, *llama.CONFIGS, *mixtral.CONFIGS, *deepseek.CONFIGS]
    raise UsageError(f"`{model}` is no decoder of the zoo.", fix=did_you_mean(model, known))


@dataclass(frozen=True)
class Setting:
    """How a job runs beside its degrees: what others state in a table of results."""

    recompute: str = "none"
    attention: AttentionKind = "fused"
    products: str = "bf16"  # what products outside attention are done in: bf16 or fp8
    overlap: frozenset[str] = frozenset()
    reduce_in_fp32: bool = True
    fused_accumulation: bool = True  # products add weight gradients to the step's sum themselves
    gathers: str = (
        "bf16"  # what activations and ZeRO-3's parameters are gathered in, where products read them
    )
    redone_inside: bool = (
        True  # what is computed again is part of the kernels that read it; not in plans
    )
    fusion: Fusion = (
        "all"  # what a compiler fuses: PyTorch run eagerly "none", only layers compiled "layers"
    )
    loss: LossKind = "plain"  # "fused": logits are made block by block, again for gradients

    @property
    def backend(self) -> Backend:
        return "framework" if self.redone_inside else "xla"

    def __post_init__(self) -> None:
        parse_attention(self.attention, ("fused", "plain"))
        parse_loss(self.loss)
        if self.recompute not in RECOMPUTE:
            raise PlanError(
                f"recompute cannot be `{self.recompute}`.",
                where="recompute", fix=did_you_mean(self.recompute, RECOMPUTE),
            )  # fmt: skip
        if self.gathers not in PRODUCTS or (self.gathers == "fp8" and self.products != "fp8"):
            raise PlanError(
                f"gathers in `{self.gathers}` do not go with products in `{self.products}`.",
                where="gathers", fix="bf16, or fp8 where products are in fp8",
            )  # fmt: skip
        if self.products not in PRODUCTS:
            raise PlanError(
                f"products cannot be `{self.products}`.",
                where="products",
                fix=did_you_mean(self.products, PRODUCTS),
            )


def overlaps(text: str) -> frozenset[str]:
    """What runs beside computation: `none`, `all`, or names joined by commas."""
    return frozenset(parse_overlap(text))


def fusion_of(text: str) -> Fusion:
    """What a compiler fuses, by name."""
    for known in FUSIONS:
        if known == text:
            return known
    raise PlanError(f"fusion cannot be `{text}`.", where="fusion", fix=did_you_mean(text, FUSIONS))


def parallelism_on(cluster: Cluster, *, dp: int | None, **degrees: Any) -> Parallelism:
    """The degrees given; data parallelism takes the rest of the devices if it is not."""
    others, wrong = degrees["tp"] * degrees["pp"] * degrees["cp"], Mistakes()
    if dp is None and others > 0 and cluster.size % others:
        wrong.add(PlanError(
            f"tp x pp x cp is {others}, which does not divide {cluster.size} devices.",
            where="parallelism", fix=f"degrees that divide {cluster.size}",
        ))  # fmt: skip
    known = {name: degrees[name] for name in DEGREES if name in degrees}
    wrong.of(lambda: check_degrees(degrees["zero"], known if dp is None else {**known, "dp": dp}))
    wrong.tell()
    return Parallelism(dp=cluster.size // others if dp is None else dp, **degrees)


def check_batch(global_batch: int, microbatch: int) -> None:
    """Refuse numbers of sequences that cannot be, both at once."""
    wrong = Mistakes()
    for name, count in (("global batch", global_batch), ("microbatch", microbatch)):
        if count < 1:
            wrong.add(PlanError(f"{name} cannot be {count}.", where=name, fix="1 or more"))
    wrong.tell()


def price_job(
    shape: Shape,
    parallelism: Parallelism,
    cluster: Cluster,
    *,
    global_batch: int,
    microbatch: int,
    setting: Setting,
) -> Price:
    """Price one step of `global_batch` sequences.

    Raises:
        PlanError: degrees that do not fit the cluster, the batch or the model.
    """
    check_batch(global_batch, microbatch)
    if parallelism.devices != cluster.size:
        raise PlanError(
            f"tp x pp x dp x cp is {parallelism.devices}, the cluster has {cluster.size} devices.",
            where="parallelism", fix=f"degrees that multiply to {cluster.size}",
        )  # fmt: skip
    if global_batch % (microbatch * parallelism.dp):
        raise PlanError(
            f"a batch of {global_batch} is not cut into microbatches of {microbatch} on {parallelism.dp} data ranks.",
            where="global batch", fix=f"a multiple of {microbatch * parallelism.dp}",
        )  # fmt: skip
    if setting.products != "bf16" and not {"f8e4m3fn", "f8e5m2"} & cluster.device.peak_flops.keys():
        raise PlanError(
            f"`{cluster.device.name}` has no rate in {setting.products}.",
            where="products", fix=f"bf16, or a cluster file that states devices.{cluster.device.name}.peak_flops.fp8",
        )  # fmt: skip
    runs = global_batch // (microbatch * parallelism.dp) * parallelism.pp * parallelism.vpp
    if runs > MOST_RUNS:
        raise PlanError(
            f"{runs:.3g} runs of stages are more than is simulated.",
            where="global batch",
            fix="a larger microbatch, or fewer sequences: steps with so many repeat themselves",
        )
    if parallelism.dp * parallelism.cp == 1 or parallelism.shard_group == 1:
        parallelism = replace(parallelism, zero=0, shard_group=None)  # nobody to share with
    shape = _divided(shape, parallelism)
    lead = shape.experts.dense if shape.experts else 0
    traced = replace(
        shape, layers=lead + max(TRACED, lead + 2)
    )  # leading layers never look like the others
    stage = replace(parallelism, pp=1, vpp=1, lean_ends=False)
    alike = replace(setting, overlap=frozenset(), reduce_in_fp32=True, fused_accumulation=True)
    parts = _parts(traced, microbatch, stage, alike, _Known(cluster))  # which those say nothing of
    job = Job(
        layers=shape.layers, lead=lead, parallelism=parallelism, microbatch=microbatch,
        microbatches=global_batch // (microbatch * parallelism.dp),
        overlap=setting.overlap, narrow_gathers=setting.gathers == "fp8", reduce_in_fp32=setting.reduce_in_fp32,
        fused_accumulation=setting.fused_accumulation, backend=setting.backend,
    )  # fmt: skip
    boundary = 2.0 * microbatch * shape.seq * shape.hidden / parallelism.cp / parallelism.tp
    return price(parts, job, cluster, boundary)


def _divided(shape: Shape, parallelism: Parallelism) -> Shape:
    """The shape with its vocabulary padded to a multiple of 128 tp, as Megatron-LM pads it.

    Raises:
        PlanError: heads, feed-forward or positions that these degrees do not divide.
    """
    tp, cp, ep = parallelism.tp, parallelism.cp, parallelism.ep
    if ep > 1 and shape.experts is None:
        raise PlanError(
            f"ep is {ep}, but the model has no experts.",
            where="ep",
            fix="1, or a mixture of experts",
        )
    cuts = cp * (tp if parallelism.sequence_parallel else 1)
    for what, size, ways in (
        ("heads", shape.heads, tp), ("key-value heads", shape.kv_heads, tp), ("feed-forward", shape.ffn, tp),
        ("positions", shape.seq, cuts), ("experts", shape.experts.count if shape.experts else ep, ep),
        *((("key-value heads", shape.kv_heads, tp * cp),) if parallelism.cp_kind == "a2a" else ()),
    ):  # fmt: skip
        if size % ways:
            name = {"positions": "cp and sequence parallelism", "experts": "ep"}.get(
                what, "tp or cp by a2a"
            )
            raise PlanError(
                f"{size} {what} cannot be cut {ways} ways.",
                where=name,
                fix=f"a {name} that divides {size}",
            )
    each = 128 * tp
    return replace(shape, vocab=-(-shape.vocab // each) * each) if shape.vocab % tp else shape


@dataclass(frozen=True)
class _Known:
    """A cluster that can be the key of a cache: clusters of equal content are equal."""

    cluster: Cluster = field(compare=False)
    content: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "content", self.cluster.fingerprint())


@lru_cache(maxsize=256)
def _parts(
    shape: Shape, microbatch: int, parallelism: Parallelism, setting: Setting, known: _Known
) -> Parts:
    """What one stage without a pipeline costs, for a model of few layers."""
    policy = RECOMPUTE[setting.recompute]
    if setting.fusion == "none" and policy == "fused":
        policy = "none"  # nothing is made again that nobody asked for
    elif setting.attention == "fused" and policy == "fused":
        policy = "fused-selective"  # fused attention keeps no scores to begin with
    program = _program(shape, microbatch * parallelism.dp, policy, setting.attention, setting.loss)
    cost = Roofline(
        known.cluster,
        setting.attention == "fused",
        setting.fusion,
        PRODUCTS[setting.products],
        backend=setting.backend,
    )
    return parts_of(
        program, shape.layers - (shape.experts.dense if shape.experts else 0), parallelism, cost
    )


@lru_cache(maxsize=64)
def _program(
    shape: Shape, batch: int, policy: Policy, attention: AttentionKind, loss: LossKind
) -> Program:
    return prepare(_folded(shape, batch, attention, loss), policy)


@lru_cache(maxsize=64)
def _folded(shape: Shape, batch: int, attention: AttentionKind, loss: LossKind) -> Any:
    from .backends.xla.capture import capture
    from .ir.analysis.blocks import fold

    example = _example(shape, batch)
    captured = capture(example.step, example.state, example.batch, donate_argnums=0)
    return fold(composed(captured.graph, attention, loss=loss)).small


def _example(shape: Shape, batch: int) -> Any:
    from .models import gpt, llama

    if shape.family == "gpt":
        config = gpt.GPTConfig(
            shape.layers, shape.hidden, shape.heads, 1e-4, batch, seq=shape.seq, vocab=shape.vocab,
            head_dim=shape.head_dim, hidden=shape.ffn, dropout=shape.dropout,
        )  # fmt: skip
        return gpt.make("gpt", config)
    if shape.experts:
        return _mixture(shape, shape.experts, batch)
    config = llama.LlamaConfig(
        shape.layers, shape.hidden, shape.ffn, shape.heads, shape.kv_heads, 1e-4, batch,
        seq=shape.seq, vocab=shape.vocab, head_dim=shape.head_dim,
    )  # fmt: skip
    return llama.make("llama", config)


def _mixture(shape: Shape, experts: Experts, batch: int) -> Any:
    """Every expert takes an even share of the choices, and no more: nothing is dropped or wasted."""
    from .models import deepseek, mixtral

    if shape.latent is None:
        config = mixtral.MixtralConfig(
            shape.layers, shape.hidden, experts.hidden, shape.heads, shape.kv_heads, experts.count, 1e-4, batch,
            shape.seq, shape.vocab, choices=experts.choices, capacity_factor=1.0, dispatch="sorted",
        )  # fmt: skip
        return mixtral.make("mixtral", config)
    latent = shape.latent
    sizes = deepseek.DeepSeekConfig(
        shape.layers, experts.dense, shape.hidden, shape.ffn, shape.heads, experts.count, experts.choices,
        experts.hidden, experts.shared, 1e-4, batch, shape.vocab, shape.seq, latent.query, latent.key_value,
        latent.head, latent.rotary,
    )  # fmt: skip
    return deepseek.make("deepseek", sizes)
