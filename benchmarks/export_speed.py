"""Throughput of exported students beside their PyTorch originals, on real texts, in interleaved rounds.

    python benchmarks/export_speed.py TEACHER STUDENT --data FILE [--rows 500] [--rounds 5] [--threads 2] [--work DIR]

Exports the student in float32 and int8, each within the tolerances of `distill-nlp export`; then each round times one
pass of each model over its share of the rows, in batches of like length, in an order that moves on by one each round. A
ratio is that of the teacher's seconds to the model's within the same round: what else the machine does slows both.
Tokenization and padding are not in it. Prints JSON, with the bar that the int8 student is to pass.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from distill_nlp.export import ExportSettings, export_model
from distill_nlp.export.texts import load_texts
from distill_nlp.inference import collate, length_sorted_batches, predict_logits
from distill_nlp.loading import load_tokenizer
from distill_nlp.onnx_model import load_for_inference
from distill_nlp.prediction import longest_input
from distill_nlp.report.build import machine

BATCH = 32
BAR = {"throughput": 4.0, "accuracy": 0.005}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher")
    parser.add_argument("student")
    parser.add_argument("--data", required=True)
    parser.add_argument("--split")
    parser.add_argument("--rows", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, help="folder for the exports; a temporary one where not given")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as temporary:
        measure(options, options.work or Path(temporary))


def measure(options: argparse.Namespace, work: Path) -> None:
    folders = {"teacher": options.teacher, "student": options.student}
    for name, quantize in (("onnx fp32", None), ("onnx int8", "int8")):
        folders[name] = str(work / name.replace(" ", "-"))
        settings = {"data": options.data, "split": options.split, "max_rows": options.rows, "speed": False}
        export_model(ExportSettings(options.student, folders[name], quantize, **settings))
    models = {name: load_for_inference(folder) for name, folder in folders.items()}
    tokenizers = {name: load_tokenizer(folder) for name, folder in folders.items()}
    texts = load_texts(options.data, options.split, "text", "label", options.rows, models["student"].config)
    batches, accuracy = {}, {}
    for name, model in models.items():
        tokenizer, length = tokenizers[name], longest_input(model.config, tokenizers[name])
        rows = [dict(tokenizer(text, truncation=True, max_length=length)) for text in texts.texts]
        accuracy[name] = float((predict_logits(model, tokenizer, rows, BATCH).argmax(1) == texts.labels).mean())
        indices = length_sorted_batches([len(row["input_ids"]) for row in rows], BATCH)
        batches[name] = [collate(tokenizer, [rows[i] for i in part], model, "cpu") for part in indices]

    seconds: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(options.rounds):
        names = list(models)[turn % len(models) :] + list(models)[: turn % len(models)]
        for name in names:
            seconds[name].append(timed(models[name], batches[name]))
        print(f"round {turn + 1} of {options.rounds}", file=sys.stderr, flush=True)
    ratios = {name: [t / s for t, s in zip(seconds["teacher"], seconds[name], strict=True)] for name in models}
    speed_up = {name: round(statistics.median(each), 2) for name, each in ratios.items()}
    lost = accuracy["student"] - accuracy["onnx int8"]
    print(
        json.dumps(
            {
                "rows": len(texts.texts),
                "batch_size": BATCH,
                "machine": machine("cpu"),
                "accuracy": accuracy,
                "rows_per_second": {n: round(len(texts.texts) / statistics.median(s), 1) for n, s in seconds.items()},
                "times_the_teacher": speed_up,
                "each_round": {name: [round(ratio, 2) for ratio in each] for name, each in ratios.items()},
                "bar": BAR,
                "passed": speed_up["onnx int8"] >= BAR["throughput"] and lost <= BAR["accuracy"],
            },
            indent=1,
        )
    )


def timed(model: torch.nn.Module, batches: list[dict[str, torch.Tensor]]) -> float:
    model.eval()
    with torch.inference_mode():
        start = time.perf_counter()
        for batch in batches:
            model(**batch)
        return time.perf_counter() - start


if __name__ == "__main__":
    main()
