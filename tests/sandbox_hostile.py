"""Programs that try to read, reach or harm resources outside the sandbox, for test_sandbox_hostile.py.

Those in LEAKS and NETWORK pass their tests if the attack succeeds; those in HARM run with `sandbox_forgery.TESTS`.
"""

from tests.sandbox_forgery import DESCRIPTORS, LIBC

# The test supplies the arguments: the path of SECRET, the repository, the trainer's process id.
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
        LIBC
        + """
def f(pid):
    return any(libc.ptrace(16, who, 0, 0) == 0 for who in (pid, 1, os.getppid(), os.getpid() - 1))""",
        "assert f({pid})",
    ),
    "another process by process_vm_readv": (
        LIBC
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
        LIBC
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

# Each returns True if it reached the server, socket or name that the test provides.
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
    "outlives its parent": LIBC + "def f(n):\n    libc.prctl(1, 0, 0, 0, 0)\n    while True: pass",
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
    "waits on the wire": DESCRIPTORS + "def f(n):\n    for fd in descriptors(): os.read(fd, 1)",
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
    "shared memory of System V": LIBC + "def f(n):\n    for i in range(64): libc.shmget(0, 1 << 30, 0o1666)",
    "files in memory": "import os\ndef f(n):\n    while True: os.write(os.memfd_create('x'), bytes(1 << 20))",
    "a queue of messages": LIBC + "def f(n):\n    for i in range(64): libc.msgget(i + 4242, 0o1666)",
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
    "mounts": LIBC + "def f(n): libc.mount(b'none', b'.', b'tmpfs', 0, None); libc.unshare(0x10020000)",
}
