"""Published hardware by name, and the one-line shorthand for clusters.

    [HOSTS x] DEVICE x PER_HOST [@ FABRIC]    4xh100x8@ib400, h100x8, 128xa100x8@hdr200
    COUNT x DEVICE                            8xcpu, 8xh100 (one host)
    TPU - SIZE                                v5p-256, v5e-8, 2xv5p-256@dcn (two slices)
    gb200-nvlN                                gb200-nvl72, 4xgb200-nvl72@ib400

A shorthand becomes the same mapping that a file holds, so both are checked once,
in `cluster`. Figures and their sources are in `hardware.yaml`.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import yaml

from ..errors import ClusterError, MissingDependencyError, did_you_mean
from ..unchecked import is_mapping, is_sequence
from ..units import parse_bandwidth, parse_flops, spell_bandwidth, spell_bytes, spell_flops

SCHEMA = "meshwright/cluster/v1"
EXAMPLES = ("h100x8", "4xh100x8@ib400", "128xa100x8@hdr200", "v5p-256", "gb200-nvl72", "8xcpu")

DTYPES = {
    "f64": ("f64",), "float64": ("f64",), "fp64": ("f64",),
    "f32": ("f32",), "float32": ("f32",), "fp32": ("f32",),
    "tf32": ("tf32",),
    "f16": ("f16",), "float16": ("f16",), "fp16": ("f16",),
    "bf16": ("bf16",), "bfloat16": ("bf16",),
    "fp8": ("f8e4m3fn", "f8e5m2"), "f8e4m3fn": ("f8e4m3fn",), "f8e5m2": ("f8e5m2",),
    "fp4": ("f4e2m1fn",), "f4e2m1fn": ("f4e2m1fn",),
    "s8": ("s8",), "int8": ("s8",), "s4": ("s4",), "int4": ("s4",),
}  # fmt: skip

_FORM = re.compile(
    r"(?:(?P<hosts>[0-9]{1,7})x)?(?P<device>[a-z][a-z0-9-]*?)"
    r"(?:x(?P<per_host>[0-9]{1,5}))?(?:@(?P<fabric>[a-z0-9]+))?"
)
_SLICE = re.compile(r"(?P<family>[a-z0-9]+)-(?P<size>[0-9]{1,7})")
_RACK = re.compile(r"gb200-nvl(?P<size>[0-9]{1,7})")


@cache
def hardware() -> dict[str, dict[str, Any]]:
    """`hardware.yaml`: `devices` and `fabrics` by name."""
    return yaml.safe_load(Path(__file__).with_name("hardware.yaml").read_text())


@cache
def names() -> dict[str, str]:
    """Every name and alias of a device -> its preset."""
    devices = hardware()["devices"]
    return {n: name for name, facts in devices.items() for n in (name, *facts.get("aliases", ()))}


def family(text: str) -> str | None:
    """The preset that a free name speaks of; None if there is none.

    "h100-80g-sxm5" -> "h100";  "NVIDIA A100-SXM4-40GB" -> "a100-40";  "my-gpu" -> None
    """
    plain = re.sub(r"[^a-z0-9]", "", text.lower().removeprefix("nvidia"))
    fits: list[str] = []
    for name in names():
        first, *rest = name.split("-")
        if plain.startswith(first) and all(part in plain for part in rest):
            fits.append(name)
    return names()[max(fits, key=len)] if fits else None


def device_facts(name: str) -> dict[str, Any]:
    """The fields of a device as a file would state them."""
    if name not in names():
        raise ClusterError(
            f"device `{name}` is not known.",
            fix=f"{did_you_mean(name, names())}, or a file that states its figures",
        )
    facts = hardware()["devices"][names()[name]]
    return {k: v for k, v in facts.items() if k not in ("aliases", "system", "slice")}


def tier_facts(name: str, per_host: int) -> dict[str, Any]:
    """The fields of a tier as a file would state them; a host's adapter is divided by its devices."""
    fabrics = hardware()["fabrics"]
    if name not in fabrics:
        raise ClusterError(f"fabric `{name}` is not known.", fix=did_you_mean(name, fabrics))
    facts = dict(fabrics[name])
    if facts.pop("nic", None) == "host":
        facts["bandwidth"] = spell_bandwidth(parse_bandwidth(facts["bandwidth"]) / per_host)
        facts["source"] += f"; shared by {per_host} devices"
    return {"tier": name, **facts}


def shorthand(text: str) -> dict[str, Any]:
    """The mapping that a one-line description stands for."""
    name = re.sub(r"\s+", "", text).lower()
    match = _FORM.fullmatch(name)
    if match is None:
        raise _unreadable(text)
    hosts, per_host = int(match["hosts"] or 1), match["per_host"]
    if hosts == 0 or (per_host and int(per_host) == 0):
        raise ClusterError(f"`{text}` has no devices.", fix="at least one host with one device")
    if match["device"] in names():
        return _hosts(name, match)
    if per_host is None and (rack := _RACK.fullmatch(match["device"])):
        return _racks(name, hosts, int(rack["size"]), match["fabric"])
    if per_host is None and (tpu := _SLICE.fullmatch(match["device"])):
        facts = hardware()["devices"].get(names().get(tpu["family"], ""), {})
        if "slice" in facts:
            return _slices(name, hosts, names()[tpu["family"]], int(tpu["size"]), match["fabric"])
    raise _unreadable(text, match["device"])


def _hosts(name: str, match: re.Match[str]) -> dict[str, Any]:
    device = names()[match["device"]]
    facts = hardware()["devices"][device]
    if "slice" in facts:
        raise ClusterError(
            f"`{name}` does not name a TPU slice.", fix=f"its size, as in `{device}-8`"
        )
    most, fabric = facts["system"]["most"], match["fabric"]
    alone = match["per_host"] is None
    hosts, per_host = int(match["hosts"] or 1), int(match["per_host"] or 1)
    if alone:  # 8xh100: so many devices on one host
        hosts, per_host = 1, hosts
    if per_host > most:
        usual = min(most, 8)
        fix = f"`{-(-per_host // usual)}x{device}x{usual}@{fabric or 'ib400'}`"
        raise ClusterError(f"one host does not hold {per_host} {device}, at most {most}.", fix=fix)
    if hosts > 1 and fabric is None:
        raise ClusterError(
            f"`{name}` does not say what joins its {hosts} hosts.",
            fix=f"`{name}@ib400` (InfiniBand, 400 Gb/s per device), `{name}@eth100` "
            f"(100 Gb/s per host), or {did_you_mean('', _between())}",
        )
    inside = tier_facts(facts["system"]["tier"], per_host)
    group = {"device": device, "hosts": hosts, "per_host": per_host}
    optional = {k: facts["system"][k] for k in ("host_memory", "host_link") if k in facts["system"]}
    return _file(name, device, {**group, **optional}, [inside, *_outer(fabric, per_host)])


def _racks(name: str, racks: int, size: int, fabric: str | None) -> dict[str, Any]:
    """Racks whose NVLink domain spans hosts of four GPUs."""
    system = hardware()["devices"]["gb200"]["system"]
    per_host = system["most"]
    if size not in (36, 72):
        raise ClusterError(f"`{name}` is no GB200 rack.", fix="`gb200-nvl36` or `gb200-nvl72`")
    if racks > 1 and fabric is None:
        raise ClusterError(
            f"`{name}` does not say what joins its {racks} racks.", fix=f"`{name}@ib400`"
        )
    group = {"device": "gb200", "hosts": racks * size // per_host, "per_host": per_host}
    optional = {k: system[k] for k in ("host_memory", "host_link")}
    inside = {**tier_facts(system["tier"], per_host), "scope": {"hosts": size // per_host}}
    return _file(name, "gb200", {**group, **optional}, [inside, *_outer(fabric, per_host)])


def _slices(name: str, slices: int, device: str, size: int, fabric: str | None) -> dict[str, Any]:
    """TPU slices. The number counts TensorCores on v4 and v5p, chips on v5e and v6e; JAX sees chips."""
    facts = hardware()["devices"][device]["slice"]
    shapes = {prod(map(int, s.split("x"))): s for s in facts["shapes"]}
    chips = size // facts["cores"]
    if size % facts["cores"] or chips not in shapes:
        sizes = ", ".join(f"{device}-{n * facts['cores']}" for n in shapes)
        raise ClusterError(f"there is no TPU slice `{device}-{size}`.", fix=f"one of {sizes}")
    per_host = min(chips, facts["per_host"])
    hosts = chips // per_host
    group = {"device": device, "hosts": slices * hosts, "per_host": per_host}
    if "host_memory" in facts:
        group["host_memory"] = facts["host_memory"]
    scope: Any = {"hosts": hosts} if hosts > 1 else "host"
    tiers = [{**_ici(facts, shapes[chips]), "scope": scope}]
    if slices > 1:
        tiers.append(_dcn(name, device, facts, fabric))
    elif fabric is not None:
        raise ClusterError(
            f"`{name}` is one slice, which `@{fabric}` joins to nothing.",
            fix=f"`{device}-{size}`, or two slices or more",
        )
    return _file(name, device, group, tiers)


def _ici(facts: Mapping[str, Any], shape: str) -> dict[str, Any]:
    """The inter-chip torus. A dimension that does not wrap around is a line: half the bandwidth.

    3D slices wrap when all dims are multiples of 4, 2D ones at 16 x 16.
    Source: docs.cloud.google.com/tpu/docs/v4 and v5p; jax-ml/scaling-book tpus.md. A 2D slice
    with one dimension of 16 counts as not wrapping at all, which is cautious.
    """
    dims = [int(d) for d in shape.split("x")]
    wraps = all(d % 4 == 0 for d in dims) if len(dims) == 3 else all(d == 16 for d in dims)
    one_way = parse_bandwidth(facts["link"])
    return {
        "tier": "ici",
        "kind": "torus" if wraps else "mesh",
        "bandwidth": spell_bandwidth(one_way * (2 if wraps else 1)),
        "latency": "1 us",
        "shape": shape,
        "source": f"[book] {facts['link']} per link and direction, "
        f"{'two links' if wraps else 'one link'} per dimension; latency [guess]",
    }


def _dcn(name: str, device: str, facts: Mapping[str, Any], fabric: str | None) -> dict[str, Any]:
    if fabric != "dcn" or "dcn" not in facts:
        fix = (
            f"`{name.split('@')[0]}@dcn`"
            if "dcn" in facts
            else f"a file with a tier of {device}'s network"
        )
        raise ClusterError(f"`{name}` does not say what joins its slices.", fix=fix)
    source = "[gcp] data center network per chip; latency [guess]"
    return {"tier": "dcn", "scope": "all", "kind": "switch", "bandwidth": facts["dcn"], "latency": "30 us", "source": source}  # fmt: skip


def _outer(fabric: str | None, per_host: int) -> list[dict[str, Any]]:
    if fabric is None:
        return []
    if fabric not in _between():
        raise ClusterError(f"fabric `{fabric}` is not known.", fix=did_you_mean(fabric, _between()))
    return [tier_facts(fabric, per_host)]


def _between() -> list[str]:
    return [name for name, facts in hardware()["fabrics"].items() if facts["scope"] == "all"]


def _file(
    name: str, device: str, group: dict[str, Any], fabric: list[dict[str, Any]]
) -> dict[str, Any]:
    devices = {device: device_facts(device)}
    return {"schema": SCHEMA, "name": name, "devices": devices, "groups": [group], "fabric": fabric}


def _unreadable(text: str, device: str | None = None) -> ClusterError:
    near = (
        did_you_mean(device or text, [*names(), "gb200-nvl72", *EXAMPLES]) if device or text else ""
    )
    hint = f"{near}; " if near.startswith("`") else ""
    what = (
        f"device `{device}` of `{text:.60}` is not known."
        if device
        else f"`{text:.60}` describes no cluster."
    )
    form = f"HOSTSxDEVICExPER_HOST@FABRIC such as {', '.join(f'`{e}`' for e in EXAMPLES[:4])}, or a .yaml file"
    return ClusterError(what, fix=f"{hint}{form}")


# ---------------------------------------------------------------- files


def expand(data: Mapping[str, Any]) -> dict[str, Any]:
    """A file's mapping with `preset:` entries filled in; what they gave is marked in `provenance`.

    {h100: {preset: h100, reserve: 6 GiB}}  ->  all fields of an H100, `reserve` as stated
    """
    out, marks = dict(data), dict[str, str]()
    devices, fabric = data.get("devices"), data.get("fabric")
    if is_mapping(devices):
        out["devices"] = {k: _expand_device(str(k), v, marks) for k, v in devices.items()}
    if is_sequence(fabric):
        shared_by = max(
            (_count(g) for g in _listed(data.get("groups")) if is_mapping(g)), default=1
        )
        out["fabric"] = [_expand_tier(tier, shared_by, marks) for tier in fabric]
    stated = data.get("provenance")
    if marks and (stated is None or is_mapping(stated)):
        out["provenance"] = marks | dict(stated or {})
    return out


def _listed(data: Any) -> Any:
    return data if is_sequence(data) else ()


def _expand_device(name: str, fields: Any, marks: dict[str, str]) -> Any:
    if hasattr(fields, "model_copy"):
        return fields.model_copy(update={"name": name})
    if not is_mapping(fields):
        return fields
    if fields.get("name", name) != name:
        raise ClusterError(
            f"device `{name}` names itself `{fields['name']}`.",
            where=f"devices.{name}.name",
            fix="its key alone",
        )
    preset = fields.get("preset")
    facts = _preset(device_facts, preset, f"devices.{name}.preset") if preset is not None else {}
    stated = {k: v for k, v in fields.items() if k != "preset"}
    given = {k: v for k, v in facts.items() if k not in stated}
    marks.update(dict.fromkeys(_leaves(given, f"devices.{name}"), "preset"))
    return {**facts, **stated, "name": name}


def _expand_tier(fields: Any, shared_by: int, marks: dict[str, str]) -> Any:
    if not is_mapping(fields) or "preset" not in fields:
        return fields
    name = fields.get("tier", fields["preset"])
    facts = _preset(lambda n: tier_facts(n, shared_by), fields["preset"], f"fabric.{name}.preset")
    stated = {k: v for k, v in fields.items() if k != "preset"} | {"tier": name}
    given = {k: v for k, v in facts.items() if k not in stated}
    marks.update(dict.fromkeys(_leaves(given, f"fabric.{name}"), "preset"))
    return {**facts, **stated}


def _preset(find: Callable[[str], dict[str, Any]], name: Any, where: str) -> dict[str, Any]:
    try:
        return find(str(name).lower())
    except ClusterError as error:
        raise ClusterError.at(error, where, None) from None


def _count(group: Mapping[str, Any]) -> int:
    per_host = group.get("per_host")
    return per_host if isinstance(per_host, int) and per_host > 0 else 1


def all_preset(data: Mapping[str, Any]) -> dict[str, str]:
    """Provenance of a mapping that came from a name: counts were declared, the rest is preset."""
    marks = {
        p: "preset"
        for name, facts in data["devices"].items()
        for p in _leaves(facts, f"devices.{name}")
    }
    marks |= {
        p: "preset" for tier in data["fabric"] for p in _leaves(tier, f"fabric.{tier['tier']}")
    }
    return marks | {p: "preset" for p in _leaves(data["groups"][0], "groups.0") if "host_" in p}


def _leaves(facts: Mapping[str, Any], prefix: str) -> Iterator[str]:
    for field, value in facts.items():
        if field == "peak_flops":
            yield from (f"{prefix}.{field}.{dtype}" for key in value for dtype in DTYPES[key])
        elif field not in ("tier", "source", "name"):
            yield f"{prefix}.{field}"


def inside_bandwidth(name: str | None) -> float | None:
    """Bandwidth per direction of the links inside a host of this preset."""
    system = hardware()["devices"].get(name or "", {}).get("system")
    return parse_bandwidth(hardware()["fabrics"][system["tier"]]["bandwidth"]) if system else None


# ---------------------------------------------------------------- this process

_TPU_KINDS = {"TPU v4": "v4", "TPU v5p": "v5p", "TPU v5": "v5p", "TPU v5 lite": "v5e", "TPU v5e": "v5e",
              "TPU v6 lite": "v6e", "TPU v6e": "v6e"}  # fmt: skip


def detect(fabric: str | None = None) -> dict[str, Any]:
    """The mapping of this process's JAX devices: counts and memory detected, rates preset."""
    try:
        jax = importlib.import_module("jax")
    except ImportError:
        raise MissingDependencyError(
            "jax is not installed.", fix="pip install 'meshwright[jax]'"
        ) from None
    devices = jax.devices()
    first, count, hosts = devices[0], len(devices), len({d.process_index for d in devices})
    name = _kind_name(first)
    data = _local(name, count, hosts, fabric)
    device, seen = data["devices"][name], ["groups.0.device", "groups.0.hosts", "groups.0.per_host"]
    if first.platform == "cpu":
        _share(data, count // hosts)
        seen.append(f"devices.{name}.memory")
    elif (stats := first.memory_stats()) and (limit := stats.get("bytes_limit")):
        device["memory"], device["reserve"] = spell_bytes(float(limit)), "0 B"  # XLA's own limit
        seen += [f"devices.{name}.memory", f"devices.{name}.reserve"]
    data["provenance"] = all_preset(data) | dict.fromkeys(seen, "detected")
    return data


def _kind_name(device: Any) -> str:
    """The preset of a JAX device."""
    if device.platform == "cpu":
        return "cpu"
    kind = str(device.device_kind)
    name = _TPU_KINDS.get(kind) if device.platform == "tpu" else family(kind)
    variant = {
        word for word in ("pcie", "nvl") if word in kind.lower() and word not in (name or "")
    }
    if name is None or variant:
        raise ClusterError(
            f"no preset describes this process's `{kind}`.",
            where="devices of this process",
            fix="a file that states its figures, see docs/cluster.md",
        )
    return name


def _local(name: str, count: int, hosts: int, fabric: str | None) -> dict[str, Any]:
    facts = hardware()["devices"][name]
    if "slice" in facts:
        data = shorthand(f"{name}-{count * facts['slice']['cores']}")
    elif hosts > 1 and fabric is None:
        raise ClusterError(
            f"this process sees {hosts} hosts; what joins them cannot be detected.",
            where="devices of this process",
            fix=f'`Cluster.local(fabric="ib400")`, or `{hosts}x{name}x{count // hosts}@ib400`',
        )
    else:
        data = shorthand(f"{hosts}x{name}x{count // hosts}" + (f"@{fabric}" if fabric else ""))
    return data | {"name": f"local-{count}x{name}"}


def _share(data: dict[str, Any], count: int) -> None:
    """Divide one machine among its emulated devices; the preset is 8 of them on 2 cores."""
    device, shared = data["devices"]["cpu"], data["fabric"][0]
    part = len(os.sched_getaffinity(0)) / 2 * 8 / count
    device["memory"] = spell_bytes(float(_machine_memory() // count))
    device["peak_flops"] = {d: _scaled(p, part) for d, p in device["peak_flops"].items()}
    device["elementwise_flops"] = _scaled(device["elementwise_flops"], part)
    for holder, field in ((device, "memory_bandwidth"), (shared, "bandwidth")):
        holder[field] = spell_bandwidth(parse_bandwidth(holder[field]) * part)


def _scaled(rate: str, part: float) -> str:
    return spell_flops(parse_flops(rate) * part)


def _machine_memory() -> int:
    """Bytes of this machine, or of the control group that this process is confined to."""
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return min(installed, int(text)) if text.isdigit() else installed
