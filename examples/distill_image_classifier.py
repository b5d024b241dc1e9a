"""Distils an image classifier: the teacher, the student on the labels alone, and the distilled student, compared.

    python examples/distill_image_classifier.py --data photographs --teacher microsoft/resnet-50 --student resnet.json
    python examples/distill_image_classifier.py --data mnist --teacher lenet5 --student lenet5-small --labeled 1000

The trainer and the losses are those for texts. --data is a folder with a sub-folder of images per class, or a parquet
file; both are split 0.7 / 0.2 / 0.1 into train, validation and test, the same part of each class. Or it is a folder
with train.parquet, test.parquet and maybe validation.parquet. All images are held in memory, at the size that the
models read. Needs Pillow: pip install 'distill-nlp[images]'.

Models: a checkpoint of an image classifier (folder or Hub id), a config (a .json file; random weights), or lenet5 and
lenet5-small, plain nn.Modules. Losses of the answers (ce, kl, dkd, dist, ...) work for every pair; rkd_distance,
rkd_angle and similarity also on pooled states (representation: mean) of ResNet, ConvNeXt, ViT and DeiT; hidden between
one stage of each of two ResNets or ConvNeXts (layers: last); hidden and attention between ViTs, or between DeiTs, of
the same patches. A run that was stopped goes on; what is finished stays.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from distill_nlp.cli_output import quiet, show_report, to_stderr
from distill_nlp.errors import DistillError, UsageError
from distill_nlp.report import write_report

try:
    from image_classifiers.data import read_data
    from image_classifiers.models import Source, one_line
    from image_classifiers.report import make_report, over_seeds
    from image_classifiers.trainings import Runs, read_losses, say
except ImportError as missing:
    if missing.name != "PIL":
        raise
    sys.exit("images need Pillow: pip install 'distill-nlp[images]'")


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    quiet(debug=False)
    try:
        return run(options)
    except DistillError as error:
        to_stderr(f"error: {error}")
        return error.exit_code
    except OSError as error:  # a full disk, a folder that may not be written
        to_stderr(f"error: {one_line(error)}")
        return 1
    except KeyboardInterrupt:
        to_stderr("interrupted; the same command goes on")
        return 130


def run(options: argparse.Namespace) -> int:
    teacher, student = Source("teacher", options.teacher), Source("student", options.student)
    if options.teacher_epochs == 0 and (teacher.config is None or teacher.is_config):
        raise UsageError(f"--teacher_epochs 0 takes a checkpoint as it is, and {options.teacher} has no weights")
    read_losses(options.losses)
    data = read_data(options, [teacher, student])
    runs = Runs(options, data, teacher, student)
    runs.try_out()
    say(
        f"{len(data.classes)} classes; images to learn from: {len(data.teacher):,} for the teacher, for the student "
        f"{len(data.labeled):,} with labels and {len(data.student) - len(data.labeled):,} without; "
        f"{len(data.validation):,} for validation, {len(data.test):,} for test"
    )
    models = {"teacher": runs.train_teacher()}
    for seed in options.seeds:
        models[f"baseline/{seed}"] = runs.train_baseline(seed)
        models[f"student/{seed}"] = runs.train_student(seed, models["teacher"])
    report = make_report(runs, models)
    write_report(report, options.output_dir)
    show_report(report, options.output_dir)
    print(over_seeds(report, options.seeds))
    return 0


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = found.add_argument
    add(
        "--data", type=Path, required=True, metavar="PATH", help="folder of classes, folder of parquet files, or a file"
    )
    add("--teacher", default="lenet5", metavar="MODEL", help="(lenet5)")
    add("--student", default="lenet5-small", metavar="MODEL", help="(lenet5-small)")
    add(
        "--losses",
        default="{ce: {weight: 0.3}, kl: {weight: 0.7, temperature: 4}}",
        metavar="YAML",
        help="name, weight and settings of each loss of the student, or a .yaml file with them; see docs/losses.md "
        "(%(default)s)",
    )
    add("--output_dir", type=Path, default=Path("runs/example_images"), metavar="DIR", help="(%(default)s)")
    add("--seeds", type=seeds, default=[0], metavar="0,1,2", help="of the students (0)")
    add(
        "--labeled",
        type=positive,
        metavar="N",
        help="labels that students see, those of validation rows included (all)",
    )
    add("--validation", type=positive, metavar="N", help="rows to hold out of train where it must be (a fifth)")
    add("--split_seed", type=int, default=0, metavar="N", help="of the splits and of the labeled rows (0)")
    add("--image_size", type=positive, metavar="PIXELS", help="height and width (the models', else the images' own)")
    add("--image_column", default="image", metavar="NAME", help="of parquet files (image)")
    add("--label_column", default="label", metavar="NAME", help="of parquet files (label)")
    add("--epochs", type=positive, default=20, metavar="N", help="of the students, at most (20)")
    add("--teacher_epochs", type=not_negative, default=20, metavar="N", help="0: the checkpoint as it is (20)")
    add("--max_steps", type=positive, metavar="N", help="of each training, in the place of epochs")
    add("--patience", type=positive, default=5, metavar="N", help="epochs without a better validation accuracy (5)")
    add("--batch_size", type=positive, default=64, metavar="N", help="(64)")
    add("--learning_rate", type=rate, default=1e-3, metavar="RATE", help="of the students (1e-3)")
    add("--teacher_learning_rate", type=rate, default=1e-3, metavar="RATE", help="(1e-3)")
    add("--weight_decay", type=rate, default=0.01, metavar="RATE", help="(0.01)")
    return found


def seeds(text: str) -> list[int]:
    found = [int(seed) for seed in text.split(",")]
    if len(set(found)) < len(found) or min(found) < 0:
        raise argparse.ArgumentTypeError(f"must be different numbers from 0, such as 0,1,2; got {text}")
    return found


def positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return int(text)


def rate(text: str) -> float:
    if not 0 <= float(text) < 1:
        raise argparse.ArgumentTypeError(f"must be in [0, 1), got {text}")
    return float(text)


def not_negative(text: str) -> int:
    return 0 if text == "0" else positive(text)


if __name__ == "__main__":
    sys.exit(main())
