"""A loss of your own: one class, no registration. Runs offline on generated data in about a minute.

    python examples/custom_loss.py

The loss is the KL divergence, each row weighted by how sure the teacher is of it: an unsure teacher is no teacher.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
)

from distill_nlp import CrossEntropyLoss, DistillationArguments, DistillationLoss, DistillationTrainer
from distill_nlp.metrics import compute_metrics
from distill_nlp.synthetic import LABEL_NAMES, generate, train_tokenizer


class ConfidentKLLoss(DistillationLoss):
    """`max_c p_t · Σ_c p_t log(p_t / p_s)`, a mean over rows."""

    def forward(self, student, teacher, labels, attention_mask):
        log_p_student = F.log_softmax(student.logits.float(), dim=-1)  # (B, C)
        log_p_teacher = F.log_softmax(teacher.logits.float(), dim=-1)  # (B, C)
        divergence = (log_p_teacher.exp() * (log_p_teacher - log_p_student)).sum(dim=-1)  # (B,)
        return (log_p_teacher.amax(dim=-1).exp() * divergence).mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="runs/example_custom_loss")
    parser.add_argument("--max_steps", type=int, default=500)
    options = parser.parse_args()

    torch.manual_seed(0)
    splits = generate(
        seed=0, sizes={"teacher_train": 16000, "train": 2000, "unlabeled": 0, "validation": 400, "test": 1000}
    )
    tokenizer = train_tokenizer([row["text"] for row in splits["teacher_train"]], vocab_size=2048)

    def tokens(split: str) -> Dataset:
        rows = Dataset.from_list(splits[split]).rename_column("label", "labels")
        return rows.map(lambda batch: tokenizer(batch["text"], truncation=True, max_length=64), batched=True)

    names = {"id2label": dict(enumerate(LABEL_NAMES)), "label2id": {name: i for i, name in enumerate(LABEL_NAMES)}}
    # Tiny models from scratch want wider initial weights than BERT's own, and no dropout.
    sizes = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "initializer_range": 0.05}
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    teacher = BertForSequenceClassification(
        BertConfig(
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=128,
            **no_dropout,
            **sizes,
            **names,
        )
    )
    student = DistilBertForSequenceClassification(
        DistilBertConfig(
            dim=32, n_layers=1, n_heads=2, hidden_dim=64, dropout=0.0, attention_dropout=0.0, **sizes, **names
        )
    )

    def train(model, split, **distillation):
        trainer = DistillationTrainer(
            model=model,
            args=DistillationArguments(
                output_dir=options.output_dir,
                max_steps=options.max_steps,
                learning_rate=2e-3,
                warmup_steps=50,
                per_device_train_batch_size=64,
                train_sampling_strategy="group_by_length",
                logging_steps=100,
                save_strategy="no",
                use_cpu=True,
                disable_tqdm=True,
            ),
            train_dataset=tokens(split),
            eval_dataset=tokens("test"),
            processing_class=tokenizer,
            compute_metrics=compute_metrics,
            **distillation,
        )
        trainer.train()
        return trainer

    trainer = train(teacher, "teacher_train", losses={"ce": CrossEntropyLoss()})
    print(f"teacher: accuracy {trainer.evaluate()['eval_accuracy']:.4f}")
    losses = {"ce": CrossEntropyLoss(), "confident_kl": ConfidentKLLoss()}
    trainer = train(student, "train", teacher=teacher, losses=losses)
    print(f"{trainer.objective.formula()}: accuracy {trainer.evaluate()['eval_accuracy']:.4f}")


if __name__ == "__main__":
    main()
