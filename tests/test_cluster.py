"""Clusters: what a line or a file stands for, and how each mistake is answered."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from meshwright.ir.cluster.cluster import Cluster, Device, DevicePrice, Group, Tier, presets
from meshwright.ir.errors import ClusterError, UsageError
from meshwright.ir.units import parse_bandwidth

LAB = """\
schema: meshwright/cluster/v1
name: lab
devices:
  h100:
    kind: cuda
    memory: 80 GiB
    reserve: 4 GiB
    peak_flops: {bf16: 989 TFLOP/s, fp8: 1979 TFLOP/s}
    memory_bandwidth: 3.35 TB/s
groups:
  - {device: h100, hosts: "gpu[00-31]", per_host: 8, host_memory: 2 TiB, host_link: 55 GB/s}
fabric:
  - {tier: nvlink, scope: host, bandwidth: 450 GB/s, latency: 2 us}
  - {tier: leaf, scope: {hosts: 4}, bandwidth: 400 Gb/s, latency: 6 us, rails: 8}
  - {tier: spine, scope: all, bandwidth: 50 GB/s, oversubscription: 2}
price: {per_device_hour: 2.49 USD}
"""


@pytest.fixture
def lab(tmp_path: Path) -> Path:
    path = tmp_path / "lab.yaml"
    path.write_text(LAB)
    return path


def refused(path: Path, old: str, new: str) -> str:
    """The answer to the lab's file with one text replaced."""
    assert LAB.count(old) == 1
    path.write_text(LAB.replace(old, new))
    with pytest.raises(ClusterError) as caught:
        Cluster.load(path)
    return str(caught.value).replace(str(path), "lab.yaml")


# ---------------------------------------------------------------- shorthand


@pytest.mark.parametrize(
    ("text", "device", "hosts", "per_host"),
    [
        ("8xcpu", "cpu", 1, 8),
        ("h100", "h100", 1, 1),
        ("8xh100", "h100", 1, 8),
        ("h100x8", "h100", 1, 8),
        ("4xh100x8@ib400", "h100", 4, 8),
        (" 4 x H100 x 8 @ IB400 ", "h100", 4, 8),
        ("128xa100x8@hdr200", "a100", 128, 8),
        ("a100-40x8", "a100-40", 1, 8),
        ("a100-80gbx8", "a100", 1, 8),
        ("v100x8", "v100", 1, 8),
        ("h200x8", "h200", 1, 8),
        ("b200x8", "b200", 1, 8),
        ("mi300xx8", "mi300x", 1, 8),
        ("gb200-nvl72", "gb200", 18, 4),
        ("4xgb200-nvl72@ib400", "gb200", 72, 4),
        ("v5e-8", "v5e", 1, 8),
        ("v5e-256", "v5e", 32, 8),
        ("v5p-256", "v5p", 32, 4),  # 256 TensorCores, 128 chips
        ("2xv5p-256@dcn", "v5p", 64, 4),
        ("4xv4-128@dcn", "v4", 64, 4),
        ("v4-384", "v4", 48, 4),
        ("v5p-7680", "v5p", 960, 4),
    ],
)
def test_a_line_stands_for_these_hosts(text, device, hosts, per_host):
    cluster = Cluster.parse(text)
    assert (cluster.device.name, cluster.hosts, cluster.per_host) == (device, hosts, per_host)
    assert cluster.size == hosts * per_host


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("4xh100x8", "`4xh100x8` does not say what joins its 4 hosts.\n  where  cluster shorthand\n"
                     "  try    `4xh100x8@ib400` (InfiniBand, 400 Gb/s per device)"),
        ("2xv5p-256", "does not say what joins its slices.\n  where  cluster shorthand\n  try    `2xv5p-256@dcn`"),
        ("h10x8", "device `h10` of `h10x8` is not known.\n  where  cluster shorthand\n  try    `h100`"),
        ("h100x8@ib4000", "fabric `ib4000` is not known.\n  where  cluster shorthand\n  try    `ib400`"),
        ("16xh100", "one host does not hold 16 h100, at most 8."),
        ("16xh100", "try    `2xh100x8@ib400`"),
        ("0xh100x8", "`0xh100x8` has no devices."),
        ("h100x0", "`h100x0` has no devices."),
        ("v5p-100", "there is no TPU slice `v5p-100`.\n  where  cluster shorthand\n  try    one of v5p-8, v5p-16"),
        ("1xv5p-256@dcn", "is one slice, which `@dcn` joins to nothing.\n  where  cluster shorthand\n"),
        ("v5px8", "`v5px8` does not name a TPU slice."),
        ("gb200-nvl7", "is no GB200 rack.\n  where  cluster shorthand\n  try    `gb200-nvl36` or `gb200-nvl72`"),
        ("???", "`???` describes no cluster."),
        ("", "`` describes no cluster."),
    ],
)  # fmt: skip
def test_a_line_that_is_wrong_is_answered_with_one_that_is_right(text, message):
    with pytest.raises(ClusterError) as caught:
        Cluster.parse(text)
    assert message in str(caught.value)


@pytest.mark.parametrize("name", presets.hardware()["devices"])
def test_every_preset_device_says_where_its_figures_come_from(name):
    facts = presets.device_facts(name)
    assert "[" in facts["source"]
    assert Device.model_validate({"name": name, **facts}).source == facts["source"]


@pytest.mark.parametrize("name", presets.hardware()["fabrics"])
def test_every_preset_fabric_says_where_its_figures_come_from(name):
    assert Tier.model_validate(presets.tier_facts(name, 8)).source


def test_an_adapter_of_the_host_is_shared_by_its_devices():
    assert Cluster.parse("2xh100x8@eth100").fabric[-1].bandwidth == 12.5e9 / 8
    assert Cluster.parse("2xh100x4@eth100").fabric[-1].bandwidth == 12.5e9 / 4
    assert Cluster.parse("2xh100x8@ib400").fabric[-1].bandwidth == 50e9


def test_a_torus_dimension_that_does_not_wrap_has_half_the_bandwidth():
    whole, part = Cluster.parse("v5e-256").fabric[0], Cluster.parse("v5e-64").fabric[0]
    assert (whole.kind, whole.shape, part.kind, part.shape) == ("torus", (16, 16), "mesh", (8, 8))
    assert whole.bandwidth == 2 * part.bandwidth == 2 * parse_bandwidth("45 GB/s")


# ---------------------------------------------------------------- files


def test_a_file_is_read_in_base_units(lab):
    cluster = Cluster.load(lab)
    near, leaf, spine = cluster.fabric
    assert (cluster.size, cluster.hosts, cluster.per_host) == (256, 32, 8)
    assert cluster.memory_per_device == 76 * 2**30
    assert cluster.device.peak_flops == {"bf16": 989e12, "f8e4m3fn": 1979e12, "f8e5m2": 1979e12}
    assert (near.latency, leaf.bandwidth, spine.effective_bandwidth) == (2e-6, 50e9, 25e9)
    assert cluster.groups[0].names is not None
    assert cluster.groups[0].names[::31] == ("gpu00", "gpu31")


def test_a_preset_fills_in_what_a_file_leaves_out(tmp_path):
    path = tmp_path / "short.yaml"
    path.write_text(
        "devices: {big: {preset: h100, memory: 96 GB}}\n"
        "groups: [{device: big, hosts: 2, per_host: 8}]\n"
        "fabric: [{preset: nvlink4}, {tier: net, preset: ib400, latency: 9 us}]\n"
    )
    cluster = Cluster.load(path)
    assert (cluster.device.memory, cluster.device.peak_flops["bf16"]) == (96e9, 989e12)
    assert [(t.name, t.bandwidth, t.latency) for t in cluster.fabric] == [
        ("nvlink4", 450e9, 1.9e-6),
        ("net", 50e9, 9e-6),
    ]
    origin = cluster.provenance
    assert (origin["devices.big.memory"], origin["devices.big.peak_flops.bf16"]) == (
        "declared",
        "preset",
    )
    assert (origin["fabric.net.latency"], origin["fabric.net.bandwidth"]) == ("declared", "preset")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        # unknown, missing and repeated keys
        ("kind: cuda", "knd: cuda", "`knd` is not a field of a device.\n  where  `devices.h100.knd`, line 5\n"
                                    "  from   cluster spec lab.yaml\n  try    `kind`"),
        ("name: lab", "nam: lab", "`nam` is not a field of a cluster.\n  where  `nam`, line 2"),
        ("rails: 8", "rail: 8", "`rail` is not a field of a tier.\n  where  `fabric.leaf.rail`, line 14"),
        ("    memory: 80 GiB\n", "", "`memory` is missing.\n  where  `devices.h100`, line 4\n"
                                     "  from   cluster spec lab.yaml\n  try    add `memory: 80 GiB`"),
        ("name: lab", "name: lab\nname: lob", "`name` is given twice, on lines 2 and 3."),
        ("tier: spine", "tier: leaf", "two tiers are called `leaf`."),
        # counts
        ("per_host: 8", "per_host: 0", "`per_host` is `0`; it should be greater than 0.\n  where  `groups.0.per_host`"),
        ("per_host: 8", "per_host: -8", "`per_host` is `-8`"),
        ("per_host: 8", "per_host: eight", "`per_host` is `eight`; it should be a valid integer"),
        ('"gpu[00-31]"', '"gpu[31-00]"', "`gpu[31-00]` is not a pattern of hosts."),
        ('"gpu[00-31]"', '"gpu[1-2,2]"', "host `gpu2` is named twice"),
        ('"gpu[00-31]"', "gpu[00-31]", 'try    quotes around a pattern of hosts: `"gpu[00-31]"`'),
        ("device: h100", "device: h10", "device `h10` is not declared.\n  where  `groups.0.device`, line 11\n"
                                        "  from   cluster spec lab.yaml\n  try    `h100`"),
        # units
        ("80 GiB", "80", "`80` has no unit.\n  where  `devices.h100.memory`, line 6"),
        ("80 GiB", "80 GB/s", "`80 GB/s` is a bandwidth, not a size in bytes."),
        ("80 GiB", "-80 GiB", "`-80 GiB` must be more than zero."),
        ("450 GB/s", "0 GB/s", "`0 GB/s` must be more than zero.\n  where  `fabric.nvlink.bandwidth`, line 13"),
        ("450 GB/s", "450 GB", "`450 GB` is a size in bytes, not a bandwidth."),
        ("2.49 USD", "cheap", "`cheap` is no price."),
        # figures that vendors quote and that are not what they seem
        ("bf16: 989 TFLOP/s", "bf16: 1979 TFLOP/s", "1979 TFLOP/s in bf16 is the figure with 2:4 sparsity.\n"
                                                    "  where  `devices.h100.peak_flops.bf16`, line 8\n"
                                                    "  from   cluster spec lab.yaml\n"
                                                    "  try    989 TFLOP/s is the dense figure"),
        ("fp8: 1979 TFLOP/s", "fp8: 3958 TFLOP/s", "try    1979 TFLOP/s is the dense figure"),
        ("bandwidth: 450 GB/s", "bandwidth: 900 GB/s", "900 GB/s counts both directions of h100's links.\n"
                                                       "  where  `fabric.nvlink.bandwidth`, line 13\n"
                                                       "  from   cluster spec lab.yaml\n"
                                                       "  try    per direction it is 450 GB/s"),
        ("{bf16: 989 TFLOP/s, fp8: 1979 TFLOP/s}", "989 TFLOP/s", "`989 TFLOP/s` has no dtype.\n"
                                                                  "  where  `devices.h100.peak_flops`, line 8\n"
                                                                  "  from   cluster spec lab.yaml\n"
                                                                  "  try    `peak_flops: {bf16: 989 TFLOP/s}`"),
        ("bf16: 989", "bf15: 989", "`bf15` is not a dtype."),
        # what does not fit together
        ("reserve: 4 GiB", "reserve: 80 GiB", "a reserve of 80 GiB leaves nothing of 80 GiB of memory.\n"
                                              "  where  `devices.h100.reserve`, line 7"),
        ("bandwidth: 50 GB/s, oversubscription: 2", "bandwidth: 60 GB/s",
         "`spine` (60 GB/s) is faster than `leaf` (50 GB/s), which is closer."),
        ("scope: all", "scope: host", "`spine` joins no more hosts than `leaf` before it."),
        ("scope: all", "scope: {hosts: 8}", "no tier connects all 256 devices on 32 hosts; `spine` reaches 8."),
        ("scope: all", "scope: rack", "`rack` is not the scope of a tier.\n  where  `fabric.spine.scope`, line 15"),
        ("scope: all", "scope: all, shape: 4x4", "shape 4x4 has 16 devices, tier `spine` joins 256."),
        # the rest
        ("kind: cuda", "kind: cudda", "`cudda` is not a kind that we know.\n  where  `devices.h100.kind`, line 5\n"
                                      "  from   cluster spec lab.yaml\n  try    `cuda`"),
        ("cluster/v1", "cluster/v9", "`meshwright/cluster/v9` is not a schema that we know."),
        ("kind: cuda", "kind: [cuda", "is not YAML: "),
        ("kind: cuda", "preset: h1000", "device `h1000` is not known.\n  where  `devices.h100.preset`, line 5"),
        (LAB, "- a\n- b\n", "`lab.yaml` holds no cluster"),
        (LAB, "", "`lab.yaml` holds no cluster"),
        ("price:", "provenance: {fabric.spin.latency: measured}\nprice:", "has no field `fabric.spin.latency`"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_file_names_its_line_and_the_remedy(lab, old, new, message):
    assert message in refused(lab, old, new)


@pytest.mark.parametrize(
    ("dtype", "sparse", "dense"),
    [("bf16", "624 TFLOP/s", "312 TFLOP/s"), ("fp8", "3958 TFLOP/s", "1979 TFLOP/s")],
)
def test_a_sparse_figure_is_known_whatever_the_device_is_called(dtype, sparse, dense):
    with pytest.raises(ClusterError, match=f"{dense} is the dense figure"):
        Cluster.parse(one_device(peak_flops={dtype: sparse}))


def test_a_figure_that_is_dense_on_one_device_is_no_mistake_on_another():
    assert Cluster.parse(one_device(peak_flops={"int8": "624 TOP/s"})).device.peak_flops == {
        "s8": 624e12
    }


def test_only_the_first_of_several_mistakes_is_told_and_the_others_counted(lab):
    message = refused(lab, "    memory: 80 GiB\n    reserve: 4 GiB\n", "    reserve: 4\n")
    assert message.endswith("; 1 more after this")


def test_a_file_that_is_missing_is_answered_with_its_neighbour(lab):
    with pytest.raises(ClusterError, match="there is no file") as caught:
        Cluster.parse(str(lab.with_name("lap.yaml")))
    assert "try    `lab.yaml`" in str(caught.value)


def one_device(**fields: Any) -> dict[str, Any]:
    device = {"kind": "cuda", "memory": "10 GiB", "memory_bandwidth": "1 TB/s"}
    device["peak_flops"] = {"bf16": "100 TFLOP/s"}  # type: ignore[assignment]
    return {
        "devices": {"mine": device | fields},
        "groups": [{"device": "mine", "hosts": 1, "per_host": 1}],
    }


# ---------------------------------------------------------------- questions


@pytest.mark.parametrize(
    ("span", "tier"),
    [(1, "nvlink"), (4, "nvlink"), (8, "nvlink"), (16, "leaf"), (32, "leaf"), (64, "spine"), (256, "spine"),
     (6, "spine"), (24, "spine")],  # some block of 6 lies on two leaves: ranks 30 to 35
)  # fmt: skip
def test_consecutive_ranks_talk_over_the_closest_tier_that_joins_every_block(lab, span, tier):
    assert Cluster.load(lab).tier_for(span).name == tier


@pytest.mark.parametrize("span", [0, 9])
def test_a_group_larger_than_the_cluster_is_refused(span):
    with pytest.raises(UsageError, match=f"a group of {span} devices"):
        Cluster.parse("h100x8").tier_for(span)


def test_an_nvlink_rack_joins_hosts():
    cluster = Cluster.parse("4xgb200-nvl72@ib400")
    assert [cluster.tier_for(n).name for n in (4, 8, 72, 144)] == [
        "nvlink5",
        "nvlink5",
        "nvlink5",
        "ib400",
    ]


def test_a_single_device_needs_no_fabric():
    assert Cluster.parse(one_device()).tier_for(1).bandwidth == 1e12


def test_unlike_devices_have_no_common_answer():
    data = yaml.safe_load(Cluster.parse("2xh100x8@ib400").to_yaml())
    del data["provenance"]
    data["devices"]["a100"] = {"preset": "a100"}
    data["groups"].append({"device": "a100", "hosts": 1, "per_host": 4})
    cluster = Cluster.parse(data)
    assert (cluster.size, cluster.hosts, cluster.tier_for(4).name) == (20, 3, "nvlink4")
    with pytest.raises(
        ClusterError, match=r"needs equal devices; .* has 2 hosts of 8 h100 and 1 host of 4 a100"
    ):
        _ = cluster.device
    with pytest.raises(ClusterError, match="needs as many devices on each host"):
        _ = cluster.per_host


def test_a_what_if_changes_one_figure_and_says_so():
    before = Cluster.parse("4xh100x8@ib400")
    after = before.with_("fabric.ib400.bandwidth", "40GB/s")
    assert after.fabric[-1].bandwidth == 40e9
    assert changes(before, after) == {"fabric.ib400.bandwidth": "declared"}
    assert after.fingerprint() != before.fingerprint()


@pytest.mark.parametrize(
    ("path", "value", "seen"),
    [
        ("hosts", 64, lambda c: c.size == 512),
        ("per_host", "4", lambda c: c.per_host == 4),
        ("device.memory", "96 GiB", lambda c: c.device.memory == 96 * 2**30),
        ("device.peak_flops.fp8", "1 PFLOP/s", lambda c: c.device.peak_flops["f8e5m2"] == 1e15),
        ("groups.0.host_memory", 1e12, lambda c: c.groups[0].host_memory == 1e12),
        ("price.per_device_hour", "3 EUR", lambda c: c.price.currency == "EUR"),
    ],
)
def test_short_paths_reach_the_only_device_and_group(path, value, seen):
    assert seen(Cluster.parse("4xh100x8@ib400").with_(path, value))


def test_a_measured_figure_is_marked_as_measured():
    cluster = Cluster.parse("8xcpu").with_("device.memory_bandwidth", 5.5e9, "measured")
    assert cluster.provenance["devices.cpu.memory_bandwidth"] == "measured"


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("fabric.ib400.bandwith", "1 GB/s", "has no field `fabric.ib400.bandwith`.\n  try    `fabric.ib400.bandwidth`"),
        ("fabric.ib400.bandwidth", "900 GB/s", "`ib400` (900 GB/s) is faster than `nvlink4`"),
        ("hosts", 0, "`hosts` is `0`; it should be greater than 0."),
        ("device.memory", "80 GB/s", "from   override `device.memory=80 GB/s`\n  try    write `80 GB`"),
    ],
)  # fmt: skip
def test_a_what_if_is_checked_like_a_file(path, value, message):
    with pytest.raises(ClusterError) as caught:
        Cluster.parse("4xh100x8@ib400").with_(path, value)
    assert message in str(caught.value)


def test_the_fingerprint_forgets_names_and_prices_and_nothing_else(lab):
    cluster = Cluster.load(lab)
    lab.write_text(
        LAB.replace("name: lab", "name: other").replace("2.49", "9").replace("gpu[", "n[")
    )
    assert Cluster.load(lab).fingerprint() == cluster.fingerprint()
    assert cluster.with_("fabric.leaf.rails", 4).fingerprint() != cluster.fingerprint()


def test_a_description_marks_what_is_not_preset():
    cluster = Cluster.parse("2xa100x8@hdr200").with_("fabric.hdr200.latency", "9 us")
    assert cluster.describe() == (
        "2xa100x8@hdr200: 16 devices on 2 hosts\n"
        "  2 × 8 a100 (declared)\n"
        "    memory 80 GiB, of which 2 GiB in reserve, at 2 TB/s\n"
        "    peak bf16 312 TFLOP/s, f16 312 TFLOP/s, s8 624 TFLOP/s, tf32 156 TFLOP/s, f32 19.5 TFLOP/s;"
        " 84% of it in large products\n"
        "  nvlink3 (switch, in a host): 300 GB/s per device each way, 1.9 us\n"
        "  hdr200 (switch, all hosts): 25 GB/s per device each way, 9 us (declared)"
    )


def changes(before: Cluster, after: Cluster) -> dict[str, str]:
    return {p: o for p, o in after.provenance.items() if before.provenance.get(p) != o}


# ---------------------------------------------------------------- there and back

amounts = st.floats(min_value=1e-3, max_value=1e18)


@st.composite
def clusters(draw: st.DrawFn) -> Cluster:
    slow, fast = sorted([draw(amounts), draw(amounts)])
    memory = draw(amounts)
    device = Device(
        name="mine",
        kind=draw(st.sampled_from(["tpu", "cpu"])),
        memory=memory,
        reserve=memory * draw(st.floats(0, 0.99)),
        peak_flops={"bf16": draw(amounts), "f32": draw(amounts)},
        memory_bandwidth=draw(amounts),
        launch=draw(st.floats(0, 1)),
    )
    hosts = draw(st.integers(1, 300))
    tiers = [
        Tier(tier="near", scope="host", bandwidth=fast),
        Tier(tier="far", scope="all", bandwidth=slow, latency=draw(st.floats(0, 1))),
    ]
    group = Group(device="mine", hosts=hosts, per_host=draw(st.integers(1, 16)))
    return Cluster(devices={"mine": device}, groups=(group,), fabric=tuple(tiers))


@given(clusters())
def test_a_cluster_survives_its_file(cluster):
    assert Cluster.parse(yaml.safe_load(cluster.to_yaml())) == cluster


@given(clusters())
def test_a_cluster_survives_json(cluster):
    again = Cluster.model_validate_json(cluster.model_dump_json())
    assert (again, hash(again), again.fingerprint()) == (
        cluster,
        hash(cluster),
        cluster.fingerprint(),
    )


@pytest.mark.parametrize("text", ["4xh100x8@ib400", "gb200-nvl72", "2xv5p-256@dcn", "8xcpu"])
def test_a_preset_survives_a_file(text, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(Cluster.parse(text).to_yaml())
    assert Cluster.load(path) == Cluster.parse(str(path)) == Cluster.parse(text)


def test_a_loaded_file_survives_its_own_yaml(lab, tmp_path):
    path = tmp_path / "again.yaml"
    path.write_text(Cluster.load(lab).to_yaml())
    assert Cluster.load(path) == Cluster.load(lab)


def test_the_schema_knows_every_key_of_the_file():
    schema = Cluster.model_json_schema()
    assert set(yaml.safe_load(LAB)) <= set(schema["properties"])
    assert schema["additionalProperties"] is False
    assert "tier" in schema["$defs"]["Tier"]["properties"]
    assert json.dumps(schema)


@pytest.mark.parametrize("index", [0, 1])
def test_the_files_in_the_docs_can_be_loaded(index, tmp_path):
    page = Path(__file__).parents[1] / "docs" / "cluster.md"
    path = tmp_path / "docs.yaml"
    path.write_text(page.read_text().split("```yaml\n")[index + 1].split("```")[0])
    assert Cluster.load(path).size == 256


@pytest.mark.parametrize("model", [Cluster, Device, Group, Tier, DevicePrice])
def test_the_docs_name_every_field(model):
    page = (Path(__file__).parents[1] / "docs" / "cluster.md").read_text()
    fields = {f.alias or name for name, f in model.model_fields.items()} - {"currency", "name"}
    assert [name for name in sorted(fields) if f"`{name}`" not in page] == []


# ---------------------------------------------------------------- this process


def test_local_devices_share_the_machine():
    jax = pytest.importorskip("jax")
    cluster = Cluster.local()
    assert (cluster.size, cluster.device.kind) == (jax.device_count(), "cpu")
    assert cluster.provenance["groups.0.per_host"] == "detected"
    assert cluster.provenance["devices.cpu.memory"] == "detected"
    assert cluster.provenance["devices.cpu.memory_bandwidth"] == "preset"
    assert cluster.device.memory * cluster.size <= presets._machine_memory()
    assert Cluster.parse("local") == cluster


class Gpu:
    platform, device_kind, process_index = "gpu", "NVIDIA H100 80GB HBM3", 0

    def memory_stats(self) -> dict[str, int]:
        return {"bytes_limit": 60 * 2**30}


def test_a_local_gpu_has_the_memory_that_xla_may_use(monkeypatch):
    devices(monkeypatch, [Gpu()] * 4)
    cluster = Cluster.local()
    assert (cluster.device.name, cluster.size, cluster.memory_per_device) == ("h100", 4, 60 * 2**30)


@pytest.mark.parametrize("kind", ["NVIDIA H100 PCIe", "NVIDIA GeForce 9999"])
def test_a_local_gpu_without_preset_is_not_guessed(monkeypatch, kind):
    other = Gpu()
    other.device_kind = kind
    devices(monkeypatch, [other])
    with pytest.raises(ClusterError, match=f"no preset describes this process's `{kind}`"):
        Cluster.local()


def test_what_joins_local_hosts_is_not_guessed(monkeypatch):
    far = Gpu()
    far.process_index = 1
    devices(monkeypatch, [Gpu(), far])
    with pytest.raises(ClusterError, match="sees 2 hosts; what joins them cannot be detected"):
        Cluster.local()
    assert Cluster.local(fabric="ib400").hosts == 2


def devices(monkeypatch: pytest.MonkeyPatch, found: list[Gpu]) -> None:
    monkeypatch.setattr("jax.devices", lambda: found)


def test_a_cluster_is_described_without_jax():
    package = Path(presets.__file__).parents[2]  # past the front door, which may import jax
    script = (
        "import sys, types; front = types.ModuleType('meshwright');"
        f"front.__path__ = [{str(package)!r}]; sys.modules['meshwright'] = front;"
        "from meshwright.ir.cluster.cluster import Cluster; Cluster.parse('h100x8');"
        "sys.exit('jax' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0
