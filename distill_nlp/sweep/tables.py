"""What a sweep found: sweep.json, sweep.md and a table for the terminal, of the same numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from optuna.trial import TrialState

from distill_nlp.durable_files import write_json, write_text
from distill_nlp.sweep.command import run_command, shown
from distill_nlp.sweep.front import pareto_front
from distill_nlp.sweep.plan import SweepPlan
from distill_nlp.sweep.plot import draw
from distill_nlp.sweep.study import REASON, RECORD, SweepStudy

SCHEMA_VERSION = 1
TABLE_FILE = "sweep.json"
_STATES = {
    TrialState.COMPLETE: "finished",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "unfinished",
}


def collect(plan: SweepPlan, study: SweepStudy) -> dict[str, Any]:
    """All trials with what is known of them, the front against size, and the best with the command that runs it."""
    trials = []
    for trial in study.trials:
        record = trial.user_attrs.get(RECORD, {})
        trials.append(
            {
                "number": trial.number,
                "state": _STATES[trial.state],
                "settings": study.space.settings(trial.params) if trial.params.keys() == study.space.names else {},
                "value": trial.value if trial.state == TrialState.COMPLETE else None,
                "evaluations": list(trial.intermediate_values.values()),
                **{key: record.get(key) for key in ("steps", "seconds", "parameters", "size_mb", "teacher", REASON)},
            }
        )
    result = {
        "schema_version": SCHEMA_VERSION,
        "sweep": str(plan.path),
        "metric": study.metric,
        "trials": trials,
        "fronts": {"parameters": front_of(trials, "parameters")},
        "best": None,
        "command": None,
    }
    if best := ranked(trials)[:1]:
        result["best"] = best[0]["number"]
        result["command"] = run_command(plan, best[0]["settings"], plan.root / best[0]["teacher"])
    return result


def ranked(trials: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The finished ones, the best first; of equals the smaller, then the earlier."""
    done = [trial for trial in trials if trial["state"] == "finished"]
    return sorted(done, key=lambda t: (-t["value"], t["parameters"], t["number"]))


def front_of(trials: list[dict[str, Any]], cost: str) -> list[int]:
    """Numbers of the finished trials that none beats in value and this cost, cheapest first."""
    known = [trial for trial in trials if trial["value"] is not None and trial.get(cost) is not None]
    return [known[i]["number"] for i in pareto_front([(trial["value"], trial[cost]) for trial in known])]


def write_tables(result: dict[str, Any], folder: Path) -> None:
    """Writes sweep.json and sweep.md, and pareto.svg once there is something to draw; each whole or not at all."""
    write_json(folder / TABLE_FILE, result)
    if result["best"] is not None:
        draw(result, folder / "pareto.svg")
    write_text(folder / "sweep.md", render_markdown(result))


def table(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Names of the columns, and a row per trial as text: finished ones by rank, then the others; the teacher first."""
    names = list(dict.fromkeys(name for trial in result["trials"] for name in trial["settings"]))
    columns = ["trial", *names, result["metric"], "steps", "seconds", "parameters", "p50, batch 1", "rows/s", "state"]
    rows = []
    if (teacher := result.get("teacher")) is not None:
        rows.append(["teacher", *[""] * len(names), _score(teacher["value"]), "", "", *_costs(teacher), ""])
    done = ranked(result["trials"])
    fronts = {number for front in result["fronts"].values() for number in front}
    for trial in [*done, *(t for t in result["trials"] if t not in done)]:
        state = trial["state"] + (", on the front" if trial["number"] in fronts else "")
        settings = [shown(trial["settings"][name]) if name in trial["settings"] else "" for name in names]
        steps = "" if trial["steps"] is None else f"{trial['steps']:,}"
        seconds = "" if trial["seconds"] is None else f"{trial['seconds']:.0f}"
        reason = f": {trial[REASON]}" if trial[REASON] else ""
        rows.append(
            [str(trial["number"]), *settings, _score(trial["value"]), steps, seconds, *_costs(trial), state + reason]
        )
    return columns, rows


def terminal_table(result: dict[str, Any]) -> Any:
    """A `rich` renderable of the trials, narrower than sweep.md, without the command, which must stay on one line."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    columns, rows = table(result)
    shown_columns = [i for i, name in enumerate(columns) if name not in _ONLY_ON_THE_PAGE]
    last = [name.rpartition(".")[2] for name in columns]
    drawn = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for i in shown_columns:
        # A heading or a reason may be broken, a number may not.
        width = 12 if columns[i] == "state" else max((len(row[i]) for row in rows), default=1)
        name = last[i] if last.count(last[i]) == 1 else columns[i]
        drawn.add_column(name, overflow="fold", min_width=min(width, 12))
    for row in rows:
        drawn.add_row(*(Text(row[i]) for i in shown_columns))
    return Group(drawn, Text(summary(result), style="bold"))


def summary(result: dict[str, Any]) -> str:
    """One sentence."""
    if result["best"] is None:
        return "No trial is finished."
    best = next(trial for trial in result["trials"] if trial["number"] == result["best"])
    states = [trial["state"] for trial in result["trials"]]
    counts = ", ".join(f"{states.count(state)} {state}" for state in _STATES.values() if state in states)
    return f"Best of {len(states)} trials ({counts}): trial {best['number']}, {result['metric']} {best['value']:.4f}."


def render_markdown(result: dict[str, Any]) -> str:
    """The same as Markdown, with the fronts and the plot."""
    columns, rows = table(result)
    lines = [f"# {Path(result['sweep']).stem}", "", summary(result), ""]
    if result["command"]:
        lines += ["Baseline, all seeds and the report on the test rows, with the best settings:", ""]
        lines += ["```", result["command"], "```", ""]
    lines += [_markdown_row(columns), "|" + "---|" * len(columns), *map(_markdown_row, rows), ""]
    if result["best"] is None:
        return "\n".join(lines)
    for cost, front in result["fronts"].items():
        numbers = ", ".join(map(str, front))
        lines.append(f"- not beaten in {result['metric']} and {_COSTS[cost]}: trials {numbers}")
    lines += ["", "![fronts](pareto.svg)", ""]
    if (machine := result.get("machine")) is not None:
        lines.append(
            f"One seed per trial, {result['metric']} on the validation rows, which picked the best: it is optimistic. "
            f"Speed on {machine['name']} ({machine['device']}, {machine['threads']} threads), models in turns on the "
            f"validation rows, without tokenization; of {result['measured']} trials, the best of each shape first."
        )
    return "\n".join(lines) + "\n"


_ONLY_ON_THE_PAGE = ("steps", "seconds", "rows/s")
_COSTS = {"parameters": "size", "latency": "latency"}


def _markdown_row(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _score(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _costs(model: dict[str, Any]) -> list[str]:
    """Parameters, latency and throughput, each empty where it is not known."""
    parameters, latency, throughput = model.get("parameters"), model.get("latency"), model.get("throughput")
    return [
        "" if parameters is None else f"{parameters / 1e6:.2f}M",
        "" if latency is None else f"{latency:.1f} ms",
        "" if throughput is None else f"{throughput:.0f}",
    ]
