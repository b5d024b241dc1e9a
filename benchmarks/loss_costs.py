"""What each loss adds to a training step: time and peak memory relative to the KL divergence alone.

    python benchmarks/loss_costs.py                    # a 6-layer MiniLM → its half, 16 x 128 and 8 x 512
    python benchmarks/loss_costs.py --models base      # BERT-base → DistilBERT, for a GPU
    python benchmarks/loss_costs.py --models tiny --batches 4x64 --rounds 2

Each variant is a whole step (teacher forward, student forward and backward) of KL plus one loss with its defaults. All
variants run in turn, round after round, and each time is divided by that of KL alone in the same round; the median over
rounds is reported. "eager" variants are the usual way: both models on eager attention, maps of all layers returned.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from memory import peak_of, return_freed_memory
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
)

from distill_nlp import DistillationModel, DistillationObjective, KLDivergenceLoss
from distill_nlp.layer_mapping import map_layers
from distill_nlp.losses import LOSSES
from distill_nlp.teacher import Teacher

CLASSES = 4  # some losses are not defined for two
# Width, heads, layers of the teacher, layers of the student; random weights.
MODELS = {"tiny": (128, 2, 4, 2), "minilm": (384, 12, 6, 3), "base": (768, 12, 12, 6)}
Step = Callable[[], None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", nargs="+", default=["16x128", "8x512"], help="rows x tokens")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--models", choices=list(MODELS), default="minilm", help="sizes of the pair")
    parser.add_argument("--losses", nargs="*", help="only these")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--output", help="JSON file for the figures")
    options = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    sizes = {"num_labels": CLASSES, "max_position_embeddings": 512, "vocab_size": 30522}
    width, heads, teacher_layers, student_layers = MODELS[options.models]
    teacher_config = BertConfig(
        hidden_size=width,
        num_attention_heads=heads,
        num_hidden_layers=teacher_layers,
        intermediate_size=4 * width,
        **sizes,
    )
    # With attention dropout, PyTorch's fused attention falls back to its slow path on a CPU.
    student_config = DistilBertConfig(
        dim=width, n_heads=heads, n_layers=student_layers, hidden_dim=4 * width, attention_dropout=0.0, **sizes
    )
    figures = {}
    for batch in options.batches:
        rows, tokens = map(int, batch.split("x"))
        steps = build_steps(teacher_config, student_config, inputs_of(rows, tokens, device), options)
        figures[batch] = measure(steps, options.rounds, device)
        print(table(batch, figures[batch]), flush=True)
    if options.output:
        Path(options.output).write_text(json.dumps(figures, indent=1) + "\n")


def inputs_of(rows: int, tokens: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Random tokens, a fifth of them padding in every second row."""
    mask = torch.ones(rows, tokens, dtype=torch.long)
    mask[::2, tokens - tokens // 5 :] = 0
    batch = {
        "input_ids": torch.randint(1000, 30000, (rows, tokens)),
        "attention_mask": mask,
        "labels": torch.randint(0, CLASSES, (rows,)),
    }
    return {name: tensor.to(device) for name, tensor in batch.items()}


def build_steps(teacher_config, student_config, batch, options) -> dict[str, Step]:
    """One training step per variant, by name; "kl" is the one that the others are compared with."""
    device = batch["input_ids"].device
    teacher = BertForSequenceClassification(copy.deepcopy(teacher_config)).to(device)
    student = DistilBertForSequenceClassification(copy.deepcopy(student_config)).to(device)

    def objective_step(losses) -> Step:
        objective = DistillationObjective({"kl": KLDivergenceLoss(), **losses})
        model = DistillationModel(student, objective, teacher.config).train()
        answers = Teacher(teacher).bind(student.config, objective)

        def step() -> None:
            with torch.autocast(device.type, torch.bfloat16, enabled=options.bf16):
                model(teacher=answers(batch), **batch).loss.backward()
            model.zero_grad(set_to_none=True)

        return step

    steps = {"kl": objective_step({})}
    for name, loss in LOSSES.items():
        if name != "kl" and (not options.losses or name in options.losses):
            steps[name] = objective_step({name: loss()})

    if not options.losses or "attention" in options.losses:
        # A config holds the attention that its model uses: each model has its own.
        eager_teacher = BertForSequenceClassification(copy.deepcopy(teacher_config)).to(device)
        eager_student = DistilBertForSequenceClassification(copy.deepcopy(student_config)).to(device)
        for model in (eager_teacher.eval().requires_grad_(False), eager_student.train()):
            model.set_attn_implementation("eager")
        pairs = map_layers("uniform", student_config.num_hidden_layers, teacher_config.num_hidden_layers)

        def eager_step(with_attention: bool) -> Step:
            def step() -> None:
                eager_attention_step(eager_teacher, eager_student, batch, pairs if with_attention else [], options.bf16)

            return step

        steps["kl, eager"] = eager_step(False)
        steps["attention, eager"] = eager_step(True)
    return steps


def eager_attention_step(teacher, student, batch, pairs, bf16: bool) -> None:
    """The usual way: returned maps of all layers, averaged per layer pair over heads, real tokens and rows."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.autocast(inputs["input_ids"].device.type, torch.bfloat16, enabled=bf16):
        with torch.no_grad():
            target = teacher(**inputs, output_attentions=bool(pairs))
        output = student(**inputs, output_attentions=bool(pairs))
    logs = [F.log_softmax(logits.float() / 2, dim=-1) for logits in (output.logits, target.logits)]
    loss = 4 * F.kl_div(*logs, reduction="batchmean", log_target=True)
    mask = inputs["attention_mask"].float()
    for student_layer, teacher_layer in pairs:
        a = output.attentions[student_layer - 1].float()
        b = target.attentions[teacher_layer - 1].float()
        divergence = (b * (b.clamp(min=1e-12).log() - a.clamp(min=1e-12).log())).sum(dim=-1).mean(dim=1)  # (B, S)
        loss = loss + ((divergence * mask).sum(dim=1) / mask.sum(dim=1)).mean() / len(pairs)
    loss.backward()
    student.zero_grad(set_to_none=True)


def measure(steps: dict[str, Step], rounds: int, device: torch.device) -> dict[str, dict[str, float]]:
    """Ratios of time and of peak memory to "kl", and what "kl" itself took."""
    peaks = {}
    return_freed_memory(at_once=True)
    for name, step in steps.items():
        step()
        peaks[name] = peak_of(step, device)
    return_freed_memory(at_once=False)
    for step in steps.values():
        step()
    seconds = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    return {
        name: {
            "time": statistics.median(s / kl for s, kl in zip(seconds[name], seconds["kl"], strict=True)),
            "memory": peaks[name] / peaks["kl"],
            "seconds": statistics.median(seconds[name]),
            "peak_mib": peaks[name] / 2**20,
        }
        for name in steps
    }


def table(batch: str, figures: dict[str, dict[str, float]]) -> str:
    kl = figures["kl"]
    lines = [f"{batch}: kl alone {kl['seconds']:.3f} s, {kl['peak_mib']:.0f} MiB", "", "| loss | time | memory |"]
    lines += ["|---|---:|---:|"]
    lines += [f"| {name} | {f['time']:.2f} | {f['memory']:.2f} |" for name, f in figures.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
