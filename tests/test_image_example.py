"""examples/distill_image_classifier.py on generated images: data, three trainings, the report, and what is refused."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoModelForImageClassification,
    BertConfig,
    ConvNextConfig,
    DeiTConfig,
    ResNetConfig,
    ViTConfig,
)
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from distill_nlp.errors import UsageError
from distill_nlp.report import can_plot
from distill_nlp.report.schema import Report

sys.path.append(str(Path(__file__).parent.parent / "examples"))

import distill_image_classifier as example
from image_classifiers.data import divide
from image_classifiers.files import NO_LABEL, Images, decode, open_source

CLASSES = ("cloudy", "rain & <b>snow", "sunny")
SIDE = 16


def picture(rng, label: int, side: int = SIDE) -> np.ndarray:
    """(side, side, 3), uint8: noise, and a bright band whose place tells the class."""
    found = rng.integers(0, 100, (side, side, 3), dtype=np.uint8)
    found[label * side // 3 : (label + 1) * side // 3] += 150
    return found


@pytest.fixture
def folder(tmp_path):
    """Three classes of 20 images, of several kinds."""
    rng = np.random.default_rng(0)
    for label, name in enumerate(CLASSES):
        own = tmp_path / "weather" / name
        own.mkdir(parents=True)
        for i in range(20):
            Image.fromarray(picture(rng, label, 16 + i)).save(own / f"{i:02}.{('png', 'jpg', 'bmp')[i % 3]}")
    (tmp_path / "weather" / ".cache").mkdir()
    (tmp_path / "weather" / "notes.txt").write_text("no class")
    return tmp_path / "weather"


def write_raw(path: Path, rows: int = 30, labels=None, seed: int = 0) -> None:
    """Grey images as raw bytes, as the MNIST sample has them."""
    rng = np.random.default_rng(seed)
    labels = [i % 3 for i in range(rows)] if labels is None else labels
    images = [picture(rng, i % 3)[:, :, 0].tobytes() for i in range(rows)]
    columns = {"image": pa.array(images, type=pa.binary(SIDE * SIDE)), "label": pa.array(labels)}
    pq.write_table(pa.table(columns), path)


@pytest.fixture
def parquet(tmp_path):
    """A folder with 30 rows of train and 12 of test."""
    (tmp_path / "data").mkdir()
    write_raw(tmp_path / "data" / "train.parquet")
    write_raw(tmp_path / "data" / "test.parquet", rows=12, seed=1)
    return tmp_path / "data"


STAGES = {"num_channels": 1, "depths": [1, 1], "num_stages": 2}
TOKENS = {"num_channels": 1, "image_size": SIDE, "patch_size": 4, "num_attention_heads": 2, "intermediate_size": 24}
CONFIGS = {
    "resnet": (
        ResNetConfig(**STAGES, embedding_size=8, hidden_sizes=[8, 16], layer_type="basic"),
        ResNetConfig(**STAGES, embedding_size=6, hidden_sizes=[6, 10], layer_type="basic"),
    ),
    "convnext": (
        ConvNextConfig(**STAGES, patch_size=2, hidden_sizes=[8, 16], image_size=SIDE),
        ConvNextConfig(**STAGES, patch_size=2, hidden_sizes=[6, 10], image_size=SIDE),
    ),
    "vit": (
        ViTConfig(**TOKENS, hidden_size=16, num_hidden_layers=2),
        ViTConfig(**TOKENS, hidden_size=12, num_hidden_layers=1),
    ),
    "deit": (
        DeiTConfig(**TOKENS, hidden_size=16, num_hidden_layers=2),
        DeiTConfig(**TOKENS, hidden_size=12, num_hidden_layers=1),
    ),
}


def models(tmp_path, teacher: str, student: str | None = None) -> list[str]:
    """Arguments for a pair of tiny models, by family; a LeNet by its name."""
    found = []
    for i, (role, name) in enumerate((("teacher", teacher), ("student", student or teacher))):
        if name in CONFIGS:
            path = tmp_path / f"{role}-{name}.json"
            CONFIGS[name][i].to_json_file(path)
            name = str(path)
        found += [f"--{role}", name]
    return found


def call(data: Path, out: Path, *arguments: str) -> int:
    return example.main(["--data", str(data), "--output_dir", str(out), "--max_steps", "2", *map(str, arguments)])


LENETS = ("--teacher", "lenet5", "--student", "lenet5-small")
POOLED = (
    "{ce: {}, kl: {temperature: 4}, rkd_distance: {representation: mean}, rkd_angle: {representation: mean}, "
    "similarity: {layers: uniform, representation: mean}}"
)
STAGEWISE = f"{POOLED[:-1]}, hidden: {{layers: last}}}}"
TOKENWISE = "{ce: {}, kl: {}, hidden: {}, attention: {}, rkd_distance: {representation: first}}"
ANSWERS = "{ce: {}, kl: {}, rkd_distance: {representation: logits}, similarity: {representation: logits}}"


@pytest.mark.parametrize(
    ("teacher", "student", "losses"),
    [
        pytest.param("resnet", "resnet", STAGEWISE, marks=pytest.mark.plots),
        ("convnext", "convnext", STAGEWISE),
        ("vit", "vit", TOKENWISE),
        ("deit", "deit", TOKENWISE),
        ("lenet5", "lenet5-small", ANSWERS),
        ("resnet", "vit", POOLED),
    ],
)
def test_a_pair_is_trained_and_reported(teacher, student, losses, parquet, tmp_path, capsys):
    out = tmp_path / "out"
    assert call(parquet, out, *models(tmp_path, teacher, student), "--losses", losses, "--image_size", SIDE) == 0
    said = capsys.readouterr().out
    for part in ("accuracy", "paired t-test over 12 test rows", "3 classes; images to learn from: 24 for the teacher"):
        assert part in said
    report = Report.model_validate_json((out / "report.json").read_text())
    assert report.test_rows == 12
    assert report.label_names == ["0", "1", "2"]
    assert report.slices == []
    assert list(report.run.stages) == ["teacher", "baseline/seed-0", "student/seed-0"]
    assert all(stage.steps == 2 for stage in report.run.stages.values())
    for name in ("ce", "kl", "rkd_distance"):
        assert name in report.run.stages["student/seed-0"].objective
    page = (out / "report.html").read_text()
    assert "test.parquet, row " in page
    assert "tokens" not in page[page.index("<h2>Examples") :]
    assert "Search the names" in page
    if can_plot():
        assert "loss_rkd_distance" in page
    weights = load_file(out / "student" / "seed-0" / "model.safetensors")
    assert not [name for name in weights if name.startswith(("student.", "objective."))]
    with np.load(out / "predictions.npz") as kept:
        assert kept["student/0"].shape == (12, 3)
        assert np.abs(kept["student/0"] - kept["baseline/0"]).max() > 0
    assert not list(out.rglob("*.partial"))


def test_a_saved_student_answers_alone_on_images_read_by_its_own_processor(folder, tmp_path):
    for config in CONFIGS["vit"]:
        config.num_channels = 3
    try:
        assert call(folder, tmp_path / "out", *models(tmp_path, "vit"), "--losses", TOKENWISE) == 0
    finally:
        for config in CONFIGS["vit"]:
            config.num_channels = 1
    path = tmp_path / "out" / "student" / "seed-0"
    model, info = AutoModelForImageClassification.from_pretrained(path, output_loading_info=True)
    assert not any(info.values())
    assert list(model.config.id2label.values()) == list(CLASSES)
    processor = ViTImageProcessorPil.from_pretrained(path)
    test = open_source(folder, "", "", seed=0).splits["test"]
    images = [Image.open(file).convert("RGB") for file in test.images]
    with torch.no_grad():
        logits = model(**processor(images=images, return_tensors="pt")).logits
    with np.load(tmp_path / "out" / "predictions.npz") as kept:
        np.testing.assert_allclose(kept["student/0"], logits.numpy(), atol=1e-5)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "rain &amp; &lt;b&gt;snow" in page
    assert "<b>snow" not in page


def test_a_finished_training_is_not_done_again_and_a_changed_one_is(parquet, tmp_path, capsys):
    assert call(parquet, tmp_path / "out", *LENETS) == 0
    capsys.readouterr()
    assert call(parquet, tmp_path / "out", *LENETS, "--losses", "{kl: {temperature: 3}}") == 0
    said = capsys.readouterr().out
    assert re.findall(r"^(\S+) +done already", said, flags=re.MULTILINE) == ["teacher", "baseline/seed-0"]
    assert "student/seed-0       again, changed: losses." in said


def test_the_same_seeds_give_the_same_answers_and_other_seeds_others(parquet, tmp_path):
    for name, seeds in (("one", "3"), ("two", "4,3")):
        assert call(parquet, tmp_path / name, *LENETS, "--seeds", seeds, "--labeled", "12") == 0
    one, two = (dict(np.load(tmp_path / name / "predictions.npz")) for name in ("one", "two"))
    assert all(np.array_equal(one[name], two[name]) for name in one)
    assert not np.array_equal(two["student/3"], two["student/4"])


def test_a_checkpoint_teaches_as_it_is_in_the_order_of_its_own_classes(parquet, tmp_path):
    config = CONFIGS["vit"][0].__class__(
        **TOKENS, hidden_size=16, num_hidden_layers=2, id2label={0: "2", 1: "0", 2: "1"}, initializer_range=0.5
    )
    torch.manual_seed(0)
    teacher = AutoModelForImageClassification.from_config(config).eval()
    teacher.save_pretrained(tmp_path / "teacher")
    arguments = ("--teacher", tmp_path / "teacher", "--student", "lenet5-small", "--teacher_epochs", "0")
    assert call(parquet, tmp_path / "out", *arguments) == 0
    assert not (tmp_path / "out" / "teacher").exists()
    test = decode(open_source(parquet, "image", "label", 0).splits["test"], SIDE, 1, [0.5], [0.5], "test")
    with torch.no_grad():
        own = teacher(pixel_values=test.pixel_values(range(12))).logits.numpy()
    with np.load(tmp_path / "out" / "predictions.npz") as kept:
        np.testing.assert_allclose(kept["teacher"], own[:, [1, 2, 0]], atol=1e-5)


# ---- data ----


def test_a_folder_is_split_by_class_the_same_way_each_time(folder):
    source = open_source(folder, "", "", seed=5)
    assert source.classes == list(CLASSES)
    assert {split: len(rows.names) for split, rows in source.splits.items()} == {
        "train": 42,
        "validation": 12,
        "test": 6,
    }
    for rows in source.splits.values():
        assert len(set(np.bincount(rows.labels))) == 1
        assert [name.split("/")[0] for name in rows.names] == [CLASSES[label] for label in rows.labels]
    names = [set(rows.names) for rows in source.splits.values()]
    assert len(set.union(*names)) == 60
    assert open_source(folder, "", "", seed=5).splits["test"].names == source.splits["test"].names
    assert open_source(folder, "", "", seed=6).splits["test"].names != source.splits["test"].names


def encoded(image: np.ndarray) -> bytes:
    import io

    file = io.BytesIO()
    Image.fromarray(image).save(file, "png")
    return file.getvalue()


@pytest.mark.parametrize("kind", ["bytes", "records"])
def test_encoded_images_of_parquet_are_those_of_their_files(kind, tmp_path):
    rng = np.random.default_rng(0)
    images = [picture(rng, i % 2) for i in range(12)]
    values = [encoded(image) for image in images]
    column = values if kind == "bytes" else [{"bytes": value, "path": None} for value in values]
    table = pa.table({"picture": column, "kind": ["b" if i % 2 else "a" for i in range(12)]})
    pq.write_table(table, tmp_path / "all.parquet")
    source = open_source(tmp_path / "all.parquet", "picture", "kind", seed=0)
    assert source.classes == ["a", "b"]
    found = decode(source.splits["train"], SIDE, 3, [0.5] * 3, [0.25] * 3, "train")
    for i, name in enumerate(found.names):
        row = int(name.rpartition(" ")[2])
        assert found.labels[i] == row % 2
        expected = (images[row].astype(np.float64) / 255 - 0.5) / 0.25
        np.testing.assert_allclose(found[i]["pixel_values"], expected.transpose(2, 0, 1), atol=1e-6)


def test_raw_pixels_and_names_of_classes_come_as_they_are(parquet):
    table = pq.read_table(parquet / "train.parquet")
    names = {"info": {"features": {"label": {"names": ["x", "y", "z"]}}}}
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(names)}), parquet / "train.parquet")
    source = open_source(parquet, "image", "label", seed=0)
    assert source.classes == ["x", "y", "z"]
    assert {split: len(rows.names) for split, rows in source.splits.items()} == {"train": 30, "test": 12}
    found = decode(source.splits["train"], SIDE, 1, [0.0], [1.0], "train")
    raw = np.frombuffer(table["image"][7].as_py(), dtype=np.uint8).reshape(1, SIDE, SIDE)
    assert np.array_equal(found.pixels[7], raw)


def images_of(labels) -> Images:
    """Rows that are told by their first pixel."""
    pixels = torch.zeros((len(labels), 1, 1, 1), dtype=torch.uint8)
    pixels[:, 0, 0, 0] = torch.arange(len(labels))
    return Images([str(i) for i in range(len(labels))], pixels, np.array(labels), [0.0], [1.0])


def numbers(images: Images) -> list[int]:
    return images.pixels.flatten().tolist()


def test_students_see_the_labels_that_they_are_given_and_no_others():
    labels = np.arange(100) % 3
    data = divide({"train": images_of(labels), "test": images_of([0])}, ["a", "b", "c"], 20, 5, seed=0)
    held, seen, learned = (set(numbers(part)) for part in (data.validation, data.labeled, data.student))
    assert (len(held), len(seen), len(learned)) == (5, 15, 95)
    assert not held & learned
    assert seen < learned
    assert set(numbers(data.teacher)) == learned
    assert (data.teacher.labels == labels[numbers(data.teacher)]).all()
    for number, label in zip(numbers(data.student), data.student.labels, strict=True):
        assert label == (labels[number] if number in seen else NO_LABEL)
    # Whatever the other labels say, the student's data are the same.
    other = np.where(np.isin(np.arange(100), [*held, *seen]), labels, (labels + 1) % 3)
    again = divide({"train": images_of(other), "test": images_of([0])}, ["a", "b", "c"], 20, 5, seed=0)
    for one, two in ((data.student, again.student), (data.labeled, again.labeled), (data.validation, again.validation)):
        assert numbers(one) == numbers(two)
        assert (one.labels == two.labels).all()


def test_rows_without_labels_are_for_the_student_alone_and_validation_counts_as_labeled():
    images = {"train": images_of([0, 1, NO_LABEL, 0, 1, NO_LABEL, 0, 1]), "validation": images_of([0, 1])}
    data = divide(images | {"test": images_of([0])}, ["a", "b"], 5, None, seed=0)
    assert set(numbers(data.teacher)) == {0, 1, 3, 4, 6, 7}
    assert len(data.labeled) == 3
    assert (data.student.labels != NO_LABEL).sum() == 3
    assert numbers(data.student) == list(range(8))
    assert numbers(data.validation) == [0, 1]
    with pytest.raises(UsageError, match="must be more than 2, the validation rows, and at most 8"):
        divide(images | {"test": images_of([0])}, ["a", "b"], 2, None, seed=0)


def test_a_fifth_of_the_labeled_rows_is_held_out_where_no_number_is_given():
    data = divide({"train": images_of([0, 1] * 20), "test": images_of([0])}, ["a", "b"], 20, None, seed=0)
    assert (len(data.validation), len(data.labeled), len(data.teacher)) == (4, 16, 36)


# ---- what is refused, in one line ----


def one_class(folder):
    for name in CLASSES[1:]:
        for file in (folder / name).iterdir():
            file.unlink()
        (folder / name).rmdir()


def few_images(folder):
    for file in list((folder / "sunny").iterdir())[2:]:
        file.unlink()


def nested(folder):
    for name in CLASSES:
        (folder / name).rename(folder / "cloud" if name == "cloudy" else folder / f"x{name}")
    (folder / "train").mkdir()
    (folder / "cloud").rename(folder / "train" / "cloud")


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (
            lambda f: (f / "cloudy" / "00.png").write_bytes(b"\x89PNG\r\n\x1a\n rubbish"),
            r"cannot read the image cloudy/00",
        ),
        (lambda f: (f / "sunny" / "03.png").write_bytes((f / "sunny" / "03.png").read_bytes()[:200]), "sunny/03.png"),
        (lambda f: (f / "sunny" / "99.jpg").write_bytes(b""), "cannot read the image sunny/99.jpg"),
        (one_class, "has one class, cloudy"),
        (few_images, "the class sunny has 2 images; to be split it needs at least 3"),
        (nested, r"train has no images .* must be the classes"),
        (lambda f: (f / "empty").mkdir(), r"empty has no images"),
    ],
)
def test_a_folder_that_cannot_be_used_is_refused(break_it, message, folder, tmp_path, capsys):
    break_it(folder)
    assert call(folder, tmp_path / "out", *LENETS) == 2
    said = capsys.readouterr().err
    assert re.fullmatch(rf"error: .*{message}.*\n", said), said
    assert not (tmp_path / "out").exists()


def column(name, values):
    return lambda d: pq.write_table(
        pq.read_table(d / "train.parquet").drop_columns(name).append_column(name, values), d / "train.parquet"
    )


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (
            lambda d: pq.write_table(pa.table({"img": [b"x"], "label": [1]}), d / "train.parquet"),
            "no column image, only img",
        ),
        (lambda d: pq.write_table(pa.table({"image": [b"x"], "y": [1]}), d / "test.parquet"), "no column label"),
        (lambda d: (d / "train.parquet").write_bytes(b"no parquet"), r"cannot read .*train.parquet"),
        (lambda d: (d / "train.parquet").rename(d / "other.parquet"), "has no train.parquet, only other.parquet"),
        (lambda d: write_raw(d / "test.parquet", 3, [0, 1, 7]), "has the class 7, which train has not"),
        (lambda d: write_raw(d / "test.parquet", 3, [0, 1, None]), "a row of test has no label"),
        (lambda d: write_raw(d / "train.parquet", 3, [-1, -1, None]), "no row has a label"),
        (column("label", pa.array([[0, 1]] * 30)), r"label holds list<.*one label"),
        (column("image", pa.array(["text"] * 30)), "images must be bytes"),
        (column("image", pa.array([b"text"] * 30)), "cannot read the image train.parquet, row 0"),
        (column("image", pa.array([None, b"text"] * 15)), "row 0 has no image bytes"),
        (column("image", pa.array([b"12"] * 30, type=pa.binary(2))), "2 raw bytes are no square"),
    ],
)
def test_parquet_that_cannot_be_used_is_refused(break_it, message, parquet, tmp_path, capsys):
    break_it(parquet)
    assert call(parquet, tmp_path / "out", *LENETS) == 2
    said = capsys.readouterr().err
    assert re.fullmatch(rf"error: .*{message}.*\n", said), said


def test_without_a_split_every_row_needs_a_label(parquet, tmp_path, capsys):
    write_raw(parquet / "train.parquet", 4, [0, 1, 2, None])
    assert call(parquet / "train.parquet", tmp_path / "out", *LENETS) == 2
    assert "need a test split of their own" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("teacher", "student", "arguments", "message"),
    [
        ("resnet", "resnet", ["--losses", "{hidden: {}}"], "the stages of these models have several"),
        ("resnet", "resnet", ["--losses", "{attention: {}}"], "does not support an attention implementation"),
        ("lenet5", "lenet5-small", ["--losses", "{hidden: {}}"], "has no num_hidden_layers"),
        ("lenet5", "lenet5-small", ["--losses", "{similarity: {}}"], "has no num_hidden_layers"),
        ("vit", "deit", ["--losses", "{hidden: {}}"], "compares token by token, but the student saw 4 x 18 tokens"),
        ("vit", "vit", ["--image_size", "32"], "Input image size"),
        ("lenet5", "lenet5-small", ["--image_size", "15"], "at least 16 pixels, got 15"),
        ("lenet5", "lenet5-small", ["--losses", "{nonsense: {}}"], "unknown loss nonsense; there are ce, kl"),
        ("lenet5", "lenet5-small", ["--losses", "{kl: {temperature: 0}}"], "kl: temperature must be > 0, got 0"),
        ("lenet5", "lenet5-small", ["--losses", "{kl: {heat: 1}}"], "kl: .*heat"),
        ("lenet5", "lenet5-small", ["--losses", "kl"], "--losses must be such as"),
        ("lenet5", "lenet5-small", ["--losses", "{kl: 0.5}"], "kl must be settings such as .*, got 0.5"),
        ("lenet5", "lenet5-small", ["--image_size", "10000000"], "of train would take 3,000,000 GB"),
        ("lenet5", "lenet5-small", ["--losses", "{kl: {"], "not valid YAML"),
        ("lenet5", "lenet5-small", ["--labeled", "31"], "at most 30, all rows with labels; got 31"),
        ("lenet5", "lenet5-small", ["--validation", "30"], "leaves no training row of the 30 labeled ones"),
        ("lenet5", "lenet5-small", ["--teacher_epochs", "0"], "lenet5 has no weights"),
        ("nowhere", "lenet5-small", [], "--teacher nowhere: .*or give one of lenet5, lenet5-small"),
    ],
)
def test_what_cannot_work_ends_before_any_training(
    teacher, student, arguments, message, parquet, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert call(parquet, tmp_path / "out", *models(tmp_path, teacher, student), *arguments) == 2
    said = capsys.readouterr().err
    assert re.fullmatch(rf"error: .*{message}.*\n", said), said
    assert not (tmp_path / "out").exists()


def test_models_of_other_images_are_refused(parquet, tmp_path, capsys):
    BertConfig().to_json_file(tmp_path / "bert.json")
    assert call(parquet, tmp_path / "out", "--teacher", tmp_path / "bert.json") == 2
    assert "is a bert, which classifies no images" in capsys.readouterr().err
    ViTConfig(**TOKENS | {"image_size": 32, "num_channels": 3}, hidden_size=12).to_json_file(tmp_path / "large.json")
    teacher = models(tmp_path, "vit")[:2]
    assert call(parquet, tmp_path / "out", *teacher, "--student", tmp_path / "large.json") == 2
    assert "their image sizes differ: 16, 32" in capsys.readouterr().err
    assert call(parquet, tmp_path / "out", *teacher, "--student", tmp_path / "large.json", "--image_size", 16) == 2
    assert "their channels differ: 1, 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["--seeds", "0,0"], ["--seeds", "a"], ["--epochs", "0"], ["--seed", "1"], ["--learning_rate", "-1"]]
)
def test_arguments_out_of_range_are_refused(arguments, parquet, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        call(parquet, tmp_path / "out", *arguments)
    assert stop.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_an_error_of_one_line(parquet, tmp_path, capsys):
    (tmp_path / "out").write_text("a file")
    assert call(parquet, tmp_path / "out", *LENETS) == 1
    assert re.fullmatch(r"error: .*out.*\n", capsys.readouterr().err)


def test_validation_rows_are_not_taken_twice():
    images = {split: images_of([0, 1]) for split in ("train", "validation", "test")}
    with pytest.raises(UsageError, match="these have some"):
        divide(images, ["a", "b"], None, 1, seed=0)
