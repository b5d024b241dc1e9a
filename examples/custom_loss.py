"""A loss of your own: one class, no registration. Runs offline on generated data in under a minute.

    python examples/custom_loss.py

The loss is the reverse KL divergence, Σ p_s log(p_s / p_t): it makes the student avoid what the teacher rules out,
where the usual direction makes it cover all that the teacher allows (Gu et al. 2023, arXiv:2306.08543).
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


class ReverseKLLoss(DistillationLoss):
    """`Σ_c p_s log(p_s / p_t)`, a mean over rows."""

    def forward(self, student, teacher, labels, attention_mask):
        log_p_student = F.log_softmax(student.logits.float(), dim=-1)  # (B, C)
        log_p_teacher = F.log_softmax(teacher.logits.float(), dim=-1)  # (B, C)
        return F.kl_div(log_p_teacher, log_p_student, reduction="none", log_target=True).sum(dim=-1).mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="runs/example_custom_loss")
    parser.add_argument("--max_steps", type=int, default=300)
    options = parser.parse_args()

    torch.manual_seed(0)
    splits = generate(
        seed=0, sizes={"teacher_train": 4000, "train": 400, "unlabeled": 0, "validation": 400, "test": 400}
    )
    tokenizer = train_tokenizer([row["text"] for row in splits["teacher_train"]], vocab_size=1000)

    def tokens(split: str) -> Dataset:
        rows = Dataset.from_list(splits[split]).rename_column("label", "labels")
        return rows.map(lambda batch: tokenizer(batch["text"], truncation=True, max_length=64), batched=True)

    names = {"id2label": dict(enumerate(LABEL_NAMES)), "label2id": {name: i for i, name in enumerate(LABEL_NAMES)}}
    sizes = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    teacher = BertForSequenceClassification(
        BertConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128, **sizes, **names)
    )
    student = DistilBertForSequenceClassification(
        DistilBertConfig(dim=32, n_layers=1, n_heads=2, hidden_dim=64, **sizes, **names)
    )

    def train(model, split, **distillation):
        trainer = DistillationTrainer(
            model=model,
            args=DistillationArguments(
                output_dir=options.output_dir,
                max_steps=options.max_steps,
                learning_rate=1e-3,
                per_device_train_batch_size=32,
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

    train(teacher, "teacher_train", losses={"ce": CrossEntropyLoss()})
    trainer = train(student, "train", teacher=teacher, losses={"ce": CrossEntropyLoss(), "reverse_kl": ReverseKLLoss()})
    print(f"{trainer.objective.formula()}: accuracy {trainer.evaluate()['eval_accuracy']:.4f}")


if __name__ == "__main__":
    main()
