"""Instructions and heap allocations of one proxied request, in each of the two sidecars, counted by callgrind, beside
the last known figures of `instructions.json`. Started by `instructions`.

Counted is the worker thread alone (what the control thread does once a second is no matter of a request), while one
sidecar runs under callgrind and the other as always. The figures do not depend on how busy the machine is.
"""

import argparse
import json
import os
import re
import sys
import time

import apps
import callgrind
from machine import Asked, Failed, Machine, Signals, run
from peers import SAMPLED, USER, Peer, Place, plan_of_weft

KNOWN = os.path.join(os.path.dirname(os.path.abspath(__file__)), "instructions.json")
CONNECTIONS = 32
WARM_UP = 40  # requests of each connection before it counts
REQUESTS = 100  # of each connection, counted
SIDES = ("client", "server")
WORTH_SAYING = 1.0  # percent: a difference below it may be chance
# of the tracing of a share of the requests: the most it may cost in instructions, in percent
TRACING = {0.01: 3, 1: 35}


def main():
    arguments = parse()
    signals = Signals()
    machine = None
    try:
        machine = Machine(signals)
        count(machine, arguments)
        return 0
    except Failed as failure:
        say(f"failed: {failure}")
        return 1
    except Asked as asked:
        say(f"stopped by {asked}")
        return 128 + asked.number
    finally:
        if machine:
            machine.stop()


def parse():
    parser = argparse.ArgumentParser(
        prog="tests/bench/instructions", usage="tests/bench/instructions --help shows the options", add_help=False
    )
    parser.add_argument("--profile", default="dev")
    parser.add_argument("--binaries", required=True)
    parser.add_argument("--tracing", action="store_true")
    parser.add_argument("--update", action="store_true")
    parser.add_argument("--top", type=int, default=0)
    return parser.parse_args()


def count(machine, arguments):
    tools = {name: os.path.join(arguments.binaries, name) for name in ("weft-sidecar", "weft-ca", "bench-peer")}
    begin = time.monotonic()
    counted = count_pair(machine, 1, tools, SAMPLED)
    made_with = versions()
    known = read_known()
    show(counted, known.get(arguments.profile), made_with, arguments.profile)
    if arguments.top:
        for side in SIDES:
            show_top(side, counted[side], arguments.top)
    if arguments.tracing:
        shares = {SAMPLED: counted} | {
            share: count_pair(machine, number, tools, share) for number, share in ((2, 0), (3, 1))
        }
        show_tracing(shares)
    if arguments.update:
        known[arguments.profile] = {side: figures(counted[side]) for side in SIDES} | {"made_with": made_with}
        with open(KNOWN, "w") as file:
            file.write(json.dumps(known, indent=2, sort_keys=True) + "\n")
        say(f"written into {KNOWN}")
    say(f"took {time.monotonic() - begin:.0f} s")


# --- counting ---------------------------------------------------------------------------------------------------


def count_pair(machine, number, tools, sampled):
    """Each sidecar in its turn under callgrind; gives the side to its `Counted`."""
    name = f"weft-{number}"
    place = Place(machine, number, name, tools)
    peer = Peer(plan_of_weft(name, sampled, ""), place)
    peer.apps = apps.start_apps(place)
    return {side: count_side(machine, peer, end) for end, side in enumerate(SIDES)}


class Counted:
    """One sidecar: what its worker did, what all its threads did, for so many requests."""

    def __init__(self, dumps, requests):
        self.worker = max(dumps, key=lambda dump: dump.instructions)
        self.all = sum(dump.instructions for dump in dumps)
        self.requests = requests

    def each(self, total):
        return total / self.requests


def count_side(machine, peer, end):
    place, side = peer.place, SIDES[end]
    say(f"{place.name}: {side}'s sidecar under callgrind")
    folder = place.path("callgrind-" + side)
    os.makedirs(folder)
    os.chown(folder, USER, USER)
    plain = peer.sides[end].command
    peer.sides[end].command = callgrind.command(folder, plain)
    try:
        peer.restart()
        load(peer, WARM_UP)
        namespace = (place.client, place.server)[end]
        control = callgrind.Control(machine, namespace, folder, peer.proxies[end], USER)
        dumps, requests = control.count(lambda: load(peer, REQUESTS))
        return Counted(dumps, requests)
    finally:
        peer.sides[end].command = plain


H2LOAD_COUNT = re.compile(r"^requests: .*?(\d+) succeeded, (\d+) failed", re.M)


def load(peer, each):
    """So many requests on each of the connections, which are new; gives how many there were in all."""
    requests = CONNECTIONS * each
    arguments = ["h2load", "--h1", "-t1", f"-c{CONNECTIONS}", f"-n{requests}", f"http://{peer.host('http1')}/"]
    output = peer.place.machine.run(arguments, peer.place.client, 300)
    found = H2LOAD_COUNT.search(output)
    if not found or int(found[1]) != requests:
        raise Failed(f"not every request was answered: {found[0] if found else output[-300:]}")
    return requests


def versions():
    """On what the figures depend besides Weft."""
    glibc = os.confstr("CS_GNU_LIBC_VERSION") or "another libc"
    return {"machine": os.uname().machine, "libc": glibc, "valgrind": run(["valgrind", "--version"]).strip()}


# --- showing ----------------------------------------------------------------------------------------------------


def figures(counted):
    return {
        "instructions": round(counted.each(counted.worker.instructions)),
        "allocations": round(counted.each(counted.worker.allocations()), 1),
    }


def read_known():
    try:
        with open(KNOWN) as file:
            return json.load(file)
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise Failed(f"{KNOWN}: {error}") from error


def show(counted, known, made_with, profile):
    known = known or {}
    print(f"One proxied HTTP/1 request, {CONNECTIONS} connections, profile {profile}, in the worker thread of\n")
    print(f"{'':18}{'instructions':>14}{'last known':>14}{'':>10}{'allocations':>14}{'last known':>14}")
    said = []
    for side in SIDES:
        now, before = figures(counted[side]), known.get(side)
        who = f"{side}'s sidecar"
        if not before:
            print(f"{who:18}{now['instructions']:>14,}{'none':>14}{'':>10}{now['allocations']:>14.1f}{'none':>14}")
            continue
        percent = 100 * (now["instructions"] / before["instructions"] - 1)
        print(
            f"{who:18}{now['instructions']:>14,}{before['instructions']:>14,}{percent:>+8.1f} %"
            f"{now['allocations']:>14.1f}{before['allocations']:>14.1f}"
        )
        if abs(percent) >= WORTH_SAYING:
            said.append(f"{who}: {abs(percent):.1f} % {'MORE' if percent > 0 else 'fewer'} instructions than last known")
    print()
    changed = {key: value for key, value in known.get("made_with", made_with).items() if made_with[key] != value}
    for key, value in changed.items():
        said.append(f"the last known figures are of {key} {value}, these of {made_with[key]}: they may differ by that")
    print("\n".join(said or ["no difference to speak of" if known else "nothing to compare with; --update keeps these"]))


def show_top(side, counted, top):
    def listed(title, counter, form):
        print(f"\n{side}'s sidecar: {title}")
        for name, total in counter.most_common(top):
            print(f"  {format(counted.each(total), form):>9}  {name[:140]}")

    listed("instructions per request, by crate or library", counted.worker.libraries, ",.0f")
    listed("instructions per request, by function, without those it calls", counted.worker.functions, ",.0f")
    listed("allocations per request, by who asks for them", counted.worker.allocating(), ".2f")


def show_tracing(shares):
    print("\nTracing, in percent of the instructions with tracing off\n")
    print(f"{'':18}{'traced':>10}{'worker':>12}{'all threads':>14}{'bar':>10}")
    off = shares[0]
    for share, bar in TRACING.items():
        for side in SIDES:
            now, before = shares[share][side], off[side]
            worker = 100 * (now.worker.instructions / before.worker.instructions - 1)
            all_ = 100 * (now.all / before.all - 1)
            who = f"{side}'s sidecar"
            print(f"{who:18}{share:>10.0%}{worker:>+10.1f} %{all_:>+12.1f} %{f'<= {bar} %':>10}")


def say(text):
    print(f"instructions: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
