"""Programs that try to get out of the sandbox, to see what they must not, or to take the machine down with them.

Each is for the test `{"input": "SECRET-INPUT", "output": EXPECTED}`; where an attack succeeds it prints what it found,
which would be the expected output. MARK is put into the name of whatever they write, so that it can be looked for.
"""

from __future__ import annotations

EXPECTED = "r1mega-expected-5e1f"
MARK = "r1mega-mark-77c3"

# Looks through all that can be read for the expected output.
_SEARCH = """
import os
NEEDLE = "r1mega-expected-" + "5e1f"
def search(top):
    for folder, _, names in os.walk(top):
        for name in names:
            path = os.path.join(folder, name)
            try:
                if os.path.getsize(path) < 1 << 20 and NEEDLE in open(path, errors="replace").read():
                    print(NEEDLE); raise SystemExit
            except OSError:
                pass
"""
_ESCAPED = 'print("r1mega-expected-" + "5e1f")\n'

PYTHON: dict[str, str] = {
    "endless loop": "while True: pass",
    "sleeps for ever": "import time\nwhile True:\n    time.sleep(1000)",
    "endless loop deaf to signals": (
        "import signal\nfor s in range(1, 32):\n    try: signal.signal(s, signal.SIG_IGN)\n"
        "    except OSError: pass\nwhile True: pass"
    ),
    "one endless operation": "9**9**9",
    "fork bomb": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "thread bomb": (
        "import threading, time\nwhile True:\n    threading.Thread(target=time.sleep, args=(1000,)).start()"
    ),
    "10 GB at once": "x = bytearray(10 << 30)\nprint(len(x))",
    "10 GB in small parts": "x = []\nwhile True: x.append(bytearray(b'x') * (1 << 20))",
    "10 GB over children": (
        "import os, time\nfor _ in range(16):\n    if os.fork() == 0:\n        x = b'x' * (700 << 20)\n"
        "        time.sleep(1000)\ntime.sleep(1000)"
    ),
    "memory files": (
        "import ctypes, os\nl = ctypes.CDLL(None)\nfds = []\nwhile len(fds) < 8:\n    fd = l.memfd_create(b'x', 0)\n"
        "    if fd < 0: break\n    os.write(fd, b'x' * (4 << 20)); fds.append(fd)\n"
        + "if len(fds): " + _ESCAPED
    ),
    "shared memory that outlives processes": (
        "import ctypes\nl = ctypes.CDLL(None)\nif l.shmget(0, 1 << 20, 0o1777) >= 0:\n    " + _ESCAPED
    ),
    "endless output": "while True: print('y' * 1000)",
    "endless errors": "import sys\nwhile True: print('y' * 1000, file=sys.stderr)",
    "one endless line": "import sys\nwhile True: sys.stdout.write('y' * 100000)",
    "fills the disk with one file": (
        f"f = open('{MARK}', 'wb')\nwhile True: f.write(b'x' * (1 << 20))"
    ),
    "fills the disk with many files": (
        f"i = 0\nwhile True:\n    open('{MARK}' + str(i), 'wb').write(b'x' * (1 << 20)); i += 1"
    ),
    "opens files without end": f"x = []\nwhile True: x.append(open('{MARK}' + str(len(x)), 'w'))",
    "reads the tests": _SEARCH + "search('/')",
    "reads the command lines and memories of others": (
        "import glob\nif glob.glob('/proc/*/cmdline') + glob.glob('/proc/*/environ'):\n    " + _ESCAPED
    ),
    "reads /etc/passwd": "open('/etc/passwd').read()\n" + _ESCAPED,
    "reads the homes": "import os\nos.listdir('/root')\n" + _ESCAPED,
    "reads its caller's memory": (
        "import os\nopen(f'/proc/{os.getppid()}/mem', 'rb').read(1)\n" + _ESCAPED
    ),
    "inherited descriptors": (
        "import os\nfor fd in range(3, 64):\n    try: data = os.pread(fd, 1 << 20, 0)\n    except OSError: continue\n"
        "    if b'r1mega-expected' in data: " + _ESCAPED
    ),
    "environment": "import os\nif any('r1mega' in k.lower() or 'TOKEN' in k for k in os.environ): " + _ESCAPED,
    "writes to /tmp": f"open('/tmp/{MARK}', 'w').write('x')\n" + _ESCAPED,
    "writes to /dev/shm": f"open('/dev/shm/{MARK}', 'w').write('x')\n" + _ESCAPED,
    "writes to /usr": f"open('/usr/{MARK}', 'w').write('x')\n" + _ESCAPED,
    "writes upwards": f"open('../{MARK}', 'w').write('x')\n" + _ESCAPED,
    "a link to outside": f"import os\nos.symlink('/tmp', 'out')\nopen('out/{MARK}', 'w').write('x')\n" + _ESCAPED,
    "links to what it may not read": (
        "import os\nos.symlink('/etc/shadow', 'main.txt')\nopen('main.txt').read()\n" + _ESCAPED
    ),
    "a link in place of its own output": (
        "import os\nos.symlink('/dev/stdout', 'x')\nos.remove('main.py')\nos.symlink('/etc/passwd', 'main.py')\n"
        "print(open('main.py').read())\n" + _ESCAPED
    ),
    "a connection": (
        "import socket\ns = socket.socket(); s.settimeout(0.5)\ns.connect(('1.1.1.1', 53))\n" + _ESCAPED
    ),
    "a connection to this machine": (
        "import socket\nfor port in (22, 80, 111, 631, 8000, PORT):\n    s = socket.socket(); s.settimeout(0.5)\n"
        "    try: s.connect(('127.0.0.1', port))\n    except OSError: continue\n    " + _ESCAPED + "    break"
    ),
    "abstract sockets of this machine": (
        "import socket\ns = socket.socket(socket.AF_UNIX)\ns.connect('\\0" + MARK + "')\n" + _ESCAPED
    ),
    "raw packets": "import socket\nsocket.socket(socket.AF_PACKET, socket.SOCK_RAW)\n" + _ESCAPED,
    "kills its parent": "import os\nos.kill(os.getppid(), 9)\nimport time; time.sleep(1000)",
    "kills all it can": "import os\nos.kill(-1, 9)\nimport time; time.sleep(1000)",
    "stops its parent": "import os, signal\nos.kill(os.getppid(), signal.SIGSTOP)\nimport time; time.sleep(1000)",
    "a sleeping child left behind": (
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        time.sleep(1000)\n"
        "    os._exit(0)\nprint('gone')"
    ),
    "a child that holds its output": (
        "import os, time\nif os.fork() == 0:\n    os.setsid(); time.sleep(1000)\nprint('gone')"
    ),
    "becomes root": "import os\nos.setuid(0)\n" + _ESCAPED,
    "new namespaces": (
        "import ctypes\nif ctypes.CDLL(None).unshare(0x10000000) == 0:\n    " + _ESCAPED
    ),
    "traces others": (
        "import ctypes\nl = ctypes.CDLL(None)\nif 0 in (l.ptrace(16, 1, 0, 0), l.ptrace(0, 0, 0, 0)):\n    " + _ESCAPED
    ),
    "leaves in the middle": "import os\nos._exit(0)",
    "dies": "import os\nos.abort()",
    "deep recursion": "import sys\nsys.setrecursionlimit(10**9)\ndef f(): f()\nf()",
    "prints its input": "print(input())",
}  # fmt: skip

CPP: dict[str, str] = {
    "reads a file while compiling": '#include "/etc/passwd"\nint main() {}',
    "compiles for ever": (
        "template <int N> struct A { static const int v = A<N - 1>::v + A<N - 2>::v + A<(N * 7) % 1000003>::v; };\n"
        "int main() { return A<900>::v; }"
    ),
    "a program of a gigabyte": "char x[1 << 30] = {1};\nint main() {}",
    "takes the tests into itself": 'asm(".incbin \\"/proc/self/environ\\"");\nint main() {}',
}

JAVASCRIPT: dict[str, str] = {
    "endless loop": "for (;;) {}",
    "a sleeping child": (
        "const child = require('child_process');\n"
        "child.spawn('sleep', ['1000'], {detached: true, stdio: 'ignore'}).unref();\nconsole.log('gone')"
    ),
    "memory": "const x = []; for (;;) x.push(Buffer.alloc(1 << 26, 1));",
}
