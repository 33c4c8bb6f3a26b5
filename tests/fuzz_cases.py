"""Hostile inputs for the command line: valid files of every kind, broken by structure and by bytes, and odd options.

A case is made of its seed and number alone, so that any one can be made again.
"""

from __future__ import annotations

import copy
import gzip
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import yaml

VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2, 3, 7, 10**6, 2**63, -(2**63), 10**400, 0.5, -0.5, 1e308, 1e-308,
    float("nan"), float("inf"),
    -float("inf"), "", "x", "²", "٣", "-1", "1e9", "9" * 400, "80 GiB", "-5 GB/s", "1e999 s", "x" * 300,
    "y" * 5000, "a\nb", "\0", "\ud800",
    "../../etc", "/dev/zero", "%s%n", "{0}", [], {}, [[]], [1, 2], ["x", "x"], {"a": 1}, {"": None}, "nan",
    "inf", "x=1",
]  # fmt: skip
WORDS = [
    "", "0", "-1", "1", "2", "3", "16", "99999999999999999999", "9" * 400, "1.5", "nan", "inf", "-inf", "1e400",
    "²", "٣", "x", "none",
    "auto", "2x4", "8x1", "0x8", "x8", "8xcpu", "0xcpu", "9999999xh100x8@ib400", "4xh100x8", "8xcpu@ib400",
    "/dev/null",
    "/dev/zero", "/dev/full", "no/such/folder/file", ".", "..", "x" * 300, "a\nb", "\udcff", "é", "--", "-",
    "full", "json", "text",
    "1,2", "1,,2", "5ms", "-5ms", "60GiB", "60 GB/s", "0GiB", "1e999GiB", "fabric.x.bandwidth=1GB/s", "=", "a=",
    "=b", "hosts=0",
    "hosts=" + "9" * 400, "device.memory=nan", "device.efficiency=nan", "device.memory=1 B", "per_host=²",
    "gpt-tiny", "gpt5",
    "train.py:make", "train.py:", ":make", "nothing.py:make", "1f1b", "zb-h1", "gpipe", "search", "mcmc",
    "slurm", "pp=2", "mesh=²",
]  # fmt: skip
BYTES = [
    b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"[" * 600, b"{" * 600, b'{"a":' * 600, b"9" * 5000, b"1e999", b"NaN",
    b"-", b"\n", b"\x1f\x8b",
    b'"', b"'", b",", b":", b"&a ", b"*a ", b"!!python/none ", b"<<: ", b"\xed\xa0\x80", "²".encode(), b"(",
    b"0F0", b"%", b"\r", b"\t",
]  # fmt: skip

CELLS = [
    "",
    "0F0",
    "9F9",
    "0B99999999",
    "²F1",
    "(0F0;1B0)OVERLAP_F_B",
    "x",
    "-1F0",
    "0W0",
    "0I0",
    "9" * 300,
    '"',
]

TRAIN = '''"""A step, as users write it."""
import jax
import jax.numpy as jnp


def step(params, batch):
    def loss(p):
        return jnp.mean((jnp.tanh(batch @ p["a"]) @ p["b"]) ** 2)

    value, grad = jax.value_and_grad(loss)(params)
    return jax.tree.map(lambda p, g: p - 0.1 * g, params, grad), {"loss": value}


def make():
    params = {"a": jnp.ones((8, 16)), "b": jnp.ones((16, 8))}
    return step, params, jax.ShapeDtypeStruct((4, 8), jnp.float32)
'''
LINES = [
    "raise SystemExit(0)", "raise KeyError('x')", "import sys; sys.exit(1)", "import nothing",
    "def make(: pass", "1/0",
    "make = 3", "make = None", "class B(BaseException): pass\nraise B('x')", "print('noise')", "def make(x): pass",
    "def make(): return 7", "def make(): return ()", "def make(): return (step,)", "def make(): raise SystemExit(3)",
    "def make(): return make()", "def make(): return step, {}, {}", "def make(): return step, None, None", "\0",
    "def make(): return step, 'x', 3", "def step(a, b): raise SystemExit(0)", "def step(a, b): return a", "\tx",
    "def step(a, b): return b, {'loss': 1.0}", "def step(a, b): return step(a, b)", "def step(a): return a, 1",
    "def make(): return step, jnp.ones((0, 8)), jnp.ones((4, 0))", "import os; os.close(1)", "(" * 300,
    "x = '" + "a" * 10000,
    "def make(): return (lambda a, b: (a, {'loss': a['a'].sum()})), {'a': jnp.ones((3, 5))}, jnp.ones((7,))",
]  # fmt: skip
GRAPH = {
    "problem": {
        "name": "small",
        "nodes": {"intervals": [[0, 3], [1, 4], [2, 5]], "costs": [[1, 4], [2, 1, 9], [3, 3]], "usages": [[5,
        1], [4, 2, 0], [3, 3]]},
        "edges": {"nodes": [[0, 1], [1, 2]], "costs": [[0, 3, 1, 5, 0, 2], [1, 0, 4, 4, 0, 1]]},
        "usage_limit": 8,
    }
}  # fmt: skip
CLUSTER = """schema: meshwright/cluster/v1
name: lab
devices:
  h100: {preset: h100, reserve: 6 GiB}
  own: {kind: cuda, memory: 40 GiB, peak_flops: {bf16: 312 TFLOP/s, f32: 19.5 TFLOP/s}, memory_bandwidth: 1555 GB/s}
groups:
  - {device: h100, hosts: "gpu[00-03]", per_host: 8, host_memory: 2 TiB, host_link: 55 GB/s}
  - {device: own, hosts: 2, per_host: 8}
fabric:
  - {preset: nvlink4}
  - {tier: rail, scope: {hosts: 2}, kind: switch, bandwidth: 50 GB/s, latency: 4 us}
  - {tier: spine, scope: all, kind: switch, bandwidth: 400 Gb/s, latency: 8 us, oversubscription: 2}
price: {per_device_hour: 2.49 USD}
"""


@dataclass(frozen=True)
class Case:
    """A command line, run in a folder of its own in which `files` lie; `kind` is what was broken."""

    kind: str
    words: tuple[str, ...]
    files: dict[str, bytes]
    special: str = ""  # "name=fifo": what lies there in place of a file


# ---------------------------------------------------------------- valid files


def make_valid(folder: Path) -> None:
    """One valid file of each kind."""
    from meshwright.api import plan_captured
    from meshwright.emulation import trace_on_cpu
    from meshwright.ir.cluster.cluster import Cluster
    from meshwright.ir.codec import save_plan, sealed
    from meshwright.ir.pipeline.torch_csv import to_torch_csv
    from meshwright.ir.profile import Profile
    from meshwright.planner.pipeline.schedules import schedule_named
    from meshwright.planner.request import Request
    from meshwright.recipe import make

    trace_on_cpu()
    folder.mkdir(parents=True, exist_ok=True)
    recipe = {"model": "gpt-tiny", "layers": 2}
    made, where = make(recipe), Cluster.parse("4xcpu")
    kept: list[Any] = []
    flat = Request(mesh=(4,), microbatches=1, recompute="none", time_limit=30)
    pipe = Request(
        pp=2, microbatches=4, recompute="none", schedule="1f1b", program="stages", time_limit=30
    )
    for name, request in (("flat.json", flat), ("pipe.json", pipe)):
        found = plan_captured(
            made.capture(request.pp != 1), where, request, made.name, keep=kept.append
        )
        save_plan(found.model_copy(update={"recipe": recipe}), folder / name)
    (folder / "frontier.json").write_text(sealed(kept[-1].model_copy(update={"recipe": recipe})))
    profile = Profile(
        device="h100",
        described="NVIDIA H100",
        count=8,
        made_with="a test",
        peak_flops={"bf16": 7e14, "f32": 4e13},
        memory_bandwidth=3e12,
        elementwise_flops=2e13,
        launch=3e-6,
        fits=(),
        products=(),
        copies=(),
        collectives=(),
        lines=({"kind": "all_reduce", "size": 8, "stride": 1, "fixed": 1e-5, "slope": 1e-11},),
    )  # type: ignore[arg-type]
    (folder / "profile.json").write_text(profile.dump())
    (folder / "graph.json").write_text(json.dumps(GRAPH))
    (folder / "schedule.csv").write_text(to_torch_csv(schedule_named("zb-h1", 3, 5, None)))
    (folder / "cluster.yaml").write_text(CLUSTER)
    (folder / "train.py").write_text(TRAIN)


# ---------------------------------------------------------------- breaking them


def broken_bytes(data: bytes, rng: Random) -> bytes:
    for _ in range(rng.randint(1, 3)):
        at, end = sorted(rng.randrange(len(data) + 1) for _ in range(2))
        match rng.randrange(6):
            case 0:
                data = data[:at] + rng.choice(BYTES) + data[at:]
            case 1:
                data = data[:at] + data[min(end, at + 200) :]
            case 2:
                data = data[:at]
            case 3:
                data = (
                    data[:at]
                    + bytes(rng.randrange(256) for _ in range(rng.randint(1, 9)))
                    + data[at + 1 :]
                )
            case 4:
                data = data[:end] + data[at:end][:2000] + data[end:]
            case _:
                data = gzip.compress(data) if rng.random() < 0.1 else data.swapcase()
    return data


def places(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    items = (
        data.items()
        if isinstance(data, dict)
        else enumerate(data)
        if isinstance(data, list)
        else ()
    )
    for key, value in items:
        yield from places(value, (*path, key))


def _at(data: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        data = data[key]
    return data


def broken_data(data: Any, rng: Random) -> Any:
    """Some values changed, removed, renamed or exchanged; equal depths are as likely as each other."""
    data = copy.deepcopy(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        paths = [path for path in places(data) if path]
        if not paths:
            return data
        by_name: dict[Any, list[tuple[Any, ...]]] = {}
        for path in paths:  # a table of a thousand rows is one name among others
            by_name.setdefault(tuple(k if isinstance(k, str) else 0 for k in path)[:3], []).append(
                path
            )
        path = rng.choice(rng.choice([*by_name.values()]))
        holder, key = _at(data, path[:-1]), path[-1]
        match rng.randrange(8):
            case 0 if isinstance(holder, dict):
                del holder[key]
            case 1 if isinstance(holder, dict):
                holder[rng.choice(("x", "", f"{key}s", "²"))] = holder.pop(key)
            case 2 if isinstance(holder, list):
                holder.insert(key, copy.deepcopy(holder[key]))
            case 3 if isinstance(holder, list):
                del holder[key]
            case 4:
                holder[key] = copy.deepcopy(_at(data, rng.choice(paths)))
            case 5 if isinstance(holder[key], int | float) and not isinstance(holder[key], bool):
                holder[key] = rng.choice((-1, 2, 0, 10**6, 1e30)) * holder[key] + rng.choice(
                    (0, 1, -1)
                )
            case 6:
                nested: Any = 0
                for _ in range(rng.choice((3, 30, 300))):
                    nested = [nested]
                holder[key] = nested
            case _:
                holder[key] = copy.deepcopy(rng.choice(VALUES))
    return data


def resealed(data: Any) -> str:
    """With the checksum that its content asks for, as far as there is one."""
    if isinstance(data, dict):
        fields = {k: v for k, v in data.items() if k != "checksum"}
        digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
        data = {**fields, "checksum": digest}
    return json.dumps(data)


def broken_json(data: bytes, rng: Random) -> bytes:
    broken = broken_data(json.loads(data), rng)
    text = resealed(broken) if rng.random() < 0.85 else json.dumps(broken)
    return text.encode("utf-8", "surrogatepass")


def broken_yaml(data: bytes, rng: Random) -> bytes:
    broken = broken_data(yaml.safe_load(data), rng)
    return yaml.safe_dump(broken, sort_keys=False, allow_unicode=False).encode()


def broken_code(data: bytes, rng: Random) -> bytes:
    lines = data.decode().split("\n")
    lines.insert(rng.choice((0, 2, len(lines))), rng.choice(LINES))
    return "\n".join(lines).encode()


def broken_cells(data: bytes, rng: Random) -> bytes:
    rows = [row.split(",") for row in data.decode().split("\n") if row]
    for _ in range(rng.randint(1, 3)):
        row = rng.choice(rows)
        at = rng.randrange(len(row))
        row[at] = rng.choice(CELLS) if rng.random() < 0.6 else rng.choice(rng.choice(rows))
    return "\n".join(",".join(row) for row in rows).encode()


Breaker = Callable[[bytes, Random], bytes]
Commands = Callable[[str, Random], tuple[str, ...]]


def _plan_command(name: str, rng: Random) -> tuple[str, ...]:
    return rng.choice((
        ("show", name), ("show", name, "--format", "json"), ("show", name, "--html", "p.html", "--all"),
        ("simulate", name), ("simulate", name, "--trace", "t.json", "--format", "json"), ("launch", name,
        "--with", "slurm"),
        ("simulate", name, "--set", rng.choice(WORDS)), ("launch", name, "--with", "torchrun", "--per-host", "2"),
    ))  # fmt: skip


KINDS: dict[str, tuple[str, Breaker, Commands]] = {
    "plan": ("flat.json", broken_json, _plan_command),
    "pipeline": ("pipe.json", broken_json, _plan_command),
    "cluster": ("cluster.yaml", broken_yaml, lambda name, rng: ("clusters", name, *_format(rng))),
    "profile": ("profile.json", broken_json, lambda name, rng: ("clusters", "with.yaml", *_format(rng))),
    "frontier": (
        "frontier.json", broken_json,
        lambda name, rng: ("replan", name, "--cluster", rng.choice(("4xcpu", "2xcpu", "8xcpu")), "-o", "new.json"),
    ),
    "graph": ("graph.json", broken_json, lambda name, rng: ("solve", name, "--time-limit", "1", *_format(rng))),
    "schedule": ("schedule.csv", broken_cells, lambda name, rng: ("schedule", name, *_format(rng))),
    "train": (
        "train.py", broken_code,
        lambda name, rng: ("plan", "--model", f"{name}:make", "--cluster", "2xcpu", "--time-limit", "2", "-o",
        "p.json",
                           *_format(rng)),
    ),
}  # fmt: skip
WITH = "devices: {h100: {preset: h100}}\ngroups: [{device: h100, hosts: 1, per_host: 8}]\n"
WITH += "fabric: [{preset: nvlink4}]\nprofile: profile.json\n"
SPECIAL = ("fifo", "folder", "ring", "zero", "missing", "hole", "unreadable")


def _format(rng: Random) -> tuple[str, ...]:
    return ("--format", "json") if rng.random() < 0.4 else ()


def file_case(valid: Path, kind: str, rng: Random) -> Case:
    name, breaker, commands = KINDS[kind]
    data = (valid / name).read_bytes()
    words = commands(name, rng)
    more = {"with.yaml": WITH.encode()} if kind == "profile" else {}
    if rng.random() < 0.05:
        return Case(kind, words, more, f"{name}={rng.choice(SPECIAL)}")
    broken = broken_bytes(data, rng) if rng.random() < 0.3 else breaker(data, rng)
    return Case(kind, words, {name: broken, **more})


# ---------------------------------------------------------------- command lines

SAFE: dict[str, tuple[str, ...]] = {
    "plan": ("--model", "gpt-tiny", "--cluster", "4xcpu", "--layers", "1", "--mesh", "4", "--microbatches", "1",
    "--time-limit", "1"),
    "replan": ("frontier.json", "--cluster", "4xcpu"), "show": ("flat.json",), "run": ("absent.json",),
    "audit": ("absent.json",), "solve": ("graph.json", "--time-limit", "1"), "models": (), "clusters": ("8xcpu",),
    "demo": ("--data", "absent.txt"), "simulate": ("pipe.json",), "calibrate": ("-o", "no/such/folder/p.json"),
    "price": ("--cluster", "8xh100x8@ib400", "--global-batch", "64", "--layers", "2", "--hidden", "64",
    "--heads", "4"),
    "schedule": ("1f1b", "--stages", "3", "--microbatches", "4"), "launch": ("flat.json", "--with", "slurm"),
}  # fmt: skip
LASTING = {
    "--devices",
    "--steps",
    "--measure",
    "--layers",
    "--time-limit",
    "--large",
}  # may well take long, rightly so


def command_case(valid: Path, rng: Random) -> Case:
    """A command that would end soon, with one to three options more, of odd values, or with words dropped."""
    name = rng.choice([*SAFE])
    words = [*SAFE[name]]
    options = options_of(name)
    for _ in range(rng.randint(1, 3)):
        option, flag = rng.choice(options)
        value = rng.choice(WORDS)
        if option in LASTING and not value.startswith("-"):
            value = rng.choice(("0", "-1", "x", "²", "nan"))
        if option in words and rng.random() < 0.7:
            at = words.index(option)
            words[at + 1 : at + 2] = [value]
        else:
            words += [option] if flag else [option, value]
    if rng.random() < 0.1 and words:
        del words[rng.randrange(len(words))]
    if rng.random() < 0.1:
        words.insert(rng.randrange(len(words) + 1), rng.choice(WORDS))
    if name == "calibrate":
        words += SAFE[name]  # or it would measure this machine, rightly so
    names = ("flat.json", "pipe.json", "frontier.json", "graph.json", "train.py")
    files = {each: (valid / each).read_bytes() for each in names}
    return Case(f"words: {name}", (name, *words), files)


def options_of(name: str) -> list[tuple[str, bool]]:
    """The options of a command, and whether each is a flag."""
    import typer

    from meshwright.cli import app

    command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    found = [
        (o, bool(getattr(p, "is_flag", False)))
        for p in command.params
        for o in p.opts
        if o.startswith("--")
    ]
    return [*found, ("--nothing", False)]


def cases(valid: Path, count: int, seed: int) -> Iterator[tuple[int, Case]]:
    kinds = [*KINDS]
    for number in range(count):
        rng = Random(f"{seed}/{number}")
        yield (
            number,
            command_case(valid, rng)
            if number % 3 == 2
            else file_case(valid, rng.choice(kinds), rng),
        )


def lay_out(case: Case, folder: Path) -> None:
    """The case's files in an empty folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, data in case.files.items():
        (folder / name).write_bytes(data)
    name, _, what = case.special.partition("=")
    path = folder / name
    match what:
        case "fifo":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case "ring":
            path.symlink_to(path)
        case "zero":
            path.symlink_to("/dev/zero")
        case "hole":
            with path.open("wb") as file:
                file.truncate(20 * 2**30)
        case "unreadable":
            path.write_bytes(b"")
            path.chmod(0)
