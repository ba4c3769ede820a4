"""Runs the tests of one program, a process for each. ``sandbox`` starts it inside of the sandbox, from its source text.

It knows the program and the inputs. What is expected stays outside, so no program can find it. It imports the standard
library only. Each process has limits of time, memory and files, and a seccomp filter: it cannot start processes, send
signals, open sockets, trace others, or keep memory in segments that its limit does not count.

The request is one JSON object on the standard input: ``program``, ``tests`` (each ``{"input": text}`` or ``{"call":
text}``), ``seconds`` (of CPU time, for all tests; ``WALL`` times as much on the clock), ``memory``, ``file`` and ``output``
(bytes). The replies are lines of JSON: ``{}`` when it is ready, then one for each test: ``status`` (exit status; negative =
signal), ``over`` (time or output, if that limit ended it), ``output``, ``value`` (of a call, as JSON text, or null),
``error`` (the end of its standard error), ``cpu`` and ``wall`` (seconds).
"""

from __future__ import annotations

import builtins
import ctypes
import json
import os
import platform
import resource
import select
import signal
import struct
import sys
import time
from typing import Any

WALL = 3.0
"""Seconds of wall time for one of CPU time: the machine may be busy."""
ERROR = 2000
"""Characters of the standard error that are kept."""
_THREAD = 0x10000  # CLONE_THREAD
# By machine: AUDIT_ARCH, clone, clone3, and the calls that are refused. The tables of Linux: arch/x86/entry/syscalls, and
# include/uapi/asm-generic/unistd.h for arm64.
_CALLS = {
    "x86_64": (
        0xC000003E,
        56,
        435,
        {
            **{"fork": 57, "vfork": 58, "execve": 59, "execveat": 322, "kill": 62, "tkill": 200, "tgkill": 234},
            **{"rt_sigqueueinfo": 129, "rt_tgsigqueueinfo": 297, "pidfd_send_signal": 424, "ptrace": 101},
            **{"process_vm_readv": 310, "process_vm_writev": 311, "socket": 41, "unshare": 272, "setns": 308},
            **{"mount": 165, "umount2": 166, "pivot_root": 155, "chroot": 161, "bpf": 321, "perf_event_open": 298},
            **{"userfaultfd": 323, "keyctl": 250, "add_key": 248, "request_key": 249, "open_by_handle_at": 304},
            **{"shmget": 29, "semget": 64, "msgget": 68, "mq_open": 240, "syslog": 103},
        },
    ),
    "aarch64": (
        0xC00000B7,
        220,
        435,
        {
            **{"execve": 221, "execveat": 281, "kill": 129, "tkill": 130, "tgkill": 131},
            **{"rt_sigqueueinfo": 138, "rt_tgsigqueueinfo": 240, "pidfd_send_signal": 424, "ptrace": 117},
            **{"process_vm_readv": 270, "process_vm_writev": 271, "socket": 198, "unshare": 97, "setns": 268},
            **{"mount": 40, "umount2": 39, "pivot_root": 41, "chroot": 51, "bpf": 280, "perf_event_open": 241},
            **{"userfaultfd": 282, "keyctl": 219, "add_key": 217, "request_key": 218, "open_by_handle_at": 265},
            **{"shmget": 194, "semget": 190, "msgget": 186, "mq_open": 180, "syslog": 116},
        },
    ),
}
# New calls have the same number everywhere: io_uring, open_tree to fspick, pidfd_getfd, mount_setattr.
_NEW = (425, 426, 427, *range(428, 434), 438, 442)
MACHINES = tuple(_CALLS)
"""Machines that it knows the system calls of."""


def main() -> None:
    """Run the tests of the request on the standard input."""
    request = json.loads(sys.stdin.buffer.read())
    replies = os.dup(1)
    _write(replies, {})
    left = float(request["seconds"])
    until = time.monotonic() + left * WALL
    for test in request["tests"]:
        reply = _run(request, test, left, until)
        left -= reply["cpu"]
        _write(replies, reply)


def _write(replies: int, reply: dict[str, Any]) -> None:
    data = memoryview(json.dumps(reply).encode() + b"\n")
    while data:
        data = data[os.write(replies, data) :]


def _run(request: dict[str, Any], test: dict[str, str], left: float, until: float) -> dict[str, Any]:
    """The reply to one test, for which ``left`` seconds of CPU time are left, and the time on the clock until ``until``."""
    source = os.memfd_create("input")
    os.write(source, test.get("input", "").encode("utf-8", "surrogatepass"))
    os.lseek(source, 0, os.SEEK_SET)
    pipes = [os.pipe() for _ in range(3)]  # output, errors, value of the call
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        _child(request, test, left, [source, *(write for _, write in pipes)])
    os.close(source)
    for _, write in pipes:
        os.close(write)
    got, over = _read(child, [read for read, _ in pipes], request["output"], min(until, start + left * WALL))
    _, status, usage = os.wait4(child, 0)
    for read, _ in pipes:
        os.close(read)
    cpu = usage.ru_utime + usage.ru_stime
    code = os.waitstatus_to_exitcode(status)
    # The limit of the process is in whole seconds.
    if over is None and (code == -signal.SIGXCPU or cpu > left or (code == -signal.SIGKILL and cpu >= left - 0.1)):
        over = "time"
    output, error, value = (bytes(part).decode("utf-8", "replace") for part in got)
    return {
        "status": code,
        "over": over,
        "output": output,
        "value": value or None,
        "error": error[-ERROR:],
        "cpu": cpu,
        "wall": time.monotonic() - start,
    }


def _read(child: int, pipes: list[int], most: int, until: float) -> tuple[list[bytearray], str | None]:
    """What a process writes until it ends. It is killed when it writes or takes too much."""
    got, over = [bytearray() for _ in pipes], None
    ended = os.pidfd_open(child)
    poll = select.poll()
    for descriptor in (*pipes, ended):
        poll.register(descriptor, select.POLLIN)
    open_ones = set(pipes)
    while True:
        ready = poll.poll(max(until - time.monotonic(), 0) * 1000 + 1)
        if not ready:
            over = over or "time"
        for descriptor, _ in ready:
            if descriptor in open_ones:
                part = os.read(descriptor, 1 << 16)
                if not part:
                    poll.unregister(descriptor)
                    open_ones.discard(descriptor)
                got[pipes.index(descriptor)] += part
                if len(got[pipes.index(descriptor)]) > most:
                    over = "output"
        if over:
            os.kill(child, signal.SIGKILL)
            break
        if [descriptor for descriptor, _ in ready] == [ended]:
            break  # it has ended, and nothing is left to read
    os.close(ended)
    return [part[:most] for part in got], over


def _child(request: dict[str, Any], test: dict[str, str], left: float, files: list[int]) -> None:
    """Become the process of one test. Raises SystemExit, so that the interpreter ends as it does for any program."""
    status = 1
    try:
        for place, descriptor in enumerate(files):
            os.dup2(descriptor, place + 100)
        for place in range(len(files)):
            os.dup2(place + 100, place)
        os.closerange(len(files), 1024)
        _limit(request, left)
    except BaseException as error:
        os.write(2, f"the limits of the process cannot be set: {error!r}".encode())
        os._exit(99)
    value = 3
    builtins.exit = builtins.quit = sys.exit  # type: ignore[assignment]  # as the module site does, which is left out
    space: dict[str, Any] = {"__name__": "__main__" if "input" in test else "program", "__builtins__": __builtins__}
    try:
        exec(compile(request["program"], "program.py", "exec"), space)
        if "call" in test:
            os.write(value, json.dumps(plain(eval(compile(test["call"], "test", "eval"), space))).encode())
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException as error:
        import traceback

        traceback.print_exception(error, limit=-3)
    try:
        sys.stdout.flush()
    except BaseException:
        status = status or 1
    sys.exit(status & 255)


def plain(value: Any, depth: int = 0) -> Any:
    """``value`` as JSON can hold it. Tuples are lists. Sets and dictionaries are marked, so that no list equals them."""
    if depth > 100:
        raise ValueError("the value is nested too deeply")
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [plain(one, depth + 1) for one in value]
    if isinstance(value, (set, frozenset)):
        return {"set": sorted((plain(one, depth + 1) for one in value), key=json.dumps)}
    if isinstance(value, dict):
        pairs = ([plain(key, depth + 1), plain(one, depth + 1)] for key, one in value.items())
        return {"dict": sorted(pairs, key=json.dumps)}
    return {"other": repr(value)[:1000]}


def _limit(request: dict[str, Any], left: float) -> None:
    seconds = max(1, int(left + 0.999))
    # SIGXCPU before SIGKILL: a SIGKILL may also mean too little memory, and the CPU time that Linux reports then may be
    # less than the limit that it applied.
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    for limit, most in (
        (resource.RLIMIT_AS, request["memory"]),
        (resource.RLIMIT_FSIZE, request["file"]),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (most, most))
    _filter()


def _filter() -> None:
    """Refuse system calls with EPERM by a filter of seccomp, for this process. A thread may be started, a process not."""
    audit, clone, clone3, refused = _CALLS[platform.machine()]
    numbers = sorted({*refused.values(), *_NEW})
    load, equal, ahead, test_bits, end = 0x20, 0x15, 0x35, 0x45, 0x06  # opcodes of classic BPF
    allow, errno = 0x7FFF0000, 0x00050000
    code = [
        (load, 0, 0, 4),  # the architecture
        (equal, 1, 0, audit),
        (end, 0, 0, 0x80000000),  # another one: end the process
        (load, 0, 0, 0),  # the number of the call
        (ahead, 0, 1, 0x40000000),  # x32
        (end, 0, 0, errno | 1),
        (equal, 0, 1, clone3),
        (end, 0, 0, errno | 38),  # ENOSYS: the C library then takes clone
        (equal, 0, 4, clone),
        (load, 0, 0, 16),  # its flags
        (test_bits, 0, 1, _THREAD),
        (end, 0, 0, allow),
        (end, 0, 0, errno | 1),
        *((equal, len(numbers) - place, 0, number) for place, number in enumerate(numbers)),
        (end, 0, 0, allow),
        (end, 0, 0, errno | 1),
    ]
    program = b"".join(struct.pack("HBBI", *line) for line in code)
    buffer = ctypes.create_string_buffer(program)
    header = struct.pack("HP", len(code), ctypes.addressof(buffer))
    libc = ctypes.CDLL(None, use_errno=True)
    pdeathsig, no_new_privileges, seccomp, by_filter = 1, 38, 22, 2
    libc.prctl(pdeathsig, signal.SIGKILL, 0, 0, 0)
    if libc.prctl(no_new_privileges, 1, 0, 0, 0) or libc.prctl(seccomp, by_filter, header, 0, 0):
        raise OSError(ctypes.get_errno(), "seccomp is not available")


if __name__ == "__main__":
    main()
