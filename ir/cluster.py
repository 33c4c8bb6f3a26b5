"""Clusters: what there is to run on. Shorthand, presets, YAML files, this process.

    Cluster.parse("4xh100x8@ib400")    4 hosts of 8 H100 each, 400 Gb/s per device between hosts
    Cluster.load("lab.yaml")           a file, see docs/cluster.md
    Cluster.local()                    the JAX devices of this process

Inside, all figures are bytes, seconds, FLOP/s and bytes/s per device and direction.
`provenance` says of each field whether it was declared, preset, detected or measured.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    SerializerFunctionWrapHandler,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_serializer,
    model_validator,
)

from . import presets
from .errors import ClusterError, MeshwrightError, UsageError, did_you_mean
from .units import (
    Bytes,
    BytesPerSecond,
    format_bandwidth,
    format_bytes,
    format_flops,
    format_seconds,
    parse_bandwidth,
    parse_bytes,
    parse_flops,
    parse_seconds,
    spell_bandwidth,
    spell_bytes,
    spell_flops,
    spell_seconds,
)

SCHEMA, DTYPES = presets.SCHEMA, presets.DTYPES
Origin = Literal["declared", "preset", "detected", "measured"]


def _read_as(parse: Callable[[str], float], example: str, zero: bool = False) -> BeforeValidator:
    """A number that files write with its unit; Python may give it in the base unit."""

    def read(value: object, info: ValidationInfo) -> float:
        if isinstance(value, str):
            number = parse(value)
        elif isinstance(value, bool) or not isinstance(value, int | float):
            raise UsageError(
                f"`{value}` is no quantity.", fix=f"a number with its unit: `{example}`"
            )
        elif info.context == "file" or info.mode == "json":
            raise UsageError(f"`{value}` has no unit.", fix=f"a number with its unit: `{example}`")
        else:
            number = float(value)
        if not (0 <= number < float("inf")) or (number == 0 and not zero):
            least = "zero or more" if zero else "more than zero"
            raise UsageError(f"`{value}` must be {least}.", fix=f"something like `{example}`")
        return number

    return BeforeValidator(read)


def _write_as(spell: Callable[[float], str]) -> PlainSerializer:
    return PlainSerializer(spell, return_type=str, when_used="json")


def _example(text: str) -> WithJsonSchema:
    return WithJsonSchema({"type": "string", "examples": [text]})


Size = Annotated[
    float, _read_as(parse_bytes, "80 GiB", zero=True), _write_as(spell_bytes), _example("2 GiB")
]
Memory = Annotated[
    float, _read_as(parse_bytes, "80 GiB"), _write_as(spell_bytes), _example("80 GiB")
]
Rate = Annotated[
    float, _read_as(parse_bandwidth, "450 GB/s"), _write_as(spell_bandwidth), _example("450 GB/s")
]
Time = Annotated[
    float, _read_as(parse_seconds, "2 us", zero=True), _write_as(spell_seconds), _example("2 us")
]
Peak = Annotated[
    float, _read_as(parse_flops, "989 TFLOP/s"), _write_as(spell_flops), _example("989 TFLOP/s")
]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    def __hash__(self) -> int:
        return hash(self.model_dump_json())


class Device(_Part):
    """One accelerator, as a step sees it.

    Invariants: `reserve < memory`; peaks are dense, one per dtype in the graph's names.
    """

    name: str = Field(default="", exclude=True)  # the key in `devices`
    kind: Literal["cuda", "rocm", "tpu", "cpu"]
    memory: Memory
    reserve: Size = 2 * 2.0**30  # context, communication buffers, allocator slack
    peak_flops: dict[str, Peak] = Field(min_length=1, examples=[{"bf16": "989 TFLOP/s"}])
    memory_bandwidth: Rate
    launch: Time = 5e-6  # seconds per kernel, whatever its size
    efficiency: float = Field(default=0.8, gt=0, le=1)  # share of the peak that large products get
    elementwise_flops: Peak | None = None  # simple f32 operations/s outside the matrix units
    source: str | None = None

    @property
    def vector_flops(self) -> float:
        """Simple operations/s; if not given, half the f32 peak, which counts an FMA as two.

        A device whose f32 peak is unknown counts as 1/16 of its fastest.
        """
        peaks = self.peak_flops
        return self.elementwise_flops or peaks.get("f32", max(peaks.values()) / 16) / 2

    @field_validator("peak_flops", mode="before")
    @classmethod
    def _per_dtype(cls, value: object) -> object:
        if not isinstance(value, Mapping):
            raise UsageError(f"`{value}` has no dtype.", fix=f"`peak_flops: {{bf16: {value}}}`")
        for dtype in value:
            if dtype not in DTYPES:
                raise UsageError(f"`{dtype}` is not a dtype.", fix=did_you_mean(str(dtype), DTYPES))
        return {name: peak for dtype, peak in value.items() for name in DTYPES[dtype]}

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.reserve >= self.memory:
            raise ClusterError(
                f"a reserve of {format_bytes(self.reserve)} leaves nothing of "
                f"{format_bytes(self.memory)} of memory.",
                where="reserve",
                fix="the memory to keep free for context and communication buffers, often `2 GiB`",
            )
        for dtype, peak in self.peak_flops.items():
            if dense := _dense_of(self.name, dtype, peak):
                raise ClusterError(
                    f"{spell_flops(peak)} in {dtype} is the figure with 2:4 sparsity.",
                    where=f"peak_flops.{dtype}",
                    fix=f"{spell_flops(dense)} is the dense figure",
                )
        return self


class Group(_Part):
    """Equal hosts: `hosts` of them with `per_host` devices each."""

    device: str
    hosts: int = Field(gt=0, examples=[4, "gpu[00-31]"])
    per_host: int = Field(gt=0, examples=[8])
    names: tuple[str, ...] | None = None  # of the hosts
    host_memory: Memory | None = None
    host_link: Rate | None = None  # between one device and its host's memory

    @model_validator(mode="before")
    @classmethod
    def _named_hosts(cls, data: Any) -> Any:
        hosts = data.get("hosts") if isinstance(data, Mapping) else None
        if (isinstance(hosts, str) and not hosts.isdigit()) or isinstance(hosts, list):
            names = presets.host_names(hosts)
            return {**data, "hosts": len(names), "names": names}
        return data

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.names is not None and len(self.names) != self.hosts:
            what = f"{len(self.names)} host names do not name {self.hosts} hosts."
            raise ClusterError(what, where="names", fix="one name per host, or none")
        return self


class Hosts(_Part):
    """The scope of a tier that joins so many consecutive hosts: `{hosts: 4}`."""

    hosts: int = Field(gt=1)


def _scope(value: object) -> object:
    if value in ("host", "all") or isinstance(value, Hosts):
        return value
    if isinstance(value, Mapping) and list(value) == ["hosts"]:
        hosts = value["hosts"]
        if isinstance(hosts, int) and not isinstance(hosts, bool) and hosts > 1:
            return value
    raise UsageError(
        f"`{value}` is not the scope of a tier.",
        fix="`host` (the devices of one host), `{hosts: 4}` (of 4 hosts each) or `all`",
    )


def _shape(value: object) -> object:
    if isinstance(value, str):
        parts = value.lower().split("x")
        if not all(part.isdigit() and int(part) for part in parts):
            raise UsageError(f"`{value}` is not a shape.", fix="sizes joined by x, like `4x4x8`")
        return tuple(map(int, parts))
    return value


class Tier(_Part):
    """One level of the fabric: what joins the devices of a host, of some hosts, or all.

    `bandwidth` is what one device can send into the tier while it receives as much:
    over a switch or a ring of several links, all its links together; over a torus or a
    mesh (a torus that does not wrap), what a ring along one dimension gets; over `full`
    (a link per pair), all its links together, of which a group of n uses n - 1.
    """

    tier: str  # its name
    scope: Annotated[Literal["host", "all"] | Hosts, BeforeValidator(_scope)]
    kind: Literal["switch", "ring", "torus", "mesh", "full"] = "switch"
    bandwidth: Rate
    latency: Time = 5e-6  # seconds per message
    oversubscription: float = Field(default=1.0, ge=1)  # 2: half the bandwidth when all send
    rails: int = Field(default=1, gt=0)  # separate networks, one per device position in the host
    shape: Annotated[tuple[int, ...] | None, BeforeValidator(_shape)] = None  # of a torus or mesh
    source: str | None = None

    @property
    def name(self) -> str:
        return self.tier

    @property
    def hosts(self) -> float:
        """How many hosts it joins; infinite for `all`."""
        if isinstance(self.scope, Hosts):
            return self.scope.hosts
        return 1 if self.scope == "host" else float("inf")

    @property
    def effective_bandwidth(self) -> BytesPerSecond:
        """Bandwidth per device and direction when every device sends at once."""
        return self.bandwidth / self.oversubscription


class Price(_Part):
    """`per_device_hour: 2.49 USD`."""

    per_device_hour: float = Field(ge=0)
    currency: str = Field(default="USD", pattern="[A-Z]{3}")
    spot: bool = False

    @model_validator(mode="before")
    @classmethod
    def _amount(cls, data: Any) -> Any:
        price = data.get("per_device_hour") if isinstance(data, Mapping) else None
        if isinstance(price, str):
            amount, currency = _money(price)
            return {**data, "per_device_hour": amount, "currency": currency}
        return data


class Cluster(_Part):
    """Devices, hosts and fabric (closest tier first), with the origin of every figure.

    `cluster.provenance["fabric.ib400.bandwidth"]` is "preset". Ranks count through the
    groups in order, host by host. Invariants: a tier farther out joins more hosts and is
    no faster; the last one joins everything; names are unique.
    """

    schema_version: Literal["meshwright/cluster/v1"] = Field(default=SCHEMA, alias="schema")
    name: str = "cluster"
    devices: dict[str, Device] = Field(min_length=1)
    groups: tuple[Group, ...] = Field(min_length=1)
    fabric: tuple[Tier, ...] = ()
    price: Price | None = None
    provenance: dict[str, Origin] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _expand(cls, data: Any) -> Any:
        return presets.expand(data) if isinstance(data, Mapping) else data

    @model_validator(mode="after")
    def _check(self) -> Self:
        for index, group in enumerate(self.groups):
            if group.device not in self.devices:
                raise ClusterError(
                    f"device `{group.device}` is not declared.",
                    where=f"groups.{index}.device",
                    fix=did_you_mean(group.device, self.devices),
                )
        _check_fabric(self)
        self._trace()
        return self

    @model_serializer(mode="wrap")
    def _dump(self, handler: SerializerFunctionWrapHandler, info: Any) -> dict[str, Any]:
        data = handler(self)
        return _tidy(data) if info.mode == "json" else data

    def _trace(self) -> None:
        """Complete `provenance`: a field that was given is declared, a default is preset."""
        known = dict(_fields(self))
        for path in self.provenance:
            if path not in known:
                where = f"provenance.{path}"
                raise ClusterError(
                    f"the cluster has no field `{path}`.",
                    where=where,
                    fix=did_you_mean(path, known),
                )
        found: dict[str, Origin] = {
            p: "declared" if given else "preset" for p, given in known.items()
        }
        object.__setattr__(self, "provenance", found | self.provenance)  # before anyone sees it

    # ------------------------------------------------------------ reading

    @classmethod
    def parse(cls, text: str | Path | Mapping[str, Any] | Cluster) -> Cluster:
        """A cluster from itself, a shorthand, a file's path, a file's content as a mapping, or "local"."""
        if isinstance(text, Cluster):
            return text
        if isinstance(text, Mapping):
            return cls._checked(dict(text), {}, "cluster given as a mapping")
        if text == "local":
            return cls.local()
        if isinstance(text, Path) or _is_path(text):
            return cls.load(text)
        try:
            data = presets.shorthand(text)
        except MeshwrightError as error:
            raise ClusterError.at(error, "cluster shorthand", None) from None
        return cls._checked(
            data | {"provenance": presets.all_preset(data)}, {}, f"shorthand `{text}`"
        )

    @classmethod
    def load(cls, path: str | Path) -> Cluster:
        """Read a YAML (or JSON) file. Each mistake is a ClusterError that names its line."""
        data, lines = _read(Path(path))
        return cls._checked(data, lines, f"cluster spec {path}", context="file")

    @classmethod
    def local(cls, fabric: str | None = None) -> Cluster:
        """The JAX devices of this process; `fabric` says what joins its hosts if there are several."""
        return cls._checked(presets.detect(fabric), {}, "this process")

    @classmethod
    def _checked(
        cls, data: Any, lines: Mapping[str, int], origin: str, context: str | None = None
    ) -> Cluster:
        try:
            return cls.model_validate(data, context=context)
        except ValidationError as error:
            raise _translate(error, data, lines, origin) from None

    # ------------------------------------------------------------ asking

    @property
    def size(self) -> int:
        """Number of devices."""
        return sum(group.hosts * group.per_host for group in self.groups)

    @property
    def hosts(self) -> int:
        return sum(group.hosts for group in self.groups)

    @property
    def per_host(self) -> int:
        """Devices on each host; refused when hosts differ."""
        return self._only({group.per_host for group in self.groups}, "as many devices on each host")

    @property
    def device(self) -> Device:
        """The one type of device; refused when there are several."""
        return self.devices[self._only({group.device for group in self.groups}, "equal devices")]

    @property
    def memory_per_device(self) -> Bytes:
        """What a step may use of each device: memory minus reserve."""
        return self.device.memory - self.device.reserve

    def _only(self, found: set[Any], needs: str) -> Any:
        if len(found) == 1:
            return next(iter(found))
        has = " and ".join(f"{g.hosts} hosts of {g.per_host} {g.device}" for g in self.groups)
        raise ClusterError(
            f"this needs {needs}; cluster `{self.name}` has {has}.",
            where="groups",
            fix="plan for one group at a time: a file that holds only that one",
        )

    def tier_for(self, span: int) -> Tier:
        """The closest tier that joins every block of `span` consecutive ranks.

        On 2 hosts of 8: 4 and 8 -> the tier in the host; 16 -> the one between them; also
        6, since ranks 6 to 11 lie on both hosts.
        """
        if not 1 <= span <= self.size:
            raise UsageError(f"a group of {span} devices is not part of a cluster of {self.size}.")
        if not self.fabric:
            return _loopback(self.device)
        return next(tier for tier, edges in self._edges if all(edge % span == 0 for edge in edges))

    @cached_property
    def _edges(self) -> list[tuple[Tier, list[int]]]:
        """Per tier, the ranks at which one of its domains ends and the next begins."""
        starts = [0]
        for group in self.groups:
            first = starts[-1]
            starts += [first + group.per_host * (host + 1) for host in range(group.hosts)]
        ends = [starts[:: int(min(tier.hosts, self.hosts))] for tier in self.fabric]
        inner = [[rank for rank in ranks if 0 < rank < self.size] for ranks in ends]
        return list(zip(self.fabric, inner, strict=True))

    def fingerprint(self) -> str:
        """sha256 of what planning depends on: names of the cluster and hosts, prices and sources aside."""
        data = self.model_dump(mode="json", exclude={"provenance", "name", "price"})
        for part in (*data["devices"].values(), *data["groups"], *data["fabric"]):
            for field in ("source", "names"):
                part.pop(field, None)
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()

    def to_yaml(self) -> str:
        """A file that `load` reads back to an equal cluster."""
        data = self.model_dump(mode="json", by_alias=True)
        return yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=100)

    def with_(self, path: str, value: Any, source: Origin = "declared") -> Cluster:
        """A copy with one field changed, for what-if questions.

        with_("fabric.ib400.bandwidth", "100 GB/s"); with_("hosts", 64); with_("device.memory", "96 GiB")
        """
        data = self.model_dump(mode="json", by_alias=True)
        full = _full_path(path, self)
        leaf = full.rpartition(".")[2]
        same = DTYPES[leaf] if ".peak_flops." in full else (leaf,)  # fp8 means two dtypes
        changed = [full.removesuffix(leaf) + each for each in same]
        for each in changed:
            _assign(data, each, value)
        data["provenance"] = self.provenance | dict.fromkeys(changed, source)
        if leaf == "hosts":  # the old names do not fit
            data["provenance"].pop(full.removesuffix(leaf) + "names", None)
        return Cluster._checked(data, {}, f"override `{path}={value}`")

    def describe(self) -> str:
        """A few lines for people; marks after a figure tell its origin unless it is preset."""
        lines = [f"{self.name}: {_count(self.size, 'device')} on {_count(self.hosts, 'host')}"]
        for index, group in enumerate(self.groups):
            lines.append(
                f"  {group.hosts} × {group.per_host} {group.device}{self._mark(f'groups.{index}.hosts')}"
            )
            lines.extend(
                f"    {line}" for line in self._describe_device(self.devices[group.device])
            )
        for tier in self.fabric:
            at, hosts = f"fabric.{tier.name}", tier.hosts
            scope = {1: "in a host", float("inf"): "all hosts"}.get(hosts, f"{hosts:.0f} hosts")
            over = (
                f", oversubscribed {tier.oversubscription:g}:1" if tier.oversubscription > 1 else ""
            )
            shape = f" {'x'.join(map(str, tier.shape))}" if tier.shape else ""
            rate = f"{format_bandwidth(tier.bandwidth)} per device each way{self._mark(f'{at}.bandwidth')}{over}"
            delay = f"{format_seconds(tier.latency)}{self._mark(f'{at}.latency')}"
            lines.append(f"  {tier.name} ({tier.kind}{shape}, {scope}): {rate}, {delay}")
        return "\n".join(lines)

    def _describe_device(self, device: Device) -> Iterator[str]:
        at = f"devices.{device.name}"
        yield (
            f"memory {format_bytes(device.memory)}{self._mark(f'{at}.memory')}, of which"
            f" {format_bytes(device.reserve)}{self._mark(f'{at}.reserve')} in reserve,"
            f" at {format_bandwidth(device.memory_bandwidth)}{self._mark(f'{at}.memory_bandwidth')}"
        )
        peaks = [
            f"{d} {format_flops(p)}{self._mark(f'{at}.peak_flops.{d}')}"
            for d, p in device.peak_flops.items()
        ]
        share = f"{device.efficiency:.0%} of it{self._mark(f'{at}.efficiency')}"
        yield f"peak {', '.join(peaks)}; {share} in large products"

    def _mark(self, path: str) -> str:
        origin = self.provenance.get(path, "preset")
        return "" if origin == "preset" else f" ({origin})"


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'s' * (number != 1)}"


def _loopback(device: Device) -> Tier:
    """The fabric of a single device: its own memory."""
    return Tier(tier="none", scope="all", bandwidth=device.memory_bandwidth, latency=0.0)


def _fields(cluster: Cluster, empty: bool = False) -> Iterator[tuple[str, bool]]:
    """Dotted path of each figure, and whether it was given; those without a value only if `empty`."""
    parts: list[tuple[str, BaseModel]] = [
        (f"devices.{name}", d) for name, d in cluster.devices.items()
    ]
    parts += [(f"groups.{index}", group) for index, group in enumerate(cluster.groups)]
    parts += [(f"fabric.{tier.name}", tier) for tier in cluster.fabric]
    parts += [("price", cluster.price)] if cluster.price else []
    if empty and not cluster.price:
        yield from ((f"price.{field}", False) for field in Price.model_fields)
    for prefix, part in parts:
        for field in type(part).model_fields:
            value = getattr(part, field)
            if field in ("name", "tier", "source", "currency") or (value is None and not empty):
                continue
            given = field in part.model_fields_set
            if isinstance(value, dict):
                yield from ((f"{prefix}.{field}.{key}", given) for key in value)
            else:
                yield f"{prefix}.{field}", given


def _check_fabric(cluster: Cluster) -> None:
    names = [tier.name for tier in cluster.fabric]
    for tier in cluster.fabric:
        if names.count(tier.name) > 1:
            raise ClusterError(
                f"two tiers are called `{tier.name}`.", where="fabric", fix="a name for each"
            )
        _check_shape(cluster, tier)
        _check_one_way(cluster, tier)
    for near, far in zip(cluster.fabric, cluster.fabric[1:], strict=False):
        _check_order(near, far)
    if cluster.size > 1 and not (cluster.fabric and cluster.fabric[-1].hosts >= cluster.hosts):
        reach = (
            f"`{names[-1]}` reaches {cluster.fabric[-1].hosts:.0f}" if names else "there is none"
        )
        raise ClusterError(
            f"no tier connects all {cluster.size} devices on {cluster.hosts} hosts; {reach}.",
            where="fabric",
            fix="a last tier with `scope: all`, such as `{preset: ib400}`",
        )


def _check_order(near: Tier, far: Tier) -> None:
    where = f"fabric.{far.name}"
    if far.hosts <= near.hosts:
        raise ClusterError(
            f"`{far.name}` joins no more hosts than `{near.name}` before it.",
            where=f"{where}.scope",
            fix="tiers closest first: `host`, then `{hosts: n}` with growing n, then `all`",
        )
    if far.effective_bandwidth > near.effective_bandwidth:
        raise ClusterError(
            f"`{far.name}` ({format_bandwidth(far.effective_bandwidth)}) is faster than "
            f"`{near.name}` ({format_bandwidth(near.effective_bandwidth)}), which is closer.",
            where=f"{where}.bandwidth",
            fix="bandwidth per device and direction; a host's adapter is shared by its devices",
        )


def _check_shape(cluster: Cluster, tier: Tier) -> None:
    if tier.shape is None:
        return
    product = 1
    for dim in tier.shape:
        product *= dim
    hosts = int(min(tier.hosts, cluster.hosts))
    reach = sum(
        sorted((g.per_host for g in cluster.groups for _ in range(g.hosts)), reverse=True)[:hosts]
    )
    if product != reach:
        shape = "x".join(map(str, tier.shape))
        raise ClusterError(
            f"shape {shape} has {product} devices, tier `{tier.name}` joins {reach}.",
            where=f"fabric.{tier.name}.shape",
            fix=f"a shape whose sizes multiply to {reach}",
        )


def _check_one_way(cluster: Cluster, tier: Tier) -> None:
    """Vendors quote NVLink as the sum of both directions; we count one."""
    for device in cluster.devices.values():
        inside = presets.inside_bandwidth(presets.family(device.name))
        quoted = device.kind in ("cuda", "rocm") and tier is cluster.fabric[0]
        if inside and quoted and _near(tier.bandwidth, 2 * inside):
            raise ClusterError(
                f"{format_bandwidth(tier.bandwidth)} counts both directions of {device.name}'s links.",
                where=f"fabric.{tier.name}.bandwidth",
                fix=f"per direction it is {format_bandwidth(inside)}",
            )


def _dense_of(name: str, dtype: str, peak: float) -> float | None:
    """The dense figure when `peak` is the sparse one of this device (of any, if it is unknown)."""
    kind = presets.family(name)
    facts = presets.hardware()["devices"]
    tables = [facts[kind]] if kind else list(facts.values())
    given = [
        (d, parse_flops(p))
        for t in tables
        if t["kind"] in ("cuda", "rocm")
        for d, p in t["peak_flops"].items()
    ]
    dense = [p for d, p in given if dtype in DTYPES[d] and d not in ("f32", "f64")]
    if any(_near(peak, p) for p in dense):
        return None
    return next((p for p in dense if _near(peak, 2 * p)), None)


def _near(a: float, b: float) -> bool:
    return abs(a - b) <= 0.01 * b


# ---------------------------------------------------------------- files


def _is_path(text: str) -> bool:
    return text.endswith((".yaml", ".yml", ".json", ".toml")) or "/" in text or Path(text).is_file()


def _read(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """Content of a file, and the line of each dotted path in it."""
    try:
        loader = yaml.SafeLoader(path.read_text())
        node = loader.get_single_node()
        lines = dict(_lines(node, "", str(path)))
        data = loader.construct_document(node) if node else None
    except FileNotFoundError:
        raise _no_file(path) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ClusterError(f"`{path}` cannot be read: {error}.", fix="a YAML file") from None
    except yaml.YAMLError as error:
        raise _not_yaml(path, error) from None
    if not isinstance(data, dict):
        what = f"`{path}` holds no cluster: a mapping with `devices`, `groups` and `fabric`."
        raise ClusterError(what, fix="docs/cluster.md shows a file")
    return data, lines


def _no_file(path: Path) -> ClusterError:
    beside = path.parent.glob("*.y*ml") if path.parent.is_dir() else ()
    near = did_you_mean(path.name, sorted(p.name for p in beside))
    fix = near if near.startswith("`") else f"a shorthand such as `{presets.EXAMPLES[1]}`"
    return ClusterError(f"there is no file `{path}`.", fix=fix)


def _not_yaml(path: Path, error: yaml.YAMLError) -> ClusterError:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error)
    bracket = "'['" in problem or "']'" in problem
    return ClusterError(
        f"`{path}` is not YAML: {problem}.",
        where=f"line {mark.line + 1}, column {mark.column + 1}" if mark else None,
        fix='quotes around a pattern of hosts: `"gpu[00-31]"`'
        if bracket
        else "docs/cluster.md shows a file",
    )


def _lines(node: yaml.Node | None, path: str, file: str) -> Iterator[tuple[str, int]]:
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, value in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            if name in seen:
                what = f"`{name}` is given twice, on lines {seen[name]} and {line}."
                raise ClusterError(
                    what, where=path or None, origin=f"cluster spec {file}", fix="keep one of them"
                )
            seen[name] = line
            yield f"{path}{name}", line
            yield from _lines(value, f"{path}{name}.", file)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            plain = (
                {k.value: v.value for k, v in item.value}
                if isinstance(item, yaml.MappingNode)
                else {}
            )
            name = _item(path.removesuffix("."), index, plain)
            yield f"{path}{name}", item.start_mark.line + 1
            yield from _lines(item, f"{path}{name}.", file)


def _item(parent: str, index: int, fields: object) -> str:
    """How a list's item is called in a path: tiers by name, all else by number."""
    if parent == "fabric" and isinstance(fields, Mapping):
        return str(fields.get("tier") or fields.get("preset") or index)
    return str(index)


def _money(text: str) -> tuple[float, str]:
    number, _, currency = text.strip().partition(" ")
    try:
        return float(number), currency.strip() or "?"
    except ValueError:
        raise UsageError(
            f"`{text}` is no price.", fix="an amount and a currency, like `2.49 USD`"
        ) from None


def _tidy(data: dict[str, Any]) -> dict[str, Any]:
    """Without fields that say nothing, and amounts with their units."""
    if price := data.get("price"):
        price["per_device_hour"] = f"{price['per_device_hour']} {price.pop('currency')}"
    for group in data.get("groups", ()):
        group.update({k: list(v) for k, v in group.items() if isinstance(v, tuple)})
    return _without_none(data)


def _without_none(data: Any) -> Any:
    if isinstance(data, dict):
        return {k: _without_none(v) for k, v in data.items() if v is not None}
    return [_without_none(item) for item in data] if isinstance(data, list) else data


# ---------------------------------------------------------------- paths


def _full_path(path: str, cluster: Cluster) -> str:
    """`hosts` -> `groups.0.hosts`, `device.memory` -> `devices.h100.memory`; others must exist."""
    full = path
    if path in ("hosts", "per_host") and len(cluster.groups) == 1:
        full = f"groups.0.{path}"
    if path.startswith("device.") and len(cluster.devices) == 1:
        full = f"devices.{next(iter(cluster.devices))}.{path.removeprefix('device.')}"
    known = [p for p, _ in _fields(cluster, empty=True)]
    parent, _, leaf = full.rpartition(".")
    dtype = (
        parent.endswith(".peak_flops")
        and leaf in DTYPES
        and any(p.startswith(parent) for p in known)
    )
    if full not in known and not dtype:
        raise ClusterError(
            f"cluster `{cluster.name}` has no field `{path}`.", fix=did_you_mean(full, known)
        )
    return full


def _assign(data: Any, path: str, value: Any) -> None:
    top, *rest = path.split(".")
    node = data.setdefault(top, {})
    if top == "price":
        node[rest[0]] = value
        return
    name, field, *dtype = rest if top != "fabric" else [".".join(rest[:-1]), rest[-1]]
    if top == "fabric":
        node = next(tier for tier in node if tier["tier"] == name)
    else:
        node = node[int(name)] if isinstance(node, list) else node[name]
    if dtype:
        node[field][dtype[0]] = value
    else:
        node[field] = value
    if field == "hosts":
        node.pop("names", None)


# ---------------------------------------------------------------- messages

_MODELS: dict[str, type[BaseModel]] = {
    "devices": Device,
    "groups": Group,
    "fabric": Tier,
    "price": Price,
}


def _translate(
    error: ValidationError, data: Any, lines: Mapping[str, int], origin: str
) -> ClusterError:
    """The first mistake that pydantic found, in the house form; misspelled keys before missing ones."""
    found = [
        e for e in error.errors(include_url=False) if e["type"] != "too_short" or not e["input"]
    ]
    first = min(found, key=lambda each: each["type"] != "extra_forbidden")
    made = first.get("ctx", {}).get("error")
    path = _path_of(first["loc"], data)
    if isinstance(made, MeshwrightError):
        path = ".".join(filter(None, (path, made.where)))
    else:
        made = _reworded(first, path)
        path = path.rpartition(".")[0] if first["type"] == "missing" else path
    line = next((lines[p] for p in _parents(path) if p in lines), None)
    where = ", ".join([f"`{path}`"] * bool(path) + [f"line {line}"] * bool(line))
    more = len({e["loc"] for e in found}) - 1
    fixed = ClusterError(
        made.what, fix=made.fix and made.fix + (f"; {more} more after this" if more else "")
    )
    return ClusterError.at(fixed, where or None, made.origin or origin)


def _reworded(first: Any, path: str) -> ClusterError:
    loc, kind, given = first["loc"], first["type"], first["input"]
    key = str(loc[-1]) if loc else "cluster"
    model = _MODELS.get(str(loc[0]), Cluster) if len(loc) > 1 else Cluster
    example = model.model_json_schema()["properties"].get(key, {}).get("examples", [None])[0]
    like = f"`{key}: {example}`" if example is not None else "docs/cluster.md shows a file"
    if kind == "extra_forbidden":
        fields = [f.alias or n for n, f in model.model_fields.items() if not f.exclude]
        fields += ["preset"] if model in (Device, Tier) else []
        return ClusterError(
            f"`{key}` is not a field of a {model.__name__.lower()}.", fix=did_you_mean(key, fields)
        )
    if kind == "missing":
        return ClusterError(
            f"`{key}` is missing.", fix=f"add {like}" if example is not None else like
        )
    if kind == "literal_error":
        options = first["ctx"]["expected"].replace(" or ", ", ").replace("'", "").split(", ")
        return ClusterError(
            f"`{given}` is not a {key} that we know.", fix=did_you_mean(str(given), options)
        )
    message = (
        first["msg"]
        .replace("Input should", "it should")
        .replace("Field required", "it is required")
    )
    return ClusterError(f"`{key}` is `{given}`; {message}.", fix=like)


def _path_of(loc: tuple[Any, ...], data: Any) -> str:
    names: list[str] = []
    for part in loc:
        data = data[part] if _holds(data, part) else None
        names.append(_item(".".join(names), part, data) if isinstance(part, int) else str(part))
    return ".".join(names)


def _holds(data: Any, part: Any) -> bool:
    if isinstance(data, list | tuple):
        return isinstance(part, int) and part < len(data)
    return isinstance(data, Mapping) and part in data


def _parents(path: str) -> Iterator[str]:
    while path:
        yield path
        path = path.rpartition(".")[0]
