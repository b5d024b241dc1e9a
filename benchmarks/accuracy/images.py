"""The LeNets of the MNIST tutorials, by examples/distill_image_classifier.py: the table of benchmarks/RESULTS.md.

    python benchmarks/accuracy/images.py --data ../shared/data --work DIR --write

The teacher learns from all labels. The students see 1,000 of them, a fifth of these held out for validation, and all
other training images without a label. What is finished is not done again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from scores import SetScores
from table import write_section

REPOSITORY = Path(__file__).resolve().parents[2]
RESULTS = REPOSITORY / "benchmarks" / "RESULTS.md"
RECIPE = "ce + kl"
SETTINGS = {
    "teacher": "lenet5",
    "student": "lenet5-small",
    "losses": "{ce: {weight: 0.3}, kl: {weight: 0.7, temperature: 4}}",
    "labeled": "1000",
    "batch_size": "128",
    "learning_rate": "2e-3",
    "teacher_learning_rate": "2e-3",
}


class ImageScores(SetScores):
    """The predictions and records in a folder of the example, which has one recipe."""

    @cached_property
    def _found(self) -> dict[str, np.ndarray]:
        with np.load(self.folder / "predictions.npz") as kept:
            return dict(kept)

    @cached_property
    def labels(self) -> np.ndarray:
        return self._found["labels"]

    def teacher_answers(self) -> dict[str, tuple[float, float]]:
        """None: the example keeps no predictions on training rows."""
        return {}

    def logits(self, model: str, split: str = "test", tokens: Any = None) -> np.ndarray:
        """`base/baseline/seed-0` and the like lie there as `baseline/0`."""
        return self._found[model.partition("/")[2].replace("seed-", "")]

    def stages(self, kind: str) -> list[dict[str, Any]]:
        return self.finals(kind)

    def finals(self, kind: str) -> list[dict[str, Any]]:
        stages = json.loads((self.folder / "report.json").read_text(encoding="utf-8"))["run"]["stages"]
        return [stages[f"{kind.partition('/')[2]}/seed-{seed}"] for seed in self.seeds]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets; mnist is read")
    parser.add_argument("--work", type=Path, required=True, help="folder for models and predictions")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--max_steps", help="of each training, in the place of epochs")
    parser.add_argument("--write", action="store_true", help=f"put the table into {RESULTS.relative_to(REPOSITORY)}")
    options = parser.parse_args()
    command = [sys.executable, str(REPOSITORY / "examples" / "distill_image_classifier.py")]
    command += ["--data", str(options.data / "mnist"), "--output_dir", str(options.work), "--seeds", options.seeds]
    command += [word for name, value in SETTINGS.items() for word in (f"--{name}", value)]
    command += [] if options.max_steps is None else ["--max_steps", options.max_steps]
    if code := subprocess.run(command).returncode:
        sys.exit(code)
    scores = ImageScores("mnist", options.work, [int(seed) for seed in options.seeds.split(",")], [RECIPE])
    shown = f"python benchmarks/accuracy/images.py --data DATA --work DIR --seeds {options.seeds}"
    print(write_section([scores], RESULTS, {"mnist": shown} if options.write else None, mark="images"))


if __name__ == "__main__":
    main()
