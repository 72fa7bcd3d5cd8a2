"""A seccomp filter: system calls that no program of a contest needs, refused with EPERM.

They get memory that no limit counts (memory files, System V segments), or open parts of the kernel that have been a way
out of sandboxes before (io_uring, BPF, keys, user faults, tracing).
"""

from __future__ import annotations

import platform
import struct
from functools import lru_cache

# Linux: arch/x86/entry/syscalls/syscall_64.tbl, and include/uapi/asm-generic/unistd.h for aarch64.
_REFUSED = {
    "x86_64": {
        "shmget": 29, "msgget": 68, "ptrace": 101, "mount": 165, "add_key": 248, "request_key": 249, "keyctl": 250,
        "unshare": 272, "perf_event_open": 298, "setns": 308, "process_vm_readv": 310, "process_vm_writev": 311,
        "memfd_create": 319, "bpf": 321, "userfaultfd": 323, "io_uring_setup": 425, "memfd_secret": 447,
    },
    "aarch64": {
        "shmget": 194, "msgget": 186, "ptrace": 117, "mount": 40, "add_key": 217, "request_key": 218, "keyctl": 219,
        "unshare": 97, "perf_event_open": 241, "setns": 268, "process_vm_readv": 270, "process_vm_writev": 271,
        "memfd_create": 279, "bpf": 280, "userfaultfd": 282, "io_uring_setup": 425, "memfd_secret": 447,
    },
}  # fmt: skip
_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_X32_BIT = 0x40000000  # calls of the x32 ABI on x86_64: the same kernel functions under other numbers

_LOAD, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06  # BPF: ld [k]; jeq k; jge k; ret k
_ALLOW, _EPERM, _KILL = 0x7FFF0000, 0x00050001, 0x80000000
_NUMBER_AT, _ARCH_AT = 0, 4  # offsets in struct seccomp_data


@lru_cache(maxsize=1)
def seccomp_filter() -> bytes:
    """The filter of this machine as an array of struct sock_filter. Raises ValueError on an architecture unknown."""
    machine = platform.machine()
    if machine not in _REFUSED:
        raise ValueError(f"the sandbox's filter of system calls is written for {', '.join(_REFUSED)}, not {machine}")
    refused = sorted(_REFUSED[machine].values())
    program = [(_LOAD, 0, 0, _ARCH_AT), (_EQUAL, 1, 0, _AUDIT_ARCH[machine]), (_RETURN, 0, 0, _KILL)]
    program.append((_LOAD, 0, 0, _NUMBER_AT))
    # A jump says how many instructions to pass over; the refusal stands last, after the permission.
    checks = [(_AT_LEAST, _X32_BIT)] * (machine == "x86_64") + [(_EQUAL, number) for number in refused]
    program += [(code, len(checks) - i, 0, value) for i, (code, value) in enumerate(checks)]
    program += [(_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _EPERM)]
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)
