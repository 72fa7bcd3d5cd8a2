"""Programming languages: how a file of each is compiled and run, and how one function of it is called.

A harness reads the call from its input and writes the result as JSON to its output; what the program itself prints
goes to stderr. Nothing of what a test expects is ever inside the sandbox.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from r1mega.reward.sandbox import BOX, SandboxError

_SOLUTION_CLASS = re.compile(r"\b(?:class|struct)\s+Solution\b")
IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")

_PYTHON_CALL = """
import json, os, sys
channel = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
call = json.load(sys.stdin)
scope = {"__name__": "solution"}
with open("main.py", encoding="utf-8") as file:
    exec(compile(file.read(), "main.py", "exec"), scope)
function = scope.get(call["function"])
if function is None and "Solution" in scope:
    function = getattr(scope["Solution"](), call["function"])
arguments = call["arguments"]
result = function(**arguments) if isinstance(arguments, dict) else function(*arguments)
channel.write(json.dumps(result))
channel.flush()
"""

_JAVASCRIPT_CALL = """
const fs = require('fs'), vm = require('vm');
const call = JSON.parse(fs.readFileSync(0, 'utf8'));
process.stdout.write = process.stderr.write.bind(process.stderr);
globalThis.require = require;
globalThis.module = module;
vm.runInThisContext(fs.readFileSync('main.js', 'utf8'), {filename: 'main.js'});
const found = vm.runInThisContext(`typeof ${call.function} === 'function' ? ${call.function} : undefined`);
const result = JSON.stringify(found(...call.arguments));
fs.writeSync(1, result === undefined ? 'null' : result);
"""


_CPP_CALL = """
#include <sstream>
#include <iomanip>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>
#include <utility>
#include <iostream>
#include <unistd.h>
namespace r1mega_call {
inline void put(std::ostream& o, bool v) { o << (v ? "true" : "false"); }
inline void put(std::ostream& o, const std::string& v) {
    o << '"';
    for (unsigned char c : v) {
        if (c == '"' || c == '\\\\') o << '\\\\' << c;
        else if (c < 32) o << "\\\\u" << std::hex << std::setw(4) << std::setfill('0') << int(c) << std::dec;
        else o << c;
    }
    o << '"';
}
inline void put(std::ostream& o, const char* v) { put(o, std::string(v)); }
inline void put(std::ostream& o, char v) { put(o, std::string(1, v)); }
template <class T, class = std::enable_if_t<std::is_arithmetic_v<T>>>
void put(std::ostream& o, T v) { o << std::setprecision(17) << v; }
template <class T> void put(std::ostream& o, const std::vector<T>& v);
template <class A, class B> void put(std::ostream& o, const std::pair<A, B>& v) {
    o << '['; put(o, v.first); o << ','; put(o, v.second); o << ']';
}
template <class T> void put(std::ostream& o, const std::vector<T>& v) {
    o << '[';
    for (size_t i = 0; i < v.size(); ++i) { if (i) o << ','; put(o, static_cast<T>(v[i])); }
    o << ']';
}
template <class R, class... A> std::tuple<std::decay_t<A>...> of(R (*)(A...));
template <class R, class C, class... A> std::tuple<std::decay_t<A>...> of(R (C::*)(A...));
template <class R, class C, class... A> std::tuple<std::decay_t<A>...> of(R (C::*)(A...) const);
template <class F, class T> int call(F f, T& arguments) {
    int channel = dup(1);
    dup2(2, 1);
    std::ostringstream o;
    put(o, std::apply(f, arguments));
    std::string text = o.str();
    for (size_t done = 0; done < text.size();) {
        ssize_t more = write(channel, text.data() + done, text.size() - done);
        if (more <= 0) return 4;
        done += more;
    }
    return 0;
}
}
"""


@dataclass(frozen=True)
class Language:
    """One language: commands inside the sandbox.

    `compile` makes the file `main`, which `run` starts; without it `run` starts `file` itself. `call` runs the harness
    (a file's name and text) beside the program. `reserved` is added to the limit on addresses, in bytes, for a runtime
    that reserves more of them than it uses.
    """

    name: str
    file: str
    run: tuple[str, ...]
    compile: tuple[str, ...] | None = None
    harness: tuple[str, str] | None = None
    call: tuple[str, ...] = ()
    reserved: int = 0


def _program(name: str) -> str:
    """The path of a program in /usr, which is what the sandbox shows. Raises SandboxError where there is none."""
    found = shutil.which(name, path="/usr/bin:/usr/local/bin")
    if found is None:
        raise SandboxError(
            f"no {name} in /usr/bin or /usr/local/bin; install it, or leave programs that need it out of the data"
        )
    return str(Path(found).resolve())


def _python() -> Language:
    command = (_program("python3"), "-I")
    run, call = (*command, f"{BOX}/main.py"), (*command, f"{BOX}/call.py")
    return Language("python", "main.py", run, harness=("call.py", _PYTHON_CALL), call=call)


def _cpp() -> Language:
    compiler = (_program("g++"), "-O2", "-std=c++17", "-w", "-o", f"{BOX}/main", f"{BOX}/main.cpp")
    return Language("cpp", "main.cpp", (f"{BOX}/main",), compile=compiler)


def _javascript() -> Language:
    command = (_program("node"), "--max-old-space-size=512")
    run, call = (*command, f"{BOX}/main.js"), (*command, f"{BOX}/call.js")
    harness = ("call.js", _JAVASCRIPT_CALL)
    return Language("javascript", "main.js", run, harness=harness, call=call, reserved=1 << 30)


_MAKERS: dict[str, Callable[[], Language]] = {"python": _python, "cpp": _cpp, "javascript": _javascript}
_ALIASES = {"": "python", "py": "python", "python3": "python", "c++": "cpp", "cc": "cpp", "js": "javascript",
            "node": "javascript"}  # fmt: skip


@lru_cache(maxsize=8)
def language_of(tag: str) -> Language | None:
    """The language of a code block's tag, None for one that is not run here. Raises SandboxError where a language that
    is run here has no interpreter or compiler on this machine."""
    name = tag.strip().lower()
    maker = _MAKERS.get(_ALIASES.get(name, name))
    return maker() if maker else None


def cpp_call(source: str, calls: Sequence[Mapping[str, Any] | None]) -> str:
    """A C++ program that makes call number `argv[1]` of `calls` to functions of `source`, which has no main of its own.

    Arguments become initializers of the parameters' own types: JSON's lists serve vectors, strings, pairs and structs.
    """
    in_class = _SOLUTION_CLASS.search(source) is not None
    cases = []
    for index, call in enumerate(calls):
        if call is None:
            continue
        if not isinstance(call["arguments"], list):
            raise SandboxError("a C++ function is called with a list of arguments; the test names them")
        name = call["function"]
        address, called = (f"&Solution::{name}", f"Solution().{name}") if in_class else (f"&{name}", name)
        arguments = ", ".join(map(_cpp_value, call["arguments"]))
        cases.append(
            f"case {index}: {{ decltype(r1mega_call::of({address})) a{{{arguments}}}; "
            f"return r1mega_call::call([](auto&... x) {{ return {called}(x...); }}, a); }}"
        )
    body = "\n".join(cases)
    return f"{source}\n{_CPP_CALL}\nint main(int, char** v) {{ switch (std::stoi(v[1])) {{\n{body}\n}} return 3; }}\n"


def _cpp_value(value: Any) -> str:
    """A JSON value as a C++ initializer."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value) if abs(value) < 1 << 31 else f"{value}LL"
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, str):
        return 'std::string("' + "".join(f"\\{byte:03o}" for byte in value.encode()) + f'", {len(value.encode())})'
    if isinstance(value, list):
        return "{" + ", ".join(map(_cpp_value, value)) + "}"
    raise SandboxError(f"a C++ function cannot be given {type(value).__name__} {str(value)[:40]!r}")
