"""One picture of a run (SVG), readable on light and dark backgrounds: four panels of bars, to scale within each group."""

from xml.sax.saxutils import escape

# title, unit, whether fewer is better, and groups: label, case, figure, how a figure is scaled and written
PANELS = (
    ("Processor time per request, both proxies", "µs", True, (
        ("HTTP/1, 1 connection", "http1-1", "cpu_us_per_request", 1, "{:,.0f}"),
        ("HTTP/1, 32 connections", "http1-32", "cpu_us_per_request", 1, "{:,.0f}"),
        ("HTTP/1, 256 connections", "http1-256", "cpu_us_per_request", 1, "{:,.0f}"),
        ("gRPC unary", "grpc-unary", "cpu_us_per_request", 1, "{:,.0f}"),
        ("HTTP/1, a new connection each", "connect-http", "cpu_us_per_request", 1, "{:,.0f}"),
    )),
    ("Latency", "ms", True, (
        ("p50, HTTP/1, 1 connection", "http1-1", "p50_us", 0.001, "{:,.2f}"),
        ("p50 at 60 % of the slowest proxy's capacity", "rate-60", "p50_us", 0.001, "{:,.2f}"),
        ("p99 at 60 % of the slowest proxy's capacity", "rate-60", "p99_us", 0.001, "{:,.1f}"),
        ("p50, HTTP/1, 32 connections, as fast as it goes", "http1-32", "p50_us", 0.001, "{:,.2f}"),
    )),
    ("Memory of the larger of both proxies", "MB", True, (
        ("idle", "start", "rss_mb_idle", 1, "{:,.0f}"),
        ("HTTP/1, 32 connections", "http1-32", "rss_mb_load", 1, "{:,.0f}"),
        ("HTTP/1, 256 connections", "http1-256", "rss_mb_load", 1, "{:,.0f}"),
        ("HTTP/1, 2000 connections", "http1-2000", "rss_mb_load", 1, "{:,.0f}"),
    )),
    ("Throughput, as fast as it goes", "", False, (
        ("HTTP/1, 32 connections: requests per second", "http1-32", "requests_per_second", 1, "{:,.0f}"),
        ("gRPC unary: calls per second", "grpc-unary", "requests_per_second", 1, "{:,.0f}"),
        ("new connections per second", "connect-http", "requests_per_second", 1, "{:,.0f}"),
        ("opaque TCP: MB per second", "tcp-down", "mb_per_second", 1, "{:,.0f}"),
    )),
)  # fmt: skip

COLOURS = {"direct": "#868e96", "weft": "#e8590c", "envoy": "#4c6ef5", "bare": "#12b886"}
OTHERS = ("#0ca678", "#be4bdb", "#f08c00", "#1098ad")

WIDTH, MARGIN, GAP = 960, 28, 40
COLUMN = (WIDTH - 2 * MARGIN - GAP) / 2
TOP = 78  # of the first panels
BAR, BAR_STEP, GROUP_LABEL, GROUP_GAP, TITLE = 12, 15, 17, 9, 30
NAME, VALUE = 78, 60  # room for the name of a peer, and for a figure behind its bar

STYLE = """
.ground { fill: #ffffff; } .line { stroke: #d1d9e0; } .range { stroke: #1f2328; stroke-opacity: 0.6; }
text { font-family: "DejaVu Sans", Verdana, sans-serif; fill: #1f2328; }
.title { font-size: 14px; font-weight: bold; } .head { font-size: 18px; font-weight: bold; }
.quiet { fill: #59636e; font-size: 11px; } .value { font-size: 11px; }
@media (prefers-color-scheme: dark) {
.ground { fill: #0d1117; } .line { stroke: #3d444d; } .range { stroke: #f0f6fc; }
text { fill: #f0f6fc; } .quiet { fill: #9198a1; }
}
"""


def draw(rows, peers):
    """The whole picture, from the rows of the JSON output."""
    colours = dict(COLOURS)
    for name, colour in zip([peer for peer in peers if peer not in colours], OTHERS * len(peers)):
        colours[name] = colour
    found = {(row["peer"], row["case"]): row for row in rows}
    panels = [panel_groups(panel, peers, found) for panel in PANELS]
    heights = [sum(group_height(bars) for _, bars in groups) + TITLE for groups in panels]
    second = TOP + max(heights[0], heights[1]) + 26
    height = second + max(heights[2], heights[3]) + 36
    parts = [head(peers, colours, height)]
    for number, (panel, groups) in enumerate(zip(PANELS, panels)):
        left = MARGIN + (number % 2) * (COLUMN + GAP)
        parts.append(draw_panel(panel, groups, left, TOP if number < 2 else second, colours))
    parts.append(text(MARGIN, height - 14, "quiet", "Bars are to scale within their group. Lines: lowest to highest of the rounds."))
    return "\n".join([*parts, "</svg>", ""])


def panel_groups(panel, peers, found):
    """Of each group the bars that were measured: peer, value, ends of the range, text."""
    groups = []
    for label, case, figure, factor, form in panel[3]:
        bars = []
        for peer in peers:
            row = found.get((peer, case), {})
            value = row.get(figure)
            if value is not None:
                ends = row.get("spread", {}).get(figure, [value, value])
                bars.append((peer, value * factor, [end * factor for end in ends], form.format(value * factor)))
        if bars:
            groups.append((label, bars))
    return groups


def group_height(bars):
    return GROUP_LABEL + len(bars) * BAR_STEP + GROUP_GAP


def head(peers, colours, height):
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" width="{WIDTH}" '
        f'height="{height:.0f}" role="img" aria-label="{escape(" beside ".join(peers))}">',
        f"<style>{STYLE}</style>",
        f'<rect class="ground" width="{WIDTH}" height="{height:.0f}" rx="6"/>',
        text(MARGIN, 36, "head", "What a pair of sidecars costs"),
    ]
    left = MARGIN
    for peer in peers:
        parts.append(f'<rect x="{left}" y="50" width="12" height="12" rx="2" fill="{colours[peer]}"/>')
        parts.append(text(left + 18, 60.5, "value", peer))
        left += 18 + 7.4 * len(peer) + 22
    return "\n".join(parts)


def draw_panel(panel, groups, left, top, colours):
    title, unit, fewer, _ = panel
    better = "less is better" if fewer else "more is better"
    parts = [
        text(left, top + 14, "title", title),
        text(left + COLUMN, top + 14, "quiet", f"{unit + ', ' if unit else ''}{better}", "end"),
        f'<line class="line" x1="{left}" x2="{left + COLUMN}" y1="{top + 21.5}" y2="{top + 21.5}"/>',
    ]
    y = top + TITLE
    for label, bars in groups:
        parts.append(text(left, y + 12, "quiet", label))
        y += GROUP_LABEL
        most = max(max(value, *ends) for _, value, ends, _ in bars) or 1
        scale = (COLUMN - NAME - VALUE) / most
        for peer, value, ends, written in bars:
            parts.append(text(left + NAME - 8, y + BAR - 2, "value", peer, "end"))
            x, middle = left + NAME, y + BAR / 2
            width = max(1.5, value * scale)
            parts.append(f'<rect x="{x}" y="{y}" width="{width:.1f}" height="{BAR}" rx="2" fill="{colours[peer]}"/>')
            low, high = (x + end * scale for end in ends)
            if high - low > 1:
                parts.append(f'<line class="range" x1="{low:.1f}" x2="{high:.1f}" y1="{middle}" y2="{middle}"/>')
            parts.append(text(max(x + width, high) + 6, y + BAR - 2, "value", written))
            y += BAR_STEP
        y += GROUP_GAP
    return "\n".join(parts)


def text(x, y, kind, words, anchor="start"):
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}">{escape(words)}</text>'
