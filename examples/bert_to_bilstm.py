"""A BiLSTM, a plain `nn.Module`, learns from a BERT by its answers alone. Offline, generated data, a minute or two.

    python examples/bert_to_bilstm.py

The student has few labeled rows, some of them with the wrong label, and many without a label, to which the teacher
gives its answers. The same student is also trained on the labels alone. After Tang et al. 2019, "Distilling
Task-Specific Knowledge from BERT into Simple Neural Networks" (arXiv:1903.12136).
"""

from __future__ import annotations

import argparse

import torch
from datasets import Dataset, concatenate_datasets, disable_progress_bars
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from transformers import BertConfig, BertForSequenceClassification, PretrainedConfig, set_seed

from distill_nlp import CrossEntropyLoss, DistillationArguments, DistillationTrainer, KLDivergenceLoss
from distill_nlp.metrics import compute_metrics
from distill_nlp.synthetic import LABEL_NAMES, generate, train_tokenizer


class BiLSTMClassifier(nn.Module):
    """Embedding, bidirectional LSTM, mean over the real tokens, linear head.

    It computes no loss. The names of `forward`'s arguments are the columns that it gets.
    """

    def __init__(self, vocab_size: int, num_labels: int, width: int = 48, padding_id: int = 0) -> None:
        super().__init__()
        # Read where there is no teacher to take the number of classes from; not needed for distillation.
        self.config = PretrainedConfig(num_labels=num_labels)
        self.embedding = nn.Embedding(vocab_size, width, padding_idx=padding_id)
        self.lstm = nn.LSTM(width, width, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * width, num_labels)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        lengths = attention_mask.sum(dim=1)  # (B,), the padding being on the right
        # Packed, so that the backward direction starts at the last real token.
        packed = pack_padded_sequence(self.embedding(input_ids), lengths.cpu(), batch_first=True, enforce_sorted=False)
        states, _ = pad_packed_sequence(self.lstm(packed)[0], batch_first=True, total_length=input_ids.shape[1])
        # States of padding are zeros.
        return self.head(states.sum(dim=1) / lengths[:, None])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="runs/example_bert_to_bilstm")
    parser.add_argument("--max_steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    options = parser.parse_args()

    disable_progress_bars()
    splits = generate(
        seed=0, sizes={"teacher_train": 16000, "train": 400, "unlabeled": 8000, "validation": 0, "test": 1000}
    )
    tokenizer = train_tokenizer([row["text"] for row in splits["teacher_train"]], vocab_size=2048)

    def tokens(split: str) -> Dataset:
        # -100 says that a row has no label.
        rows = [{"text": row["text"], "labels": row["label"] if row["label"] >= 0 else -100} for row in splits[split]]
        return Dataset.from_list(rows).map(lambda batch: tokenizer(batch["text"], truncation=True), batched=True)

    test = tokens("test")

    def train(model: nn.Module, data: Dataset, batch_size: int, learning_rate: float, seed: int, **losses) -> float:
        trainer = DistillationTrainer(
            model=model,
            args=DistillationArguments(
                output_dir=options.output_dir,
                max_steps=options.max_steps,
                learning_rate=learning_rate,
                warmup_steps=50,
                per_device_train_batch_size=batch_size,
                per_device_eval_batch_size=250,
                train_sampling_strategy="group_by_length",
                logging_steps=200,
                save_strategy="no",
                use_cpu=True,
                disable_tqdm=True,
                seed=seed,
            ),
            train_dataset=data,
            eval_dataset=test,
            processing_class=tokenizer,
            compute_metrics=compute_metrics,
            **losses,
        )
        trainer.train()
        return trainer.evaluate()["eval_accuracy"]

    set_seed(0)
    teacher = BertForSequenceClassification(
        BertConfig(
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=128,
            initializer_range=0.05,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            max_position_embeddings=tokenizer.model_max_length,
            vocab_size=len(tokenizer),
            pad_token_id=tokenizer.pad_token_id,
            id2label=dict(enumerate(LABEL_NAMES)),
            label2id={name: i for i, name in enumerate(LABEL_NAMES)},
        )
    )
    labels_alone = {"losses": {"ce": CrossEntropyLoss()}}
    accuracy = train(teacher, tokens("teacher_train"), 128, 2e-3, 0, **labels_alone)
    print(f"teacher: accuracy {accuracy:.4f}")

    labeled = tokens("train")
    everything = concatenate_datasets([labeled, tokens("unlabeled")])
    distillation = {
        "teacher": teacher,
        "losses": {"ce": CrossEntropyLoss(), "kl": KLDivergenceLoss(temperature=2.0)},
        "loss_weights": {"ce": 0.3, "kl": 0.7},
    }
    for seed in options.seeds:
        for name, data, losses in (("plain", labeled, labels_alone), ("distilled", everything, distillation)):
            set_seed(seed)
            student = BiLSTMClassifier(len(tokenizer), len(LABEL_NAMES), padding_id=tokenizer.pad_token_id)
            accuracy = train(student, data, 64, 5e-3, seed, **losses)
            print(f"{name} BiLSTM, seed {seed}: accuracy {accuracy:.4f}")


if __name__ == "__main__":
    main()
