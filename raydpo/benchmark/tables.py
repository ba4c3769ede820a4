"""The benchmark's figures as tables: in the terminal, and as Markdown for the pages of the guide and README."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Table", "how", "markdown", "summary_row", "tables"]

GIB = 2**30
MARK = "~"
"""Before a time of which a part was extrapolated."""
_PARTS = {
    "step": ("Training step", "raydpo train"),
    "reference": ("Reference pass, start-up not counted", "raydpo score"),
    "job": ("Whole job", "raydpo run"),
    "sweep": ("Sweep of five betas", "raydpo sweep"),
}
_SIDES = ("raydpo", "kernel", "trl")
_PHASES = ("read", "scoring asked", "scored", "training", "first step")


@dataclass(frozen=True)
class Table:
    """A table: its title, the names of its columns, its rows of text, and a remark below it."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    remark: str = ""


def how(record: Mapping[str, Any]) -> list[str]:
    """What each side ran, in sentences."""
    settings, points = record["settings"], record["figures"]["points"]
    weights = "all weights" if settings["lora"] is None else f"LoRA of rank {settings['lora']}"
    told = [
        "raydpo: the commands score, train, run and sweep as typed, each with the Ray that it starts; the wall clock is "
        "that of the whole command, and steps are those of its run directory. Nothing is held out; the policy is exported, "
        "checked and checkpointed at the end.",
        "kernel: raydpo's scoring and training steps in plain processes, without Ray, its workers and its run directory. No "
        "user runs this.",
        f"{_trl(record)}: one process of DPOTrainer that reads, tokenises, computes the reference once "
        "(precompute_ref_log_probs), trains and saves, with adamw_torch_fused and max_length=None; of the settings below, "
        "the fastest.",
        f"Both: {_name(settings['model'])}, {settings['dtype']}, {weights}, {settings['pairs_per_step']} pairs a step, at "
        f"most {settings['max_length']} tokens a row, no recompute unless a row says so; the same pairs in the same order "
        "and the same initial adapters; log-probs and losses are compared.",
    ]
    if any(_of(each, part, side).get("extrapolated") for each in points for part in _PARTS for side in _SIDES):
        told.append(
            f"{MARK}: extrapolated. Start-up and the first steps are measured; further steps, and TRL's reference pass over "
            "their pairs, are added in proportion to their token positions."
        )
    return told


def tables(record: Mapping[str, Any]) -> list[Table]:
    """All tables of a file of results; those without rows are left out."""
    found = record["figures"]
    tried = found["tried"]
    made = [
        Table(
            f"{record['baseline']}: settings",
            ("pairs a pass x accumulated", "recompute", "largest pass", "step", "reference pass", *_MEMORY),
            [(*_ran(one), _seconds(one["step_seconds"]), _scored(one), *_memory(one)) for one in tried],
            f"Median of the steps after the first, of {tried[0]['steps']} steps." if tried else "",
        ),
        *(_compared(record, part) for part in _PARTS),
        Table(
            "Start of a command",
            ("pairs, order", "command", *_PHASES, "end", "seconds by phase, from summary.json"),
            [
                (point["workload"], f"raydpo {verb}", *_phases(each))
                for point in found["points"]
                for verb, each in point["commands"].items()
            ],
            "Seconds since the command was typed. raydpo train finds all log-probs in the cache. The first training with a "
            "model also checks it; again: two steps, with what the machine remembers of the model.",
        ),
        Table(
            "Peak memory",
            ("compared", "side", "positions a pass", "recompute", *_MEMORY),
            [
                (row["compared"], label, f"{row[side]['largest_pass']:,}", _yes(row[side]), *_memory(row[side]))
                for row in found["memory"]
                for side, label in (("raydpo", "raydpo train"), ("trl", f"{record['baseline']}, {_setting(row['trl'])}"))
            ],
            "All processes: of the command at one time, Ray's too, shared pages once; seen in samples, which miss a short "
            "peak, but at least the training process. Training process: its own peak, which the system records, or its "
            "GPU's. Positions of raydpo are the most that a pass may have.",
        ),
    ]
    return [table for table in made if table.rows]


_MEMORY = ("all processes", "training process")


def _compared(record: Mapping[str, Any], part: str) -> Table:
    """A row for each workload, with the time of each side."""
    (title, ours), rows, remarks = _PARTS[part], [], []
    for point in record["figures"]["points"]:
        times = [_of(point, part, side) for side in _SIDES]
        if any(times):
            told = [_seconds(each.get("seconds"), each.get("extrapolated", 0)) for each in times]
            told[2:2] = [_ratio(point[part].get("over_kernel"))]
            rows.append((point["workload"], *told, _ratio(point[part].get("ratio"))))
            if measured := times[2].get("measured_steps"):
                remarks.append(f"{point['workload']}: {measured} of TRL's steps measured in each training.")
        if "trl_reuses_reference" in point[part]:
            remarks.append(
                f"TRL {'re-uses' if point[part]['trl_reuses_reference'] else 'recomputes'} the first beta's reference."
            )
    if part == "step" and rows:
        remarks.append("Seconds are medians of the steps; a ratio is the median of the ratios of equal steps.")
    if part == "job":
        remarks += [told for side, name in (("raydpo", ours), ("trl", "TRL")) if (told := _line(record, side, name))]
    columns = ["pairs, order", ours, "kernel, without Ray", "raydpo / kernel", _trl(record), "times as fast"]
    if part in ("job", "sweep"):
        rows, columns = [(*row[:2], *row[4:]) for row in rows], columns[:2] + columns[4:]
    return Table(title, columns, rows, " ".join(remarks))


def _line(record: Mapping[str, Any], side: str, name: str) -> str:
    """Start-up and slope of the whole job, from the smallest and the largest size in file order."""
    points = [each for each in record["figures"]["points"] if each["order"] == "file" and side in each["job"]]
    sizes = sorted((each["pairs"], each["job"][side]["seconds"]) for each in points)
    if len(sizes) < 2:
        return ""
    (pairs, seconds), (more, longer) = sizes[0], sizes[-1]
    slope = (longer - seconds) / (more - pairs)
    start = seconds - slope * pairs
    if start < 0:  # the two sizes were not equally fast a pair, so the line through them says nothing
        return ""
    return f"{name}: {start:.0f} s and {slope:.2f} s a pair."


def markdown(record: Mapping[str, Any]) -> str:
    """The tables as a section of a page, with machine, date, versions and commands."""
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    lines = [f"{record['machine']}; {_dates(record)}; {versions}.", "", *(f"- {line}" for line in how(record)), ""]
    for table in tables(record):
        lines += [f"**{table.title}**", "", "| " + " | ".join(table.columns) + " |", "| --- " * len(table.columns) + "|"]
        lines += ["| " + " | ".join(row) + " |" for row in table.rows]
        lines += ["", *([table.remark, ""] if table.remark else [])]
    commands = dict.fromkeys(f"python {each['command']}" for each in record["measured"].values())
    return "\n".join([*lines, "```", *commands, "```"]) + "\n"


def summary_row(record: Mapping[str, Any]) -> str:
    """The row of README: step, whole job and sweep of the most pairs in file order, and memory, as one line of Markdown."""
    told, parts = [], {"step": "a step", "job": "the whole job", "sweep": "five betas"}
    points = [each for each in record["figures"]["points"] if each["order"] == "file"]
    points = [each for each in points if any("ratio" in each[part] for part in parts)]
    largest = max(points, key=lambda each: each["pairs"], default={})
    for part, name in parts.items():
        if "ratio" in largest.get(part, ()):
            sides = [_of(largest, part, side) for side in ("raydpo", "trl")]
            ours, theirs = (_seconds(each["seconds"], each["extrapolated"]) for each in sides)
            told.append(f"{name} {ours} against {theirs}")
    told = [f"{largest['pairs']:,} pairs: {', '.join(told)}"] if told else []
    for row in record["figures"]["memory"][-1:]:  # each at its fastest
        sizes = _all_processes(row["raydpo"]), row["raydpo"]["peak_bytes"], _all_processes(row["trl"])
        ours, alone, theirs = (f"{size / GIB:.1f} GiB" for size in sizes)
        told.append(f"memory {ours} with Ray's processes, {alone} without, against {theirs}")
    about = f"{_name(record['settings']['model'])}, {_dates(record)}; {MARK} extrapolated"
    return f"| speed against {_trl(record)}, its fastest setting ({about}) | {'; '.join(told)} |"


def _name(model: str) -> str:
    return model.rstrip("/").rpartition("/")[2]


def _dates(record: Mapping[str, Any]) -> str:
    days = sorted({each["date"][:10] for each in record["measured"].values()})
    return days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"


def _trl(record: Mapping[str, Any]) -> str:
    tried = record["figures"]["tried"]
    best = min(tried, key=lambda one: one["step_seconds"]) if tried else None
    return record["baseline"] + ("" if best is None else f", {_setting(best)}{', recomputed' * best['recompute']}")


def _setting(one: Mapping[str, Any]) -> str:
    return f"{one['batch']} x {one['accumulate']}"


def _of(point: Mapping[str, Any], part: str, side: str) -> Mapping[str, Any]:
    return point[part].get(side, {})


def _yes(found: Mapping[str, Any]) -> str:
    return "yes" if found["recompute"] else "no"


def _ran(one: Mapping[str, Any]) -> tuple[str, ...]:
    return _setting(one), _yes(one), f"{one['largest_pass']:,}"


def _scored(one: Mapping[str, Any]) -> str:
    return f"{one['reference_seconds']:.1f} s for {one['pairs']} pairs"


def _phases(command: Mapping[str, Any]) -> list[str]:
    told = [_seconds(command["phases"].get(phase)) for phase in _PHASES]
    by_phase = ", ".join(f"{name} {seconds:.1f}" for name, seconds in command["startup_seconds"].items())
    return [*told, _seconds(command["seconds"], command["extrapolated"]), by_phase]


def _seconds(value: float | None, extrapolated: int = 0) -> str:
    if value is None:
        return ""
    return f"{MARK if extrapolated else ''}{value:,.{0 if value >= 100 else 1 if value >= 1 else 3}f} s"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _memory(found: Mapping[str, Any]) -> list[str]:
    return [f"{size / GIB:.2f} GiB" for size in (_all_processes(found), found["peak_bytes"])]


def _all_processes(found: Mapping[str, Any]) -> float:
    """Most memory of all processes: as sampled, but not less than the exact peak of the training process among them."""
    return max(found["tree_bytes"], found["peak_bytes"])
