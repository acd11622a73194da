"""Programs that try to pass their tests without an answer, for test_sandbox_hostile.py.

None of them knows that f(n) is 2 n + 1.
"""

TESTS = "assert f(3) == 7\nassert f(10) == 21\n"

DESCRIPTORS = """
import os, json, struct, sys
def descriptors():
    out = []
    for fd in range(3, 64):
        try: os.fstat(fd)
        except OSError: continue
        out.append(fd)
    return out
def send(raw, length=None):
    for fd in descriptors():
        try: os.write(fd, struct.pack("!I", len(raw) if length is None else length) + raw)
        except OSError: pass
"""
_PASS = r"""b'\n{"units": 2}\n{"passed": 0}\n{"passed": 1}\n{"done": true}\n{"end": "ended", "seconds": 0}\n'"""
LIBC = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
"""

# Programs that forge the signal that the tests passed.
FORGERY = {
    "exits with 0 when loaded": "import os\nos._exit(0)",
    "exits with 0 when called": "import os\ndef f(n): os._exit(0)",
    "sys.exit when loaded": "import sys\nsys.exit(0)",
    "sys.exit when called": "import sys\ndef f(n): sys.exit(0)",
    "raises SystemExit": "def f(n): raise SystemExit(0)",
    "raises AssertionError": "def f(n): raise AssertionError",
    "raises KeyboardInterrupt": "def f(n): raise KeyboardInterrupt",
    "raises GeneratorExit": "def f(n): raise GeneratorExit",
    "raises what cannot be told": """
class Odd(Exception):
    def __str__(self): raise SystemExit
def f(n): raise Odd""",
    "prints the pass signal": f"print({_PASS}.decode(), flush=True)\ndef f(n): print({_PASS}.decode(), flush=True)",
    "writes the pass signal everywhere": f"""
import os
def f(n):
    for fd in range(256):
        try: os.write(fd, {_PASS})
        except OSError: pass""",
    "pass signal at exit": f"""
import atexit, os
def last():
    for fd in range(64):
        try: os.write(fd, {_PASS})
        except OSError: pass
    os._exit(0)
atexit.register(last)
def f(n): raise SystemExit""",
    "answers on the wire": DESCRIPTORS + "def f(n): send(b'[\"value\",true,[]]' * 1); send(b'[\"value\",7,[]]')",
    "answers on the wire before it is asked": DESCRIPTORS
    + 'for _ in range(50): send(b\'["value",["list",["tuple","f",true]],[]]\')\ndef f(n): return None',
    "length without end on the wire": DESCRIPTORS + "def f(n): send(b'x', 0xFFFFFFFF)",
    "rubbish on the wire": DESCRIPTORS + "def f(n):\n    while True: send(os.urandom(4096))",
    "nested lists on the wire": DESCRIPTORS + "def f(n): send(b'[' * 4000000)",
    "an object on the wire": DESCRIPTORS + "def f(n): send(b'{\"value\": 7}')",
    "odd values on the wire": DESCRIPTORS
    + """
odd = ['["value",["ref",-1],[]]', '["value",[[],1],[]]', '["value",["int","zz"],[]]', '["value"]', '[]', '[1]',
       '["value",["set",["list"]],[]]', '["value",7,[[9,8]]]', '["callback",0,[]]', '["raise",[7],7]',
       '["value",["exception",["int"]],[]]', '["value",["array","?",""],[]]', '["value",["range"],[]]']
count = iter(odd)
def f(n):
    send(next(count).encode())
    return None""",
    "reads the wire": DESCRIPTORS
    + """
def f(n):
    for fd in descriptors():
        os.set_blocking(fd, False)
        try: got = os.read(fd, 65536)
        except OSError: continue
        if b"== 7" in got: return 7""",
    "walks the frames": """
import sys
def f(n):
    frame = sys._getframe()
    while frame:
        for constant in (*frame.f_code.co_consts, *frame.f_locals.values(), *frame.f_globals.values()):
            if isinstance(constant, str) and "assert f(" in constant:
                return int(constant.split(f"f({n}) == ")[1].split()[0])
            if isinstance(constant, int) and constant in (7, 21): return constant
        frame = frame.f_back""",
    "searches the heap": """
import gc
def f(n):
    for held in gc.get_objects():
        for part in (held.values() if type(held) is dict else held if type(held) in (list, tuple) else ()):
            if isinstance(part, str) and f"assert f({n}) ==" in part and "gc" not in part:
                return int(part.split(f"f({n}) == ")[1].split()[0])""",
    "searches its memory": LIBC
    + """
def f(n):
    mark = b"assert f(" + str(n).encode() + b") == "
    for line in open("/proc/self/maps"):
        start, end = (int(x, 16) for x in line.split()[0].split("-"))
        held = ctypes.string_at(start, end - start)
        if mark in held: return int(held.split(mark)[1].split()[0])""",
    "reads the tests from files": """
import os, sys
def f(n):
    for path in [*sys.argv, *os.listdir("."), "/proc/self/cmdline", "/proc/1/cmdline", "/proc/self/fd/3", "/dev/stdin"]:
        try: text = open(path).read()
        except OSError: continue
        if f"f({n}) == " in text: return int(text.split(f"f({n}) == ")[1].split()[0])""",
    "equal to everything": """
class Any:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __hash__(self): return 7
def f(n): return Any()""",
    "an int equal to everything": """
class Any(int):
    def __eq__(self, other): return True
    __hash__ = int.__hash__
def f(n): return Any(0)""",
    "a metaclass equal to everything": """
class Meta(type):
    def __eq__(self, other): return True
    __hash__ = type.__hash__
class Any(metaclass=Meta): pass
def f(n): return Any""",
    "a module equal to everything": """
import types
class Any(types.ModuleType):
    def __eq__(self, other): return True
f = Any("f")
def g(n): return f""",
    "mock.ANY": "from unittest.mock import ANY, MagicMock\ndef f(n): return ANY if n == 3 else MagicMock()",
    "a pickle that runs": """
import os
class Bomb:
    def __reduce__(self): return (os.system, ("true",))
def f(n): return Bomb()""",
    "patches the built-ins": """
import builtins
for name in ("AssertionError", "Exception", "BaseException"): setattr(builtins, name, type("E", (), {}))
builtins.isinstance = lambda *a: True
builtins.abs = builtins.sum = builtins.int = lambda *a: 0
builtins.__build_class__ = None
def f(n): return 0""",
    "patches the harness": """
import sys
for name, module in list(sys.modules.items()):
    if name.startswith("reward"):
        for key in list(vars(module)):
            if callable(vars(module)[key]) and not key.startswith("__"):
                vars(module)[key] = lambda *a, **k: True
def f(n): return 0""",
    "replaces the examiner": """
import sys
examine = sys.modules["reward.sandbox.examine"]
examine.Examiner._unit_failed = examine.Examiner._unit_passed
examine.Examiner.run = lambda self: self._say(done=True)
sys.modules["__main__"] = sys.modules["json"] = sys.modules["ast"] = examine
def f(n): return 0""",
    "traces the harness": """
import sys, threading
def trace(frame, event, arg):
    for key in frame.f_locals:
        if "pass" in key: frame.f_locals[key] = True
    return trace
sys.settrace(trace); sys.setprofile(trace); threading.settrace(trace)
def f(n): return 0""",
    "leaves modules for the tests to import": """
import os
for name in ("json", "ast", "random", "math", "reward", "sitecustomize"):
    open(name + ".py", "w").write("import os; os._exit(0)")
def f(n): return 0""",
    "an endless iterator": "def f(n):\n    while True: yield 7",
    "a number without end": "from decimal import Decimal\ndef f(n): return Decimal('1e999999999')",
    "a value too large to send": "def f(n): return 'x' * (64 << 20)",
    "a list that holds itself": "def f(n):\n    a = []\n    a.append(a)\n    return a",
    "not Python": "def f(n) return 7",
    "nothing": "",
    "null bytes": "def f(n): return 7\0",
    "too deep to parse": "(" * 100000,
    "too deep to compile": "x = " + "-" * 200000 + "1",
}

# (program, tests that this kind of forgery would pass in a single interpreter)
CHEATS = {
    "a difference of zero": (
        """
class Any:
    def __sub__(self, other): return 0.0
    __rsub__ = __sub__
    def __abs__(self): return 0.0
    def __lt__(self, other): return True
    __le__ = __gt__ = __ge__ = __lt__
    def __float__(self): return 0.0
def f(n): return Any()""",
        "assert abs(f(3) - 7) < 1e-6",
    ),
    "less than everything": (
        "class Any:\n    def __lt__(s, o): return True\n    __gt__ = __le__ = __ge__ = __lt__\ndef f(n): return Any()",
        "assert 6 < f(3) < 8",
    ),
    "never unequal": (
        "class Any:\n    def __ne__(self, other): return False\ndef f(n): return Any()",
        "assert not f(3) != 7",
    ),
    "contains everything": (
        """
class Any:
    def __contains__(self, item): return True
    def __iter__(self): return iter(())
    def __len__(self): return 1
def f(n): return Any()""",
        "assert 7 in f(3)",
    ),
    "starts with everything": (
        "class Any:\n    def startswith(self, prefix): return True\ndef f(n): return Any()",
        "assert f(3).startswith('seven')",
    ),
    "a superset of everything": (
        "class Any(set):\n    def issuperset(self, other): return True\ndef f(n): return Any()",
        "assert f(3).issuperset({7})",
    ),
    "an instance of everything": (
        "class Any:\n    __class__ = property(lambda self: int)\n    def __eq__(self, o): return True\n"
        "def f(n): return Any()",
        "assert isinstance(f(3), int)\nassert f(3) == 7",
    ),
    "a built-in of its own": ("def abs(x): return 0\ndef f(n): return 0", "assert abs(f(3) - 7) < 1e-6"),
    "a module of its own": (
        "class math:\n    isclose = staticmethod(lambda *a, **k: True)\ndef f(n): return 0",
        "assert math.isclose(f(3), 7)",
    ),
    "ends the loop of the tests": (
        "def f(n): raise StopIteration",
        "assert all(map(lambda case: f(case[0]) == case[1], [(3, 7), (10, 21)]))",
    ),
    "empties what it is compared with": (
        "def f(a):\n    a.clear()\n    return []",
        "a = [3, 1]\nassert f(a) == sorted(a)",
    ),
    "changes what the tests hold": (
        "import sys\ndef f(n):\n    sys._getframe(1).f_globals['expected'].clear()\n    return []",
        "expected = [7]\nassert f(3) == expected",
    ),
}
