"""The command `distill-nlp`. Heavy imports wait until a command needs them."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence
from typing import Any

import distill_nlp
from distill_nlp.cli_export import add_export, run_export
from distill_nlp.cli_output import AFTER_STORAGE, add_trust, interruption_line, show_report, trust_if_asked
from distill_nlp.cli_output import is_main_rank as _is_main_rank
from distill_nlp.cli_output import quiet as _quiet
from distill_nlp.cli_output import to_stderr as _to_stderr
from distill_nlp.cli_push import add_push
from distill_nlp.cli_results import add_results
from distill_nlp.cli_settings import add_settings, dotted, positive, value_of
from distill_nlp.config import STAGES, LossSection
from distill_nlp.config_file import leaves, load_experiment
from distill_nlp.durable_files import storage_problem
from distill_nlp.errors import DistillError, UsageError, one_line
from distill_nlp.interruption import SignalWatch, write_from_handler

_LOSS_HELP = (
    "Values are YAML; defaults stand in brackets. Any setting of `training` can be given for the teacher alone, as "
    "`--teacher.training.learning_rate 2e-5`, and any other argument of Transformers' TrainingArguments as "
    "`--training.adam_beta2 0.98`. Losses are given by name: `--losses.kl.temperature 4`, `--losses.hidden.weight 1`; "
    "settings of a phase by its number, from 0: `--phases.1.losses.kl.temperature 4`. Each loss has a weight, a "
    f"{LossSection.model_fields['weight'].description}, as `--losses.kl.weight "
    "'{schedule: linear, start: 0, end: 1}'`. docs/losses.md has all losses and their settings."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; gives its exit code: 0 done, 1 failed, 2 wrong usage or data, 130 or 143 interrupted."""
    # Before PyTorch loads its OpenMP: spinning threads make small operations many times slower on a shared machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    parser = _parser()
    known, rest = parser.parse_known_args(arguments)
    if known.command not in ("run", "report", "cache", "doctor", "sweep") and rest:
        parser.error(f"unknown arguments: {' '.join(rest)}")
    try:
        with SignalWatch(lambda line: write_from_handler(line) if _is_main_rank() else None):
            return known.function(known, rest)
    except KeyboardInterrupt as error:
        if _is_main_rank():
            print(f"\n{interruption_line(known.command, error, arguments)}", file=sys.stderr)
        return getattr(error, "exit_code", 130)
    except BrokenPipeError:
        # The reader (`| head`) has gone; nothing is left to be flushed to it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if known.debug:
            raise
        if isinstance(error, DistillError):
            message, code = "\n".join(map(one_line, error.lines)), error.exit_code
        else:
            text = one_line(" ".join(str(error).split()))
            message, code = f"{type(error).__name__}: {text} (--debug shows the traceback)", 1
            if known.command in AFTER_STORAGE and (problem := storage_problem(error)) is not None:
                message = f"{problem}: {text}; {AFTER_STORAGE[known.command]}"
        # What is wrong with the settings is the same on all ranks; what fails may fail on one.
        if _is_main_rank():
            print(f"error: {message}", file=sys.stderr)
        elif not isinstance(error, UsageError):
            print(f"error (rank {os.environ['RANK']}): {message}", file=sys.stderr)
        return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="distill-nlp", description="Distils a text classifier into a small, fast student, and proves it."
    )
    parser.add_argument("--version", action="version", version=f"distill-nlp {distill_nlp.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    run = commands.add_parser(
        "run",
        help="teacher, plain baseline, distilled student and report, from one config",
        description="Runs the stages of an experiment: fine-tunes the teacher (unless it is finished), trains the "
        "student plainly and distilled, and reports. A finished stage is not done again unless its settings changed; "
        "an interrupted one goes on from its last checkpoint.",
        usage="distill-nlp run CONFIG [--stages A,B] [--dry-run] [--no-doctor] [--debug] [--SETTING VALUE ...]",
        epilog=_LOSS_HELP,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=40),
        allow_abbrev=False,
    )
    run.add_argument("--stages", metavar="A,B", help=f"only these of {','.join(STAGES)}")
    run.add_argument(
        "--dry-run",
        action="store_true",
        help="only two steps of each stage, of which nothing is kept; there is no report of them",
    )
    run.add_argument("--no-doctor", action="store_true", help="do not look first for what can be known to be wrong")
    add_settings(run)
    run.set_defaults(function=_run)

    cache = commands.add_parser(
        "cache",
        help="compute the teacher's logits ahead of the students' stage",
        description="Fills the teacher's cache for the rows that the students will learn from, and says how many were "
        "there already. Only what is missing is computed; a run with the same config does it by itself. Takes the "
        "settings of run.",
        usage="distill-nlp cache CONFIG [--debug] [--SETTING VALUE ...]",
        epilog=_LOSS_HELP,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=40),
        allow_abbrev=False,
    )
    add_settings(cache)
    cache.set_defaults(function=_cache)

    doctor = commands.add_parser(
        "doctor",
        help="what can be known to be wrong before the first step",
        description="Looks at data, labels, tokenizers, models, losses, memory and time of an experiment without "
        "training anything. Each finding says what, why it matters and how to mend it. Exit code 2 if one of them "
        "would stop a run, else 0. Takes the settings of run, which looks the same way first.",
        usage="distill-nlp doctor CONFIG [--debug] [--SETTING VALUE ...]",
        epilog=_LOSS_HELP,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=40),
        allow_abbrev=False,
    )
    add_settings(doctor)
    doctor.set_defaults(function=_doctor)

    sweep = commands.add_parser(
        "sweep",
        help="many students of one teacher under other settings",
        description="Trains students under other settings until there are enough trials, the teacher's answers paid "
        "once, and ends with a table, the Pareto front and the best settings as a command. The same command goes on "
        "with an interrupted sweep, and may run several times at once.",
        usage="distill-nlp sweep CONFIG [--trials N] [--workers N] [--output_dir DIR] [--debug] [--SETTING VALUE ...]",
        epilog="CONFIG names an experiment, a space and the number of trials: see docs/sweeps.md. Settings are those "
        "of run, for all trials.",
        allow_abbrev=False,
    )
    sweep.add_argument("config", metavar="CONFIG", help="the sweep's YAML file")
    sweep.add_argument("--trials", type=positive, metavar="N", help="finished trials, instead of the file's")
    sweep.add_argument("--workers", type=positive, default=1, metavar="N", help="processes on this machine [1]")
    sweep.add_argument("--output_dir", metavar="DIR", help="folder of the sweep, instead of the file's")
    sweep.add_argument("--debug", action="store_true", help="show tracebacks and the libraries' own messages")
    sweep.set_defaults(function=_sweep)

    add_export(commands).set_defaults(function=_export)

    predict = commands.add_parser(
        "predict", help="classify texts with a finished model", description="Classifies texts with a finished model."
    )
    predict.add_argument("model", metavar="MODEL", help="folder or Hub id of a classifier, or an exported folder")
    predict.add_argument(
        "texts",
        metavar="TEXT|FILE",
        nargs="+",
        help="texts; or one file (csv, tsv, json, jsonl, parquet by its text column, any other by lines); - for stdin",
    )
    predict.add_argument(
        "--format",
        choices=("text", "jsonl"),
        default="text",
        help="output: label, score, text (with several labels per text, "
        "labels and scores joined by commas, - where none applies); or JSON",
    )
    predict.add_argument("--text_column", default="text", metavar="NAME", help="column of a file with columns [text]")
    predict.add_argument("--text_pair_column", metavar="NAME", help="second text of a pair, in a file with columns")
    predict.add_argument("--batch_size", type=positive, default=32, metavar="N", help="texts of one pass [32]")
    predict.add_argument("--max_length", type=positive, metavar="N", help="cut texts at so many tokens")
    predict.add_argument("--debug", action="store_true", help="show tracebacks and the libraries' own messages")
    add_trust(predict)
    predict.set_defaults(function=_predict)

    add_results(commands)
    add_push(commands).set_defaults(function=_push)
    return parser


def _run(known: argparse.Namespace, rest: list[str]) -> int:
    stages = _stages(known.stages)
    pipeline = _pipeline(known, rest)
    if known.dry_run:
        pipeline.rehearse(stages)
        return 0
    report = pipeline.run(stages, doctor=not known.no_doctor)
    if report is not None:
        show_report(report, pipeline.root)
    return 0


def _doctor(known: argparse.Namespace, rest: list[str]) -> int:
    from rich.console import Console

    pipeline = _pipeline(known, rest)
    from distill_nlp.doctor import exit_code, terminal_findings

    found = pipeline.examine()
    if _is_main_rank():
        Console().print(terminal_findings(found))
    return exit_code(found)


def _cache(known: argparse.Namespace, rest: list[str]) -> int:
    _pipeline(known, rest).fill_cache()
    return 0


def _sweep(known: argparse.Namespace, rest: list[str]) -> int:
    _quiet(known.debug)
    from rich.console import Console

    from distill_nlp.sweep import run_sweep, terminal_table

    result = run_sweep(known.config, dotted(rest), known.output_dir, known.trials, known.workers, _to_stderr)
    Console().print(terminal_table(result))
    if result.get("command"):
        print(result["command"])
    return 0


def _export(known: argparse.Namespace, rest: list[str]) -> int:
    _quiet(known.debug)
    trust_if_asked(known)
    run_export(known)
    return 0


def _pipeline(known: argparse.Namespace, rest: list[str]) -> Any:
    """The experiment of a config with the settings of the command line over it."""
    fields = dict(leaves())
    given = vars(known)
    overrides = {name: value_of(given[name], name, field) for name, field in fields.items() if name in given}
    overrides |= dotted(rest)
    experiment = load_experiment(known.config, overrides)
    _quiet(known.debug)
    from distill_nlp.pipeline import Pipeline

    return Pipeline(experiment, _to_stderr)


def _predict(known: argparse.Namespace, rest: list[str]) -> int:
    _quiet(known.debug)
    trust_if_asked(known)
    from distill_nlp.prediction import predict, read_texts

    # A text may hold letters that the terminal's encoding lacks; that must not end a long run.
    sys.stdout.reconfigure(errors="backslashreplace")

    for line in predict(
        known.model,
        read_texts(known.texts, known.text_column, known.text_pair_column),
        as_json=known.format == "jsonl",
        batch_size=known.batch_size,
        max_length=known.max_length,
    ):
        print(line)
    sys.stdout.flush()
    return 0


def _push(known: argparse.Namespace, rest: list[str]) -> int:
    _quiet(known.debug)
    from distill_nlp.push import PushOptions, push

    if not known.debug:
        import huggingface_hub.utils as hub

        hub.logging.set_verbosity_error()
        if not sys.stderr.isatty():
            hub.disable_progress_bars()
    sys.stdout.reconfigure(errors="backslashreplace")
    wanted = {field.name: getattr(known, field.name) for field in dataclasses.fields(PushOptions)}
    print(push(PushOptions(**wanted), _to_stderr))
    return 0


def _stages(text: str | None) -> tuple[str, ...]:
    if text is None:
        return STAGES
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in STAGES]
    if unknown or not names:
        raise UsageError(f"--stages: unknown {', '.join(unknown) or repr(text)}; there are {', '.join(STAGES)}")
    return tuple(name for name in STAGES if name in names)
