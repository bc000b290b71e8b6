"""How often a process does something: system calls and heap allocations, counted by the kernel (perf events on
tracepoints and on probes at the allocator's functions), so that the release build is counted as it is.
"""

import contextlib
import ctypes
import os
import platform
import re
import struct
import subprocess

from machine import LIBC, Failed, run

TRACING = "/sys/kernel/tracing"
GROUP = f"weftbench{os.getpid()}"
PERF_EVENT_OPEN = {"x86_64": 298, "aarch64": 241}
TRACEPOINT = 2
INHERIT = 1 << 1
# of glibc, and of allocators that a program may bring along
ALLOCATING = re.compile(
    r"(malloc|calloc|realloc|memalign|posix_memalign|aligned_alloc"
    r"|mi_(malloc|zalloc|calloc|realloc|rezalloc)(_aligned)?"
    r"|_rjem_(malloc|calloc|realloc|mallocx|rallocx|aligned_alloc|posix_memalign))"
)


class Unavailable(Exception):
    """This machine or this program does not let itself be counted; the text says why."""


@contextlib.contextmanager
def tracing():
    """The kernel's tracing files, mounted for the time of the count if they are not."""
    mounted = os.path.exists(f"{TRACING}/uprobe_events")
    if not mounted:
        done = subprocess.run(["mount", "-t", "tracefs", "tracefs", TRACING], capture_output=True, text=True)
        if done.returncode != 0 or not os.path.exists(f"{TRACING}/uprobe_events"):
            raise Unavailable(f"the kernel offers no tracefs: {done.stderr.strip()}")
    try:
        yield
    finally:
        if not mounted:
            subprocess.run(["umount", TRACING], capture_output=True)


class Counter:
    """Counts events of all threads of a process, and of those they start."""

    def __init__(self, process, events):
        self.files = []
        for thread in process.threads():
            for event in events:
                self.files.append(self.open(thread, event))

    def open(self, thread, event):
        with open(f"{TRACING}/events/{event}/id") as file:
            number = int(file.read())
        # struct perf_event_attr, its first version
        attributes = struct.pack("=IIQQQQQIIQ", TRACEPOINT, 64, number, 0, 0, 0, INHERIT, 0, 0, 0)
        buffer = ctypes.create_string_buffer(attributes, len(attributes))
        call = PERF_EVENT_OPEN.get(platform.machine())
        if call is None:
            raise Unavailable(f"counting is not known on {platform.machine()}")
        file = LIBC.syscall(call, buffer, thread, -1, -1, 0)
        if file < 0:
            self.close()
            raise Unavailable(f"perf_event_open: {os.strerror(ctypes.get_errno())}")
        return file

    def count(self):
        return sum(struct.unpack("=Q", os.read(file, 8))[0] for file in self.files)

    def close(self):
        for file in self.files:
            os.close(file)
        self.files = []


@contextlib.contextmanager
def system_calls(processes):
    """Gives a function that tells how many each process has made so far."""
    with tracing(), counters([(process, ["raw_syscalls/sys_enter"]) for process in processes]) as count:
        yield count


@contextlib.contextmanager
def allocations(processes):
    """The same for calls of the allocator: malloc and its kin, realloc included."""
    with tracing():
        events, wanted = {}, []
        try:
            for process in processes:
                names = []
                for place in allocator_of(process):
                    if place not in events:
                        events[place] = f"{GROUP}/a{len(events)}"
                        append("uprobe_events", f"p:{events[place]} {place}")
                    names.append(events[place])
                wanted.append((process, names))
            with counters(wanted) as count:
                yield count
        finally:
            for event in events.values():
                with contextlib.suppress(Unavailable):
                    append("uprobe_events", f"-:{event}")


@contextlib.contextmanager
def counters(wanted):
    made = []
    try:
        for process, events in wanted:
            made.append(Counter(process, events))
        yield lambda: [counter.count() for counter in made]
    finally:
        for counter in made:
            counter.close()


def append(name, line):
    try:
        # Python's own "a" seeks, which these files refuse
        file = os.open(f"{TRACING}/{name}", os.O_WRONLY | os.O_APPEND)
        try:
            os.write(file, line.encode() + b"\n")
        finally:
            os.close(file)
    except OSError as error:
        raise Unavailable(f"{name} refused `{line}`: {error.strerror}") from error


def allocator_of(process):
    """FILE:OFFSET of each function that allocates, in the program and in its libc."""
    program = os.readlink(f"/proc/{process.pid}/exe")
    own = symbols(program)
    if "malloc" in own and "_Znwm" not in own:
        raise Unavailable("the program brings an allocator whose `operator new` has no symbol")
    with open(f"/proc/{process.pid}/maps") as file:
        libc = re.search(r"(/\S*/libc\.so\.6|/\S*/libc-2\S*\.so)", file.read())
    found = [f"{program}:{offset:#x}" for offset in own.values()]
    if libc and "malloc" not in own:
        found += [f"{libc[1]}:{offset:#x}" for offset in symbols(libc[1]).values()]
    if not found:
        raise Unavailable("no function that allocates was found")
    return sorted(set(found))


def symbols(path):
    """Allocating functions of a file: name to offset in the file."""
    segments = []
    for line in run(["readelf", "-lW", path]).splitlines():
        words = line.split()
        if words[:1] == ["LOAD"]:
            segments.append([int(word, 16) for word in (words[1], words[2], words[4])])
    found = {}
    for options in (["-D"], []):
        done = subprocess.run(["nm", "--defined-only", *options, path], capture_output=True, text=True)
        for line in done.stdout.splitlines():
            words = line.split()
            name = words[2].split("@")[0] if len(words) == 3 and words[1] in "TtWi" else ""
            if ALLOCATING.fullmatch(name) or name == "_Znwm":
                address = int(words[0], 16)
                for offset, start, size in segments:
                    if start <= address < start + size:
                        found[name] = address - start + offset
    if not segments:
        raise Failed(f"{path} is no ELF file")
    return found
