"""Clusters: what there is to run on. Shorthand, presets, YAML files, this process.

    Cluster.parse("4xh100x8@ib400")     4 hosts of 8 H100 each, 400 Gb/s per device between hosts
    Cluster.parse("lab.toml.yaml")      a file, see docs/cluster.md
    Cluster.local()                     the JAX devices of this process

Inside, all figures are bytes, seconds, FLOP/s and bytes/s per device and direction.
`provenance` says for each field whether it was declared, preset, detected or measured.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import json
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from . import presets
from .errors import ClusterError, MissingDependencyError, UsageError
from .units import format_bandwidth, format_bytes, parse_bandwidth, parse_bytes, parse_flops, parse_seconds

SCHEMA = "meshwright/cluster/v1"
Origin = Literal["declared", "preset", "detected", "measured"]


def _reader(parse):
    return BeforeValidator(lambda value: parse(value) if isinstance(value, str) else value)


Size = Annotated[float, _reader(parse_bytes), Field(ge=0)]
Rate = Annotated[float, _reader(parse_bandwidth), Field(gt=0)]
Time = Annotated[float, _reader(parse_seconds), Field(ge=0)]
Peak = Annotated[float, _reader(parse_flops), Field(gt=0)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Device(_Part):
    """One accelerator. `efficiency` is the share of the peak that large products reach."""

    name: str
    kind: Literal["cuda", "rocm", "tpu", "cpu"]
    memory: Size
    reserve: Size = 0.0  # context, communication buffers, allocator slack
    peak_flops: dict[str, Peak] = Field(min_length=1)
    memory_bandwidth: Rate
    launch: Time = 5e-6
    efficiency: float = Field(default=0.8, gt=0, le=1)

    @model_validator(mode="after")
    def _sane(self) -> Device:
        if self.reserve >= self.memory:
            raise ValueError(f"reserve {format_bytes(self.reserve)} leaves nothing of {format_bytes(self.memory)}")
        for dtype, peak in self.peak_flops.items():
            dense = presets.SPARSE.get(peak)
            if dense and self._looks_sparse(dtype, peak):
                raise ValueError(
                    f"{peak / 1e12:g} TFLOP/s for {dtype} is the figure with 2:4 sparsity; the dense one is {dense / 1e12:g} TFLOP/s"
                )
        return self

    def _looks_sparse(self, dtype: str, peak: float) -> bool:
        """A short-float peak that a known device reaches only with sparsity."""
        known = [d["peak_flops"].get(dtype) for d in presets.DEVICES.values()]
        return peak not in known and dtype in ("bf16", "f16", "tf32", "f8e4m3fn", "int8")


class Group(_Part):
    """Equal hosts: how many, and how many devices each."""

    device: str
    hosts: int = Field(gt=0)
    per_host: int = Field(gt=0)
    host_memory: Size | None = None
    host_link: Rate | None = None


class Tier(_Part):
    """One level of the fabric: what joins devices of a host, of some hosts, or all."""

    tier: str
    scope: Literal["host", "all"] | Annotated[int, Field(gt=1)]  # a number: that many hosts
    kind: Literal["switch", "ring", "torus", "mesh"] = "switch"
    bandwidth: Rate
    latency: Time = 5e-6
    oversubscription: float = Field(default=1.0, ge=1)

    @property
    def name(self) -> str:
        return self.tier

    @model_validator(mode="after")
    def _one_way(self) -> Tier:
        one_way = presets.TWO_WAY.get(self.bandwidth)
        if one_way and self.tier.lower().startswith("nvl") and self.bandwidth != 900e9:
            raise ValueError(
                f"{format_bandwidth(self.bandwidth)} is NVLink in both directions; per direction it is {format_bandwidth(one_way)}"
            )
        return self


class Price(_Part):
    per_device_hour: float = Field(gt=0)  # US dollars
    spot: bool = False


class Cluster(_Part):
    """Devices, hosts and fabric (closest tier first), with the origin of every figure."""

    schema_: str = Field(default=SCHEMA, alias="schema")
    name: str
    devices: dict[str, Device]
    groups: tuple[Group, ...] = Field(min_length=1)
    fabric: tuple[Tier, ...] = Field(min_length=1)
    price: Price | None = None
    provenance: dict[str, Origin] = Field(default_factory=dict)

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    @model_validator(mode="before")
    @classmethod
    def _named_devices(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(data.get("devices"), dict):
            named = {k: {"name": k, **v} if isinstance(v, dict) else v for k, v in data["devices"].items()}
            return {**data, "devices": named}
        return data

    @model_validator(mode="after")
    def _whole(self) -> Cluster:
        if self.schema_ != SCHEMA:
            raise ValueError(f"schema {self.schema_!r} is not known; this version reads {SCHEMA!r}")
        for group in self.groups:
            if group.device not in self.devices:
                raise ValueError(f"group names device {group.device!r}; declared are {', '.join(self.devices)}")
        self._check_fabric()
        return self

    def _check_fabric(self) -> None:
        scopes = [self._hosts_joined(tier) for tier in self.fabric]
        if scopes != sorted(scopes):
            raise ValueError("fabric tiers must stand closest first: host, then some hosts, then all")
        if scopes[-1] < self.hosts:
            raise ValueError(f"no fabric tier joins all {self.hosts} hosts; add one with scope: all")
        if len({tier.tier for tier in self.fabric}) != len(self.fabric):
            raise ValueError("two fabric tiers have one name")

    def _hosts_joined(self, tier: Tier) -> float:
        return {"host": 1.0, "all": float("inf")}.get(tier.scope, tier.scope) if isinstance(tier.scope, str) else tier.scope

    # ------------------------------------------------------------ reading

    @classmethod
    def parse(cls, text: str | Path | Cluster) -> Cluster:
        """A cluster from itself, a shorthand (`8xcpu`, `h100x8`, `4xh100x8@ib400`, `v5p-256`) or a YAML file."""
        if isinstance(text, Cluster):
            return text
        name = str(text)
        if name == "local":
            return cls.local()
        if isinstance(text, Path) or name.endswith((".yaml", ".yml", ".json")) or os.sep in name:
            return cls.load(Path(name))
        return _from_shorthand(name)

    @classmethod
    def load(cls, path: str | Path) -> Cluster:
        """Read a YAML file; every mistake is a ClusterError that names it."""
        path = Path(path)
        if not path.is_file():
            near = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
            raise ClusterError(f"there is no cluster file {path}.", fix=_close(path.name, near) or "a shorthand such as h100x8")
        try:
            data = yaml.safe_load(path.read_text())
        except yaml.YAMLError as error:
            raise ClusterError(f"{path} is not YAML: {error}", fix="see docs/cluster.md for the format") from None
        if not isinstance(data, dict):
            raise ClusterError(f"{path} holds no mapping.", fix="see docs/cluster.md for the format")
        return cls._checked(data, str(path), "declared")

    @classmethod
    def _checked(cls, data: dict[str, Any], origin: str, source: Origin) -> Cluster:
        try:
            cluster = cls.model_validate(data)
        except ValidationError as error:
            raise _readable(error, origin) from None
        except UsageError as error:
            raise ClusterError(error.what, origin=origin, fix=error.fix) from None
        given = {path: source for path in _paths(data) if not path.startswith(("schema", "provenance"))}
        return cluster.model_copy(update={"provenance": {**given, **cluster.provenance}})

    @classmethod
    def local(cls) -> Cluster:
        """The JAX devices of this process. CPU devices share the machine's memory; their rates are presets."""
        try:
            jax = importlib.import_module("jax")
        except ImportError:
            raise MissingDependencyError("jax is not installed.", fix="pip install jax") from None
        found = jax.devices()
        kind = {"gpu": "cuda", "cuda": "cuda", "rocm": "rocm", "tpu": "tpu"}.get(found[0].platform, "cpu")
        base = _nearest_preset(kind, found[0].device_kind)
        hosts = max(d.process_index for d in found) + 1
        data = _cluster_data(f"local-{len(found)}x{found[0].platform}", base, hosts, len(found) // hosts, "ib400" if hosts > 1 else None)
        detected: dict[str, Origin] = {"groups.0.hosts": "detected", "groups.0.per_host": "detected"}
        memory = _local_memory(found[0], len(found))
        if memory:
            data["devices"][base]["memory"] = memory
            detected[f"devices.{base}.memory"] = "detected"
        made = cls._checked(data, "this process", "preset")
        return made.model_copy(update={"provenance": {**made.provenance, **detected}})

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
        self._homogeneous()
        return self.groups[0].per_host

    @property
    def device(self) -> Device:
        self._homogeneous()
        return self.devices[self.groups[0].device]

    def _homogeneous(self) -> None:
        kinds = {(group.device, group.per_host) for group in self.groups}
        if len(kinds) > 1:
            text = ", ".join(f"{g.hosts} hosts of {g.per_host} {g.device}" for g in self.groups)
            raise ClusterError(
                f"intra-operator planning needs equal devices, {self.name} has {text}.",
                fix="plan for one of the groups alone",
            )

    @property
    def memory_per_device(self) -> float:
        return self.device.memory - self.device.reserve

    def tier_for(self, span: int) -> Tier:
        """The closest tier that joins `span` consecutive devices."""
        hosts = -(-span // self.per_host)
        return next(t for t in self.fabric if (self._hosts_joined(t) if hosts > 1 else 1) >= hosts)

    def fingerprint(self) -> str:
        """sha256 of the content, names and origins aside."""
        data = self.model_dump(mode="json", exclude={"provenance", "name"})
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()

    def to_yaml(self) -> str:
        data = self.model_dump(mode="json", by_alias=True, exclude_none=True)
        for device in data["devices"].values():
            device.pop("name")
        return yaml.safe_dump(data, sort_keys=False)

    def with_(self, path: str, value: Any, source: Origin = "declared") -> Cluster:
        """A copy with one field changed: `with_("fabric.ib400.bandwidth", "100 GB/s")`."""
        data = self.model_dump(mode="json", by_alias=True, exclude={"provenance"})
        here: Any = data
        *parents, last = path.split(".")
        trail: list[str] = []
        for part in parents:
            here, key = _step(here, part, path)
            trail.append(key)
        here_value, key = _step(here, last, path)
        if isinstance(here_value, (dict, list)):
            raise ClusterError(f"{path} is not a single figure.", fix=_close(last, _fields(here_value)))
        here[int(key) if isinstance(here, list) else key] = value
        origins = {**self.provenance, ".".join([*trail, key]): source}
        return Cluster._checked({**data, "provenance": origins}, f"override of {path}", source).model_copy(
            update={"provenance": origins}
        )

    def describe(self) -> str:
        """One paragraph: devices, memory, tiers."""
        lines = [f"{self.name}: {self.size} devices"]
        for group in self.groups:
            device = self.devices[group.device]
            peak = ", ".join(f"{k} {v / 1e12:g} TFLOP/s" for k, v in device.peak_flops.items())
            lines.append(f"  {group.hosts} × {group.per_host} {group.device}: {format_bytes(device.memory)}, {peak}")
        for tier in self.fabric:
            lines.append(f"  {tier.tier}: {format_bandwidth(tier.bandwidth)} per device each way, scope {tier.scope}")
        return "\n".join(lines)


# ---------------------------------------------------------------- shorthand

_TPU = re.compile(r"^(v4|v5e|v5p|v6e)-(\d+)$")
_RACK = re.compile(r"^(gb200)-nvl(\d+)$")
_HOSTED = re.compile(r"^(?:(\d+)x)?([a-z][a-z0-9]*(?:-\d+)?)x(\d+)(?:@([a-z0-9]+))?$")
_PLAIN = re.compile(r"^(\d+)x(cpu)$")


def _from_shorthand(text: str) -> Cluster:
    """`[HOSTS x] DEVICE x PER_HOST [@ FABRIC]`, `N x cpu`, `v5p-256`, `gb200-nvl72`."""
    name = text.strip().lower()
    if match := _PLAIN.match(name):
        return _build(name, "cpu", 1, int(match[1]), None)
    if match := _TPU.match(name):
        return _build(name, match[1], 1, int(match[2]), None)
    if match := _RACK.match(name):
        return _build(name, match[1], 1, int(match[2]), None)
    match = _HOSTED.match(name)
    if not match:
        raise ClusterError(
            f"{text!r} is no cluster.", where="cluster shorthand",
            fix=_close(name, list(presets.PRESETS)) or "HOSTSxDEVICExPER_HOST@FABRIC such as 4xh100x8@ib400, or a .yaml file",
        )  # fmt: skip
    hosts, device, per_host, fabric = int(match[1] or 1), match[2], int(match[3]), match[4]
    if hosts > 1 and fabric is None:
        raise ClusterError(f"{text!r} does not say how its {hosts} hosts are joined.", fix=f"{name}@ib400 (one of {', '.join(presets.FABRICS)})")
    return _build(name, device, hosts, per_host, fabric)


def _build(name: str, device: str, hosts: int, per_host: int, fabric: str | None) -> Cluster:
    if device not in presets.DEVICES:
        raise ClusterError(f"device {device!r} is not known.", where=f"cluster {name!r}", fix=_close(device, list(presets.DEVICES)))
    if fabric is not None and fabric not in presets.FABRICS:
        raise ClusterError(f"fabric {fabric!r} is not known.", where=f"cluster {name!r}", fix=_close(fabric, list(presets.FABRICS)))
    if hosts < 1 or per_host < 1:
        raise ClusterError(f"{name!r} has no devices.", fix="at least one host with one device")
    return Cluster._checked(_cluster_data(name, device, hosts, per_host, fabric), f"shorthand {name!r}", "preset")


def _cluster_data(name: str, device: str, hosts: int, per_host: int, fabric: str | None) -> dict[str, Any]:
    facts = presets.DEVICES[device]
    kind = facts["kind"]
    inside = next(key for key in ("nvlink", "ici", "shared") if key in facts)
    latency = {"nvlink": 2e-6, "ici": 1e-6, "shared": 3e-5}[inside]
    tiers: list[dict[str, Any]] = [
        {"tier": inside, "scope": "host", "kind": "torus" if inside == "ici" else "switch", "bandwidth": facts[inside], "latency": latency}
    ]
    if fabric is not None:
        bandwidth, latency, _ = presets.FABRICS[fabric]
        tiers.append({"tier": fabric, "scope": "all", "bandwidth": bandwidth, "latency": latency})
    return {
        "schema": SCHEMA,
        "name": name,
        "devices": {
            device: {
                "kind": kind, "memory": facts["memory"], "reserve": presets.RESERVE[kind], "peak_flops": facts["peak_flops"],
                "memory_bandwidth": facts["memory_bandwidth"], "launch": presets.LAUNCH[kind], "efficiency": round(facts["efficiency"], 4),
            }
        },
        "groups": [{"device": device, "hosts": hosts, "per_host": per_host, "host_link": facts["host_link"]}],
        "fabric": tiers,
    }  # fmt: skip


def _nearest_preset(kind: str, device_kind: str) -> str:
    text = device_kind.lower().replace(" ", "")
    of_kind = [name for name, facts in presets.DEVICES.items() if facts["kind"] == kind]
    return next((name for name in sorted(of_kind, key=len, reverse=True) if name.replace("-", "") in text), of_kind[-1] if of_kind else "cpu")


def _local_memory(device: Any, count: int) -> float | None:
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return float(stats["bytes_limit"])
    if device.platform == "cpu":
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) / count
    return None


# ---------------------------------------------------------------- messages


def _close(word: str, known: list[str]) -> str | None:
    near = difflib.get_close_matches(word, known, n=3, cutoff=0.4)
    return " or ".join(near) if near else (", ".join(known[:12]) or None)


def _readable(error: ValidationError, origin: str) -> ClusterError:
    """The first of pydantic's findings in the house form."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"] if part not in ("float", "int", "literal['host','all']"))
    if first["type"] == "extra_forbidden":
        key = str(first["loc"][-1])
        return ClusterError(f"{key!r} is not a field here.", where=where, origin=origin, fix=_close(key, _known_fields(first["loc"])))
    if first["type"] == "missing":
        return ClusterError(f"{where} is missing.", origin=origin, fix=f"add {first['loc'][-1]}; docs/cluster.md shows an example")
    message = first["msg"].removeprefix("Value error, ")
    what, _, fix = message.partition("\n")
    return ClusterError(f"{what}", where=f"{where or 'cluster'} = {first.get('input')!r}"[:120], origin=origin, fix=fix.replace("try", "").strip() or "docs/cluster.md")


def _known_fields(loc: tuple[Any, ...]) -> list[str]:
    part = {"devices": Device, "groups": Group, "fabric": Tier, "price": Price}.get(str(loc[0]), Cluster) if len(loc) > 1 else Cluster
    return [field.alias or name for name, field in part.model_fields.items()]


def _paths(data: Any, prefix: str = "") -> list[str]:
    if isinstance(data, dict):
        return [path for key, value in data.items() for path in _paths(value, f"{prefix}{key}.")]
    if isinstance(data, (list, tuple)):
        return [path for i, value in enumerate(data) for path in _paths(value, f"{prefix}{i}.")]
    return [prefix[:-1]]


def _fields(data: Any) -> list[str]:
    if isinstance(data, dict):
        return list(data)
    return [str(item.get("tier", item.get("device", i))) for i, item in enumerate(data)] if isinstance(data, list) else []


def _step(data: Any, part: str, path: str) -> tuple[Any, str]:
    """One step of a dotted path; list items go by number or by their name."""
    if isinstance(data, list):
        names = _fields(data)
        index = int(part) if part.isdigit() else names.index(part) if part in names else -1
        if 0 <= index < len(data):
            return data[index], str(index)
    elif isinstance(data, dict) and part in data:
        return data[part], part
    raise ClusterError(f"the cluster has no field {path!r}.", where=part, fix=_close(part, _fields(data)))
