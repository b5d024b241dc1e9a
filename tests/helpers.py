"""Tiny models and data, and references written as loops over numbers: what the package is compared with."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    PreTrainedTokenizerFast,
)

from distill_nlp import (
    AttentionLoss,
    CrossEntropyLoss,
    DistillationArguments,
    DistillationTrainer,
    HiddenStateLoss,
    KLDivergenceLoss,
)
from distill_nlp.outputs import AttentionInputs, Features

VOCAB_SIZE = 100
LABELS = ("negative", "neutral", "positive")

BINARY = ("bad", "good")

# ---- models and data ----


def label_config(labels=LABELS) -> dict:
    return {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}


def bert_config(dropout: float = 0.1, **changes) -> BertConfig:
    settings = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": 40,
        "hidden_dropout_prob": dropout,
        "attention_probs_dropout_prob": dropout,
        # Wide enough for maps and logits that are far from uniform.
        "initializer_range": 0.3,
        **label_config(),
    }
    return BertConfig(**(settings | changes))


def distilbert_config(dropout: float = 0.1, **changes) -> DistilBertConfig:
    settings = {
        "vocab_size": VOCAB_SIZE,
        "dim": 24,
        "n_layers": 2,
        "n_heads": 3,
        "hidden_dim": 32,
        "max_position_embeddings": 40,
        "dropout": dropout,
        "attention_dropout": dropout,
        "seq_classif_dropout": dropout,
        "initializer_range": 0.3,
        **label_config(),
    }
    return DistilBertConfig(**(settings | changes))


def seeded(seed: int, make):
    """What `make()` gives under this seed; the global generator is as it was before."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


def make_teacher(seed: int = 1, **changes) -> BertForSequenceClassification:
    return seeded(seed, lambda: BertForSequenceClassification(bert_config(**changes))).eval()


def make_student(seed: int = 2, **changes) -> DistilBertForSequenceClassification:
    return seeded(seed, lambda: DistilBertForSequenceClassification(distilbert_config(**changes)))


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Words w4 ... w99 are the ids 4 ... 99."""
    vocab = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3} | {f"w{i}": i for i in range(4, VOCAB_SIZE)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=32,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def swapped_tokenizer() -> PreTrainedTokenizerFast:
    """The same entries, but the numbers of w40 and w41 in each other's place."""
    tokenizer = make_tokenizer()
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    vocab = backend["model"]["vocab"]
    vocab["w40"], vocab["w41"] = vocab["w41"], vocab["w40"]
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(backend))
    return tokenizer


def make_dataset(rows: int = 16, seed: int = 0, unlabeled: tuple[int, ...] = (), max_length: int = 12) -> Dataset:
    """Ragged token ids, with both segments; the rows named in `unlabeled` have the label -100."""
    rng = np.random.default_rng(seed)
    columns = {"input_ids": [], "token_type_ids": [], "attention_mask": [], "labels": []}
    for row in range(rows):
        length = int(rng.integers(4, max_length + 1))
        columns["input_ids"].append([2, *rng.integers(4, VOCAB_SIZE, length - 2).tolist(), 3])
        columns["token_type_ids"].append([0] * (length // 2) + [1] * (length - length // 2))
        columns["attention_mask"].append([1] * length)
        columns["labels"].append(-100 if row in unlabeled else int(rng.integers(0, len(LABELS))))
    return Dataset.from_dict(columns)


def make_batch(dataset: Dataset | None = None, rows=range(4), width: int | None = None) -> dict[str, torch.Tensor]:
    """The rows padded to `width`, or to the longest of them."""
    dataset = make_dataset() if dataset is None else dataset
    examples = [dataset[i] for i in rows]
    width = width or max(len(example["input_ids"]) for example in examples)
    batch = {
        name: torch.tensor([example[name] + [0] * (width - len(example[name])) for example in examples])
        for name in ("input_ids", "token_type_ids", "attention_mask")
    }
    return batch | {"labels": torch.tensor([example["labels"] for example in examples])}


def all_losses() -> dict:
    return {
        "ce": CrossEntropyLoss(),
        "kl": KLDivergenceLoss(temperature=2.0),
        "hidden": HiddenStateLoss(),
        "attention": AttentionLoss(),
    }


ALL_WEIGHTS = {"ce": 0.3, "kl": 0.7, "hidden": 0.5, "attention": 2.0}


def make_arguments(output_dir, **changes) -> DistillationArguments:
    """Quiet, on the CPU, in the order of the data, saving nothing, every step logged."""
    settings = {
        "output_dir": str(output_dir),
        "use_cpu": True,
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 8,
        "learning_rate": 0.01,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "train_sampling_strategy": "sequential",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 3,
    }
    return DistillationArguments(**(settings | changes))


def checkpointing(**settings) -> dict:
    """Arguments that switch gradient checkpointing on, under the name that this version of Transformers has."""
    known = DistillationArguments.__dataclass_fields__
    name = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    return {name: True} | ({f"{name}_kwargs": settings} if settings else {})


def make_trainer(output_dir, student=None, teacher=None, losses=None, loss_weights=None, data=None, **changes):
    """A trainer of the tiny pair; `changes` go to the arguments, but for the trainer's own names."""
    own = {
        name: changes.pop(name)
        for name in ("callbacks", "compute_metrics", "data_collator", "eval_dataset", "optimizers", "processing_class")
        if name in changes
    }
    losses = all_losses() if losses is None else losses
    weights = {name: weight for name, weight in ALL_WEIGHTS.items() if name in losses}

    def build():
        return DistillationTrainer(
            model=make_student(dropout=0.0) if student is None else student,
            teacher=make_teacher() if teacher is None else teacher,
            losses=losses,
            loss_weights=weights if loss_weights is None else loss_weights,
            args=make_arguments(output_dir, **changes),
            train_dataset=make_dataset() if data is None else data,
            **({"processing_class": make_tokenizer()} | own),
        )

    # The projections are drawn here: the same for each trainer of a test.
    return seeded(5, build)


def parameters_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the parameters and buffers."""
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    if one.keys() != other.keys():
        raise AssertionError(f"other names: {sorted(one.keys() ^ other.keys())}")
    return max((one[name].double() - other[name].double()).abs().max().item() for name in one)


def step_logs(trainer) -> list[dict[str, float]]:
    """The entries of the log that belong to training steps."""
    return [entry for entry in trainer.state.log_history if "loss" in entry]


# ---- references: loops in float64 ----


def features(logits=None, hidden_states=None, attentions=None) -> Features:
    logits = torch.zeros(1, 2) if logits is None else logits
    return Features(logits=logits, hidden_states=hidden_states or {}, attentions=attentions or {})


def attention_inputs(query, key, mask=None, scaling=None, value=None) -> AttentionInputs:
    value = query if value is None else value
    return AttentionInputs(query, key, value, mask, query.shape[-1] ** -0.5 if scaling is None else scaling)


def to_numpy(tensor) -> np.ndarray:
    return tensor.detach().double().numpy() if isinstance(tensor, torch.Tensor) else np.asarray(tensor, dtype=float)


def softmax_row(row) -> list[float]:
    top = max(row)
    exponentials = [math.exp(value - top) for value in row]
    return [value / sum(exponentials) for value in exponentials]


def reference_cross_entropy(logits, labels, smoothing: float = 0.0, class_weights=None) -> float:
    total, count = 0.0, 0
    for row, label in zip(to_numpy(logits), labels, strict=True):
        if label == -100:
            continue
        p = softmax_row(row)
        loss = 0.0
        for c in range(len(row)):
            target = (1 - smoothing) * (c == label) + smoothing / len(row)
            loss -= target * math.log(p[c])
        total += loss * (1.0 if class_weights is None else class_weights[label])
        count += 1
    return total / count if count else 0.0


def reference_binary_cross_entropy(logits, labels, class_weights=None) -> float:
    total, count = 0.0, 0
    for row, targets in zip(to_numpy(logits), to_numpy(labels), strict=True):
        if targets[0] == -100:
            continue
        loss = 0.0
        for c, (z, y) in enumerate(zip(row, targets, strict=True)):
            p = 1 / (1 + math.exp(-z))
            loss -= (y * math.log(p) + (1 - y) * math.log(1 - p)) * (1.0 if class_weights is None else class_weights[c])
        total += loss / len(row)
        count += 1
    return total / count


def reference_kl(student, teacher, temperature: float) -> float:
    student, teacher = to_numpy(student), to_numpy(teacher)
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        p_s, p_t = softmax_row(s / temperature), softmax_row(t / temperature)
        for a, b in zip(p_t, p_s, strict=True):
            total += a * math.log(a / b)
    return temperature**2 * total / len(student)


def reference_hidden_states(student, teacher, mask, kind: str, weight=None, bias=None) -> float:
    """One pair of layers: student (B, S, H_student), teacher (B, S, H_teacher), mask (B, S)."""
    student, teacher, mask = to_numpy(student), to_numpy(teacher), to_numpy(mask)
    rows = []
    for b in range(len(student)):
        values = []
        for s in range(student.shape[1]):
            if mask[b, s] == 0:
                continue
            x = student[b, s]
            if weight is not None:
                x = [float(np.dot(w, x) + c) for w, c in zip(to_numpy(weight), to_numpy(bias), strict=True)]
            y = teacher[b, s]
            if kind == "mse":
                values.append(sum((p - q) ** 2 for p, q in zip(x, y, strict=True)) / len(y))
            else:
                dot = sum(p * q for p, q in zip(x, y, strict=True))
                values.append(1 - dot / math.sqrt(sum(p * p for p in x) * sum(q * q for q in y)))
        rows.append(sum(values) / len(values))
    return sum(rows) / len(rows)


def reference_map(query, key, mask) -> list:
    """[row][head][query token][key token]; masked keys are left out of the softmax and get 0."""
    query, key, mask = to_numpy(query), to_numpy(key), to_numpy(mask)
    maps = []
    for b in range(query.shape[0]):
        maps.append([])
        for a in range(query.shape[1]):
            maps[b].append([])
            real = [k for k in range(key.shape[2]) if mask[b, k]]
            for s in range(query.shape[2]):
                scores = [float(np.dot(query[b, a, s], key[b, a, k])) / math.sqrt(query.shape[3]) for k in real]
                row = dict(zip(real, softmax_row(scores), strict=True))
                maps[b][a].append([row.get(k, 0.0) for k in range(key.shape[2])])
    return maps


def reference_attention(student_qk, teacher_qk, mask, kind: str) -> float:
    """One pair of layers, each given as (query, key) of shape (B, A, S, D)."""
    student, teacher = np.array(reference_map(*student_qk, mask)), np.array(reference_map(*teacher_qk, mask))
    if student.shape[1] != teacher.shape[1]:
        student, teacher = student.mean(axis=1, keepdims=True), teacher.mean(axis=1, keepdims=True)
    mask = to_numpy(mask)
    rows = []
    for b in range(len(student)):
        real = [s for s in range(mask.shape[1]) if mask[b, s]]
        values = []
        for a in range(student.shape[1]):
            for s in real:
                p, q = student[b, a, s], teacher[b, a, s]
                if kind == "kl":
                    values.append(sum(q[k] * math.log(q[k] / p[k]) for k in real))
                else:
                    values.append(sum((p[k] - q[k]) ** 2 for k in real) / len(real))
        rows.append(sum(values) / len(values))
    return sum(rows) / len(rows)


def numeric_gradient(function, tensor: torch.Tensor, step: float = 1e-5) -> np.ndarray:
    """Central differences of `function(array)`, entry by entry, in float64."""
    base = to_numpy(tensor).copy()
    gradient = np.zeros_like(base)
    for index in np.ndindex(*base.shape):
        up, down = base.copy(), base.copy()
        up[index] += step
        down[index] -= step
        gradient[index] = (function(up) - function(down)) / (2 * step)
    return gradient


# ---- experiments ----


def write_rows(folder: Path, words: int = 3) -> Path:
    """Separable rows: the first word tells the label."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", 40), ("validation", 12), ("test", 16), ("pool", 20)):
        rows = [(f"w{4 + i % 2} w{10 + (i * 7 + len(split)) % 60} w{10 + (i * 3) % 50}", i % 2) for i in range(count)]
        more = [" ".join(f"w{10 + (i * 5 + j * 11) % 60}" for j in range(3, words)) for i in range(count)]
        rows = [(f"{text} {rest}".strip(), label) for (text, label), rest in zip(rows, more, strict=True)]
        table = pd.DataFrame(rows, columns=["text", "label"])
        extra = {"other": [f"w{20 + i % 30}" for i in range(count)], "big": table.label * 7, "same": 1}
        table.assign(**extra).to_parquet(folder / f"{split}.parquet")
    return folder


TOPICS = ("food", "money", "sport")


def write_rows_of_several_labels(folder: Path, names: tuple[str, ...] | None = TOPICS) -> Path:
    """Separable rows in jsonl: each of three words tells one label; a row may have all of them, or none.

    Args:
        names: of the labels; None: their numbers.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for k, (split, count) in enumerate([("train", 48), ("validation", 16), ("test", 24), ("pool", 20)]):
        with open(folder / f"{split}.jsonl", "w", encoding="utf-8") as lines:
            for i in range(count):
                found = [c for c in range(len(TOPICS)) if i >> c & 1]
                words = [f"w{4 + c}" for c in found] + [f"w{10 + (i * 7 + k) % 60}", f"w{10 + i * 3 % 50}"]
                labels = found if names is None else [names[c] for c in found]
                lines.write(json.dumps({"text": " ".join(words), "labels": labels}) + "\n")
    return folder


def free_port() -> int:
    """Of this machine, for processes that meet."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextmanager
def limited(seconds: int, error: type[BaseException] = TimeoutError) -> Iterator[None]:
    """Raises an error within it where it takes longer; in the main thread alone."""

    def stop(*_):
        raise error(f"not done in {seconds} s")

    earlier = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, earlier)
