"""A distillation as most tutorials have it: a Trainer subclass with the teacher in `compute_loss`, and all around it.

    python benchmarks/speed/plain.py --data DIR --teacher DIR --checkpoint DIR --output DIR --seed 0 --epochs 3

In float32, the teacher running in every step, batches of random rows padded to their longest. Rows, tokens, epochs,
batch size, optimizer and schedule are those of `distill-nlp run` with its defaults, as are the student's initial
weights, the evaluation after each epoch and the checkpoint that is kept, the best by validation accuracy. The teacher
does not run in evaluation.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
import torch.nn.functional as F
from transformers import Trainer

TEMPERATURE = 2.0


def divergence(logits: torch.Tensor, target: torch.Tensor, temperature: float = TEMPERATURE) -> torch.Tensor:
    """KL divergence of (B, C) logits from the teacher's at a temperature, times its square."""
    logs = (F.log_softmax(z / temperature, dim=-1) for z in (logits, target))
    return temperature**2 * F.kl_div(*logs, reduction="batchmean", log_target=True)


class PlainDistiller(Trainer):
    """A Trainer whose loss is `ce_weight` · cross-entropy + `kl_weight` · KL divergence from a live teacher.

    Args:
        teacher: frozen, in eval.
        ce_weight, kl_weight: of the terms; without the first one the labels are not read.
        *arguments, **settings: of `Trainer`.
    """

    def __init__(
        self,
        *arguments: Any,
        teacher: torch.nn.Module,
        ce_weight: float = 0.0,
        kl_weight: float = 1.0,
        **settings: Any,
    ) -> None:
        super().__init__(*arguments, **settings)
        self.teacher, self.ce_weight, self.kl_weight = teacher.to(self.args.device), ce_weight, kl_weight

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs)
        labels = inputs.pop("labels")
        output = model(**inputs)
        with torch.no_grad():
            target = self.teacher(**inputs).logits
        loss = self.kl_weight * divergence(output.logits.float(), target.float())
        if self.ce_weight:
            loss = loss + self.ce_weight * F.cross_entropy(output.logits.float(), labels)
        return (loss, output) if return_outputs else loss


def main(arguments: list[str] | None = None) -> None:
    options = _arguments(arguments)
    # Here, so that a bare `--help` and the trainer's import stay quick.
    from datasets import load_dataset
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        TrainingArguments,
        set_seed,
    )

    from distill_nlp.loading import load_backbone
    from distill_nlp.student import build_student

    tokenizer = AutoTokenizer.from_pretrained(options.teacher)
    data = load_dataset(options.data).rename_column("label", "labels")

    def encode(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return tokenizer(rows["text"], truncation=True, max_length=options.max_length)

    splits = {name: data[name].map(encode, batched=True, remove_columns="text") for name in ("train", "validation")}
    teacher = AutoModelForSequenceClassification.from_pretrained(options.teacher, dtype=torch.float32)
    names = [teacher.config.id2label[i] for i in range(teacher.config.num_labels)]
    layers = {"layers": half_of(teacher.config.num_hidden_layers)}
    set_seed(options.seed)
    student = build_student(names, from_teacher=layers, teacher=load_backbone(options.checkpoint))
    trainer = PlainDistiller(
        student,
        TrainingArguments(
            output_dir=f"{options.output}/checkpoints",
            seed=options.seed,
            num_train_epochs=options.epochs,
            per_device_train_batch_size=16,
            per_device_eval_batch_size=64,
            learning_rate=5e-5,
            weight_decay=0.01,
            warmup_steps=0.1,
            eval_strategy="epoch",
            save_strategy="epoch",
            save_total_limit=2,
            load_best_model_at_end=True,
            metric_for_best_model="accuracy",
            report_to="none",
            use_cpu=not torch.accelerator.is_available(),
            dataloader_pin_memory=torch.cuda.is_available(),
        ),
        teacher=teacher.eval().requires_grad_(False),
        ce_weight=0.3,
        kl_weight=0.7,
        train_dataset=splits["train"],
        eval_dataset=splits["validation"],
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=lambda found: {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())},
    )
    trainer.train()
    trainer.save_model(options.output)


def half_of(layers: int) -> int:
    """Blocks of the student of a teacher of so many."""
    return max(1, layers // 2)


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder with train and validation: text, label")
    parser.add_argument("--teacher", required=True, help="the fine-tuned one")
    parser.add_argument("--checkpoint", required=True, help="what the teacher was made from: the student's layers")
    parser.add_argument("--output", required=True, help="folder for the student")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--max_length", type=int, default=256, help="texts are cut at so many tokens [256]")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
