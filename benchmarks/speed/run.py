"""What a distillation step costs: beside its floor, with each lever, and from `import` to the first line of help.

    python benchmarks/speed/run.py                                  # steps, levers, start; writes nothing
    python benchmarks/speed/run.py --parts steps --rounds 5 --rows 64 --json FILE
    python benchmarks/speed/run.py --write                          # puts the tables into benchmarks/SPEED.md
    python benchmarks/speed/run.py --parts accelerator --models base        # tokens per second and utilisation of a GPU

All variants of a part train over the same rows in turn, round after round, in an order that moves on by one each round;
each time is divided by that of the part's first variant in the same round. Shown are the median of these ratios and
their range. The first pass of each is not counted. Weights and tokens are random.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from loops import LEVERS, Bare, Pass, Trained
from workloads import MODELS, Pair, batches_of, fixed_rows, imdb_rows, machine, padded_share

PAGE = Path(__file__).resolve().parents[1] / "SPEED.md"
BEGIN, END = "<!-- speed: begin -->", "<!-- speed: end -->"
PARTS = ("steps", "defaults", "levers", "start", "accelerator")
# Dense bfloat16 FLOP/s, by the maker's data sheet.
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L4": 121e12}
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
    "as distill-nlp run does it: cached, grouped": Trained(teacher="cached", grouped=True),
    "the same, training.bf16": Trained(teacher="cached", grouped=True, bf16=True),
    "the same, no attention dropout as well": Trained(teacher="cached", grouped=True, bf16=True, attention_dropout=0.0),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="steps,defaults,levers,start", help=f"of {','.join(PARTS)}")
    parser.add_argument("--models", choices=list(MODELS), default="minilm", help="sizes of the pair [minilm]")
    parser.add_argument("--batches", default="16x128,8x512", help="of the part steps: rows x tokens")
    parser.add_argument("--rows", type=int, default=128, help="of a pass [128]")
    parser.add_argument("--longest", type=int, default=256, help="IMDB reviews are cut at so many tokens [256]")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", metavar="FILE", help="all figures")
    parser.add_argument("--write", action="store_true", help="put the tables into benchmarks/SPEED.md")
    options = parser.parse_args()
    parts = options.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--parts knows {', '.join(PARTS)}, got {', '.join(sorted(unknown))}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pair = Pair(options.models, device)
    figures: dict[str, Any] = {"command": shown_command(sys.argv[1:]), "machine": machine(device)}
    texts = [f"```\n{figures['command']}\n```", machine_line(figures["machine"])]
    for part in parts:
        for title, found in PART[part](pair, options):
            figures.setdefault(part, {})[title] = found
            texts.append(table(title, found))
            print(f"{texts[-1]}\n", flush=True)
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=1) + "\n")
    if options.write:
        write("\n\n".join(texts))


def steps(pair: Pair, options: argparse.Namespace):
    """Trainers beside bare loops, at fixed lengths."""
    for batch in options.batches.split(","):
        size, tokens = map(int, batch.split("x"))
        count = max(size, options.rows * 128 // tokens // size * size)
        passes = {name: way.on(pair, fixed_rows(count, tokens), size) for name, way in STEPS.items()}
        yield f"steps of {batch}, {count} rows, fp32, no attention dropout", measured(passes, options.rounds)


def defaults(pair: Pair, options: argparse.Namespace):
    """What a user gets without settings, beside what most start from."""
    data, source = imdb_rows(4 * options.rows, options.longest)
    passes = {name: way.on(pair, data, 16) for name, way in DEFAULTS.items()}
    title = f"whole epochs of {len(data)} rows, {source} cut at {options.longest}, batches of 16"
    yield title, measured(passes, options.rounds)


def levers(pair: Pair, options: argparse.Namespace):
    """Each lever on a bare loop."""
    data, source = imdb_rows(4 * options.rows, options.longest)
    shares = [padded_share(data, batches_of(data, 16, grouped, 0)) for grouped in (False, True)]
    passes = {name: way.on(pair, data, 16) for name, way in LEVERS.items()}
    title = (
        f"levers on a bare loop, {len(data)} rows, {source} cut at {options.longest}, batches of 16 "
        f"(tokens computed for each real one: {shares[0]:.2f} at random, {shares[1]:.2f} grouped)"
    )
    yield title, measured(passes, options.rounds)


def start(pair: Pair, options: argparse.Namespace):
    """Processes from nothing."""
    commands = {
        "python -c pass": "pass",
        "distill-nlp --help": "from distill_nlp.cli import main; main(['--help'])",
        "import distill_nlp": "import distill_nlp",
        "import torch, transformers.Trainer": "import torch; from transformers import Trainer",
    }

    def process(code: str) -> Pass:
        def once(seed: int) -> tuple[float, float]:
            begin = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=False, stdout=subprocess.DEVNULL)
            return time.perf_counter() - begin, float("nan")

        return once

    yield "start-up", measured({name: process(code) for name, code in commands.items()}, options.rounds)


def accelerator(pair: Pair, options: argparse.Namespace):
    """Tokens per second and, where the peak is known, model-FLOPs utilisation, in bfloat16."""
    for size, tokens in ((32, 256), (64, 512)):
        count = max(size, options.rows // size * size)
        data = fixed_rows(count, tokens)
        ways = {"eager": Bare(bf16=True, teacher_bf16=True, attention_dropout=0.0, fused=True)}
        ways["compiled student"] = Bare("live", True, True, False, 0.0, True, compiled=True)
        passes = {name: way.on(pair, data, size) for name, way in ways.items()}
        if pair.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        found = measured(passes, options.rounds)
        for figures in found.values():
            figures["tokens_per_second"] = count * tokens / figures["seconds"]
            work = flops_of_a_token(pair, tokens) * figures["tokens_per_second"]
            name = torch.cuda.get_device_name() if pair.device.type == "cuda" else ""
            peak = next((value for key, value in PEAK.items() if key in name), None)
            figures["utilisation"] = None if peak is None else work / peak
        if pair.device.type == "cuda":
            next(iter(found.values()))["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        yield f"{options.models} pair, {size}x{tokens}, bf16", found


def flops_of_a_token(pair: Pair, tokens: int) -> float:
    """Multiplications and additions of a step for each token: the teacher forward, the student forward and backward."""
    width, _, teacher, student = MODELS[pair.name]
    # Of a block: 12 H² weights, twice each; scores and their use 4 S H.
    block = 24 * width**2 + 4 * tokens * width
    return block * (teacher + 3 * student)


PART = {"steps": steps, "defaults": defaults, "levers": levers, "start": start, "accelerator": accelerator}


def measured(passes: dict[str, Pass], rounds: int) -> dict[str, dict[str, Any]]:
    """Seconds of each, and ratios to the first in the same round."""
    names = list(passes)
    for name in names:
        passes[name](0)
    wall: dict[str, list[float]] = {name: [] for name in names}
    cpu: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        for i in range(len(names)):
            name = names[(i + turn) % len(names)]
            seconds, busy = passes[name](turn + 1)
            wall[name].append(seconds)
            cpu[name].append(busy)
    first = names[0]
    found = {}
    for name in names:
        ratios = [a / b for a, b in zip(wall[name], wall[first], strict=True)]
        busy = [a / b for a, b in zip(cpu[name], cpu[first], strict=True)]
        found[name] = {
            "seconds": statistics.median(wall[name]),
            "ratio": statistics.median(ratios),
            "range": [min(ratios), max(ratios)],
            "cpu_ratio": None if busy[0] != busy[0] else statistics.median(busy),
        }
    return found


def table(title: str, found: dict[str, dict[str, Any]]) -> str:
    """The figures as Markdown."""
    extra = [key for key in ("tokens_per_second", "utilisation", "peak_gib") if any(key in f for f in found.values())]
    head = ["", "seconds", "time ×", "range", "CPU time ×", *(key.replace("_", " ") for key in extra)]
    lines = [f"**{title}**", "", "| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    for name, figures in found.items():
        low, high = figures["range"]
        cells = [name, f"{figures['seconds']:.2f}", f"{figures['ratio']:.2f}", f"{low:.2f} … {high:.2f}"]
        cells.append("" if figures["cpu_ratio"] is None else f"{figures['cpu_ratio']:.2f}")
        cells += ["" if figures.get(key) is None else f"{figures[key]:,.2f}" for key in extra]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def machine_line(found: dict[str, Any]) -> str:
    return f"{found['name']} ({found['device']}, {found['threads']} threads), torch {found['torch']}."


def shown_command(arguments: list[str]) -> str:
    """What to type for the same figures, without where they go."""
    kept, skip = [], False
    for argument in arguments:
        if not (skip or argument in ("--write", "--json") or argument.startswith("--json=")):
            kept.append(argument)
        skip = argument == "--json"
    return " ".join(["python benchmarks/speed/run.py", *kept])


def write(text: str) -> None:
    """Puts the tables between the marks of the page."""
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
