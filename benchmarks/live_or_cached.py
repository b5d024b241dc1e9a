"""What the teacher's cache saves in a whole training: the stages of `distill-nlp run` themselves, in turn.

    python benchmarks/live_or_cached.py CONFIG --work DIR [--rounds 3] [--steps 250] [--OVERRIDE VALUE ...]

The teacher is trained and the cache filled once, ahead; then each round trains the baseline (the student's plain
fine-tuning), the student with the teacher live, and the student from the full cache, in an order that moves on by one
each round, each in a process of its own. A ratio is that of two stages' seconds (`stage.json`: training steps with
their loading, no start-up) of the same round. What a killed run has done is kept in DIR.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

VARIANTS = {
    "plain": ["--stages", "baseline"],
    "live": ["--stages", "student", "--teacher.cache", "false"],
    "cached": ["--stages", "student", "--teacher.cache", "true"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--work", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=250, help="of each training")
    options, overrides = parser.parse_known_args()
    steps = ["--training.max_steps", str(options.steps), "--training.eval_strategy", "no", "--seeds", "0"]
    # What is finished is taken from there by a further call, of the same settings alone.
    settings = [Path(options.config).read_text(encoding="utf-8"), *overrides, *steps]
    work = options.work / hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:8]
    arguments = [options.config, *overrides, *steps, "--cache_dir", str(work / "cache")]
    prepared, filled = work / "prepared", work / "fill.json"
    distill("run", *arguments, "--output_dir", str(prepared), "--stages", "teacher")
    if not filled.is_file():
        shutil.rmtree(work / "cache", ignore_errors=True)
        start = time.monotonic()
        distill("cache", *arguments, "--output_dir", str(prepared))
        filled.write_text(json.dumps({"fill_seconds_with_start_up": round(time.monotonic() - start, 1)}))
    figures = json.loads(filled.read_text())

    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for turn in range(options.rounds):
        names = list(VARIANTS)[turn % 3 :] + list(VARIANTS)[: turn % 3]
        for name in names:
            seconds[name].append(stage_seconds(name, work / f"round-{turn}", prepared, arguments))
    figures |= {"seconds": seconds}
    for name in ("live", "cached"):
        ratios = [a / b for a, b in zip(seconds[name], seconds["plain"], strict=True)]
        figures[f"{name}_to_plain"] = {"median": statistics.median(ratios), "each": ratios}
    print(json.dumps(figures, indent=1))


def stage_seconds(name: str, folder: Path, prepared: Path, arguments: list[str]) -> float:
    run = folder / name
    stage = run / ("baseline" if name == "plain" else "student") / "seed-0" / "stage.json"
    if not stage.is_file():
        shutil.rmtree(run, ignore_errors=True)
        run.mkdir(parents=True)
        shutil.copytree(prepared / "teacher", run / "teacher")
        distill("run", *arguments, "--output_dir", str(run), "--no-doctor", *VARIANTS[name])
    return json.loads(stage.read_text())["seconds"]


def distill(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "distill_nlp", *arguments], check=True)


if __name__ == "__main__":
    main()
