"""Distils a fine-tuned BERT into DistilBERT on IMDB with the library alone: no config file, no command.

    python examples/distill_imdb.py --teacher textattack/bert-base-uncased-imdb
    accelerate launch examples/distill_imdb.py --teacher path/to/fine-tuned-bert --bf16

The teacher must be fine-tuned already, and share its tokenizer with the student.
"""

from __future__ import annotations

import argparse

import torch
from datasets import load_dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from distill_nlp import (
    AttentionLoss,
    CrossEntropyLoss,
    DistillationArguments,
    DistillationTrainer,
    HiddenStateLoss,
    KLDivergenceLoss,
)
from distill_nlp.metrics import compute_metrics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="fine-tuned classifier: folder or Hub id")
    parser.add_argument("--student", default="distilbert-base-uncased", help="checkpoint to start the student from")
    parser.add_argument("--dataset", default="stanfordnlp/imdb", help="Hub id or folder with columns text and label")
    parser.add_argument("--output_dir", default="runs/example_imdb")
    parser.add_argument("--max_length", type=int, default=256)
    parser.add_argument("--num_train_epochs", type=float, default=3)
    parser.add_argument("--max_steps", type=int, default=-1)
    parser.add_argument("--bf16", action="store_true")
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.teacher)
    teacher = AutoModelForSequenceClassification.from_pretrained(options.teacher, dtype=torch.float32)
    student = AutoModelForSequenceClassification.from_pretrained(
        options.student, dtype=torch.float32, id2label=teacher.config.id2label, label2id=teacher.config.label2id
    )
    data = load_dataset(options.dataset)
    # The best checkpoint is picked on rows carved from train; test stays unseen until the end.
    carved = data["train"].train_test_split(test_size=0.1, seed=0)
    splits = {"train": carved["train"], "validation": carved["test"], "test": data["test"]}
    tokens = {
        name: split.map(
            lambda batch: tokenizer(batch["text"], truncation=True, max_length=options.max_length), batched=True
        )
        for name, split in splits.items()
    }

    trainer = DistillationTrainer(
        model=student,
        teacher=teacher,
        losses={
            "ce": CrossEntropyLoss(),
            "kl": KLDivergenceLoss(temperature=2.0),
            "hidden": HiddenStateLoss(layers="uniform", kind="cosine"),
            "attention": AttentionLoss(layers="last"),
        },
        loss_weights={"ce": 0.3, "kl": 0.7, "hidden": 1.0, "attention": 0.1},
        args=DistillationArguments(
            output_dir=options.output_dir,
            num_train_epochs=options.num_train_epochs,
            max_steps=options.max_steps,
            learning_rate=5e-5,
            per_device_train_batch_size=16,
            per_device_eval_batch_size=64,
            warmup_steps=0.1,
            bf16=options.bf16,
            use_cpu=not torch.accelerator.is_available(),
            train_sampling_strategy="group_by_length",
            eval_strategy="epoch",
            save_strategy="epoch",
            save_total_limit=1,
            load_best_model_at_end=True,
            metric_for_best_model="accuracy",
            logging_steps=50,
        ),
        train_dataset=tokens["train"],
        eval_dataset=tokens["validation"],
        processing_class=tokenizer,
        compute_metrics=compute_metrics,
    )
    trainer.train()
    trainer.save_model(options.output_dir)
    metrics = trainer.evaluate(tokens["test"], metric_key_prefix="test")
    if trainer.is_world_process_zero():
        print(f"test accuracy {metrics['test_accuracy']:.4f}; the student is in {options.output_dir}")


if __name__ == "__main__":
    main()
