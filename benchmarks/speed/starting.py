"""Processes from nothing: imports, `--help`, and what passes before the first step of a training."""

from __future__ import annotations

import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from measuring import Figures, Pass, Seconds, cpu_of_children, measured
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from workloads import Pair

from distill_nlp.doctor.examination import ACCURACY_ROWS

_WORDS, _TOKENS = 5000, 128
# The step that would be the first ends the process; what it leaves undone, as writing, is no part of a start.
_TO_THE_FIRST_STEP = """
import os, sys
sys.argv[0] = "start"
from transformers import Trainer
Trainer.training_step = lambda *arguments, **settings: os._exit(0)
"""
IMPORTS = {
    "python -c pass": "pass",
    "distill-nlp --help": "from distill_nlp.cli import main; main(['--help'])",
    "import distill_nlp": "import distill_nlp",
    "import torch, transformers.Trainer": "import torch; from transformers import Trainer",
}


def tables(pair: Pair, rows: int, rounds: int) -> Iterator[tuple[str, dict[str, Figures]]]:
    """Imports; and the way of plain code and of `distill-nlp run` to the first step on a teacher that is finished.

    Args:
        pair: of models, random weights.
        rows: to train on.
        rounds: that count.
    """
    yield "start-up", measured({name: _process(lambda code=code: code) for name, code in IMPORTS.items()}, rounds)
    with tempfile.TemporaryDirectory() as folder:
        places = write_material(pair, Path(folder), rows)
        ways = {name: _process(lambda way=way: way(places)) for name, way in STARTS.items()}
        title = f"to the first step with the teacher live: {pair.name} pair, {rows:,} rows of text to be tokenized"
        yield title, measured(ways, rounds)


def _process(code: Callable[[], str]) -> Pass:
    def once(seed: int) -> Seconds:
        text = code()
        used, begin = cpu_of_children(), time.perf_counter()
        found = subprocess.run(
            [sys.executable, "-c", text], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        wall, cpu = time.perf_counter() - begin, cpu_of_children() - used
        if found.returncode:
            raise SystemExit(f"exit code {found.returncode}: {found.stderr[-2000:]}")
        return wall, cpu

    return once


def write_material(pair: Pair, folder: Path, rows: int) -> dict[str, Path]:
    """Data of random words, a teacher of random weights that is a finished classifier, and where they lie.

    The validation rows have the labels that the teacher gives them: with one that knows nothing, a run would not
    begin. All other labels are drawn; nobody looks at what they say before the first step.
    """
    places = {name: folder / name for name in ("data", "teacher", "runs")}
    for path in places.values():
        path.mkdir(parents=True)
    rng, words = np.random.default_rng(0), [f"w{i}" for i in range(_WORDS)]
    tokenizer, model = _tokenizer(words), pair.teacher().to("cpu")
    for name, count in (("train", rows), ("validation", min(max(rows // 8, 32), ACCURACY_ROWS)), ("test", 32)):
        lengths = np.clip(rng.lognormal(5.0, 0.6, count).astype(int), 8, 400)
        texts = [" ".join(words[i] for i in rng.integers(0, _WORDS, length)) for length in lengths]
        labels = rng.integers(0, 2, count)
        if name == "validation":
            margins = _margins(model, tokenizer, texts)
            # Of random weights most answers are the same one.
            with torch.no_grad():
                model.classifier.bias[1] -= margins.median()
            labels = (margins > margins.median()).long().numpy()
        table = Dataset.from_dict({"text": texts, "label": labels.tolist()})
        table.to_parquet(str(places["data"] / f"{name}.parquet"))
    model.config.id2label, model.config.label2id = {0: "bad", 1: "good"}, {"bad": 0, "good": 1}
    model.save_pretrained(places["teacher"])
    tokenizer.save_pretrained(places["teacher"])
    return places


@torch.no_grad()
def _margins(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """By how much the second class is ahead.  (N,)"""
    found = []
    for first in range(0, len(texts), 64):
        encoded = tokenizer(
            texts[first : first + 64], truncation=True, max_length=_TOKENS, padding=True, return_tensors="pt"
        )
        logits = model(encoded["input_ids"], encoded["attention_mask"]).logits
        found.append(logits[:, 1] - logits[:, 0])
    return torch.cat(found)


def _tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = {word: i for i, word in enumerate([*special, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token"), special, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def _plain(places: dict[str, Path]) -> str:
    given = {"data": places["data"], "teacher": places["teacher"], "checkpoint": places["teacher"]}
    given |= {"output": places["runs"] / "plain", "max_length": _TOKENS}
    words = [str(word) for name, value in given.items() for word in (f"--{name}", value)]
    return f"{_fresh_cache(places)}{_TO_THE_FIRST_STEP}sys.path[:0] = {sys.path!r}\nimport plain\nplain.main({words!r})"


def _ours(*more: str) -> Callable[[dict[str, Path]], str]:
    def code(places: dict[str, Path]) -> str:
        # A fresh run each time.
        run = tempfile.mkdtemp(dir=places["runs"])
        settings = {
            "output_dir": run,
            "data.dataset": places["data"],
            "data.validation_split": "validation",
            "data.max_length": _TOKENS,
            "data.label_names": "[bad, good]",
            "teacher.model": places["teacher"],
            "teacher.cache": "false",
            "student.from_teacher.layers": 1,
        }
        words = ["run", str(_RECIPE), *(str(word) for name, value in settings.items() for word in (f"--{name}", value))]
        arguments = [*words, "--stages", "student", *more]
        return (
            f"{_fresh_cache(places)}{_TO_THE_FIRST_STEP}from distill_nlp.cli import main\nsys.exit(main({arguments!r}))"
        )

    return code


_RECIPE = Path(__file__).resolve().parents[2] / "configs" / "recipes" / "vanilla_kd.yaml"
_BARE = shlex.split("--no-doctor --training.precision fp32")
STARTS: dict[str, Callable[[dict[str, Path]], str]] = {
    "plain Trainer subclass": _plain,
    "distill-nlp run --no-doctor --training.precision fp32": _ours(*_BARE),
    "distill-nlp run": _ours(),
}


def _fresh_cache(places: dict[str, Path]) -> str:
    """Each process tokenizes by itself."""
    return f"import os\nos.environ['HF_DATASETS_CACHE'] = {tempfile.mkdtemp(dir=places['runs'])!r}\n"
