"""What a distillation costs: a step beside its floor, with each lever and each way to maps, whole runs, and start-up.

    python benchmarks/speed/run.py                                  # steps, defaults, levers, start; writes nothing
    python benchmarks/speed/run.py --parts steps --rounds 5 --rows 64 --json FILE
    python benchmarks/speed/run.py --parts capture                  # attention losses by capture and by eager maps
    python benchmarks/speed/run.py --parts relations                # token relations by capture and by whole maps
    python benchmarks/speed/run.py --parts limits                   # the products of a step alone: what is left to win
    python benchmarks/speed/run.py --parts short                    # short rows in bf16 on a CPU
    python benchmarks/speed/run.py --parts whole --data DATA --teacher CHECKPOINT --work DIR --seeds 0,1,2
    python benchmarks/speed/run.py --parts stages --data DATA --teacher CHECKPOINT --work DIR    # and its idle share
    python benchmarks/speed/run.py --parts accelerator --models base --rows 3200    # a GPU's tokens per second
    python benchmarks/speed/run.py ... --write      # puts the tables of these parts into benchmarks/SPEED.md

All variants of a part train over the same rows in turn, round after round, in an order that moves on by one each round;
each time is divided by that of the part's first variant in the same round. Shown are the median of these ratios, their
range, and the ratio of the quickest passes, which other work on the machine weighs on least. The first pass of each is
not counted. Weights and tokens are random, but for those of `whole`, where a round is a seed, and of `stages`.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))
import accelerator
import capturing
import limits
import short
import starting
import whole
from loops import LEVERS, Bare, Trained
from measuring import measured, table
from page_blocks import put_blocks
from workloads import MODELS, Pair, batches_of, fixed_rows, imdb_rows, machine, padded_share

from distill_nlp.durable_files import write_json

PAGE = Path(__file__).resolve().parents[1] / "SPEED.md"
FLAGS = ("--compile",)
# Fused AdamW, as the Trainer's own default is.
STEPS = {
    "bare loop, teacher live": Bare(attention_dropout=0.0, fused=True),
    "plain Trainer subclass": Trained("plain", attention_dropout=0.0),
    "DistillationTrainer, KL": Trained(attention_dropout=0.0),
    "DistillationTrainer, KL + hidden + attention": Trained(losses=("hidden", "attention"), attention_dropout=0.0),
    "bare loop, the labels alone": Bare("none", attention_dropout=0.0, fused=True),
    "stock Trainer, the labels alone": Trained("labels", attention_dropout=0.0),
    "DistillationTrainer, KL, cached": Trained(teacher="cached", attention_dropout=0.0),
}
DEFAULTS = {
    "plain Trainer subclass: fp32, teacher live, random batches": Trained("plain"),
    "cached, grouped": Trained(teacher="cached", grouped=True),
    "the same, no attention dropout": Trained(teacher="cached", grouped=True, attention_dropout=0.0),
    "the same in bf16: `run` by itself, where bf16 is quicker": Trained(
        teacher="cached", grouped=True, bf16=True, attention_dropout=0.0
    ),
}


def main() -> None:
    options = _arguments()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pair = Pair(options.models, device)
    figures: dict[str, Any] = {"command": shown_command(sys.argv[1:]), "machine": machine(device)}
    for part in options.parts:
        texts = [f"```\n{shown_command(sys.argv[1:], part)}\n```", machine_line(figures["machine"])]
        for title, found in PART[part](pair, options):
            figures.setdefault(part, {})[title] = found
            texts.append(table(title, found))
            print(f"{texts[-1]}\n", flush=True)
        # After each part: the next one may take hours.
        if options.json:
            write_json(options.json, figures)
        if options.write:
            put_blocks(PAGE, "speed", "part", {part: "\n\n".join(texts)})


def _arguments() -> argparse.Namespace:
    layout = argparse.RawDescriptionHelpFormatter
    # `shown_command` knows whole names.
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout, allow_abbrev=False)
    parser.add_argument("--parts", type=_listed, default="steps,defaults,levers,start", help=f"of {','.join(PART)}")
    parser.add_argument("--models", choices=list(MODELS), default="minilm", help="sizes of the pair [minilm]")
    parser.add_argument(
        "--batches",
        default="16x128,8x512,imdb",
        help="of steps and limits: rows x tokens, or imdb [all three]",
    )
    parser.add_argument("--rows", type=int, default=128, help="of a pass [128]")
    parser.add_argument("--longest", type=int, default=256, help="reviews are cut at so many tokens [256]")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", metavar="FILE", help="all figures")
    parser.add_argument("--write", action="store_true", help="put the tables into benchmarks/SPEED.md")
    parser.add_argument("--compile", action="store_true", help="levers: torch.compile'd student as well")
    parser.add_argument("--short", type=_numbers, default="20,64,128", help="of the part short: tokens [20,64,128]")
    parser.add_argument("--shapes", default="32x256,64x512", help="of the part accelerator: rows x tokens")
    parser.add_argument("--texts", type=int, default=4000, help="of the part start, to be tokenized [4000]")
    capture = parser.add_argument_group("the parts capture and relations")
    capture.add_argument("--tokens", type=_numbers, default="128,256,512", help="of a row [128,256,512]")
    capture.add_argument("--maps", choices=("mse", "kl"), default="mse", help="how attention maps are compared [mse]")
    runs = parser.add_argument_group("the parts whole and stages")
    runs.add_argument("--data", metavar="DIR", help="train, validation and test of text and label, as imdb-small")
    runs.add_argument("--teacher", metavar="DIR", help="BERT checkpoint that teacher and student are made from")
    runs.add_argument("--work", metavar="DIR", help="folder for the runs; what is finished there is not done again")
    runs.add_argument("--seeds", type=_numbers, default="0", help="[0]")
    runs.add_argument("--epochs", type=float, default=3, help="[3]")
    runs.add_argument(
        "--settings", default="", help="of distill-nlp run, for students: '--student.attention_dropout 0'"
    )
    options = parser.parse_args()
    if {"whole", "stages"} & {*options.parts} and None in (options.data, options.teacher, options.work):
        parser.error("the parts whole and stages need --data, --teacher and --work")
    return options


def _listed(text: str) -> list[str]:
    parts = text.split(",")
    if unknown := sorted(set(parts) - set(PART)):
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; there are {', '.join(PART)}")
    return parts


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def steps(pair: Pair, options: argparse.Namespace):
    """Trainers beside bare loops, at fixed lengths and at those of IMDB."""
    for title, data, size in _rows_of(options):
        found = _measured(pair, options, STEPS, data, size)
        yield f"steps of {title}, {len(data)} rows, fp32, no attention dropout", found


def products(pair: Pair, options: argparse.Namespace):
    """Steps beside their matrix products and attention alone."""
    # The products are those of rows of one length.
    for title, data, size in _rows_of(options, reviews=False):
        found = _measured(pair, options, limits.WAYS, data, size)
        yield f"{pair.name} pair, steps of {title}, {len(data)} rows", found


def _rows_of(options: argparse.Namespace, reviews: bool = True):
    """For each of `--batches`: its name, the rows of a pass, and how many of them are a batch."""
    for batch in options.batches.split(","):
        if batch == "imdb":
            if reviews:
                data, source = imdb_rows(options.rows, options.longest)
                yield f"16 rows at random, {source} cut at {options.longest}", data, 16
            continue
        size, tokens = map(int, batch.split("x"))
        yield batch, fixed_rows(max(size, options.rows * 128 // tokens // size * size), tokens), size


def _measured(pair: Pair, options: argparse.Namespace, ways: Mapping[str, Any], data: Any, size: int):
    return measured({name: way.on(pair, data, size) for name, way in ways.items()}, options.rounds)


def defaults(pair: Pair, options: argparse.Namespace):
    """What a user gets without settings, beside what most start from."""
    data, source = imdb_rows(4 * options.rows, options.longest)
    title = f"whole epochs of {len(data)} rows, {source} cut at {options.longest}, batches of 16"
    yield title, _measured(pair, options, DEFAULTS, data, 16)


def levers(pair: Pair, options: argparse.Namespace):
    """Each lever on a bare loop."""
    data, source = imdb_rows(4 * options.rows, options.longest)
    shares = [padded_share(data, batches_of(data, 16, grouped, 0)) for grouped in (False, True)]
    ways = LEVERS | ({"torch.compile'd student": Bare(compiled=True)} if options.compile else {})
    title = (
        f"levers on a bare loop, {len(data)} rows, {source} cut at {options.longest}, batches of 16 "
        f"(tokens computed for each real one: {shares[0]:.2f} at random, {shares[1]:.2f} grouped)"
    )
    yield title, _measured(pair, options, ways, data, 16)


def capture(pair: Pair, options: argparse.Namespace):
    """Losses of states and maps by capture and in the usual way."""
    yield from _captured(pair, options, options.maps, f"KL + hidden + attention ({options.maps})")


def relations(pair: Pair, options: argparse.Namespace):
    """The same of relations between tokens."""
    yield from _captured(pair, options, "relations", "KL + relations (Q-Q, K-K, V-V)")


def _captured(pair: Pair, options: argparse.Namespace, maps: str, terms: str):
    """In batches of 8."""
    for tokens in options.tokens:
        count = max(8, options.rows * 128 // tokens // 8 * 8)
        for layers, shown in (("uniform", "all mapped layers"), ("last", "the last layer alone")):
            found = capturing.costs(pair, 8, tokens, count, layers, maps, options.rounds)
            yield f"{terms} of {shown}, {count // 8} steps of 8x{tokens}, fp32", found


PART = {
    "steps": steps,
    "defaults": defaults,
    "levers": levers,
    "capture": capture,
    "relations": relations,
    "limits": products,
    "short": lambda pair, options: short.tables(pair, options.rows, options.short, options.rounds),
    "whole": lambda pair, options: whole.tables(options),
    "stages": lambda pair, options: whole.stage_tables(options),
    "start": lambda pair, options: starting.tables(pair, options.texts, options.rounds),
    "accelerator": lambda pair, options: accelerator.tables(pair, options.rows, options.shapes, options.rounds),
}


def machine_line(found: dict[str, Any]) -> str:
    return f"{found['name']} ({found['device']}, {found['threads']} threads), torch {found['torch']}."


def shown_command(arguments: list[str], part: str | None = None) -> str:
    """What to type for the same figures, without where they go, and with names in the place of this machine's folders.

    Args:
        arguments: as they were typed.
        part: that alone, instead of all.
    """
    names = {"--data": "DATA", "--teacher": "CHECKPOINT", "--work": "DIR"}
    shown = [] if part is None else ["--parts", part]
    words = iter(arguments)
    for word in words:
        name, equals, value = word.partition("=")
        if name == "--write":
            continue
        value = (value if equals else next(words)) if name not in FLAGS else None
        if name == "--json" or (name == "--parts" and part is not None):
            continue
        shown += [name] if value is None else [name, names.get(name, shlex.quote(value))]
    return " ".join(["python benchmarks/speed/run.py", *shown])


if __name__ == "__main__":
    main()
