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
from cases import CASES, Run
from machine import Asked, Failed, Machine, Signals, Span
from peers import PLANS, Peer, Place, read_plans

DEFAULT_PEERS = ["direct", "weft", "envoy", "bare"]


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
        for failure in results["failed"]:
            say(f"failed: {failure}")
        return 1 if results["failed"] else 0
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
    parser = argparse.ArgumentParser(prog="tests/bench/run", usage="tests/bench/run --help shows the options", add_help=False)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--case", action="append", default=[])
    parser.add_argument("--rounds", type=whole)
    parser.add_argument("--seconds", type=whole)
    parser.add_argument("--only")
    parser.add_argument("--peers")
    parser.add_argument("--json")
    parser.add_argument("--markdown")
    parser.add_argument("--plot")
    parser.add_argument("--publish", action="store_true")
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
    tools = {name: os.path.join(binaries, name) for name in ("weft-sidecar", "weft-ca", "bench-peer", "bench-bare")}
    tools["envoy"] = arguments.envoy
    peers = []
    for number, plan in enumerate(plans, start=1):
        say(f"starting {plan.name}")
        place = Place(machine, number, plan.name, tools)
        peers.append(Peer(plan, place))
        peers[-1].apps = apps.start_apps(place)
        peers[-1].start()
    run = Run(arguments.seconds, arguments.quick)
    run.peers = peers
    begun, samples, failed = time.monotonic(), {}, []
    for number, case in enumerate(cases, start=1):
        rounds = min(case.rounds, arguments.rounds) or arguments.rounds
        for turn in range(rounds):
            # each peer comes first in some round
            first = turn % len(peers)
            for peer in [peer for peer in peers[first:] + peers[:first] if peer.takes_part(case)]:
                try:
                    if not case.own_start:
                        peer.restart()
                    span = Span(machine.processes)
                    sample = case.measure(peer, run)
                    sample = {**span.end(), **sample}
                    run.note(case, peer, sample)
                except Failed as failure:
                    sample = {"errors": 1, "first_error": str(failure)}
                    failed.append(f"{case.name}, {peer.name}: {failure}")
                samples.setdefault((case.name, peer.name), []).append(sample)
                where = f"{number}/{len(cases)} {turn + 1}/{rounds}"
                say(f"{where:10}{case.name:14}{peer.name:12}{report.brief(sample)}")
    traced = {peer.name: apps.spans(peer.place) for peer in peers if peer.proxies}
    rows = [
        row(case, peer, samples[(case.name, peer.name)])
        for case in cases
        for peer in peers
        if (case.name, peer.name) in samples
    ]
    share(rows, "start", ("rss_mb_idle", "ready_ms"), lambda case: True)
    share(rows, "counts", ("allocations_per_request", "system_calls_per_request"), lambda case: case == "http1-32")
    return {
        "when": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "seconds": round(time.monotonic() - begun),
        "rounds": arguments.rounds,
        "length": arguments.seconds,
        "peers": {peer.name: peer.plan.about for peer in peers},
        "spans": traced,
        "failed": failed,
        "cases": cases,
        "rows": rows,
    }


def share(rows, source, names, wanted):
    """Copies what one case found out into the rows of others."""
    found = {row["peer"]: row for row in rows if row["case"] == source}
    for row in rows:
        if row["peer"] in found and wanted(row["case"]):
            row.update({name: found[row["peer"]].get(name) for name in names})


def row(case, peer, samples):
    """One object of the JSON output: the medians over the rounds, and beside each its lowest and highest."""
    made = {"peer": peer.name, "case": case.name, "title": case.title, "connections": case.connections}
    made |= {name: None for name in report.ALWAYS}
    spread = {}
    for name in dict.fromkeys(name for sample in samples for name in sample):
        values = [sample[name] for sample in samples if sample.get(name) is not None]
        if values and isinstance(values[0], str):
            made[name] = values[0]
        elif values:
            made[name] = round(statistics.median(values), 2)
            spread[name] = [round(min(values), 2), round(max(values), 2)]
    return made | {"rounds": len(samples), "spread": spread}


def say(text):
    print(f"bench: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
