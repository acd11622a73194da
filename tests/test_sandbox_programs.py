"""Programs and tests across two processes, the counting of tests, and that a run leaves nothing behind."""

import datetime
import os
import signal
import subprocess
import sys
import time
from collections import Counter, OrderedDict, deque
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reward.functions import RewardError
from reward.sandbox import folder, seccomp
from reward.sandbox.confine import LAYERS, Limits
from reward.sandbox.pool import Job, Sandbox
from reward.sandbox.values import BadMessage, decode, encode

STACK = """
class Stack:
    def __init__(self, *items): self.items = list(items)
    def push(self, item): self.items.append(item); return self
    def pop(self):
        if not self.items: raise IndexError("empty")
        return self.items.pop()
    def __len__(self): return len(self.items)
    def __iter__(self): return iter(self.items)
    def __eq__(self, other): return isinstance(other, Stack) and self.items == other.items
    def __add__(self, other): return Stack(*self.items, *other.items)
    def __getitem__(self, i): return self.items[i]
    def __str__(self): return f"<{self.items}>"
"""


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox(workers=2) as sandbox:
        yield sandbox


GOOD = {
    "plain values": (
        "def f(x): return x",
        "for x in (None, True, 1, -2**70, 1.5, float('inf'), 'ä\\ud800', b'x', bytearray(b'y'), (1, (2,)), {1: {2}},\n"
        "          frozenset({(1, 2)}), 1j, range(3), [[], {}]):\n"
        "    assert f(x) == x and type(f(x)) is type(x), x",
    ),
    "library types": (
        "import collections, datetime\nfrom decimal import Decimal\n"
        "def f(x): return x\ndef g(): return collections.Counter('aab')\n"
        "def h(): return collections.defaultdict(list, a=[1])",
        "import datetime, decimal, collections\n"
        "assert f(datetime.date(2020, 1, 2)) == datetime.date(2020, 1, 2)\n"
        "assert f(decimal.Decimal('1.10')) == decimal.Decimal('1.1')\n"
        "assert g() == {'a': 2, 'b': 1} and g().most_common(1) == [('a', 2)]\nassert h() == {'a': [1]}",
    ),
    "arguments changed in place": (
        "def f(a, d, s): a.sort(); d['x'] = a; s.discard(1)",
        "a, d, s = [3, 1], {}, {1, 2}\nf(a, d, s)\nassert (a, d, s) == ([1, 3], {'x': [1, 3]}, {2})",
    ),
    "keywords": ("def f(a, *, b=1): return a - b", "assert f(1, b=3) == -2\nassert f(a=1) == 0"),
    "a generator": ("def f(n):\n    yield from range(n)", "assert list(f(3)) == [0, 1, 2]\nassert next(f(2)) == 0"),
    "a map": ("def f(a): return map(str, a)", "assert sorted(f([2, 1])) == ['1', '2']\nassert '2' in f([2])"),
    "a closure": ("def f(n): return lambda m: n + m", "assert f(3)(4) == 7"),
    "functions as arguments": (
        "def f(g, a): return [g(x) for x in a]",
        "import operator\nassert f(lambda x: x * 2, [1, 2]) == [2, 4]\nassert f(str, [1]) == ['1']\n"
        "assert f(operator.neg, [1]) == [-1]\ndef g(x):\n    return x + len(f(str, [1]))\nassert f(g, [1]) == [2]",
    ),
    "a class": (
        STACK,
        "s = Stack(1)\ns.push(2)\nassert len(s) == 2 and list(s) == [1, 2] and s[0] == 1 and str(s) == '<[1, 2]>'\n"
        "assert s.pop() == 2\nassert s == Stack(1)\nassert s != Stack(2)\nassert s + Stack(5) == Stack(1, 5)\n"
        "assert isinstance(s, Stack)\ns.items = []\nassert not s\nassert s != 3 and not s == []\n"
        "try: s.pop()\nexcept IndexError as e: error = str(e)\nassert error == 'empty'",
    ),
    "a named tuple": (
        "from collections import namedtuple\nP = namedtuple('P', 'x y')\ndef f(): return P(1, 2)",
        "assert f() == (1, 2)\nassert f().x == 1\nassert P(1, 2) < (1, 3)\nx, y = f()\nassert y == 2",
    ),
    "an enumeration": (
        "import enum\nclass E(enum.IntEnum):\n    A = 3\ndef f(): return E.A",
        "assert f() == 3\nassert E.A == 3",
    ),
    "exceptions": (
        "class Empty(ValueError): pass\ndef f(n):\n    if n: raise Empty('no')\n    raise KeyError(n)",
        "seen = []\ntry: f(1)\nexcept Empty as e: seen.append(str(e))\ntry: f(1)\nexcept ValueError: seen.append(2)\n"
        "try: f(0)\nexcept KeyError: seen.append(3)\nassert seen == ['no', 2, 3]",
    ),
    "constants": ("LIMIT = 5\ndef f(): return LIMIT", "assert f() == LIMIT == 5"),
    "a module that only the program imports": ("import math\ndef f(): return math.pi", "assert f() == math.pi"),
    "a name of a built-in": ("def sum(a, b): return a + b", "assert sum(1, 2) == 3"),
    "asyncio": (
        "import asyncio\nasync def g(): await asyncio.sleep(0); return 3\ndef f(): return asyncio.run(g())",
        "assert f() == 3",
    ),
    "threads": (
        "from concurrent.futures import ThreadPoolExecutor\ndef f():\n    with ThreadPoolExecutor(4) as p:\n"
        "        return sum(p.map(abs, range(10)))",
        "assert f() == 45",
    ),
    "files": (
        "import tempfile, os\ndef f():\n    open('/tmp/x' if os.getcwd() == '/scratch' else 'x', 'w').write('a')\n"
        "    with tempfile.NamedTemporaryFile('w+') as t: t.write('b'); t.seek(0); return open('x').read() + t.read()",
        "assert f() == 'ab'",
    ),
    "a data class": (
        "import dataclasses, typing\n@dataclasses.dataclass(order=True)\nclass P:\n    x: int\n"
        "def f(): return typing.get_type_hints(P)['x'](3)",
        "assert f() == 3\nassert P(1) == P(1)\nassert P(1) < P(2)",
    ),
    "a main guard": ("def f(): return 1\nif __name__ == '__main__': raise SystemExit", "assert f() == 1"),
    "recursion": ("def f(n): return 1 if n == 0 else f(n - 1)", "assert f(900) == 1"),
    "a long list": ("def f(n): return list(range(n))", "assert f(200000) == list(range(200000))"),
}


@pytest.mark.parametrize("name", GOOD)
def test_accepted_forms_of_a_program(sandbox, name):
    program, tests = GOOD[name]
    outcome = sandbox.run(Job([program], tests))
    assert outcome.all_passed, outcome
    assert outcome.share == 1.0 and outcome.why == "" and outcome.fault == ""


def test_setup_classes_lie_beside_the_program_and_statements_with_the_tests(sandbox):
    node = "class Node:\n    def __init__(self, v, n=None): self.v, self.n = v, n\n"
    setup = f"from typing import Optional\n{node}last = Node(1, Node(2))"
    program = "def f(node: Optional[Node]):\n    return 0 if node is None else node.v + f(node.n)"
    assert sandbox.run(Job([program], "assert f(last) == 3\nassert f(None) == 0", setup)).all_passed
    theirs = "class Node:\n    def __init__(self, v): self.v = v\ndef f(node): return node.v"
    assert sandbox.run(Job([theirs], "assert f(last) == 4", "last = Node(4)")).all_passed


def test_the_text_to_complete_gives_the_tests_its_helpers_and_not_the_answer(sandbox):
    given = "def double(n):\n    return 2 * n\n\ndef f(n):\n    '''n, doubled'''\n"
    tests = "assert f(3) == double(3)"
    job = Job([given + "    return n + n"], tests, given=given, entry_point="f")
    assert sandbox.run(job).all_passed
    forged = Job([given + "    return 0\ndef double(n): return 0"], tests, given=given, entry_point="f")
    assert sandbox.run(forged).passed == frozenset()
    absent = Job(["def g(n): return 6"], "assert f(3) is None", given=given, entry_point="f")
    assert "NameError" in sandbox.run(absent).why


UNITS = [
    ("assert f(1) == 1\nassert f(2) == 0\nassert f(3) == 3", 3, {0, 2}, True),
    (
        "def check(g):\n    assert True\n    assert g(1) == 1\n    for i in 0, 1:\n        assert g(i) == i\ncheck(f)",
        2,
        {0, 1},
        True,
    ),
    ("assert f(1) == 1\nf(1, 2)\nassert f(2) == 2", 2, {0}, False),
    ("def never():\n    assert f(1) == 1\nassert f(2) == 2", 2, {1}, True),
    ("def same(a, b):\n    assert a == b\nsame(f(1), 1)\nsame(f(2), 0)", 1, set(), True),
    ("assert f(1) == 1\nraise SystemExit", 1, {0}, False),
]


def test_a_function_with_a_built_ins_name_must_be_defined(sandbox):
    assert sandbox.run(Job(["def max(a, b): return b"], "assert max(1, 2) == 2")).all_passed
    for job in (Job(["x = 1"], "assert max(1, 2) == 2"), Job(["x = 1"], "assert max(1, 2) == 2", entry_point="max")):
        outcome = sandbox.run(job)
        assert outcome.passed == frozenset() and outcome.why == "NameError: the program does not define max"


@pytest.mark.parametrize(("tests", "units", "passed", "finished"), UNITS)
def test_units(sandbox, tests, units, passed, finished):
    outcome = sandbox.run(Job(["def f(n): return n"], tests, stop_at_first=False))
    assert (outcome.units, outcome.passed, outcome.finished) == (units, passed, finished)
    assert outcome.share == pytest.approx(len(passed) / (units + (not finished)))
    assert outcome.all_passed == (finished and len(passed) == units)


def test_the_first_failure_is_the_last_test_where_all_must_pass(sandbox):
    tests = "assert f(1) == 0\nassert f(2) == 2"
    assert sandbox.run(Job(["def f(n): return n"], tests)).passed == frozenset()
    assert sandbox.run(Job(["def f(n): return n"], tests, stop_at_first=False)).passed == {1}


@pytest.mark.parametrize(
    ("tests", "fault"),
    [
        ("assert f(", "not valid Python"),
        ("f(1)", "no assert"),
        ("assert True", "no assert"),
        ("class A: pass\nassert f(A()) == 1", "pass a A"),
        ("assert f(x for x in 'a') == 1", "pass a generator"),
        ("assert f('x' * (9 << 20))", "limit between a program and its tests"),
    ],
)
def test_faults_of_the_tests_are_reported(sandbox, tests, fault):
    assert fault in sandbox.run(Job(["def f(n): return 1"], tests)).fault


@pytest.mark.slow
def test_limits_are_kept_and_named(sandbox):
    limits = Limits(cpu_seconds=1, wall_milliseconds=60_000, memory_mb=128, disk_mb=1)
    stubborn = "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\ndef f():\n    while True: pass"
    jobs = {
        "CPU time is over": ("def f(): \n    while True: pass", "assert f()", limits),
        "CPU time is over  ": (stubborn, "assert f()", limits),
        "time is over": ("import time\ndef f(): time.sleep(60)", "assert f()", Limits(1, 1500)),
        "MemoryError": ("def f(): return bytes(200 << 20)", "assert f()", limits),
        "OSError": ("def f(): return open('x', 'wb').write(bytes(2 << 20))", "assert f()", limits),
        "CPU time is over ": ("def f(): return 1", "while f(): pass\nassert f()", limits),
    }
    for why, (program, tests, allowed) in jobs.items():
        outcome = sandbox.run(Job([program], tests), allowed)
        assert outcome.why.startswith(why.strip()) and not outcome.all_passed, outcome


def test_the_same_program_gets_the_same_score(sandbox):
    job = Job(
        ["import random\ndef f(): return list({'a', 'b', 'c', 'd'}), random.random()"], "x = f()\nassert x == 0, x"
    )
    assert len({sandbox.run(job).why for _ in range(5)}) == 1


def test_eight_jobs_run_at_once_and_keep_their_order():
    jobs = [Job([f"import time\ntime.sleep(1)\ndef f(): return {i}"], f"assert f() == {i % 9}") for i in range(12)]
    with Sandbox(workers=8) as sandbox, ThreadPoolExecutor(1) as thread:
        running = thread.submit(sandbox.map, jobs)
        children = Path(f"/proc/{sandbox._server._process.pid}/task/{sandbox._server._process.pid}/children")
        seen = set()
        while not running.done():
            seen.add(len(children.read_text().split()))
            time.sleep(0.01)
    assert max(seen) >= 8  # one more while an ended job is cleared away
    assert [outcome.all_passed for outcome in running.result()] == [i == i % 9 for i in range(12)]


def test_a_server_that_dies_is_replaced():
    job = Job(["def f(): return 1"], "assert f() == 1")
    with Sandbox(workers=1) as sandbox:
        server = sandbox._server._process
        server.kill()
        server.wait()
        assert sandbox.run(job).all_passed
        assert sandbox._server._process.pid != server.pid


@pytest.mark.parametrize("layers", [LAYERS, ()])
def test_signals_to_the_trainer_do_not_end_jobs(layers):
    """Slurm signals every process of a job. The trainer finishes its step, and the scores of that step count."""
    job = Job(["import time\ntime.sleep(1)\ndef f(): return 1"], "assert f() == 1")
    with Sandbox(workers=2, layers=layers) as sandbox, ThreadPoolExecutor(1) as thread:
        server = psutil.Process(sandbox._server._process.pid)
        running = thread.submit(sandbox.map, [job, job])
        _until(lambda: len(server.children(recursive=True)) >= 6)  # three for each job
        for process in [server, *server.children(recursive=True)]:
            process.send_signal(signal.SIGTERM)
        assert all(outcome.all_passed for outcome in running.result())
        assert sandbox._server._process.pid == server.pid


def test_a_missing_required_protection_is_an_error():
    with Sandbox(layers=()) as sandbox:
        with pytest.raises(RewardError, match=r"kept from the network on this machine \(none is used\)"):
            sandbox.require(["network"])
        with pytest.raises(RewardError, match="`require` names 'disk'; the sandbox protects network, filesystem"):
            sandbox.require(["disk"])
        sandbox.require([])


def test_a_python_that_does_not_start_is_reported(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RewardError, match="does not start"):
        Sandbox()


TRAINER = """
import sys, tempfile
tempfile.tempdir = sys.argv[2]
sys.path.insert(0, sys.argv[1])
from reward.sandbox.pool import Job, Sandbox
sandbox = Sandbox(layers=sys.argv[3].split(",") if sys.argv[3] else ())
print("ready", flush=True)
sandbox.map([Job(["import time\\ntime.sleep(600)"], "assert f()")] * 4)
"""


@pytest.mark.parametrize("layers", ["namespaces,identity,landlock,seccomp", "landlock,seccomp", ""])
def test_no_process_outlives_a_killed_trainer(root, tmp_path, layers):
    command = [sys.executable, "-c", TRAINER, str(root), str(tmp_path), layers]
    trainer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert trainer.stdout is not None and trainer.stdout.readline() == "ready\n"
    _until(lambda: len(_named(tmp_path)) >= 1 + 1 + 4 * 3)  # trainer, server, three for each job
    trainer.send_signal(signal.SIGKILL)
    trainer.wait()
    trainer.stdout.close()
    _until(lambda: not _named(tmp_path) and not list(tmp_path.iterdir()))


def _named(place: Path) -> list[int]:
    """Processes whose command line contains the folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if os.fsencode(place) in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def _until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters())
    | st.binary()
    | st.complex_numbers(allow_nan=False)
    | st.decimals(allow_nan=False)
    | st.fractions()
    | st.dates()
    | st.datetimes().map(lambda t: t.replace(fold=0))
    | st.times().map(lambda t: t.replace(fold=0))
    | st.timedeltas()
    | st.builds(range, st.integers(), st.integers()),
    lambda inner: (
        st.lists(inner)
        | st.tuples(inner, inner)
        | st.dictionaries(st.integers(), inner)
        | st.builds(deque, st.lists(inner))
    ),
    max_leaves=8,
)


def _none_other(value: object) -> list[object]:
    raise AssertionError(value)


@given(plain)
def test_plain_values_round_trip(value):
    again = decode(encode(value, _none_other), _none_other)
    assert again == value and type(again) is type(value) and repr(again) == repr(value)


def test_other_values_round_trip_by_reference():
    for value in (Counter("aab"), OrderedDict(b=1, a=2), {1, (2,)}, frozenset("x"), bytearray(b"x")):
        again = decode(encode(value, _none_other), _none_other)
        assert again == value and type(again) is type(value)
    assert [encode(kind(1), _none_other) for kind in (Decimal, Fraction)] == [["Decimal", "1"], ["Fraction", 1, 1]]
    assert encode(datetime.date(2020, 1, 2), _none_other) == ["date", "2020-01-02"]


JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(max_size=5)
    | st.sampled_from(["int", "set", "dict", "range", "ref"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=12,
)


@given(JUNK)
def test_no_message_makes_more_than_a_plain_value(raw):
    """The tests' side turns every message into a value of Python's own types, or refuses it."""

    def refuse(raw):
        raise BadMessage("no value")

    try:
        value = decode(raw, refuse)
    except BadMessage:
        return
    assert encode(value, _none_other) is not NotImplemented


@pytest.mark.slow
def test_the_private_folder_is_removed_whatever_is_in_it(tmp_path):
    place = tmp_path / "place"
    place.mkdir()
    (tmp_path / "kept").write_text("x")
    (place / "link").symlink_to(tmp_path)
    os.mkfifo(place / "pipe")
    (place / "closed" / "inner").mkdir(parents=True)
    (place / "closed").chmod(0)
    here = Path.cwd()
    os.chdir(place)
    for _ in range(1100):
        Path("d" * 50).mkdir()
        os.chdir("d" * 50)
    os.chdir(here)
    assert folder.exceeds(place, 1 << 30, 10_000)
    folder.remove(place)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_the_private_folder_is_measured(tmp_path):
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(1 << 30)
    assert not folder.exceeds(tmp_path, 1 << 20, 10)
    (tmp_path / "full").write_bytes(bytes(2 << 20))
    os.sync()
    assert folder.exceeds(tmp_path, 1 << 20, 10) and folder.exceeds(tmp_path, 1 << 30, 1)


@pytest.mark.parametrize(
    ("machine", "header"),
    [("x86_64", "x86_64-linux-gnu/asm/unistd_64.h"), ("aarch64", "asm-generic/unistd.h")],
)
def test_the_numbers_of_system_calls_are_the_kernels(machine, header):
    path = Path("/usr/include", header)
    if not path.exists():
        pytest.skip(f"no {path}")
    lines = [line.split() for line in path.read_text().splitlines() if line.startswith("#define __NR")]
    theirs = {
        line[1].removeprefix("__NR_").removeprefix("__NR3264_"): line[2] for line in reversed(lines) if len(line) > 2
    }
    theirs |= {"newfstatat": theirs["fstatat"]} if machine == "aarch64" else {}
    ours = seccomp.numbers(machine)
    assert len(ours) > 100
    assert {name: str(number) for name, number in ours.items()} == {name: theirs[name] for name in ours}


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_filter_fits_the_kernel(machine):
    code = seccomp.build(machine, 1)
    assert len(code) % 8 == 0 and len(code) // 8 < 4096
