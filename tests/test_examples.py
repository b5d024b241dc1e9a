"""Every example runs as it stands, for two steps."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers import make_student, make_teacher, make_tokenizer
from PIL import Image

ROOT = Path(__file__).parent.parent
# The server is run by test_serving.py.
EXAMPLES = sorted({path.name for path in (ROOT / "examples").glob("*.py")} - {"serve_onnx.py"})


def local_imdb(folder: Path) -> list[str]:
    """A tiny data set and tiny checkpoints in place of those of the Hub."""
    (folder / "data").mkdir()
    for split in ("train", "test"):
        rows = [(f"w{4 + i % 2} w{10 + i}", i % 3) for i in range(20)]
        pd.DataFrame(rows, columns=["text", "label"]).to_csv(folder / "data" / f"{split}.csv", index=False)
    make_teacher().save_pretrained(folder / "teacher")
    make_student().save_pretrained(folder / "student")
    make_tokenizer().save_pretrained(folder / "teacher")
    names = {"--teacher": "teacher", "--student": "student", "--dataset": "data"}
    return [word for option, name in names.items() for word in (option, str(folder / name))] + ["--max_length", "16"]


def images(folder: Path) -> list[str]:
    """A folder of two classes."""
    rng = np.random.default_rng(0)
    for i in range(20):
        path = folder / "images" / ("dark", "bright")[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 100, (20, 20, 3), dtype=np.uint8) + np.uint8(100 * (i % 2))).save(path)
    return ["--data", str(folder / "images")]


ARGUMENTS = {
    "distill_image_classifier.py": images,
    "distill_imdb.py": local_imdb,
    "custom_loss.py": lambda folder: [],
    "bert_to_bilstm.py": lambda folder: ["--seeds", "0"],
}


def test_every_example_is_run_here():
    assert set(EXAMPLES) == set(ARGUMENTS)


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs(name, tmp_path):
    arguments = [*ARGUMENTS[name](tmp_path), "--output_dir", str(tmp_path / "out"), "--max_steps", "2"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / name), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        cwd=tmp_path,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "accuracy" in done.stdout
