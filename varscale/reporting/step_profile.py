"""The profile of a run's steps, as `train.py --profile` leaves it and as a report shows it: table and picture."""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING

from varscale.engine.rundir import profile_folder
from varscale.files import replace_text
from varscale.reporting.content import Picture
from varscale.reporting.plotting import COLOURS, GREYS, picture
from varscale.reporting.trace import IDLE, OTHER, REDUCE, analyse, read_trace

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, ORANGE, GREEN, PINK, VIOLET, OLIVE, TEAL, RED = COLOURS
COLOUR_OF = {
    "data wait": RED,
    "copy": ORANGE,
    "augment": OLIVE,
    "forward": BLUE,
    "teacher forward": TEAL,
    "loss": VIOLET,
    "backward": GREEN,
    REDUCE: PINK,
    "optimizer": GREYS[1],
    "EMA": GREYS[2],
    **dict.fromkeys(("outcome", "logging", "checkpoint", "evaluation"), GREYS[3]),
    OTHER: GREYS[0],
    IDLE: RED,
}
LETTER = 0.0085  # of the longest bar: what a letter of a label takes
TOLD = (
    "Host: what the training thread did, each instant counted for the innermost phase; 'reduce' is what collectives "
    "take of backward and optimizer while nothing is computed there. Where there is a device, its kernels stand with "
    "the phase that launched them, 'reduce' is communication that no computation hides, 'idle' is when nothing ran. "
    "The profiler itself makes steps somewhat slower."
)
HEADS = ("phase", "host ms", "share")
DEVICE_HEADS = ("device ms", "share of device")


def write_step_profile(trace: Path) -> str:
    """Write profile.json, profile.md and profile.png beside a rank's trace; returns what a terminal shows of them."""
    found = analyse(read_trace(trace))
    text = "\n".join(
        [
            f"Where the time of a step goes: rank 0, mean of {found['steps']} steps.",
            "",
            *_aligned(phase_rows(found)),
            "",
            fill(TOLD, 110),
            "",
            *_aligned(operator_rows(found)),
        ]
    )
    replace_text(trace.with_name("profile.json"), json.dumps(found, indent=1))
    replace_text(trace.with_name("profile.md"), f"{text}\n")
    trace.with_name("profile.png").write_bytes(draw("profile", "", found).png)
    return f"{text}\n\nfor Perfetto or Chrome: {trace}"


def read_step_profile(run: Path) -> dict | None:
    """What `analyse` found of a run's steps; None where it was not profiled. Raises ValueError where it is damaged."""
    path = profile_folder(run) / "profile.json"
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text())
        if {"steps", "step_ms", "operators"} <= found.keys() and found["host"].keys() <= COLOUR_OF.keys():
            return found
    except (ValueError, KeyError, AttributeError):
        pass
    raise ValueError(f"{path}: is damaged; a start with --profile writes it again")


def phase_rows(found: dict) -> list[tuple[str, ...]]:
    """A head and a row for each phase, the whole step last."""
    host, device = found["host"], found.get("device", {})
    rows = [HEADS + (DEVICE_HEADS if device else ())]
    for name in sorted({*host, *device}, key=list(COLOUR_OF).index):
        cells = _time(host.get(name), found["step_ms"])
        rows.append((name, *cells, *(_time(device.get(name), found["device_step_ms"]) if device else ())))
    whole = _time(found["step_ms"], found["step_ms"])
    return [*rows, ("step", *whole, *(_time(found["device_step_ms"], found["device_step_ms"]) if device else ()))]


def operator_rows(found: dict) -> list[tuple[str, ...]]:
    """A head and a row for each of the operators that take the most time by themselves."""
    of, step = ("device", found["device_step_ms"]) if "device" in found else ("host", found["step_ms"])
    rows = [(one["name"], f"{one['calls']:.0f}", *_time(one["ms"], step)) for one in found["operators"]]
    return [("operator", "calls a step", f"{of} ms", "share"), *rows]


def draw(name: str, title: str, found: dict) -> Picture:
    """A step as a bar by phase, for the host and, where there is one, for the device."""
    bars = {"device": found["device"]} if "device" in found else {}
    bars["host"] = found["host"]
    return picture(name, title, partial(_draw, bars=bars), width=8.4, height=1.5 + 0.5 * len(bars))


def _draw(axis: "Axes", bars: dict[str, dict[str, float]]) -> None:
    longest = max(sum(bar.values()) for bar in bars.values())
    handles = {}
    for row, bar in bars.items():
        left = 0.0
        for phase, width in bar.items():
            hatch = (
                {"fill": False, "hatch": "////", "edgecolor": RED, "alpha": 0.5}
                if phase == IDLE
                else {"color": COLOUR_OF[phase]}
            )
            handles[phase] = axis.barh(row, width, left=left, height=0.7, linewidth=0, **hatch)
            words = [*phase.split(), _milliseconds(width, longest)]
            if width > LETTER * longest * max(map(len, words)):
                colour = {} if phase == IDLE else {"color": "white"}
                axis.text(left + width / 2, row, "\n".join(words), ha="center", va="center", fontsize=8, **colour)
            left += width
    axis.set(xlabel="milliseconds of a step", xlim=(0, longest))
    axis.grid(axis="y", visible=False)
    order = sorted(handles, key=list(COLOUR_OF).index)
    axis.figure.legend([handles[phase] for phase in order], order, loc="outside lower center", ncols=7)


def _time(milliseconds: float | None, whole: float) -> tuple[str, str]:
    return ("", "") if milliseconds is None else (_milliseconds(milliseconds, whole), f"{milliseconds / whole:.1%}")


def _milliseconds(value: float, whole: float) -> str:
    return f"{value:.1f}" if whole >= 200 else f"{value:.2f}"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table that can be read as it is."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        return f"| {first[0]:<{first[1]}} | " + " | ".join(f"{cell:>{width}}" for cell, width in others) + " |"

    rule = f"| {'-' * widths[0]} | " + " | ".join("-" * (width - 1) + ":" for width in widths[1:]) + " |"
    return [line(rows[0]), rule, *map(line, rows[1:])]
