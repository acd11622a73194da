"""Programs that try to harm the trainer or to pass without an answer, for test_sandbox_hostile.py.

None of them knows that f(n) is 2 n + 1. Those in LEAKS and NETWORK pass their tests if what they try succeeds.
"""

TESTS = "assert f(3) == 7\nassert f(10) == 21\n"

_FD = """
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
_C = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
"""

# Of the signal that the tests passed.
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
    "answers on the wire": _FD + "def f(n): send(b'[\"value\",true,[]]' * 1); send(b'[\"value\",7,[]]')",
    "answers on the wire before it is asked": _FD
    + 'for _ in range(50): send(b\'["value",["list",["tuple","f",true]],[]]\')\ndef f(n): return None',
    "length without end on the wire": _FD + "def f(n): send(b'x', 0xFFFFFFFF)",
    "rubbish on the wire": _FD + "def f(n):\n    while True: send(os.urandom(4096))",
    "nested lists on the wire": _FD + "def f(n): send(b'[' * 4000000)",
    "an object on the wire": _FD + "def f(n): send(b'{\"value\": 7}')",
    "odd values on the wire": _FD
    + """
odd = ['["value",["ref",-1],[]]', '["value",[[],1],[]]', '["value",["int","zz"],[]]', '["value"]', '[]', '[1]',
       '["value",["set",["list"]],[]]', '["value",7,[[9,8]]]', '["callback",0,[]]', '["raise",[7],7]',
       '["value",["exception",["int"]],[]]', '["value",["array","?",""],[]]', '["value",["range"],[]]']
count = iter(odd)
def f(n):
    send(next(count).encode())
    return None""",
    "reads the wire": _FD
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
    "searches its memory": _C
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

# (program, tests that a cheat of just this kind would pass in one interpreter)
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
    "changes what the tests hold": (
        "import sys\ndef f(n):\n    sys._getframe(1).f_globals['expected'].clear()\n    return []",
        "expected = [7]\nassert f(3) == expected",
    ),
}

# Arguments come from the test: SECRET's place, the repository, the trainer's process.
LEAKS = {
    "the environment": (
        """
import os, ctypes
def f(pid):
    text = str(dict(os.environ)) + str(os.getenv("BATON_CANARY"))
    environ = ctypes.POINTER(ctypes.c_char_p).in_dll(ctypes.CDLL(None), "environ")
    i = 0
    while environ and environ[i]:
        text += environ[i].decode(); i += 1
    for who in ("self", "thread-self", os.getppid(), 1, pid):
        try: text += open(f"/proc/{who}/environ").read()
        except OSError: pass
    return "SECRET" in text""",
        "assert f({pid})",
    ),
    "a file": ("def f(path): return open(path).read()", "assert f({secret!r}) == 'SECRET'"),
    "a file by descriptor": (
        "import os\ndef f(path): return os.read(os.open(path, os.O_RDONLY), 99).decode()",
        "assert f({secret!r}) == 'SECRET'",
    ),
    "a file through a symlink": (
        "import os\ndef f(path):\n    os.symlink(path, 'here')\n    return open('here').read()",
        "assert f({secret!r}) == 'SECRET'",
    ),
    "a file through a hard link": (
        "import os\ndef f(path):\n    os.link(path, 'here')\n    return open('here').read()",
        "assert f({secret!r}) == 'SECRET'",
    ),
    "a file by going up": (
        "import os\ndef f(path):\n    return open('../' * 40 + path.lstrip('/')).read()",
        "assert f({secret!r}) == 'SECRET'",
    ),
    "a file through proc": (
        """
import os
def f(path, pid):
    for who in (pid, 1, os.getppid(), "self"):
        try: return open(f"/proc/{who}/root{path}").read()
        except OSError: pass""",
        "assert f({secret!r}, {pid}) == 'SECRET'",
    ),
    "a file by chroot": (
        """
import os
def f(path):
    os.mkdir("jail"); os.chroot("jail")
    for _ in range(40): os.chdir("..")
    os.chroot(".")
    return open(path).read()""",
        "assert f({secret!r}) == 'SECRET'",
    ),
    "a file by a command": (
        "import subprocess\ndef f(path): return subprocess.run(['cat', path], capture_output=True, text=True).stdout",
        "assert f({secret!r}) == 'SECRET'",
    ),
    "a file by a command in its place": (
        "import os\ndef f(path): os.execv('/bin/cat', ['cat', path])",
        "assert f({secret!r}) == 'SECRET'",
    ),
    "the users of the system": ("def f(): return open('/etc/passwd').read()", "assert f().startswith('root:')"),
    "the recipe": (
        "def f(repository): return open(repository + '/recipes/tiny.yaml').read()",
        "assert 'stages' in f({repository!r})",
    ),
    "the repository as a module": (
        """
import sys
def f(repository):
    sys.path.insert(0, repository)
    import handoff.errors
    return True""",
        "assert f({repository!r})",
    ),
    "the list of the repository": ("import os\ndef f(path): return os.listdir(path)", "assert f({repository!r})"),
    "the trainer's memory": (
        "def f(pid):\n    open(f'/proc/{pid}/mem', 'rb')\n    return True",
        "assert f({pid})",
    ),
    "another process by ptrace": (
        _C
        + """
def f(pid):
    return any(libc.ptrace(16, who, 0, 0) == 0 for who in (pid, 1, os.getppid(), os.getpid() - 1))""",
        "assert f({pid})",
    ),
    "another process by process_vm_readv": (
        _C
        + """
def f(pid):
    buffer = ctypes.create_string_buffer(8)
    class Vector(ctypes.Structure): _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]
    here, there = Vector(ctypes.addressof(buffer), 8), Vector(id(f), 8)
    return any(libc.process_vm_readv(who, ctypes.byref(here), 1, ctypes.byref(there), 1, 0) > 0
               for who in (pid, 1, os.getppid(), os.getpid() - 1))""",
        "assert f({pid})",
    ),
    "signals to the trainer": (
        """
import os, signal
def f(pid):
    for who in (pid, os.getppid(), -1, 0, 1):
        if who == 0 and os.getpgrp() == os.getpid(): continue
        try: os.kill(who, 0)
        except OSError: continue
        return True""",
        "assert f({pid})",
    ),
    "a signal by fcntl": (
        """
import fcntl, os
def f(pid):
    reading, writing = os.pipe()
    fcntl.fcntl(reading, 8, pid)
    fcntl.fcntl(reading, 10, 10)
    return True""",
        "assert f({pid})",
    ),
    "more than its limits": (
        """
import resource
def f():
    for kind in (resource.RLIMIT_CPU, resource.RLIMIT_AS, resource.RLIMIT_FSIZE, resource.RLIMIT_NOFILE):
        try: resource.setrlimit(kind, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        except (OSError, ValueError): continue
        return True""",
        "assert f()",
    ),
    "limits of the tests' process": (
        """
import os, resource
def f():
    for pid in {1, os.getppid(), os.getpid() - 1} - {0}:
        try: resource.prlimit(pid, resource.RLIMIT_AS, (1, 1))
        except OSError: continue
        return True""",
        "assert f()",
    ),
    "privileges": (
        """
import os
def f():
    for take in (lambda: os.setuid(0), lambda: os.setresuid(0, 0, 0), lambda: os.setgroups([0]), lambda: os.nice(-5)):
        try: take()
        except OSError: continue
        return True""",
        "assert f()",
    ),
    "system calls that only harm": (
        _C
        + """
def f(numbers):
    # EPERM and ENOSYS come from the filter; anything else means that the kernel looked at the call.
    out = []
    for number in numbers:
        ctypes.set_errno(0)
        if libc.syscall(number, 0, 0, 0, 0, 0, 0) != -1 or ctypes.get_errno() not in (1, 38): out.append(number)
    return out""",
        "assert f({forbidden})",
    ),
}

# Each gives True if it got through to the server, socket or name that the test put up.
NETWORK = {
    "TCP": "import socket\ndef f(port, path): return bool(socket.create_connection(('127.0.0.1', port), 1))",
    "UDP": "import socket\ndef f(port, path):\n    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
    "    return s.sendto(b'x', ('127.0.0.1', port)) == 1",
    "IPv6": "import socket\ndef f(port, path): return bool(socket.socket(socket.AF_INET6))",
    "raw": "import socket\ndef f(port, path): return bool(socket.socket(socket.AF_PACKET, socket.SOCK_RAW))",
    "netlink": "import socket\ndef f(port, path): return bool(socket.socket(socket.AF_NETLINK, socket.SOCK_RAW))",
    "unix": "import socket\ndef f(port, path):\n    socket.socket(socket.AF_UNIX).connect(path)\n    return True",
    "unix without a file": "import socket\ndef f(port, path):\n"
    "    socket.socket(socket.AF_UNIX).connect('\\0baton-canary')\n    return True",
    "unix datagrams of a pair": "import socket\ndef f(port, path):\n"
    "    a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)\n    return a.sendto(b'x', path + 'd') == 1",
    "listening": "import socket\ndef f(port, path): return bool(socket.create_server(('127.0.0.1', 0)))",
    "HTTP": "import urllib.request\ndef f(port, path):\n"
    "    return bool(urllib.request.urlopen(f'http://127.0.0.1:{port}/', timeout=1))",
    "a name": "import socket\ndef f(port, path):\n    socket.getaddrinfo('example.org', 80)\n    return True",
}

_KILL_ALL = "import os, signal\n{}\ndef f(n): return 0"
HARM = {
    "fork bomb": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "fork bomb when called": "import os\ndef f(n):\n    while True: os.fork()",
    "thread bomb": """
import threading, time
threading.stack_size(32768)
while True:
    try: threading.Thread(target=time.sleep, args=(999,)).start()
    except RuntimeError: pass""",
    "process pool": "import multiprocessing\ndef f(n):\n    with multiprocessing.Pool(64) as p: p.map(abs, range(9))",
    "a daemon": """
import os, sys, time
def f(n):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            while True: time.sleep(1)
        os._exit(0)""",
    "kills all": _KILL_ALL.format("os.kill(-1, signal.SIGKILL)"),
    "kills its parent": _KILL_ALL.format("os.kill(os.getppid(), signal.SIGKILL)"),
    "kills init": _KILL_ALL.format("os.kill(1, signal.SIGKILL)"),
    "kills its group": _KILL_ALL.format("os.killpg(0, signal.SIGKILL)"),
    "kills itself": _KILL_ALL.format("os.kill(os.getpid(), signal.SIGKILL)"),
    "stops itself": "import os, signal\ndef f(n): os.kill(os.getpid(), signal.SIGSTOP)",
    "ignores signals": """
import signal
for number in range(1, 65):
    try: signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError): pass
def f(n):
    while True: pass""",
    "outlives its parent": _C + "def f(n):\n    libc.prctl(1, 0, 0, 0, 0)\n    while True: pass",
    "sleeps": "import time\ndef f(n): time.sleep(9999)",
    "sleeps when loaded": "import time\ntime.sleep(9999)",
    "loops": "def f(n):\n    while True: pass",
    "a pattern that takes for ever": "import re\ndef f(n): re.match('(a+)+$', 'a' * 64 + 'b')",
    "a number that takes for ever": "def f(n): return len(str(7 ** (7 ** 12)))",
    "threads that never end": """
import threading
def spin():
    while True: pass
for _ in range(8): threading.Thread(target=spin).start()
def f(n): return 0""",
    "a lock that is never free": "import threading\ndef f(n):\n    a = threading.Lock()\n    a.acquire(); a.acquire()",
    "waits on the wire": _FD + "def f(n):\n    for fd in descriptors(): os.read(fd, 1)",
    "10 GB list": "def f(n): return [0] * (10 << 27)",
    "10 GB bytes": "x = bytearray(10 << 30)",
    "memory bit by bit": "def f(n):\n    a = []\n    while True: a.append(bytes(1 << 16))",
    "memory and no exception": """
def f(n):
    a = []
    while True:
        try: a.append(bytearray(1 << 20))
        except MemoryError: pass""",
    "strings that double": "def f(n):\n    a = 'x'\n    while True: a += a",
    "recursion": "def f(n): return f(n)",
    "recursion without a limit": "import sys\nsys.setrecursionlimit(10 ** 9)\ndef f(n): return f(n) + 1",
    "recursion in C": "import sys\nsys.setrecursionlimit(10 ** 9)\nclass A:\n    def __repr__(s): return repr(s)\n"
    "def f(n): return repr(A())",
    "a crash": "import ctypes\ndef f(n): ctypes.string_at(0)",
    "an abort": "import os\ndef f(n): os.abort()",
    "output without end": "def f(n):\n    while True: print('x' * 65536)",
    "output without a line": "import sys\ndef f(n):\n    while True: sys.stdout.write('x' * 65536)",
    "errors without end": "import sys\ndef f(n):\n    while True: sys.stderr.write('x' * 65536)",
    "a full disk": "def f(n):\n    with open('big', 'wb') as file:\n        while True: file.write(bytes(1 << 20))",
    "a full disk, file by file": """
def f(n):
    i = 0
    while True:
        i += 1
        with open(str(i), 'wb') as file: file.write(bytes(1 << 20))""",
    "a full disk, and no exception": """
import itertools
def f(n):
    for i in itertools.count():
        try:
            with open(str(i), 'wb') as file: file.write(bytes(1 << 20))
        except OSError: pass""",
    "files without end": "def f(n):\n    i = 0\n    while True:\n        i += 1\n        open(str(i), 'w').close()",
    "folders too deep to remove": """
import os
def f(n):
    for _ in range(3000):
        os.mkdir("d" * 100, 0o700)
        os.chdir("d" * 100)""",
    "a folder without permissions": "import os\ndef f(n):\n    os.makedirs('a/b')\n    os.mkdir('a/c', 0)",
    "a sparse file": "def f(n):\n    with open('big', 'wb') as file: file.truncate(1 << 40)",
    "shared memory": "from multiprocessing import shared_memory\n"
    "def f(n): shared_memory.SharedMemory('baton_canary', True, 1 << 30)",
    "shared memory of System V": _C + "def f(n):\n    for i in range(64): libc.shmget(0, 1 << 30, 0o1666)",
    "files in memory": "import os\ndef f(n):\n    while True: os.write(os.memfd_create('x'), bytes(1 << 20))",
    "a queue of messages": _C + "def f(n):\n    for i in range(64): libc.msgget(i + 4242, 0o1666)",
    "writes outside": """
def f(n):
    import os, glob
    for folder in (PLACE, "/", "/tmp", "/var/tmp", "/dev/shm", "/etc", "/usr/lib", os.path.dirname(os.__file__)):
        try: open(folder + "/baton-canary-written", "w").write("x")
        except OSError: pass""",
    "writes over a file": "def f(n): open(SECRET, 'w').write('x')",
    "appends to a file through a symlink": "import os\nos.symlink(SECRET, 'x')\ndef f(n): open('x', 'a').write('x')",
    "cuts a file": "import os\ndef f(n): os.truncate(SECRET, 0)",
    "removes a file": "import os\ndef f(n): os.remove(SECRET)",
    "moves a file": "import os\ndef f(n): os.rename(SECRET, 'x')",
    "changes a file's mode": "import os\ndef f(n): os.chmod(SECRET, 0)",
    "changes a file's time": "import os\ndef f(n): os.utime(SECRET, (0, 0))",
    "changes a file's owner": "import os\ndef f(n): os.chown(SECRET, os.getuid(), 7)",
    "changes Python's library": "import os\ndef f(n): os.chmod(os.__file__, 0)",
    "makes devices": "import os, stat\ndef f(n): os.mknod('sda', stat.S_IFBLK | 0o666, os.makedev(8, 0))",
    "mounts": _C + "def f(n): libc.mount(b'none', b'.', b'tmpfs', 0, None); libc.unshare(0x10020000)",
}
