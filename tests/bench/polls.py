"""How long the polls of tasks and the turns of its event loop take a thread of a sidecar, by the kernel's own tracing: a
probe where tokio runs a task, one where it is done, and the calls of epoll_wait.

Two times are told of each. What it was `charged` is the kernel's account: from its begin to its end, less the time when
the thread was switched out. On a virtual machine that includes the pauses of the processor itself, when the host runs
something else. So a timer interrupts the thread after each 0.1 ms of its time, and where it did not for much longer,
the processor stood still: what the thread `ran` is the same with each such gap counted as no more than 0.3 ms.
"""

import collections
import contextlib
import os
import re
import subprocess
import time

from machine import Failed, run

TRACING = "/sys/kernel/tracing"
RUN_TASK = "tokio::runtime::scheduler::current_thread::Context::run_task"
TIMER = 100_000  # ns
GAP = 0.0003  # s
LONG = 0.002  # s: it is told where the timer found a poll that ran for longer
Stretch = collections.namedtuple("Stretch", "begin charged ran where")  # s of the monotonic clock, s, s, Counter or None


class Probes:
    """Where tokio runs a task in a program; `with` takes them away again."""

    def __init__(self, program):
        self.group = f"weft{os.getpid()}"
        place = f"{program}:{offset(program, RUN_TASK):#x}"
        self.probes = {f"{self.group}/begin": f"p:{self.group}/begin {place}", f"{self.group}/end": f"r:{self.group}/end {place}"}

    def __enter__(self):
        if not os.path.exists(f"{TRACING}/uprobe_events"):
            raise Failed(f"the kernel's tracing is not there, or knows no uprobes. Try: mount -t tracefs none {TRACING}")
        remove_leftovers()
        try:
            for probe in self.probes.values():
                tell(probe)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        for name in self.probes:
            with contextlib.suppress(Failed):
                tell(f"-:{name}")


def remove_leftovers():
    """Probes of a run that was killed."""
    with open(f"{TRACING}/uprobe_events") as file:
        names = re.findall(r"^.:(weft(\d+)/\w+)", file.read(), re.M)
    for name, owner in names:
        if not os.path.exists(f"/proc/{owner}"):
            tell(f"-:{name}")


def tell(probe):
    try:
        file = os.open(f"{TRACING}/uprobe_events", os.O_WRONLY | os.O_APPEND)
        try:
            os.write(file, probe.encode())
        finally:
            os.close(file)
    except OSError as error:
        raise Failed(f"the kernel refuses the probe `{probe}`: {error}") from error


def offset(program, name):
    """Where in the file a function begins."""
    found = [line.split(" ", 2) for line in run(["nm", "-C", program]).splitlines() if line.endswith(" " + name)]
    if len(found) != 1:
        raise Failed(f"{program} has {len(found)} symbols {name}; it must have one, and not be stripped")
    address = int(found[0][0], 16)
    for line in run(["readelf", "-lW", program]).splitlines():
        fields = line.split()
        if fields[:1] == ["LOAD"]:
            at, virtual, size = (int(fields[number], 16) for number in (1, 2, 4))
            if virtual <= address < virtual + size:
                return address - virtual + at
    raise Failed(f"{program}: no segment holds {name}")


class Recording:
    """Of one thread, until `stop`; `with` ends it in any case, since nothing else may use the probes when they go."""

    def __init__(self, place, probes, name, thread):
        self.place, self.file = place, place.path(f"{name}.perf")
        call = "epoll_wait" if os.path.exists(f"{TRACING}/events/syscalls/sys_enter_epoll_wait") else "epoll_pwait"
        events = [f"{probes.group}:*", f"syscalls:sys_enter_{call}", f"syscalls:sys_exit_{call}", f"cpu-clock/period={TIMER}/"]
        arguments = ["perf", "record", "-k", "CLOCK_MONOTONIC", "--switch-events", "-m", "8192", "-t", thread, "-o", self.file]
        self.process = place.start(name, arguments + [word for event in events for word in ("-e", event)], place.here)

    def __enter__(self):
        time.sleep(1)  # perf says nothing when it has begun
        self.process.check()
        return self

    def __exit__(self, *_):
        self.process.stop()
        if self.process in self.place.machine.processes:
            self.place.machine.processes.remove(self.process)

    def stop(self):
        """Polls and turns, each a list of stretches."""
        self.process.check()
        self.__exit__()
        with open("/proc/sys/kernel/perf_event_max_sample_rate") as file:
            rate = int(file.read())
        if rate * TIMER < 2e9:
            raise Failed(f"the kernel allows only {rate} samples a second (kernel.perf_event_max_sample_rate)")
        script = ["perf", "script", "-i", self.file, "--ns", "--show-switch-events", "--show-lost-events"]
        script += ["-F", "time,event,ip,sym"]
        with subprocess.Popen(script, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as perf:
            stretches = read(perf.stdout)
        if perf.returncode != 0:
            raise Failed(f"perf script ended with {perf.returncode}")
        os.remove(self.file)
        return stretches


def read(lines):
    """Lines are `TIME: EVENT: INSTRUCTION FUNCTION`, or what perf says of a switch."""
    polls, turns, poll, turn, last, runs = [], [], None, None, None, False
    for line in lines:
        at, _, event = line.strip().partition(": ")
        if "LOST" in event:
            raise Failed(f"perf lost events: {event.strip()}")
        if not event:
            continue
        now, (event, _, where) = float(at), event.strip().partition(": ")
        for stretch in (poll, turn):
            if stretch and runs:
                stretch[1] += now - last
                stretch[2] += min(now - last, GAP)
        last = now
        if event.startswith("PERF_RECORD_SWITCH"):
            runs = " IN" in event
        elif "sys_exit_epoll" in event:
            turn = [now, 0.0, 0.0]
        elif "sys_enter_epoll" in event and turn:
            turns.append(Stretch(*turn, None))
            turn = None
        elif event.endswith(":begin"):
            poll, found = [now, 0.0, 0.0], []
        elif event.endswith(":end") and poll:
            polls.append(Stretch(*poll, collections.Counter(found) if poll[2] > LONG else None))
            poll = None
        elif event.startswith("cpu-clock") and poll:
            found.append(" ".join(where.split()))
    return polls, turns
