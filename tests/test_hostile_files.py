"""Files that are not what they should be are refused by name, in bounded time; a user's own end as the user's."""

from __future__ import annotations

import gzip
import json
import os
import time

import pytest

from meshwright.graph_file import graph_of
from meshwright.ir.cluster.cluster import Cluster
from meshwright.ir.codec import check_writable, load_plan, write_whole
from meshwright.ir.errors import ClusterError, MeshwrightError, PlanError, UsageError
from meshwright.ir.files import MIB, FileKind, is_file, read_bytes, read_object, unpacked
from meshwright.ir.profile import load_profile
from meshwright.planner.search.frontier import load_frontier
from meshwright.planner.solver import iopddl
from meshwright.recipe import make
from meshwright.scheduling import Memory, Seconds, Size, study
from meshwright.text_data import read_text

READERS = {
    "plan": load_plan, "cluster.yaml": Cluster.parse, "profile": load_profile, "frontier": load_frontier,
    "graph": lambda path: iopddl.read(path), "schedule.csv": lambda path: study(str(path), SIZE, Seconds(), Memory()),
    "text": read_text, "a.graph.json": lambda path: graph_of({"model": str(path)}),
    "train.py": lambda path: make({"model": f"{path}:make"}),
}  # fmt: skip
SIZE = Size(None, None, None)


def pipe(path):
    os.mkfifo(path)


def ring(path):
    path.symlink_to(path)


def device(path):
    path.symlink_to("/dev/zero")


def folder(path):
    path.mkdir()


@pytest.mark.parametrize("made", [pipe, ring, device, folder])
@pytest.mark.parametrize("kind", READERS)
def test_what_is_no_ordinary_file_is_refused_at_once(tmp_path, kind, made):
    path = tmp_path / kind
    made(path)
    begin = time.monotonic()
    with pytest.raises(MeshwrightError, match=r"cannot be read|no file"):
        READERS[kind](path)
    assert time.monotonic() - begin < 2


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize("name", ["x" * 300, "missing", "y/" * 3000 + "z"])
def test_names_that_are_none_are_refused(tmp_path, kind, name):
    with pytest.raises(MeshwrightError) as caught:
        READERS[kind](tmp_path / f"{name}.{kind}")
    assert len(str(caught.value)) < 4000


CONTENTS = {
    "empty": b"", "nul": b"a\0b", "latin": b"devices: \xff", "gzip": gzip.compress(b"{}"), "null": b"null",
    "deep": b"[" * 500 + b"]" * 500, "deep mappings": b'{"a":' * 5000 + b"1" + b"}" * 5000, "list": b"[1]",
    "NaN": b'{"version": NaN}', "infinite": b'{"version": 1e999}', "digits": b'{"version": ' + b"9" * 400 + b"}",
    "thousands of digits": b'{"version": ' + b"9" * 9000 + b"}", "twice": b'{"version": 1, "version": 2}',
}  # fmt: skip


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("kind", [kind for kind in READERS if kind != "text"])
def test_contents_that_are_none_are_refused(tmp_path, kind, content):
    path = tmp_path / kind
    path.write_bytes(CONTENTS[content])
    with pytest.raises(MeshwrightError) as caught:
        READERS[kind](path)
    assert len(str(caught.value)) < 4000


def test_json_leaves_nothing_open():
    kind = FileKind("plan", 100, "another", PlanError)
    for text, complaint in (
        ('{"a": 1, "a": 2}', "`a` is given twice"), ('{"a": NaN}', "NaN is no number"), ("[]", "no plan"),
        ('{"a": -Infinity}', "-Infinity is no number"), ('{"a": 1e400}', "1e400 is no finite number"),
        ('{"a": 9223372036854775808}', "no number of anything"), ("[" * 100_000, "no JSON"),
    ):  # fmt: skip
        with pytest.raises(PlanError, match=complaint):
            read_object(text, kind, "here")
    assert read_object('{"a": -9223372036854775807, "b": -0.5}', kind, "here") == {
        "a": 1 - 2**63,
        "b": -0.5,
    }


def test_sizes_are_bounded(tmp_path):
    (tmp_path / "big").write_bytes(b"x" * 1001)
    with pytest.raises(UsageError, match="it has more than 1000 B"):
        read_bytes(tmp_path / "big", FileKind("file", 1000, "a smaller one"))
    assert len(read_bytes(tmp_path / "big", FileKind("file", 1001, "this"))) == 1001
    with open(tmp_path / "c.yaml", "wb") as file:
        file.truncate(50 * 2**30)  # no byte of it is on the disk
    with pytest.raises(ClusterError, match="it has more than 256 KiB"):
        Cluster.parse(tmp_path / "c.yaml")


def test_what_unpacks_without_end_is_refused():
    kind = FileKind("graph", 1024 * MIB, "another")
    bomb = gzip.compress(b"0" * (20 * MIB))
    with pytest.raises(UsageError, match="unpacks to more than"):
        unpacked(bomb, "bomb", kind)
    with pytest.raises(UsageError, match="ends early"):
        unpacked(gzip.compress(os.urandom(1000))[:-9], "cut", kind)
    with pytest.raises(UsageError, match="damaged"):
        unpacked(b"\x1f\x8b\x08\x00" + b"x" * 50, "wrong", kind)
    assert unpacked(gzip.compress(b"{}"), "right", kind) == unpacked(b"{}", "plain", kind) == b"{}"


BOMB = "a: &a [x, x]\n" + "".join(
    f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
GOOD = """
devices: {h100: {preset: h100}}
groups: [{device: h100, hosts: 2, per_host: 8}]
fabric: [{preset: nvlink4}, {preset: ib400}]
"""


@pytest.mark.parametrize(
    "text, complaint",
    [
        (BOMB, r"aliases \(`\*name`\) are not read"),
        ("devices: " + "[" * 500 + "]" * 500, "more than 20 levels"),
        ("\n".join(" " * k + "a:" for k in range(500)), "more than 20 levels"),
        ("[" * 200_000, "more than 20 levels"),
        ("devices: " + "9" * 400, "no number of anything"),
        ("devices: 0x" + "f" * 400, "no number of anything"),
        ("devices: 2001-99-99", "holds what is no value"),
        ("devices: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
        (GOOD.replace("hosts: 2", "hosts: .inf"), "`hosts` is `inf`; it should be a finite number"),
        (
            GOOD.replace("per_host: 8", "per_host: .nan"),
            "`per_host` is `nan`; it should be a finite number",
        ),
        (GOOD.replace("hosts: 2", "hosts: '²'"), "`²` is not a pattern of hosts"),
        (GOOD.replace("hosts: 2", "hosts: 9000000000000000000"), "less than or equal to 1000000"),
        (GOOD.replace("hosts: 2", "hosts: 'a[1-9999]b[1-9999]'"), "names more than 100000 hosts"),
    ],
)
def test_yaml_is_read_plainly(tmp_path, text, complaint):
    (tmp_path / "c.yaml").write_text(text)
    begin = time.monotonic()
    with pytest.raises(ClusterError, match=complaint):
        Cluster.parse(tmp_path / "c.yaml")
    assert time.monotonic() - begin < 8


def test_a_mark_of_the_byte_order_is_no_content(tmp_path):
    (tmp_path / "c.yaml").write_bytes(b"\xef\xbb\xbf" + GOOD.encode())
    assert Cluster.parse(tmp_path / "c.yaml").size == 16


def test_where_nothing_can_be_written_is_told_before(tmp_path):
    ring(tmp_path / "ring")
    (tmp_path / "file").write_text("")
    for name in (".", "ring", "x" * 300, "file/below", "no/a"):
        path = tmp_path / name
        with pytest.raises(PlanError, match="cannot be written"):
            check_writable(path)
    long = tmp_path / ("x" * 250)
    write_whole(long, "all of it")
    assert long.read_text() == "all of it" and is_file(long)


# ---------------------------------------------------------------- a user's own file

ENDS = {
    "raise SystemExit(0)": "cannot be imported: SystemExit: 0",
    "import sys; sys.exit('enough')": "cannot be imported: SystemExit: enough",
    "class Own(BaseException): pass\nraise Own('mine')": "cannot be imported: Own: mine",
    "def make(: pass": "cannot be imported: SyntaxError",
    "import nothing_of_that_name": "cannot be imported: ModuleNotFoundError",
    "def make(): raise SystemExit(3)": "`make()` failed: SystemExit: 3",
    "def make():\n    return make()": "`make()` failed: RecursionError",
    "make = 3": "has no function `make`",
}


@pytest.mark.parametrize("text", ENDS)
def test_how_a_users_file_ends_is_told_as_its_own(tmp_path, text):
    (tmp_path / "own_file.py").write_text(text)
    with pytest.raises(UsageError) as caught:
        make({"model": f"{tmp_path / 'own_file.py'}:make"})
    assert ENDS[text] in str(caught.value)


def test_a_step_that_ends_python_is_refused(tmp_path):
    (tmp_path / "own_step.py").write_text(
        "def step(x):\n    raise SystemExit(0)\ndef make():\n    return step, 1.0"
    )
    with pytest.raises(UsageError, match="the step ended Python: SystemExit: 0"):
        make({"model": f"{tmp_path / 'own_step.py'}:make"}).capture()


def test_a_file_called_like_a_module_does_not_replace_it(tmp_path):
    (tmp_path / "json.py").write_text("def make():\n    return (lambda x: x), 1.0")
    assert make({"model": f"{tmp_path / 'json.py'}:make"}).name == "make"
    import json as found

    assert found.dumps is json.dumps and "loads" in dir(found)
