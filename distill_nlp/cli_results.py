"""The commands that look at finished models: report, compare."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from distill_nlp.cli_output import add_trust, quiet, show_report, to_stderr, trust_if_asked
from distill_nlp.cli_settings import dotted, positive
from distill_nlp.config import CONFIG_FILE
from distill_nlp.config_file import load_experiment
from distill_nlp.errors import UsageError


def add_results(commands: Any) -> None:
    """Adds the parsers of `report` and `compare`."""
    report = commands.add_parser(
        "report",
        help="make the report of a finished run again",
        description="Makes report.json, report.md and report.html of a finished run again, without training. What the "
        "report that is there found of the same models and rows is taken over. Takes the settings of run.",
        usage="distill-nlp report RUN_DIR [--fresh] [--debug] [--SETTING VALUE ...]",
        allow_abbrev=False,
    )
    report.add_argument("run_dir", metavar="RUN_DIR", help="the run's output_dir")
    report.add_argument("--fresh", action="store_true", help="predict and measure again")

    compare = commands.add_parser(
        "compare",
        help="any two or more models on the same labeled rows",
        description="Runs two or more classifiers over the same labeled rows and compares each with each: scores with "
        "95% intervals, McNemar's test, agreement, speed. Classes are matched by name.",
        allow_abbrev=False,
    )
    compare.add_argument("models", metavar="MODEL", nargs="+", help="folders or Hub ids of classifiers")
    compare.add_argument("--data", required=True, metavar="FILE|DATASET", help="labeled rows: a file, folder or Hub id")
    compare.add_argument("--split", metavar="NAME", help="of a folder or Hub data set [test]")
    compare.add_argument("--config_name", metavar="NAME", help="configuration of a Hub data set")
    compare.add_argument("--text_column", default="text", metavar="NAME", help="[text]")
    compare.add_argument("--text_pair_column", metavar="NAME", help="second text of a pair")
    compare.add_argument("--label_column", default="label", metavar="NAME", help="[label]")
    compare.add_argument("--max_rows", type=positive, metavar="N", help="at most so many rows, drawn at random")
    compare.add_argument("--max_length", type=positive, metavar="N", help="cut texts at so many tokens")
    compare.add_argument("--batch_size", type=positive, default=32, metavar="N", help="texts of one pass [32]")
    compare.add_argument("--json", action="store_true", help="print the comparison as JSON")
    add_trust(compare)
    for parser in (report, compare):
        parser.add_argument("--debug", action="store_true", help="show tracebacks and the libraries' own messages")
    report.set_defaults(function=_report)
    compare.set_defaults(function=_compare)


def _report(known: argparse.Namespace, rest: list[str]) -> int:
    folder = Path(known.run_dir).expanduser()
    if not (folder / CONFIG_FILE).is_file():
        raise UsageError(f"{known.run_dir} is no folder of a run: it has no {CONFIG_FILE}")
    # A run may have been moved since.
    experiment = load_experiment(folder / CONFIG_FILE, dotted(rest) | {"output_dir": str(folder)})
    quiet(known.debug)
    from distill_nlp.pipeline import Pipeline

    pipeline = Pipeline(experiment, to_stderr)
    show_report(pipeline.report(fresh=known.fresh), pipeline.root)
    return 0


def _compare(known: argparse.Namespace, rest: list[str]) -> int:
    quiet(known.debug)
    trust_if_asked(known)
    from distill_nlp.comparison import compare, terminal_comparison

    settings = ("split", "config_name", "text_column", "text_pair_column", "label_column", "max_rows", "max_length")
    given = {name: getattr(known, name) for name in (*settings, "batch_size")}
    found = compare(known.models, known.data, **given)
    if known.json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
        return 0
    from rich.console import Console

    Console().print(terminal_comparison(found))
    return 0
