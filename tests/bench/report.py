"""What a person and a program get to see: JSON, Markdown tables, the bars of the project and how far each is."""

import json
import os

import bars
import plot

# always in the JSON, whether or not a case has them
ALWAYS = (
    "requests_per_second", "p50_us", "p99_us", "p999_us", "cpu_us_per_request", "allocations_per_request",
    "rss_mb_idle", "rss_mb_load", "ready_ms", "steal_percent",
)  # fmt: skip

# name, title in the table, how it is written, what follows it in a line of progress
FIGURES = (
    ("ready_ms", "ready ms", "{:,.1f}", "ms"),
    ("rss_mb_idle", "MB idle", "{:,.1f}", "MB idle"),
    ("requests_per_second", "per second", "{:,.0f}", "/s"),
    ("mb_per_second", "MB/s", "{:,.0f}", "MB/s"),
    ("p50_us", "p50 µs", "{:,.0f}", "µs p50"),
    ("p99_us", "p99 µs", "{:,.0f}", "µs p99"),
    ("p999_us", "p99.9 µs", "{:,.0f}", None),
    ("p50_us_without", "p50 µs without", "{:,.0f}", None),
    ("p99_us_without", "p99 µs without", "{:,.0f}", "µs p99 without"),
    ("cpu_us_per_request", "CPU µs each, both proxies", "{:,.1f}", "µs CPU"),
    ("cpu_ns_per_byte", "CPU ns per byte, both proxies", "{:,.2f}", "ns CPU per byte"),
    ("system_calls_per_request", "system calls each, per proxy", "{:,.1f}", "system calls"),
    ("allocations_per_request", "allocations each, per proxy", "{:,.1f}", "allocations"),
    ("held", "connections held", "{:,.0f}", "held"),
    ("kb_per_connection_client", "KB each, client's proxy", "{:,.1f}", "KB client"),
    ("kb_per_connection_server", "KB each, server's proxy", "{:,.1f}", "KB server"),
    ("rss_mb_known", "MB known", "{:,.1f}", "MB known"),
    ("rss_mb_called", "MB each called once", "{:,.1f}", "MB each called once"),
    ("connections_called", "connections then", "{:,.0f}", "connections"),
    ("rss_mb_dialled", "MB at most, all dialled", "{:,.1f}", "MB all dialled"),
    ("connections_between", "connections at the end", "{:,.0f}", "connections"),
    ("rss_mb_settled", "MB 30 s later", "{:,.1f}", "MB 30 s later"),
    ("connections_settled", "connections then", "{:,.0f}", "connections"),
    ("rss_mb_load", "MB load", "{:,.1f}", "MB"),
    ("steal_percent", "steal %", "{:.0f}", "% steal"),
    ("foreign_percent", "foreign %", "{:.0f}", "% foreign"),
    ("errors", "errors", "{:.0f}", None),
)
DOCS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "docs")
MARKS = ("<!-- figures: written by tests/bench/run --publish -->", "<!-- end of the figures -->")
NO_SPREAD = {"steal_percent", "foreign_percent", "errors", "held"}


def write(results, arguments):
    text = markdown(results)
    print(text)
    if arguments.markdown:
        save(arguments.markdown, text + "\n")
    if arguments.json:
        save(arguments.json, json.dumps(results["rows"], indent=1) + "\n")
    if arguments.plot:
        save(arguments.plot, plot.draw(results["rows"], list(results["peers"])))
    if arguments.publish:
        save(os.path.join(DOCS, "benchmarks.svg"), plot.draw(results["rows"], list(results["peers"])))
        publish(os.path.join(DOCS, "benchmarks.md"), text)


def publish(path, text):
    """Puts the figures between the two marks of the page."""
    with open(path) as file:
        page = file.read()
    before, rest = page.split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    save(path, f"{before}{MARKS[0]}\n\n{text}\n\n{MARKS[1]}{after}")


def save(path, text):
    with open(path, "w") as file:
        file.write(text)


def brief(sample):
    """A sample in one line of progress."""
    words = []
    for name, _, text, unit in FIGURES:
        if unit and sample.get(name) is not None:
            words.append(f"{text.format(sample[name])}{'' if unit.startswith('/') else ' '}{unit}")
    if sample.get("errors"):
        words.append(f"{sample['errors']:.0f} ERRORS ({sample.get('first_error') or 'see the log'})")
    return "  ".join(words)


def markdown(results):
    lines = [
        f"Measured {results['when']} on {machine()}: {results['rounds']} rounds of {results['length']} s, "
        f"{results['seconds']} s in all. Medians (lowest–highest).",
        "",
    ]
    for name, about in results["peers"].items():
        got = results["spans"].get(name)
        lines.append(f"- {name}: {about}{f'; the receiver of traces got {got:,} spans' if got else ''}")
    lines += bars.table(results["rows"])
    for case in results["cases"]:
        rows = [row for row in results["rows"] if row["case"] == case.name]
        lines += case_table(case.title, rows, only_own(case.name)) if rows else []
    return "\n".join(lines)


def only_own(name):
    """Figures that another case has measured stand in its table only."""
    hidden = set()
    if name != "start":
        hidden |= {"ready_ms", "rss_mb_idle"}
    if name != "counts":
        hidden |= {"allocations_per_request", "system_calls_per_request"}
    return hidden


def case_table(title, rows, hidden):
    shown = [f for f in FIGURES if f[0] not in hidden and any(row.get(f[0]) is not None for row in rows)]
    if not any(row.get("errors") for row in rows):
        shown = [figure for figure in shown if figure[0] != "errors"]
    lines = ["", f"### {title}", ""]
    lines.append("| | " + " | ".join(figure[1] for figure in shown) + " |")
    lines.append("|---|" + "---:|" * len(shown))
    for row in rows:
        lines.append(f"| {row['peer']} | " + " | ".join(cell(row, *figure) for figure in shown) + " |")
    for row in rows:
        for name in ("no_system_calls", "no_allocations"):
            if row.get(name):
                lines += ["", f"{row['peer']}: {name[3:].replace('_', ' ')} are not counted: {row[name]}."]
        if row.get("errors") and row.get("first_error"):
            lines += ["", f"{row['peer']}: the first error was: {row['first_error']}."]
    return lines


def cell(row, name, _title, text, _unit):
    value = row.get(name)
    if value is None:
        return "–"
    shown, ends = text.format(value), row["spread"].get(name)
    if ends and row["rounds"] > 1 and ends[0] != ends[1] and name not in NO_SPREAD:
        return f"{shown} ({text.format(ends[0])}–{text.format(ends[1])})"
    return shown


def machine():
    model = "unknown processor"
    with open("/proc/cpuinfo") as file:
        for line in file:
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    return f"{os.cpu_count()} × {model}, Linux {os.uname().release.split('-')[0]}"
