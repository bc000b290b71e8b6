"""A program under callgrind (valgrind): how it is started and told when to count, and what its dump says.

The format of a dump is in valgrind's manual, "Callgrind Format Specification". Read is what one thread did: its own
instructions of each function, and who called the allocator how often. Inclusive costs are not.
"""

import collections
import glob
import os
import re

from machine import Failed

ALLOCATING = {"malloc", "calloc", "realloc", "posix_memalign", "aligned_alloc", "memalign"}
# between the code that wants memory and the allocator: not worth naming as a caller
GLUE = re.compile(
    r"(__rustc::)?__r(ust|dl|g)_(alloc|alloc_zeroed|realloc)|<?alloc::(alloc|raw_vec|boxed|vec)::|<?std::(sys::)?alloc"
    r"|<alloc::(boxed::Box|vec::Vec|string::String|sync::Arc)|<bytes::bytes_mut::BytesMut>::reserve_inner"
)
CONTROL_PATIENCE = 60  # seconds for valgrind to hear a command


def command(folder, program):
    """`program` (a command) as it is started under callgrind; nothing is counted yet."""
    # --vgdb-prefix: the pipes it is told through lie in our folder, which is removed in any case
    options = ["--instr-atstart=no", "--separate-threads=yes", f"--callgrind-out-file={folder}/counted"]
    return ["valgrind", "-q", "--tool=callgrind", f"--vgdb-prefix={folder}/vgdb", *options, *program]


class Control:
    """Tells a running callgrind when to count. Speaks as the user of the program: another one is not heard."""

    def __init__(self, machine, namespace, folder, process, user):
        self.machine, self.namespace, self.folder, self.process = machine, namespace, folder, process
        self.prefix = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups"]

    def count(self, work):
        """Counts while `work()` runs, and gives what each thread did."""
        self.tell("instrumentation on")
        result = work()
        self.tell("instrumentation off")
        self.tell("dump")
        dumps = [read(path) for path in glob.glob(os.path.join(glob.escape(self.folder), "counted.*"))]
        if not any(dump.instructions for dump in dumps):
            raise Failed(f"callgrind counted nothing in {self.process.name}")
        return dumps, result

    def tell(self, words):
        vgdb = ["vgdb", f"--vgdb-prefix={self.folder}/vgdb", f"--pid={self.process.pid}"]
        vgdb += ["--wait=10", f"--cmd-time-out={CONTROL_PATIENCE}", *words.split()]
        self.machine.run(self.prefix + vgdb, self.namespace, CONTROL_PATIENCE + 20)
        self.process.check()


class Dump:
    """What one thread did while it was counted."""

    def __init__(self):
        self.instructions = 0
        self.functions = collections.Counter()  # name to own instructions
        self.libraries = collections.Counter()  # crate or library to instructions of its code, wherever it was inlined
        self.calls = collections.defaultdict(collections.Counter)  # name to callers to number of calls

    def allocations(self):
        return sum(self.calls[name].total() for name in ALLOCATING & self.calls.keys())

    def allocating(self):
        """Who allocates how often, seen through the code that only passes it on."""
        found, open_ = collections.Counter(), collections.Counter()
        for name in ALLOCATING & self.calls.keys():
            open_.update(self.calls[name])
        for _ in range(8):
            passed = collections.Counter()
            for name, times in open_.items():
                callers = self.calls.get(name)
                if callers and GLUE.match(name):
                    for caller, share in callers.items():
                        passed[caller] += times * share / callers.total()
                else:
                    found[name] += times
            open_ = passed
        found.update(open_)
        return found


NAMED = re.compile(r"\((\d+)\)(?: (.*))?$")


def read(path):
    """Reads the dump of one thread."""
    dump, functions, files, objects = Dump(), {}, {}, {}
    function = called = library = file = object_ = ""
    is_call = False
    with open(path, errors="replace") as lines:
        for line in lines:
            first = line[:1]
            if first.isdigit() or first in "+-*":
                if is_call:  # what the called function cost, which it says itself
                    is_call = False
                    continue
                cost = int(line.split()[-1])
                dump.functions[function] += cost
                dump.libraries[library] += cost
                dump.instructions += cost
                continue
            key, equals, value = line.rstrip("\n").partition("=")
            if not equals:
                continue
            if key == "fn":
                function = plain(full(functions, value))
            elif key in ("fl", "fi", "fe"):
                file = full(files, value)
                library = library_of(file, object_)
            elif key == "ob":
                object_ = full(objects, value)
                library = library_of(file, object_)
            elif key == "cfn":
                called = plain(full(functions, value))
            elif key in ("cfi", "cfl"):
                full(files, value)
            elif key == "cob":
                full(objects, value)
            elif key == "calls":
                dump.calls[called][function] += int(value.split()[0])
                is_call = True
    return dump


def full(table, text):
    """A name is written once, with a number; then the number stands for it."""
    found = NAMED.match(text)
    if not found:
        return text
    if found[2]:
        table[found[1]] = found[2]
    return table.get(found[1], text)


def plain(name):
    """Without the hash of the compiler, and what callgrind adds at recursion."""
    return re.sub(r"(::h[0-9a-f]{16})?('\d+)?$", "", name)


def library_of(file, object_):
    for pattern, word in (
        (r"/registry/src/[^/]+/([^/]+)/", None),
        (r"/rustc/[0-9a-f]+/library/(\w+)/|/lib/rustlib/src/rust/library/(\w+)/", None),
        (r"(?:^|/)(sidecar|proto)/src/", "weft-"),
    ):
        found = re.search(pattern, file)
        if found:
            return (word or "") + next(group for group in found.groups() if group)
    return os.path.basename(object_) or "unknown"
