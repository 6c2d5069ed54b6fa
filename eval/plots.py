"""The plots of a report: which figures of report.json and of the training log go where."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from .figures import Axis, Bar, Margins, Point, Row, Series, bar_plot, dot_plot, line_plot
from .headlines import at_temperature, drafted, drafted_results, drafting_of, is_chosen, is_main, is_plain, overall
from .tables import interval, number, percent, rate, temperature_name, times

CURVE_POINTS = 160  # a longer training log is averaged in this many stretches
Json = dict[str, Any]


def acceptance_by_position(report: Json, without_repeats: bool) -> str:
    """The share of rounds that accepted at least i drafted tokens, per temperature; "" where no round counts."""
    series, positions = [], 1
    for colour, entry in enumerate(drafted(report)):
        counted = entry["without_repeats"] if without_repeats else entry
        if not counted["rounds"]:
            continue
        name = temperature_name(entry["temperature"]) + ("" if entry["source"] == "decoded" else f" {entry['source']}")
        found = zip(counted["acceptance_by_position"], counted["acceptance_by_position_ci95"], strict=True)
        points = [
            Point(i, value, ci[0], ci[1], f"{name}, position {i}: {interval(value, ci, percent)}")
            for i, (value, ci) in enumerate(found, 1)
        ]
        positions = max(positions, len(points))
        series.append(Series(name, points, colour, dashed=entry["source"] == "simulated"))
    if not series:
        return ""
    x = Axis("drafted position", (0.8, positions + 0.2), ticks=range(1, positions + 1))
    return line_plot(series, x, Axis("rounds that accepted it", (0.0, 1.0), _percent_tick))


def acceptance_by_source(report: Json) -> str:
    """Acceptance lengths of all prompts and of each source, per temperature; hollow without repeated rounds."""
    categories: list[str | None] = [
        None,
        *sorted({e["category"] for e in drafted_results(report) if e["category"] is not None}),
    ]
    colours = {entry["temperature"]: colour for colour, entry in enumerate(overall(report))}
    groups = []
    for category in categories:
        shown = [e for e in drafted_results(report) if e["category"] == category]
        entries = [e for e in shown if e["acceptance_length"] is not None]
        groups.append(
            ("all prompts" if category is None else category, [_row(e, colours[e["temperature"]]) for e in entries])
        )
    reach = [v for _, rows in groups for r in rows for v in (r.point.y, r.point.high, r.hollow and r.hollow.y) if v]
    if not reach:
        return ""
    return dot_plot(groups, Axis("acceptance length", (1.0, max(1.5, math.ceil(max(reach) * 2) / 2))))


def speed(report: Json) -> str:
    """Tokens per second and user, without the draft and with it."""
    groups = []
    for colour, entry in enumerate(overall(report)):
        label = "no draft" if is_plain(entry) else "with draft"
        sides = (("target", None, "baseline_tps_per_user"), (label, colour, "tps_per_user"))
        bars = []
        for label, shade, key in sides:
            value, ci = entry[key], entry[f"{key}_ci95"]
            if value is not None:
                hover = f"{label}: {interval(value, ci, rate)} tokens/s"
                bars.append(Bar(label, shade, Point(0, value, ci[0], ci[1], hover), rate(value)))
        if bars:
            groups.append((temperature_name(entry["temperature"]), times(entry["speedup"]), bars))
    return bar_plot(groups, Axis("tokens per second and user")) if groups else ""


def expected_speedup(report: Json) -> str:
    """What the calibration expected of every chain, and what chains came to over the test prompts; "" without one."""
    calibration = report["calibration"]
    if not calibration or not calibration["measured"]:
        return ""
    curves, measured, longest = list[Series](), list[Series](), 0
    colours = {entry["temperature"]: colour for colour, entry in enumerate(overall(report))}
    for entry in sorted(calibration["temperatures"], key=lambda entry: float(entry["temperature"])):
        name, colour = temperature_name(entry["temperature"]), colours[entry["temperature"]]
        values = [1.0, *entry["expected_speedup"]]
        curves.append(Series(name, [Point(k, value) for k, value in enumerate(values)], colour, markers=False))
        longest = max(longest, len(values) - 1)
        chains = [e for e in at_temperature(report, entry["temperature"]) if e["drafting"]["method"] != "tree"]
        points = [_measured(e, name, is_main(e, report["results"])) for e in chains if e["speedup"] is not None]
        longest = max([longest, *(int(point.x) for point in points)])
        if points:
            measured.append(Series("", points, colour, joined=False))
    x = Axis("drafted tokens a round", (-0.3, longest + 0.3), ticks=range(longest + 1))
    return line_plot([*curves, *measured], x, Axis("speed-up", write="{:g}".format))


def _measured(entry: Json, name: str, main: bool) -> Point:
    ci, how = entry["speedup_ci95"], ", chosen" if main and is_chosen(entry) else ""
    said = f"{name}, {drafting_of(entry).name}{how}, measured: {interval(entry['speedup'], ci, times)}"
    return Point(entry["drafting"]["length"], entry["speedup"], ci[0], ci[1], said)


def training(curve: Sequence[Json]) -> list[tuple[str, str]]:
    """(title, plot) of loss, accuracy by step and simulated acceptance length; [] where nothing is logged."""
    steps = _stretches([line for line in curve if "validation" not in line])
    checks = [(line["step"], line["validation"]) for line in curve if "validation" in line]
    # Before its first step a head knows nothing; a loss of 20 there would press the rest of the curve together.
    later = [check for check in checks if check[0]] or checks
    plots = []
    losses = [
        Series("training", [Point(line["step"], line["loss"]) for line in steps], 0, markers=False),
        Series("validation", [_checked(step, values, "loss") for step, values in later], 1),
    ]
    if losses := [entry for entry in losses if entry.points]:
        plots.append(
            ("Loss", _curve(losses, "log scale" if _positive(losses) else "", "{:g}".format, log=_positive(losses)))
        )
    if later:
        plots.append(("Accuracy by step of the rollout", _accuracy(later)))
        plots.append(("Simulated acceptance length", _simulated(checks)))
    return plots


def best(curve: Sequence[Json]) -> Point | None:
    """Step and acceptance length of the first best validation: the head that was kept."""
    points = [Point(line["step"], line["validation"]["acceptance_length"]) for line in curve if "validation" in line]
    return max(points, key=lambda point: point.y, default=None)


def _row(entry: Json, colour: int) -> Row:
    name, length, ci = (
        temperature_name(entry["temperature"]),
        entry["acceptance_length"],
        entry["acceptance_length_ci95"],
    )
    fresh = entry["without_repeats"]
    hollow = None
    if fresh["acceptance_length"] is not None:
        hover = (
            f"{name}, without repeated rounds: {interval(fresh['acceptance_length'], fresh['acceptance_length_ci95'])}"
        )
        hollow = Point(fresh["acceptance_length"], fresh["acceptance_length"], text=hover)
    return Row(
        name, colour, Point(length, length, ci[0], ci[1], f"{name}: {interval(length, ci)}"), hollow, number(length)
    )


def _accuracy(checks: Sequence[tuple[int, Json]]) -> str:
    count = len(checks[0][1]["accuracy"])
    series = [
        Series(
            f"step {step + 1}" if step in (0, count - 1) else "",
            [
                Point(
                    at, values["accuracy"][step], text=f"step {step + 1}: {percent(values['accuracy'][step])} at {at:,}"
                )
                for at, values in checks
            ],
            0,
            markers=len(checks) == 1,
            strength=1 - 0.7 * step / max(count - 1, 1),
        )
        for step in range(count)
    ]
    return _curve(series, "validation rows predicted", _percent_tick)


def _simulated(checks: Sequence[tuple[int, Json]]) -> str:
    points = [_checked(step, values, "acceptance_length") for step, values in checks]
    top = max(points, key=lambda point: point.y)
    entries = [Series("", points, 0), Series(f"best {number(top.y)}", [top], 1)]
    reach = max(math.ceil(top.y * 2 + 0.2) / 2, 1.5)
    return _curve(entries, "on validation answers", "{:g}".format, span=(1.0, reach), until=points[-1].x)


def _checked(step: int, values: Json, key: str) -> Point:
    return Point(step, values[key], text=f"{number(values[key])} at step {step:,}")


def _curve(
    series: Sequence[Series],
    title: str,
    write: Callable[[float], str],
    span: tuple[float, float] | None = None,
    log: bool = False,
    until: float = 0.0,
) -> str:
    """A panel of the training curve; all panels have the same size."""
    until = max([until, *(point.x for entry in series for point in entry.points)])
    x = Axis("optimiser step", (0.0, max(until, 1.0)))
    return line_plot(series, x, Axis(title, span, write, log=log), (360, 250), Margins(right=82))


def _percent_tick(value: float) -> str:
    return f"{100 * value:.3g}%"


def _positive(series: Sequence[Series]) -> bool:
    return min(point.y for entry in series for point in entry.points) > 0


def _stretches(lines: Sequence[Json]) -> list[Json]:
    """The lines of a log, or means over stretches of them where there are too many to be seen."""
    size = max(1, math.ceil(len(lines) / CURVE_POINTS))
    parts = [lines[start : start + size] for start in range(0, len(lines), size)]
    return [{"step": part[-1]["step"], "loss": sum(line["loss"] for line in part) / len(part)} for part in parts]
