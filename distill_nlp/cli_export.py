"""`distill-nlp export` on the command line."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill_nlp.cli_output import add_trust
from distill_nlp.cli_settings import positive

if TYPE_CHECKING:
    from distill_nlp.export import ExportSettings


def add_export(commands: Any) -> argparse.ArgumentParser:
    """Adds the command; who adds it says what it runs."""
    export = commands.add_parser(
        "export",
        help="a finished model as an ONNX folder, in float or int8",
        description="Writes a classifier as an ONNX folder with its tokenizer and labels, that predict reads as well. "
        "The answers of both are compared on real texts first; where they drift, nothing is written and the exit code "
        "is 1.",
        allow_abbrev=False,
    )
    export.add_argument("model", metavar="MODEL", help="folder or Hub id of a classifier")
    export.add_argument("--to", choices=("onnx",), default="onnx", help="format [onnx]")
    export.add_argument("--quantize", choices=("int8",), help="8-bit weights: a quarter of the size, and faster")
    export.add_argument("--fp16", action="store_true", help="half of the size; faster only where float16 is native")
    export.add_argument("--output", metavar="DIR", help="folder to write [MODEL-onnx, MODEL-onnx-int8, ...]")
    export.add_argument(
        "--data",
        metavar="DATA",
        help="rows to compare on: folder, file or Hub id, or synthetic [a few built-in texts]",
    )
    export.add_argument("--split", metavar="NAME", help="of --data [test; the only one of a file]")
    export.add_argument("--max_rows", type=positive, default=500, metavar="N", help="of --data, at random [500]")
    export.add_argument("--text_column", default="text", metavar="NAME", help="of --data and --calibrate [text]")
    export.add_argument("--text_pair_column", metavar="NAME", help="second text of a pair, of both")
    export.add_argument("--label_column", default="label", metavar="NAME", help="of --data [label]")
    export.add_argument(
        "--calibrate",
        metavar="DATA",
        help="fix the ranges of int8 activations on 128 rows of its split train, instead of batch by batch",
    )
    export.add_argument(
        "--reduce-range",
        action="store_const",
        const=True,
        help="7-bit weights, for processors without VNNI [what drifts less on this one]",
    )
    export.add_argument("--teacher", metavar="MODEL", help="also time and score this model, in PyTorch")
    export.add_argument("--no-speed", action="store_true", help="do not time anything")
    export.add_argument("--max_difference", type=float, metavar="X", help="of two logits [0.001; fp16, int8: any]")
    export.add_argument(
        "--max_flips", type=float, metavar="X", help="share of rows with another label [0; fp16 0.005; int8 0.02]"
    )
    export.add_argument(
        "--max_score_loss",
        type=float,
        metavar="X",
        help="of accuracy, or of macro-F1 with several labels [0; fp16 0.002; int8 0.005]",
    )
    add_trust(export)
    export.add_argument("--debug", action="store_true", help="show tracebacks and the libraries' own messages")
    return export


def run_export(known: argparse.Namespace) -> None:
    """Exports, and prints the table and where the folder lies."""
    from rich.console import Console

    from distill_nlp.export import ExportSettings, export_model, terminal_table

    given = vars(known)
    same = ("model", "output", "quantize", "fp16", "reduce_range", "calibrate", "data", "split", "text_column")
    more = ("text_pair_column", "label_column", "max_rows", "teacher", "max_difference", "max_flips", "max_score_loss")
    settings = ExportSettings(**{name: given[name] for name in same + more}, speed=not known.no_speed)
    record = export_model(settings, lambda line: print(line, file=sys.stderr, flush=True))
    Console().print(terminal_table(record))
    print(f"written to {settings.folder}")
    if (run := _run_of(settings)) is not None:
        print(f"distill-nlp report {run} shows it beside the student")


def _run_of(settings: ExportSettings) -> Path | None:
    """The run whose report looks for this export, if there is one."""
    model, folder = Path(settings.model).expanduser(), settings.folder
    run, beside = model.parent.parent, folder.resolve().parent == model.resolve().parent
    looked_for = beside and model.parent.name == "student" and folder.name.startswith(f"{model.name}-")
    return run if looked_for and (run / "report.json").is_file() else None
