"""Peak memory of training on few and on many rows: streamed from files, and tokenized on the disk.

    python benchmarks/streaming_memory.py              # 100,000 against 2,000,000 streamed, 5,000,000 tokenized rows
    python benchmarks/streaming_memory.py --large 200000 --tokenized 500000

Rows are generated into a folder that is removed afterwards (about 2 GB). Each training runs in a process of its own,
with a tiny model, as what grows with the rows is looked for. Two figures each: peak RSS, in which pages of files that
are mapped into memory count until the system wants them back, and the largest RssAnon, in which they do not.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np

PART = 50_000
WORDS = 1000
CASES = ("jsonl", "parquet", "one pass", "random", "group_by_length")


# ---- rows ----


def texts(rows: int) -> Iterator[tuple[list[str], list[int]]]:
    """Texts of 5 to 35 words with labels, in parts."""
    rng = np.random.default_rng(0)
    for start in range(0, rows, PART):
        count = min(PART, rows - start)
        ends = np.cumsum(rng.integers(5, 36, count))
        words = [f"w{i}" for i in rng.integers(0, WORDS, ends[-1])]
        made = [" ".join(part) for part in (words[a:b] for a, b in zip([0, *ends[:-1]], ends, strict=True))]
        yield made, rng.integers(0, 2, count).tolist()


def write_texts(file: Path, rows: int) -> None:
    """A jsonl or parquet file of so many rows."""
    import pyarrow
    from pyarrow.parquet import ParquetWriter

    file.parent.mkdir(parents=True, exist_ok=True)
    schema = pyarrow.schema([("text", pyarrow.string()), ("label", pyarrow.int64())])
    if file.suffix == ".parquet":
        with ParquetWriter(file, schema) as writer:
            for made, labels in texts(rows):
                writer.write_table(pyarrow.table({"text": made, "label": labels}, schema=schema))
        return
    with open(file, "w", encoding="utf-8") as lines:
        for made, labels in texts(rows):
            lines.writelines(json.dumps({"text": t, "label": c}) + "\n" for t, c in zip(made, labels, strict=True))


def write_tokens(folder: Path, rows: int) -> None:
    """A data set of token ids as `save_to_disk` leaves it, written shard by shard."""
    import pyarrow
    from datasets import Dataset, concatenate_datasets

    rng, shards = np.random.default_rng(0), []
    for number, start in enumerate(range(0, rows, PART)):
        lengths = rng.integers(5, 36, min(PART, rows - start))
        offsets = pyarrow.array(np.concatenate([[0], np.cumsum(lengths)]), pyarrow.int32())
        ids = pyarrow.array(rng.integers(5, WORDS, lengths.sum()), pyarrow.int32())
        mask = pyarrow.array(np.ones(lengths.sum(), np.int8))
        columns = {
            "input_ids": pyarrow.ListArray.from_arrays(offsets, ids),
            "attention_mask": pyarrow.ListArray.from_arrays(offsets, mask),
            "labels": pyarrow.array(rng.integers(0, 2, len(lengths))),
        }
        table = pyarrow.table(columns)
        file = folder.with_name(f"{folder.name}-{number}.arrow")
        with pyarrow.OSFile(str(file), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=1000)
        shards.append(file)
    concatenate_datasets([Dataset.from_file(str(file)) for file in shards]).save_to_disk(folder)
    for file in shards:
        file.unlink()


# ---- trainings ----


def tiny(folder: Path) -> Path:
    """A BERT of two layers with a vocabulary of the words, as a checkpoint."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    entries = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{i}" for i in range(WORDS))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(entries)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(entries), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=64,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def streamed(data: Path, steps: int, batch_size: int) -> None:
    """A distilled student by the command's own pipeline."""
    from distill_nlp.config import Experiment
    from distill_nlp.pipeline import Pipeline

    with tempfile.TemporaryDirectory(dir=data.parent) as folder:
        teacher = str(tiny(Path(folder, "teacher")))
        experiment = Experiment(
            output_dir=str(Path(folder, "run")),
            data={"dataset": str(data), "validation_split": "validation", "streaming": True, "max_length": 48},
            teacher={"model": teacher, "finetune": "never"},
            student={"from_teacher": {"layers": 1}},
            losses={"kl": {}},
            training={"max_steps": steps, "per_device_train_batch_size": batch_size, "use_cpu": True},
        )
        Pipeline(experiment).run(["student"], doctor=False)


def one_pass(data: Path) -> None:
    """All rows once, checked and mixed, without a model."""
    from distill_nlp.config import DataSection
    from distill_nlp.data_streams import load_streamed_splits
    from distill_nlp.row_stream import RowStream

    config = DataSection(dataset=str(data), validation_split="validation", streaming=True)
    rows = sum(1 for _ in load_streamed_splits(config).streams.train)
    kinds = [load_streamed_splits(config).streams.train]
    stream = RowStream(kinds, lambda some: some, ["text"], batch_size=32, strategy="random")
    for _ in islice(stream, rows):
        pass


def tokenized(data: Path, steps: int, batch_size: int, strategy: str) -> None:
    """`DistillationTrainer` over rows on the disk."""
    from datasets import load_from_disk
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from distill_nlp import DistillationArguments, DistillationTrainer, KLDivergenceLoss

    with tempfile.TemporaryDirectory(dir=data.parent) as folder:
        teacher = str(tiny(Path(folder, "teacher")))
        arguments = DistillationArguments(
            output_dir=folder, max_steps=steps, per_device_train_batch_size=batch_size, use_cpu=True, disable_tqdm=True,
            train_sampling_strategy=strategy, save_strategy="no", dataloader_pin_memory=False,
        )  # fmt: skip
        load = AutoModelForSequenceClassification.from_pretrained
        DistillationTrainer(
            model=load(teacher), teacher=load(teacher), losses={"kl": KLDivergenceLoss()}, args=arguments,
            train_dataset=load_from_disk(str(data)), processing_class=AutoTokenizer.from_pretrained(teacher),
        ).train()  # fmt: skip


# ---- measured ----


def largest_anonymous(stop: threading.Event) -> int:
    """MiB of memory that no file is behind, the most of what is seen every 20 ms."""
    most = 0
    while not stop.is_set():
        status = Path("/proc/self/status").read_text(encoding="ascii")
        most = max(most, int(status.partition("RssAnon:")[2].split()[0]))
        time.sleep(0.02)
    return most // 1024


def measure(case: str, data: Path, steps: int, batch_size: int) -> dict[str, float]:
    """Runs a case in this process; its peaks in MiB, and its seconds."""
    found: list[int] = []
    stop = threading.Event()
    watcher = threading.Thread(target=lambda: found.append(largest_anonymous(stop)))
    watcher.start()
    start = time.perf_counter()
    try:
        if case == "one pass":
            one_pass(data)
        elif case in ("random", "group_by_length"):
            tokenized(data, steps, batch_size, case)
        else:
            streamed(data, steps, batch_size)
    finally:
        stop.set()
        watcher.join()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return {"peak": peak, "anonymous": found[0], "seconds": round(time.perf_counter() - start, 1)}


def in_a_process(case: str, data: Path, options: argparse.Namespace) -> dict[str, float]:
    """The same in a process of its own."""
    words = [sys.executable, __file__, "--case", case, "--data", str(data)]
    words += ["--steps", str(options.steps), "--batch_size", str(options.batch_size)]
    run = subprocess.run(words, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if run.returncode:
        raise SystemExit(f"{case} over {data} failed:\n{run.stderr[-3000:]}")
    return json.loads(run.stdout.splitlines()[-1])


def compare(case: str, folder: Path, few: int, many: int, options: argparse.Namespace) -> None:
    """Prints the peaks of few and many rows, and their ratio."""
    found = {}
    for rows in (few, many):
        data = folder / f"{case}-{rows}"
        if case in ("random", "group_by_length"):
            write_tokens(data, rows)
        else:
            kind = "jsonl" if case == "one pass" else case
            write_texts(data / f"train.{kind}", rows)
            for split in ("validation", "test"):
                write_texts(data / f"{split}.{kind}", 200)
        found[rows] = in_a_process(case, data, options)
        for file in sorted(data.rglob("*"), reverse=True):
            file.unlink()
    one, other = found[few], found[many]
    cells = [
        f"{one[name]:,.0f} → {other[name]:,.0f} MiB ({other[name] / one[name]:.2f}×)" for name in ("peak", "anonymous")
    ]
    seconds = f"{one['seconds']:.0f} and {other['seconds']:.0f} s"
    print(f"{case:<16} {few:>9,} → {many:>9,} rows: peak RSS {cells[0]}, RssAnon {cells[1]}; {seconds}", flush=True)


def main() -> None:
    from datasets import disable_progress_bars

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--few", type=int, default=100_000, help="rows to compare with")
    parser.add_argument("--large", type=int, default=2_000_000, help="streamed rows")
    parser.add_argument("--tokenized", type=int, default=5_000_000, help="rows on the disk")
    parser.add_argument("--steps", type=int, default=1000, help="of each training")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--folder", help="where rows are written, a temporary folder else")
    parser.add_argument("--only", choices=CASES, nargs="+", default=CASES)
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(options.case, options.data, options.steps, options.batch_size)))
        return
    disable_progress_bars()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for case in options.only:
            many = options.tokenized if case in ("random", "group_by_length") else options.large
            compare(case, Path(folder), options.few, many, options)


if __name__ == "__main__":
    main()
