#!/usr/bin/env python3
"""Draws tests/bench/picture.svg from the measured figures in tests/bench/figures.json.

usage: picture.py [--check]      --check: exit code 1 where the picture is not what the figures make

Standard library only. The same figures make the same bytes.
"""
import json, pathlib, sys
from xml.sax.saxutils import escape

HERE = pathlib.Path(__file__).resolve().parent
WIDTH, LABEL, BAR, GAP = 860, 150, 235, 90
ROW, BAR_HEIGHT = 24, 14
INK, PALE, OURS, OTHERS = "#1f2328", "#59636e", "#0b7a75", "#b6bec8"


def text(x, y, words, size=12, color=INK, weight="normal", anchor="start"):
    return f'<text x="{x}" y="{y}" font-size="{size}" fill="{color}" font-weight="{weight}" text-anchor="{anchor}">{escape(words)}</text>'


def amount(value, unit):
    """A figure as it is written at its bar."""
    if unit == "MiB":
        return f"{value:,} MiB"
    if unit == "x":
        return f"{value:g} x"
    return f"{value:.1f} s" if value < 100 else f"{value:,.0f} s"


def bars(panel, key, unit, x, y):
    """One column of bars: its figures share a scale that begins at zero."""
    longest = max(row[key] for row in panel["rows"])
    drawn = []
    for i, row in enumerate(panel["rows"]):
        top, width = y + i * ROW, max(1.0, BAR * row[key] / longest)
        is_ours = row["method"] == "neuroada-ckpt"
        drawn.append(f'<rect x="{x}" y="{top}" width="{width:.1f}" height="{BAR_HEIGHT}" rx="2" fill="{OURS if is_ours else OTHERS}"/>')
        drawn.append(text(f"{x + width + 6:.1f}", top + 11, amount(row[key], unit), 11, INK if is_ours else PALE, "bold" if is_ours else "normal"))
    return drawn


def picture(figures):
    drawn, y = [], 34
    for panel in figures["panels"]:
        time_at, memory_at = 20 + LABEL, 20 + LABEL + BAR + GAP
        drawn.append(text(20, y, panel["title"], 14, INK, "bold"))
        drawn.append(text(time_at, y + 22, panel["time"], 11, PALE))
        drawn.append(text(memory_at, y + 22, "most memory", 11, PALE))
        y += 32
        for i, row in enumerate(panel["rows"]):
            is_ours = row["method"] == "neuroada-ckpt"
            drawn.append(text(time_at - 8, y + i * ROW + 11, row["method"], 12, INK, "bold" if is_ours else "normal", "end"))
        drawn += bars(panel, "time", panel["unit"], time_at, y)
        drawn += bars(panel, "memory_mib", "MiB", memory_at, y)
        y += ROW * len(panel["rows"]) + 34
    drawn.append(text(20, y - 8, figures["note"], 11, PALE))
    y += 10
    head = (f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{y}" viewBox="0 0 {WIDTH} {y}" role="img" '
            f'font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif">')
    title = f"<title>{escape('; '.join(panel['title'] for panel in figures['panels']))}</title>"
    ground = f'<rect width="{WIDTH}" height="{y}" rx="6" fill="#ffffff" stroke="#d1d9e0"/>'
    return "\n".join([head, title, ground, *drawn, "</svg>", ""])


def main():
    drawn = picture(json.loads((HERE / "figures.json").read_text()))
    path = HERE / "picture.svg"
    if "--check" in sys.argv:
        sys.exit(0 if path.read_text() == drawn else "error: picture.svg is not what figures.json makes: run tests/bench/picture.py")
    path.write_text(drawn)


main()
