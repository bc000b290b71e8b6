"""What a person and a program get to see: JSON, a Markdown table, the bars of the project and how far each is."""

import json
import os

# always in the JSON, whether or not a case has them
ALWAYS = (
    "requests_per_second", "p50_us", "p99_us", "p999_us", "cpu_us_per_request", "allocations_per_request",
    "rss_mb_idle", "rss_mb_load", "ready_ms", "steal_percent",
)  # fmt: skip

BRIEF = (
    ("requests_per_second", "{:.0f}/s"),
    ("p50_us", "p50 {:.0f} µs"),
    ("p99_us", "p99 {:.0f} µs"),
    ("cpu_us_per_request", "cpu {:.1f} µs"),
    ("rss_mb_load", "{:.1f} MB"),
    ("steal_percent", "steal {:.0f} %"),
    ("foreign_percent", "foreign {:.0f} %"),
)

COLUMNS = (
    ("requests_per_second", "requests/s", "{:,.0f}"),
    ("p50_us", "p50 µs", "{:,.0f}"),
    ("p99_us", "p99 µs", "{:,.0f}"),
    ("cpu_us_per_request", "CPU µs per request, both proxies", "{:,.1f}"),
    ("rss_mb_idle", "MB idle", "{:,.1f}"),
    ("rss_mb_load", "MB load", "{:,.1f}"),
    ("steal_percent", "steal %", "{:.0f}"),
    ("foreign_percent", "foreign %", "{:.0f}"),
    ("errors", "errors", "{:.0f}"),
)


def write(results, arguments):
    text = markdown(results)
    print(text)
    if arguments.markdown:
        save(arguments.markdown, text + "\n")
    if arguments.json:
        save(arguments.json, json.dumps(results["rows"], indent=1) + "\n")


def save(path, text):
    with open(path, "w") as file:
        file.write(text)


def markdown(results):
    lines = [f"Measured {results['when']} on {machine()}, {results['seconds']} s. Median of the rounds (lowest to highest)."]
    for case in results["cases"]:
        rows = [row for row in results["rows"] if row["case"] == case.name]
        columns = [column for column in COLUMNS if any(row.get(column[0]) is not None for row in rows)]
        lines += ["", f"**{case.title}**", ""]
        lines.append("| | " + " | ".join(title for _, title, _ in columns) + " |")
        lines.append("|---|" + "---:|" * len(columns))
        for row in rows:
            lines.append(f"| {row['peer']} | " + " | ".join(cell(row, *column) for column in columns) + " |")
    return "\n".join(lines)


def cell(row, name, _title, text):
    value = row.get(name)
    if value is None:
        return "–"
    shown, ends = text.format(value), row["spread"].get(name)
    if ends and row["rounds"] > 1 and ends[0] != ends[1] and name not in ("steal_percent", "foreign_percent", "errors"):
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
