#!/usr/bin/env python3
"""Draws a trace of `dlf-engine generate --trace` as SVG: every token with its α.

    python3 tools/draw_trace.py trace.jsonl docs/generation.svg

The bar over a token is α, its colour the expert that acted; tokens that fusion changed are underlined.
Needs Python 3.9 and nothing else.
"""

import argparse
import html
import json
from pathlib import Path

COLORS = ["#2a6fdb", "#d9622b", "#2f9e62", "#9b51c4", "#c2a011", "#1f9aa8", "#c2417c", "#6b6f76"]
CHARACTER, LINE, BAR, MARGIN, WIDTH = 9.0, 96, 48, 16, 900
NARROWEST = 34  # room for α over a token of one character
MOST = 2.0  # α at the top of a bar


def shown(text):
    """A token's text with its spaces and line ends made visible."""
    return text.replace("\n", "↵").replace(" ", "·") or "∅"


def draw(records):
    experts = sorted({r["expert"] for r in records if r["expert"]})
    color = {name: COLORS[i % len(COLORS)] for i, name in enumerate(experts)}
    parts, x, y = [], float(MARGIN), 46.0
    for record in records:
        text = shown(record["text"])
        width = max(CHARACTER * len(text) + 10, NARROWEST)
        if x + width > WIDTH - MARGIN:
            x, y = float(MARGIN), y + LINE
        alpha = sum(record["alpha"])
        height = BAR * min(max(alpha, 0.0), MOST) / MOST
        fill = color.get(record["expert"], "#6b6f76")
        title = f"{text}  α {alpha:.2f} {record['expert'] or ''}, loss {record['loss'] or 0:.2g}"
        parts.append(
            f'<g><title>{html.escape(title)}</title>'
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{width - 4:.1f}" height="{BAR}" class="back"/>'
            f'<rect x="{x:.1f}" y="{y + BAR - height:.1f}" width="{width - 4:.1f}" height="{height:.1f}" fill="{fill}"/>'
            f'<text x="{x + (width - 4) / 2:.1f}" y="{y - 4:.1f}" class="alpha">{alpha:.1f}</text>'
            f'<text x="{x + (width - 4) / 2:.1f}" y="{y + BAR + 17:.1f}" class="token'
            f'{" changed" if record["changed"] else ""}">{html.escape(text)}</text></g>'
        )
        x += width
    legend, lx = [], float(MARGIN)
    for name in experts:
        legend.append(f'<rect x="{lx}" y="10" width="12" height="12" fill="{color[name]}"/>')
        legend.append(f'<text x="{lx + 18}" y="20" class="legend">{html.escape(name)}</text>')
        lx += 40 + CHARACTER * len(name)
    legend.append(
        f'<text x="{lx + 8}" y="20" class="legend">bars: α from 0 to 2 · underlined: not the large model’s choice</text>'
    )
    height = y + BAR + 34
    style = (
        "text{font-family:ui-monospace,Menlo,Consolas,monospace}.token{font-size:15px;text-anchor:middle;fill:#1f2328}"
        ".alpha{font-size:11px;text-anchor:middle;fill:#656d76}.legend{font-size:13px;fill:#656d76}"
        ".changed{text-decoration:underline;font-weight:bold}.back{fill:#8882}"
        "@media(prefers-color-scheme:dark){.token{fill:#e6edf3}.alpha,.legend{fill:#9198a1}}"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" role="img">'
        f"<title>Tokens and their α</title><style>{style}</style>{''.join(legend)}{''.join(parts)}</svg>\n"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("svg", type=Path)
    arguments = parser.parse_args()
    records = [json.loads(line) for line in arguments.trace.read_text().splitlines()]
    arguments.svg.write_text(draw(records))


if __name__ == "__main__":
    main()
