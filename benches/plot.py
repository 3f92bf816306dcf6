"""Draws the lab's rows of target/bench.json as SVG: medians as bars, from the least to the most as whiskers.

usage: plot.py BENCH.json >PLOT.svg
"""
import json
import math
import sys
from xml.sax.saxutils import escape

COLOURS = {"floor": "#9aa0a6", "ours": "#1a73e8", "peer": "#e8710a"}
NAMES = {"floor": "the same operations done bare", "ours": "lunplug", "peer": "os-brick"}
LEFT, WIDTH, BAR, TOP = 470, 560, 11, 60


def main():
    with open(sys.argv[1]) as file:
        rows = [row for row in json.load(file) if row.get("floor")]
    if not rows:
        sys.exit("plot.py: there are no rows of the lab: hack/bench --only lab makes them")
    rows = [(row["what"], [(who, row[who]) for who in COLOURS if row.get(who)]) for row in rows]
    values = [told[key] for _, bars in rows for _, told in bars for key in ("min_ms", "max_ms")]
    low, high = 10 ** math.floor(math.log10(min(values))), 10 ** math.ceil(math.log10(max(values)))

    def x(value):
        return LEFT + WIDTH * math.log(max(value, low) / low) / math.log(high / low)

    parts, y = [], TOP
    for what, bars in rows:
        middle = y + BAR * len(bars) / 2 + 4
        parts.append(f'<text x="{LEFT - 8}" y="{middle}" text-anchor="end">{escape(what)}</text>')
        for who, told in bars:
            end, centre = x(told["median_ms"]), y + BAR / 2
            title = f'{NAMES[who]}: {told["median_ms"]} ms, {told["programs"]} programs'
            parts.append(
                f'<rect x="{LEFT}" y="{y}" width="{end - LEFT:.1f}" height="{BAR - 1}" fill="{COLOURS[who]}">'
                f"<title>{escape(title)}</title></rect>"
                f'<path d="M{x(told["min_ms"]):.1f} {centre}H{x(told["max_ms"]):.1f}" stroke="#202124"/>'
                f'<text x="{x(told["max_ms"]) + 4:.1f}" y="{centre + 4}" font-size="9">{told["median_ms"]:.0f}</text>'
            )
            y += BAR
        y += 8
    grid, decade = [], low
    while decade <= high:
        grid.append(
            f'<path d="M{x(decade):.1f} {TOP - 6}V{y}" stroke="#dadce0"/>'
            f'<text x="{x(decade):.1f}" y="{TOP - 10}" text-anchor="middle">{decade:g} ms</text>'
        )
        decade *= 10
    legend = [
        f'<rect x="{LEFT + 210 * n}" y="12" width="10" height="10" fill="{colour}"/>'
        f'<text x="{LEFT + 210 * n + 15}" y="21">{NAMES[who]}</text>'
        for n, (who, colour) in enumerate(COLOURS.items())
    ]
    print(
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + WIDTH + 60}" height="{y + 10}" '
        f'font-family="sans-serif" font-size="11"><rect width="100%" height="100%" fill="white"/>'
        + "".join(grid + parts + legend) + "</svg>"
    )


main()
