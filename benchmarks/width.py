"""What a narrower student keeps of its teacher: columns by the norms' scale, or a basis from an SVD, or neither.

    python benchmarks/width.py CHECKPOINT --data FILE [--width 192] [--steps 150] [--seeds 0,1,2]

CHECKPOINT is a BERT encoder, FILE a csv or parquet with a column `text`. Heads and neurons are cut by the package's
rules; the starts differ in what of the hidden states is kept:

- columns: as `from_teacher: {width: ...}` does, see `distill_nlp/student_width.py`.
- svd: the right singular vectors of embeddings and of all projections that write states, one under the other, become
  the columns; a LayerNorm has the diagonal of its rotated scale.
- svd, mean apart: the same, with the direction of the mean, which a LayerNorm takes out, kept as the new mean.
- first: the first columns.
- random: weights drawn as for a training from scratch.

The score is the part of the variance of the teacher's last states that a linear map of the student's gives, on tokens
that the map was not fitted on: before training, and after steps of AdamW on the squared error of such a map.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from torch import nn
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, set_seed

from distill_nlp import build_student

_ROWS_TO_LOOK_AT, _BATCH = 192, 32
_PEAK_RATE = 5e-4
_READING = tuple(f"{name}.weight" for name in ("query", "key", "value", "intermediate.dense", "pooler.dense"))
State = dict[str, torch.Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--data", required=True, help="csv or parquet file with a column text")
    parser.add_argument("--width", type=int, help="of the students; half of the teacher's where not given")
    parser.add_argument("--max_length", type=int, default=48)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[0, 1, 2])
    options = parser.parse_args()
    teacher = AutoModel.from_pretrained(options.checkpoint, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.checkpoint)
    width = options.width or teacher.config.hidden_size // 2
    ending = Path(options.data).suffix[1:]
    texts = load_dataset(ending, data_files=options.data, split="train").shuffle(seed=0)["text"]

    def encoded(rows: list[str]) -> dict[str, torch.Tensor]:
        return dict(tokenizer(rows, truncation=True, max_length=options.max_length, padding=True, return_tensors="pt"))

    looked_at, rest = encoded(texts[:_ROWS_TO_LOOK_AT]), texts[_ROWS_TO_LOOK_AT:]
    print("| start | before training | after |\n|---|---:|---:|")
    for name, start in STARTS.items():
        before, after = [], []
        for seed in options.seeds:
            set_seed(seed)
            student = start(teacher, width)
            before.append(explained(student, teacher, looked_at))
            order = torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed)).tolist()
            rows = [rest[order[i % len(order)]] for i in range(options.steps * _BATCH)]
            train(student, teacher, [encoded(rows[i : i + _BATCH]) for i in range(0, len(rows), _BATCH)])
            after.append(explained(student, teacher, looked_at))
        print(f"| {name} | {shown(before)} | {shown(after)} |", flush=True)


def shown(values: list[float]) -> str:
    """Mean, and standard deviation over seeds where they differ."""
    spread = f" ± {statistics.stdev(values):.3f}" if len(set(values)) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


# ---- starts ----


def by_columns(teacher: PreTrainedModel, width: int) -> PreTrainedModel:
    recipe = {"layers": teacher.config.num_hidden_layers, "architecture": "same", "width": width}
    return build_student(["a", "b"], from_teacher=recipe, teacher=teacher).base_model


def by_random(teacher: PreTrainedModel, width: int) -> PreTrainedModel:
    return AutoModel.from_config(by_columns(teacher, width).config)


def by_first_columns(teacher: PreTrainedModel, width: int) -> PreTrainedModel:
    return in_basis(teacher, torch.eye(teacher.config.hidden_size)[:, :width], width)


def by_svd(teacher: PreTrainedModel, width: int, mean_apart: bool = False) -> PreTrainedModel:
    """The basis in which embeddings and written states lose least, by their weights alone."""
    state = teacher.state_dict()
    written = [tensor for key, tensor in state.items() if "_embeddings.weight" in key]
    written += [tensor.T for key, tensor in state.items() if key.endswith("output.dense.weight")]
    # Each matrix counts alike, whatever its number of rows.
    stacked = torch.cat([tensor / tensor.norm() for tensor in written])
    if not mean_apart:
        return in_basis(teacher, right_singular(stacked, width), width)
    size = teacher.config.hidden_size
    ones = torch.full((size, 1), size**-0.5)
    centered = right_singular(stacked - stacked @ ones @ ones.T, width - 1)
    basis = torch.cat([ones, centered], dim=1)
    # A reflection that takes the first direction to the mean of the new columns.
    mirror = torch.full((width,), width**-0.5) - torch.eye(width)[0]
    mirror = mirror / mirror.norm()
    return in_basis(teacher, basis - 2 * (basis @ mirror)[:, None] * mirror, width)


def right_singular(matrix: torch.Tensor, count: int) -> torch.Tensor:
    """The first right singular vectors, as columns."""
    return torch.linalg.eigh(matrix.double().T @ matrix.double())[1].flip(1)[:, :count].float()


def in_basis(teacher: PreTrainedModel, basis: torch.Tensor, width: int) -> PreTrainedModel:
    """The student whose states are the teacher's times an orthonormal basis, (H, width), as far as LayerNorms allow.

    Heads and neurons are those that the package keeps: it is handed a teacher whose states are in the basis already,
    and whose columns beyond the width have no scale, so that it cuts just these.
    """
    size = teacher.config.hidden_size
    rotated = AutoModel.from_config(teacher.config).eval()
    state: State = dict(teacher.state_dict())
    for key, tensor in state.items():
        if "_embeddings.weight" in key:
            state[key] = padded(tensor @ basis, 1, size)
        elif key.endswith("LayerNorm.weight"):
            # Of the rotated scale, which is no longer one per column, its diagonal.
            state[key] = padded((basis.square() * tensor[:, None]).sum(0), 0, size)
        elif key.endswith(("LayerNorm.bias", "output.dense.weight", "output.dense.bias")):
            state[key] = padded(basis.T @ tensor, 0, size)
        elif key.endswith(_READING):
            state[key] = padded(tensor @ basis, 1, size)
    rotated.load_state_dict(state)
    return by_columns(rotated, width)


def padded(tensor: torch.Tensor, dim: int, size: int) -> torch.Tensor:
    """Zeros behind, to the teacher's width."""
    missing = list(tensor.shape)
    missing[dim] = size - tensor.shape[dim]
    return torch.cat([tensor, torch.zeros(missing)], dim)


STARTS: dict[str, Callable[[Any, int], PreTrainedModel]] = {
    "columns": by_columns,
    "svd": by_svd,
    "svd, mean apart": lambda teacher, width: by_svd(teacher, width, mean_apart=True),
    "first columns": by_first_columns,
    "random": by_random,
}


# ---- how near they come ----


@torch.no_grad()
def last_states(encoder: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Of all real tokens.  (T, width)"""
    encoder.eval()
    return encoder(**inputs).last_hidden_state[inputs["attention_mask"].bool()]


def fitted(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """The linear map, with a constant, of the least squared error.  (width + 1, H)"""
    ours = with_ones(ours).double()
    ridge = 1e-3 * torch.eye(ours.shape[1], dtype=torch.float64) * len(ours)
    ridge[-1, -1] = 0
    return torch.linalg.solve(ours.T @ ours + ridge * ours.var(), ours.T @ theirs.double())


def with_ones(states: torch.Tensor) -> torch.Tensor:
    return torch.cat([states, torch.ones_like(states[:, :1])], dim=1)


def explained(student: PreTrainedModel, teacher: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> float:
    """Part of the variance of the teacher's states; the map is fitted on the first two thirds of the tokens."""
    ours, theirs = last_states(student, inputs), last_states(teacher, inputs).double()
    cut = len(ours) * 2 // 3
    error = theirs[cut:] - with_ones(ours[cut:]).double() @ fitted(ours[:cut], theirs[:cut])
    return 1 - (error.square().sum() / (theirs[cut:] - theirs[:cut].mean(0)).square().sum()).item()


def train(student: PreTrainedModel, teacher: PreTrainedModel, batches: list[dict[str, torch.Tensor]]) -> None:
    """On the squared error of a linear map, which starts as the best one on the first batches."""
    ours, theirs = (torch.cat([last_states(m, batch) for batch in batches[:8]]) for m in (student, teacher))
    start = fitted(ours, theirs).float()
    to_teacher = nn.Linear(*(start[:-1].shape))
    with torch.no_grad():
        to_teacher.weight.copy_(start[:-1].T)
        to_teacher.bias.copy_(start[-1])
    parameters = [*student.parameters(), *to_teacher.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=_PEAK_RATE, fused=True)
    warm_up = max(1, len(batches) // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, (len(batches) - step) / (len(batches) - warm_up + 1))
    )
    for batch in batches:
        expected = last_states(teacher, batch)
        student.train()
        found = student(**batch).last_hidden_state[batch["attention_mask"].bool()]
        nn.functional.mse_loss(to_teacher(found), expected).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


if __name__ == "__main__":
    main()
