"""The benchmark: starts every peer, measures case after case with the peers in turns, and reports. Started by `run`."""

import argparse
import datetime
import json
import os
import statistics
import sys
import time

import apps
import report
from cases import CASES, settle
from machine import Asked, Failed, Machine, Signals
from peers import PLANS, Peer, Place, read_plans

DEFAULT_PEERS = ["direct", "weft", "envoy"]


def main():
    arguments = parse()
    if arguments.list:
        for case in CASES:
            print(f"{case.name:18}{case.title}{'' if case.quick else '  (not with --quick)'}")
        return 0
    signals = Signals()
    machine = None
    try:
        plans, cases = chosen(arguments)
        machine = Machine(signals)
        results = measure(machine, plans, cases, arguments)
        report.write(results, arguments)
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
    parser = argparse.ArgumentParser(prog="tests/bench/run", add_help=False)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--case", action="append", default=[])
    parser.add_argument("--rounds", type=whole)
    parser.add_argument("--seconds", type=whole)
    parser.add_argument("--only")
    parser.add_argument("--peers")
    parser.add_argument("--json")
    parser.add_argument("--markdown")
    parser.add_argument("--plot")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--binaries", default="")
    parser.add_argument("--envoy", default="")
    arguments = parser.parse_args()
    arguments.rounds = arguments.rounds or (1 if arguments.quick else 5)
    arguments.seconds = arguments.seconds or (2 if arguments.quick else 5)
    return arguments


def whole(text):
    number = int(text)
    if not 1 <= number <= 1000:
        raise argparse.ArgumentTypeError("expected a whole number from 1 to 1000")
    return number


def chosen(arguments):
    """Peers and cases that were asked for."""
    plans = {name: PLANS[name] for name in DEFAULT_PEERS}
    if arguments.peers:
        plans |= {plan.name: plan for plan in read_plans(arguments.peers)}
    if arguments.only:
        known = {**PLANS, **plans}
        unknown = [name for name in arguments.only.split(",") if name not in known]
        if unknown:
            raise Failed(f"--only: no peer is called `{unknown[0]}`; there are {', '.join(known)}")
        plans = {name: known[name] for name in arguments.only.split(",")}
    cases = [case for case in CASES if case.quick or not arguments.quick]
    if arguments.case:
        cases = [case for case in CASES if any(case.name.startswith(name) for name in arguments.case)]
        for name in arguments.case:
            if not any(case.name.startswith(name) for case in CASES):
                raise Failed(f"--case: no case begins with `{name}`; --list shows them")
    return list(plans.values()), cases


def measure(machine, plans, cases, arguments):
    binaries = os.path.abspath(arguments.binaries)
    tools = {name: os.path.join(binaries, name) for name in ("weft-sidecar", "weft-ca", "bench-peer")}
    tools["envoy"] = arguments.envoy
    peers = []
    for number, plan in enumerate(plans, start=1):
        say(f"starting {plan.name}")
        place = Place(machine, number, plan.name, tools)
        peer = Peer(plan, place)
        peer.apps = apps.start_apps(place)
        peer.start()
        peers.append(peer)
    time.sleep(1)
    idle = {peer.name: [process.rss_mb() for process in peer.proxies] for peer in peers}
    for peer in peers:
        settle(peer)
    begun = time.monotonic()
    samples = {}
    for number, case in enumerate(cases, start=1):
        rounds = case.rounds or arguments.rounds
        for turn in range(rounds):
            # each peer comes first in some round
            for peer in peers[turn % len(peers) :] + peers[: turn % len(peers)]:
                if not case.peers(peer):
                    continue
                sample = case.measure(peer, arguments.seconds)
                samples.setdefault((case.name, peer.name), []).append(sample)
                say(f"[{number}/{len(cases)}, {turn + 1}/{rounds}] {case.name:14}{peer.name:12}{brief(sample)}")
    return {
        "when": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "seconds": round(time.monotonic() - begun),
        "peers": [{"name": peer.name, "about": peer.plan.about, "ready_ms": peer.ready_ms} for peer in peers],
        "idle": idle,
        "cases": cases,
        "rows": [
            row(case, peer, samples[(case.name, peer.name)], idle[peer.name])
            for case in cases
            for peer in peers
            if (case.name, peer.name) in samples
        ],
    }


def row(case, peer, samples, idle):
    """One object of the JSON output: the medians over the rounds, and beside each its lowest and highest."""
    made = {"peer": peer.name, "case": case.name, "title": case.title, "connections": case.connections}
    made |= {name: None for name in report.ALWAYS}
    made |= {"rss_mb_idle": max(idle, default=None), "ready_ms": max(peer.ready_ms, default=None)}
    spread = {}
    for name in dict.fromkeys(name for sample in samples for name in sample):
        values = [sample[name] for sample in samples if sample.get(name) is not None]
        if values:
            made[name] = statistics.median(values)
            spread[name] = [min(values), max(values)]
    for name, value in made.items():
        if isinstance(value, float):
            made[name] = round(value, 2)
    made["rounds"] = len(samples)
    made["spread"] = {name: [round(end, 2) for end in ends] for name, ends in spread.items()}
    return made


def brief(sample):
    words = []
    for name, text in report.BRIEF:
        if sample.get(name) is not None:
            words.append(text.format(sample[name]))
    if sample.get("errors"):
        words.append(f"{sample['errors']} ERRORS")
    return "  ".join(words)


def say(text):
    print(f"bench: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
