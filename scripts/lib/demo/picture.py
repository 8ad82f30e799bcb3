"""The demo's result as one picture and one sentence, on a terminal or in a file:

    .venv/bin/python -B -m scripts.lib.demo.picture DEMO.json docs/demo.svg

One bar for each arm, stacked by stage; each stage has a colour, and a pattern for terminals without colours.
The floor's bar is below: what must cross the store's link, and the start with all local.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

BUSY_LIMIT = 0.6  # of the cores: above it they may be the limit, and not the link
SVG_COLUMNS = 80
TITLES = {
    "plain": "as the job starts today",
    "first": "--bootseer and three options, nothing learned yet",
    "again": "a bare --bootseer",
    "spelled": "again, with the three options",
    "floor": "bytes that must cross the link, then the start with all local",
}


@dataclass(frozen=True)
class Look:
    """How a part of a bar is drawn: a pattern, the same of ASCII, a colour."""

    pattern: str
    ascii: str
    colour: str


STAGES = {
    "prolog": Look("░", ".", "bright_black"),
    "launch": Look("▒", ":", "cyan"),
    "image": Look("▓", "#", "blue"),
    "environment": Look("█", "E", "green"),
    "checkpoint": Look("▚", "C", "yellow"),
    "program": Look("▞", "+", "magenta"),
}
FLOOR = {"link": Look("▬", "=", "bright_black"), "local": Look("─", "-", "bright_black")}


def show(result: dict[str, Any], console: Console) -> None:
    """Print the picture, and a warning when the cores may have been the limit."""
    text = picture(result, console.width, ascii_only=console.options.ascii_only)
    console.print(text, "", sentence(result, ascii_only=console.options.ascii_only), sep="\n")
    for name, arm in result["arms"].items():
        if arm["cpu_busy"] > BUSY_LIMIT:
            busy = f"{name}: the cores were {_percent(arm['cpu_busy'])} busy, so they may have been the limit"
            console.print(busy, style="yellow")


def picture(result: dict[str, Any], columns: int, *, ascii_only: bool) -> Text:
    """The bars, the figures of each arm, and what the patterns stand for."""
    bars = {name: (arm["median_s"], arm["stages"], STAGES) for name, arm in result["arms"].items()}
    link_s = result["floor_s"] - result["local_s"]
    bars["floor"] = result["floor_s"], {"link": link_s, "local": result["local_s"]}, FLOOR
    scale = columns / max(max(seconds, sum(parts.values())) for seconds, parts, _ in bars.values())
    text = Text()
    for name, (seconds, parts, looks) in bars.items():
        text.append(f"{name} {seconds:.1f} s", style="bold").append(f"  {TITLES[name]}\n")
        text.append_text(_bar(parts, looks, scale, ascii_only)).append("\n")
        if name in result["arms"]:
            text.append(f"{_figures(result['arms'][name])}\n\n", style="dim")
    text.append("\n")
    for stage, look in STAGES.items():
        text.append((look.ascii if ascii_only else look.pattern) * 2, style=look.colour).append(f" {stage}  ")
    return text


def sentence(result: dict[str, Any], *, ascii_only: bool) -> Text:
    """The outcome in words."""
    arrow, times = ("->", "x") if ascii_only else ("→", "×")
    seconds = {name: arm["median_s"] for name, arm in result["arms"].items()}
    above = seconds["again"] / result["floor_s"]
    return Text(
        f"Again is {_shorter(result['reduction_again'])} than plain ({seconds['plain']:.1f} {arrow} "
        f"{seconds['again']:.1f} s), {above:.2f} {times} the floor of {result['floor_s']:.1f} s; first is "
        f"{_shorter(result['reduction_first'])} ({seconds['first']:.1f} s).",
        style="bold green" if min(result["reduction_first"], result["reduction_again"]) > 0 else "bold red",
    )


def _shorter(reduction: float) -> str:
    return f"{_percent(abs(reduction))} {'shorter' if reduction >= 0 else 'longer'}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _bar(parts: dict[str, float], looks: dict[str, Look], scale: float, ascii_only: bool) -> Text:
    """scale: columns for a second. The parts' ends are rounded, so that no error adds up."""
    text, until_s = Text(), 0.0
    for part, duration_s in parts.items():
        until_s += duration_s
        cells = round(until_s * scale) - len(text)
        text.append((looks[part].ascii if ascii_only else looks[part].pattern) * cells, looks[part].colour)
    return text


def _figures(arm: dict[str, Any]) -> str:
    longest = sorted(arm["stages"].items(), key=lambda item: -item[1])[:2]
    stages = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in longest)
    sent = f"{arm['store_bytes'] / 1e9:.2f} GB sent"
    return f"{stages}; {sent}, link {_percent(arm['link_busy'])}, cores {_percent(arm['cpu_busy'])} busy"


def main() -> None:
    """Write the picture of a result to a file."""
    result = json.loads(Path(sys.argv[1]).read_text())
    console = Console(record=True, width=SVG_COLUMNS, force_terminal=True, color_system="truecolor")
    show(result, console)
    Path(sys.argv[2]).write_text(console.export_svg(title="scripts/demo"))


if __name__ == "__main__":
    main()
