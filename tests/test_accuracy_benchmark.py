"""benchmarks/accuracy: from a set and a recipe to the table in the results' file."""

import importlib
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from helpers import BINARY
from scipy.stats import t as distribution
from transformers import pipeline

from distill_nlp.cli import main
from distill_nlp.config_file import load_experiment
from distill_nlp.data import load_splits, texts_of
from distill_nlp.report.statistics import mcnemar

FOLDER = Path(__file__).parents[1] / "benchmarks" / "accuracy"


@pytest.fixture
def bench(monkeypatch):
    """The modules of the benchmark by name; its trainings run in this process."""
    monkeypatch.syspath_prepend(str(FOLDER))
    modules = {name: importlib.import_module(name) for name in ("grouping", "rest", "scores", "table", "run", "images")}

    def in_this_process(command, check, env, cwd):
        assert main(command[3:]) == 0

    # Its name for the module, not the module's function: a first import of matplotlib asks a process for the fonts.
    monkeypatch.setattr(modules["run"], "subprocess", SimpleNamespace(run=in_this_process))
    return modules


@pytest.fixture
def tiny(bench, experiment, tmp_path, monkeypatch):
    """`tiny(*arguments)` runs the benchmark on a set of tiny models, and gives what the results' file then holds."""
    settings = yaml.safe_load(experiment().read_text())
    sets = tmp_path / "here" / "sets"
    sets.mkdir(parents=True)
    one = {
        "recipes": ["vanilla_kd", "rkd"],
        "data": settings["data"] | {"dataset": "data"},
        "teacher": {"model": None, "training": {"num_train_epochs": 1}},
        "student": {"from_teacher": {"layers": 2}},
        "learning_rate_factor": 4,
        "training": {"max_steps": 2, "per_device_train_batch_size": 8, "eval_strategy": "no"},
    }
    (sets / "tiny.yaml").write_text(yaml.safe_dump(one))
    more = one | {"base": "tiny", "data": one["data"] | {"unlabeled": "pool.txt"}}
    (sets / "more.yaml").write_text(yaml.safe_dump(more))
    (tmp_path / "pool.txt").write_text("a b c\nd e f g\n" * 5)
    rest = more | {"data": one["data"] | {"max_train_samples": 20, "max_unlabeled_samples": 8}, "unlabeled_rest": True}
    (sets / "rest.yaml").write_text(yaml.safe_dump(rest))
    results = tmp_path / "RESULTS.md"
    tables = "<!-- set other -->\nanother table\n\n<!-- set tiny -->\na former table"
    results.write_text(f"above\n<!-- accuracy: begin -->\n{tables}\n<!-- accuracy: end -->\nbelow\n")
    monkeypatch.setattr(bench["run"], "HERE", tmp_path / "here")
    monkeypatch.setattr(bench["run"], "RESULTS", results)
    monkeypatch.setattr(bench["run"], "REPOSITORY", tmp_path)

    def call(*arguments):
        places = ["--data", str(tmp_path), "--teacher", str(tmp_path / "backbone"), "--work", str(tmp_path / "work")]
        monkeypatch.setattr("sys.argv", ["run.py", *places, *arguments])
        bench["run"].main()
        return results.read_text()

    return call


@pytest.mark.slow
def test_the_table_holds_teacher_baseline_and_students_and_nothing_is_trained_twice(tiny, bench, tmp_path):
    first = tiny("--sets", "tiny", "--seeds", "0,1", "--write")
    folder = tmp_path / "work" / "tiny"
    rows = {line.split("|")[1].strip(): line for line in first.splitlines() if line.startswith("|")}
    assert {"teacher", "baseline", "vanilla_kd", "rkd"} <= set(rows)
    scores = bench["scores"].SetScores("tiny", folder, [0, 1], ["rkd"])
    right = [np.mean(scores.logits(f"rkd/student/seed-{seed}").argmax(1) == scores.labels) for seed in (0, 1)]
    assert f"{np.mean(right):.4f} ± {np.std(right, ddof=1):.4f}" in rows["rkd"]
    records = [json.loads((folder / f"rkd/student/seed-{seed}/stage.json").read_text()) for seed in (0, 1)]
    validated = np.mean([record["validation"]["accuracy"] for record in records])
    (line,) = [line for line in first.splitlines() if line.startswith("Students, mean of the validation scores: ")]
    assert f"rkd {validated:.4f}" in line
    # What the teacher says of the rows that it and the students learned from, by the model itself.
    train = pd.read_parquet(tmp_path / "data" / "train.parquet")
    teacher = pipeline(
        "text-classification", str(folder / "base" / "teacher"), top_k=None, max_length=16, truncation=True
    )
    answers = [{one["label"]: one["score"] for one in found} for found in teacher(list(train["text"]))]
    entropy = np.mean([-sum(p * np.log(p) for p in answer.values()) for answer in answers])
    share = np.mean([max(a, key=a.get) == BINARY[label] for a, label in zip(answers, train["label"], strict=True)])
    assert f"students' labeled rows: accuracy {share:.4f}, entropy of its answers {entropy:.3f} nats; on test" in first
    others = "above\n<!-- accuracy: begin -->\n<!-- set other -->\nanother table\n\n<!-- set tiny -->\n```\n"
    assert first.startswith(f"{others}python benchmarks/accuracy/run.py --data DATA ")
    assert first.endswith("<!-- accuracy: end -->\nbelow\n")
    assert "a former table" not in first
    assert str(tmp_path) not in first
    made = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    # A teacher, two baselines of two budgets, two students of two recipes; other folders reach the teacher by a link.
    assert len(made) == 9
    assert tiny("--sets", "tiny", "--seeds", "0,1", "--write") == first
    assert made == {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}


@pytest.mark.slow
def test_a_set_with_a_base_takes_its_teacher_and_baseline(tiny, tmp_path):
    with pytest.raises(SystemExit, match="run that set first"):
        tiny("--sets", "more", "--seeds", "0")
    text = tiny("--sets", "more,tiny", "--recipes", "vanilla_kd", "--seeds", "0", "--write")
    assert text.index("**more**") < text.index("another table") < text.index("**tiny**")
    work = tmp_path / "work"
    assert os.path.samefile(work / "more" / "base" / "teacher", work / "tiny" / "base" / "teacher")
    rows = [line for line in text.splitlines() if line.startswith("| baseline")]
    assert rows[0] == rows[1]


@pytest.mark.slow
def test_a_first_phase_that_recipes_share_is_trained_once(tiny, tmp_path, monkeypatch):
    def settings(temperature):
        phases = [{"losses": {"hidden": {"weight": 1.0}}}, {"losses": {"kl": {"temperature": temperature}}}]
        return {"data": {}, "teacher": {}, "student": {}, "phases": phases}

    folder = tmp_path / "recipes"
    folder.mkdir()
    for name, made in {"vanilla_kd": settings(1.0), "rkd": settings(8.0)}.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(made | {"output_dir": name}))
    monkeypatch.setattr(importlib.import_module("run"), "RECIPES", folder)
    text = tiny("--sets", "tiny", "--seeds", "0", "--write")
    work = tmp_path / "work" / "tiny"
    first = {name: work / name / "student" / "seed-0-phase-1" for name in ("vanilla_kd", "rkd")}
    assert os.path.samefile(*first.values())
    assert not first["vanilla_kd"].is_symlink()
    last = [(work / name / "student" / "seed-0" / "model.safetensors").read_bytes() for name in first]
    assert last[0] != last[1]
    # A recipe that is not what it was has a first phase of its own, and the other one's stays.
    changed = yaml.safe_load((folder / "rkd.yaml").read_text())
    changed["phases"][0]["losses"]["hidden"]["weight"] = 2.0
    (folder / "rkd.yaml").write_text(yaml.safe_dump(changed))
    tiny("--sets", "tiny", "--seeds", "0")
    assert not first["rkd"].is_symlink()
    assert not os.path.samefile(*first.values())
    assert sorted(path.name for path in first["rkd"].parent.iterdir() if not path.name.startswith(".")) == [
        "seed-0",
        "seed-0-phase-1",
    ]
    # Both count the steps of both phases.
    steps = [line.split("|")[7].strip() for line in text.splitlines() if line.startswith(("| vanilla_kd", "| rkd"))]
    assert steps == ["4", "4"]


@pytest.mark.slow
def test_variants_have_a_table_of_their_own_beside_their_recipe(tiny, tmp_path):
    text = tiny(
        *("--sets", "tiny", "--recipes", "vanilla_kd", "--variants", "vanilla_kd-t8", "--seeds", "0", "--write"),
        *("--no-long-baseline", "--precision", "fp32"),
    )
    assert "<!-- set tiny -->\na former table\n" in text
    own = text.partition("<!-- set tiny-variants -->")[2]
    settings = "--variants vanilla_kd-t8 --no-long-baseline --jobs 1 --precision fp32\n"
    assert f"--sets tiny --recipes vanilla_kd --seeds 0 {settings}" in own
    assert "Baselines" not in own
    assert not (tmp_path / "work" / "tiny" / "base_long").exists()
    assert [line.split("|")[1].strip() for line in own.splitlines() if line.startswith("| ")][-2:] == [
        "vanilla_kd",
        "vanilla_kd-t8",
    ]
    assert "Variants, points of right rows, all seeds: vanilla_kd-t8 " in own
    laid_down = [
        yaml.safe_load((tmp_path / "work" / "tiny" / f"{name}.yaml").read_text())
        for name in ("vanilla_kd", "vanilla_kd-t8")
    ]
    assert [settings["losses"]["kl"]["temperature"] for settings in laid_down] == [4.0, 8.0]


def test_every_variant_is_a_recipe_with_settings_that_exist(bench, tmp_path):
    run = bench["run"]
    variants = yaml.safe_load(run.VARIANTS.read_text())
    assert variants
    for name, changes in variants.items():
        recipe = yaml.safe_load((run.RECIPES / f"{changes.pop('recipe')}.yaml").read_text())
        made = run.merged(recipe, changes)
        assert made != recipe
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(made))
        load_experiment(tmp_path / f"{name}.yaml")


@pytest.mark.slow
def test_without_write_the_file_stays_and_an_unfinished_recipe_is_left_out(tiny, tmp_path, capsys):
    tiny("--sets", "tiny", "--recipes", "rkd", "--seeds", "0")
    shutil.rmtree(tmp_path / "work" / "tiny" / "rkd" / "student")
    assert "a former table" in tiny("--sets", "tiny", "--seeds", "0", "--table")
    shown = capsys.readouterr().out.splitlines()[-8:]
    assert any(line.startswith("| baseline") for line in shown)
    assert not any(line.startswith("| rkd") for line in shown)


def test_the_rest_of_the_training_file_is_what_no_model_learned_from(tiny, bench, tmp_path):
    given = {"data": tmp_path, "teacher": tmp_path, "work": tmp_path / "work", "recipes": ["vanilla_kd"]}
    options = SimpleNamespace(**given, variants=[], seeds=[0], table=False, precision="fp32", no_long_baseline=False)
    bench["run"].Bench("rest", options)._lay_down("vanilla_kd", "mine")
    config = load_experiment(tmp_path / "work" / "rest" / "mine.yaml")
    splits = load_splits(config.data)
    assert (len(splits.train), len(splits.unlabeled)) == (20, 8)
    assert texts_of(splits.train).isdisjoint(texts_of(splits.unlabeled))
    # All of the others lie in the file, and nothing else.
    all_texts = set(pd.read_parquet(tmp_path / "data" / "train.parquet")["text"])
    rest = pd.read_parquet(tmp_path / "work" / "rest" / "rest.parquet")
    assert list(rest) == ["text"]
    assert set(rest["text"]) == all_texts - {text for (text,) in texts_of(splits.train)}


def test_learning_rates_of_all_phases_are_multiplied(tiny, bench, tmp_path):
    given = {"data": tmp_path, "teacher": tmp_path, "work": tmp_path, "recipes": ["tinybert"], "variants": []}
    options = SimpleNamespace(**given, seeds=[0], precision="fp32", no_long_baseline=False)
    bench["run"].Bench("tiny", options)._lay_down("tinybert", "mine")
    settings = yaml.safe_load((tmp_path / "tiny" / "mine.yaml").read_text())
    sections = [settings["training"], *(phase["training"] for phase in settings["phases"])]
    assert [section.get("learning_rate") for section in sections] == [2e-4, None, pytest.approx(1.2e-4)]


def test_the_budgets_of_the_baselines_are_those_of_no_recipe(tiny, bench, tmp_path, monkeypatch):
    monkeypatch.setattr(bench["run"].Bench, "_distill", lambda *_: None)
    given = {"data": tmp_path, "teacher": tmp_path, "work": tmp_path, "recipes": ["rkd"], "variants": []}
    options = SimpleNamespace(**given, seeds=[0], jobs=1, precision="fp32", no_long_baseline=False)
    bench["run"].Bench("tiny", options).train()
    short, long = (yaml.safe_load((tmp_path / "tiny" / f"{name}.yaml").read_text()) for name in ("base", "base_long"))
    budgets = [
        (found["training"]["learning_rate"], found["training"]["num_train_epochs"], found["losses"].keys())
        for found in (short, long)
    ]
    assert budgets == [(pytest.approx(2e-4), 3, {"ce", "kl"}), (pytest.approx(6e-4), 6, {"ce", "kl"})]


@pytest.mark.parametrize("option", ["--sets", "--recipes"])
def test_an_unknown_name_is_refused_with_those_there_are(tiny, option, capsys):
    with pytest.raises(SystemExit):
        tiny(option, "nonsense")
    assert "unknown: nonsense; there are" in capsys.readouterr().err


def test_settings_of_a_set_lie_over_those_of_a_recipe(bench):
    recipe = {"a": {"b": 1, "c": {"d": 2}}, "e": [1]}
    assert bench["run"].merged(recipe, {"a": {"b": None, "c": {"f": 3}}, "e": [2]}) == {
        "a": {"b": None, "c": {"d": 2, "f": 3}},
        "e": [2],
    }
    assert recipe == {"a": {"b": 1, "c": {"d": 2}}, "e": [1]}


class _Known:
    """Right and wrong answers as given: of student and baseline, by seed."""

    def __init__(self, module, students, baselines):
        self.scores = module.SetScores("known", Path(), list(range(len(students))), [])
        self.found = {"recipe/student": students, "base/baseline": baselines}
        self.scores.right = self.right

    def right(self, model):
        kind, seed = model.rsplit("/seed-", 1)
        return np.array(self.found[kind][int(seed)], dtype=bool)


def test_a_row_counts_once_however_many_seeds_saw_it(bench):
    rng = np.random.default_rng(0)
    student, baseline = rng.random(200) < 0.9, rng.random(200) < 0.8
    one, _ = _Known(bench["scores"], [student], [baseline]).scores.against_baseline("recipe")
    three, each = _Known(bench["scores"], [student] * 3, [baseline] * 3).scores.against_baseline("recipe")
    assert one == pytest.approx(three)
    assert len(each) == 3
    assert len(set(each)) == 1
    difference = student.astype(float) - baseline
    t = difference.mean() / (difference.std(ddof=1) / np.sqrt(200))
    assert one == pytest.approx(2 * distribution.sf(abs(t), 199))


def test_a_variant_is_compared_with_its_recipe_row_by_row(bench):
    rng = np.random.default_rng(1)
    variant, recipe, baseline = ([rng.random(300) < share for _ in range(2)] for share in (0.9, 0.8, 0.5))
    known = _Known(bench["scores"], variant, baseline)
    known.found["plain/student"] = recipe
    known.scores.variant_of = {"recipe": "plain"}
    lead, p = known.scores.against_recipe("recipe")
    difference = np.mean([one.astype(float) - other for one, other in zip(variant, recipe, strict=True)], axis=0)
    assert lead == pytest.approx(difference.mean())
    t = difference.mean() / (difference.std(ddof=1) / np.sqrt(300))
    assert p == pytest.approx(2 * distribution.sf(abs(t), 299))


def test_the_same_answers_are_no_difference(bench):
    pooled, each = _Known(bench["scores"], [[True, False]], [[True, False]]).scores.against_baseline("recipe")
    assert (pooled, each) == (1.0, [1.0])


@pytest.mark.slow
def test_the_table_of_images_is_that_of_the_examples_predictions(bench, tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    (tmp_path / "mnist").mkdir()
    for split, rows in (("train", 1100), ("test", 40)):
        images = pa.array([rng.bytes(16 * 16) for _ in range(rows)], type=pa.binary(256))
        table = pa.table({"image": images, "label": pa.array(rng.integers(0, 3, rows))})
        pq.write_table(table, tmp_path / "mnist" / f"{split}.parquet")
    results = tmp_path / "RESULTS.md"
    results.write_text("above\n<!-- images: begin -->\na former table\n<!-- images: end -->\nbelow\n")
    monkeypatch.setattr(bench["images"], "RESULTS", results)
    monkeypatch.setattr(bench["images"], "REPOSITORY", tmp_path)
    monkeypatch.syspath_prepend(str(FOLDER.parents[1] / "examples"))
    example = importlib.import_module("distill_image_classifier")

    def in_this_process(command):
        return SimpleNamespace(returncode=example.main(command[2:]))

    monkeypatch.setattr(bench["images"], "subprocess", SimpleNamespace(run=in_this_process))
    places = ["--data", str(tmp_path), "--work", str(tmp_path / "work")]
    monkeypatch.setattr("sys.argv", ["images.py", *places, "--seeds", "0,1", "--max_steps", "2", "--write"])
    bench["images"].main()
    text = results.read_text()
    assert text.startswith(
        "above\n<!-- images: begin -->\n<!-- set mnist -->\n```\npython benchmarks/accuracy/images.py "
    )
    assert text.endswith("<!-- images: end -->\nbelow\n")
    assert "a former table" not in text
    kept = np.load(tmp_path / "work" / "predictions.npz")
    right = {name: kept[name].argmax(1) == kept["labels"] for name in kept.files if name != "labels"}
    rows = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("|")}
    assert f"| {right['teacher'].mean():.4f} |" in rows["teacher"]
    for name, kind in (("baseline", "baseline"), ("ce + kl", "student")):
        means = [right[f"{kind}/{seed}"].mean() for seed in (0, 1)]
        assert f"{np.mean(means):.4f} ± {np.std(means, ddof=1):.4f}" in rows[name]
        assert "| 2 |" in rows[name]
    each = [mcnemar(right[f"student/{seed}"], right[f"baseline/{seed}"])["p_value"] for seed in (0, 1)]
    assert f"{each[0]:.1g}, {each[1]:.1g}" in rows["ce + kl"]


def test_a_file_without_marks_is_not_written(bench, tmp_path):
    results = tmp_path / "RESULTS.md"
    results.write_text("nothing here\n")
    with pytest.raises(SystemExit, match="has no lines"):
        bench["table"].write_section([], results, "--seeds 0")
    assert results.read_text() == "nothing here\n"


def test_recipes_are_compared_with_the_baseline_that_validation_prefers(bench, tmp_path):
    validation = {"base": (0.80, 0.84), "base_long": (0.70, 0.95)}
    for name, values in validation.items():
        for seed, value in enumerate(values):
            folder = tmp_path / name / "baseline" / f"seed-{seed}"
            folder.mkdir(parents=True)
            record = {"steps": 10, "seconds": 1.0, "validation": {"accuracy": value, "f1_macro": 1 - value}}
            (folder / "stage.json").write_text(json.dumps(record))
    kinds = [f"{name}/baseline" for name in validation]
    scores = bench["scores"].SetScores("known", tmp_path, [0, 1], [], kinds)
    scores.labels = np.array([0, 1])
    assert scores.validation(kinds) == {
        "base/baseline": pytest.approx(0.82),
        "base_long/baseline": pytest.approx(0.825),
    }
    assert scores.baseline == "base_long/baseline"
    scores = bench["scores"].SetScores("known", tmp_path, [0, 1], [], kinds)
    scores.labels = np.array([[0, 1], [1, 1]])
    assert scores.baseline == "base/baseline"


def test_the_interval_of_a_recipe_is_over_rows_and_seeds(bench, tmp_path):
    """The seeds of the recipe disagree: rows alone would give about 0.09."""
    rng = np.random.default_rng(0)
    scores = bench["scores"].SetScores("known", tmp_path, [0, 1], [])
    scores.labels = rng.integers(0, 2, 300)
    shares = {"base/teacher": 0.95, "recipe/student/seed-0": 0.95}
    known = {}

    def logits(model):
        if model not in known:
            right = rng.random(300) < shares.get(model, 0.7)
            known[model] = np.eye(2)[np.where(right, scores.labels, 1 - scores.labels)]
        return known[model]

    scores.logits = logits
    low, high = scores.interval("recipe")
    difference = np.mean(scores.of_seeds("recipe/student")) - np.mean(scores.of_seeds("base/baseline"))
    assert low < difference < high
    assert high - low > 0.2


def test_tests_interval_and_table_take_the_chosen_baseline(bench, tmp_path):
    """The short baseline is the better one on the test rows; it is not what the recipe is compared with."""
    kinds = ["base/baseline", "base_long/baseline"]
    for kind, value in zip(kinds, (0.1, 0.2), strict=True):
        for seed in (0, 1):
            folder = tmp_path / kind / f"seed-{seed}"
            folder.mkdir(parents=True)
            record = {"steps": 10, "seconds": 60.0, "validation": {"accuracy": value, "f1_macro": value}}
            (folder / "stage.json").write_text(json.dumps(record))
    for seed in (0, 1):
        folder = tmp_path / "recipe" / "student" / f"seed-{seed}"
        folder.mkdir(parents=True)
        record = {"steps": 30, "seconds": 60.0, "validation": {"accuracy": 0.3}, "resumed_from": None}
        (folder / "stage.json").write_text(json.dumps(record))
    scores = bench["scores"].SetScores("known", tmp_path, [0, 1], ["recipe"], kinds)
    scores.labels = np.arange(60) % 2
    shares = {"base/teacher": 1.0, "base/": 0.9, "base_long/": 0.5, "recipe/": 0.75}

    def logits(model):
        share = next(value for begin, value in shares.items() if model.startswith(begin))
        right = np.arange(60) < 60 * share
        return np.eye(2)[np.where(right, scores.labels, 1 - scores.labels)]

    scores.logits = logits
    scores.teacher_answers = dict
    low, high = scores.interval("recipe")
    assert 0 < low < 0.25 < high
    _, each = scores.against_baseline("recipe")
    # 15 rows are the recipe's alone, none the baseline's.
    assert each == [pytest.approx(2 * 0.5**15)] * 2
    rows = {line.split("|")[1].strip(): line for line in bench["table"]._table(scores).splitlines() if "|" in line}
    assert rows["baseline"].startswith("| baseline | 0.5000 ± 0.0000 |")
    assert "| 50% |" in rows["recipe"]
    assert "↓" not in rows["recipe"]
    # Where the baseline has more rows right, the p-values say so, and are those of that.
    shares["recipe/"] = 0.25
    rows = {line.split("|")[1].strip(): line for line in bench["table"]._table(scores).splitlines() if "|" in line}
    assert f"| {2 * 0.5**15:.1g} ↓, {2 * 0.5**15:.1g} ↓ |" in rows["recipe"]
    assert rows["recipe"].count("↓") == 3


@pytest.fixture
def costs(bench, tmp_path):
    """Steps and minutes of one seed of a recipe of two phases, of 10 steps and one minute each, with these records."""

    def write(name, record):
        folder = tmp_path / "recipe" / "student" / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "stage.json").write_text(json.dumps(record))

    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"phases": [{}, {}]}))
    record = {"steps": 10, "seconds": 60.0, "resumed_from": None, "validation": {"accuracy": 0.5}}
    for name in ("seed-0-phase-1", "seed-0"):
        write(name, record)
    scores = bench["scores"].SetScores("known", tmp_path, [0], ["recipe"])
    scores.labels = np.array([0, 1])
    return SimpleNamespace(write=write, record=record, shown=lambda: bench["table"]._cost(scores, "recipe/student"))


def test_the_phases_of_a_recipe_count_and_no_other_ones(costs):
    """As of a recipe that had three once, of a stage that is begun, and of a seed whose name begins alike."""
    assert costs.shown() == "20 | 2.0"
    costs.write("seed-0-phase-2", costs.record)
    costs.write("seed-0-phase-1.partial", {"steps": 3})
    costs.write("seed-01", costs.record)
    assert costs.shown() == "20 | 2.0"


def test_the_minutes_of_a_training_that_was_interrupted_are_no_less_than_shown(costs):
    costs.write("seed-0", costs.record | {"resumed_from": "checkpoint-5"})
    assert costs.shown() == "20 | > 2.0"


@pytest.mark.slow
def test_models_of_a_recipe_that_has_changed_are_no_row(tiny, bench, tmp_path, monkeypatch, capsys):
    assert "| rkd |" in tiny("--sets", "tiny", "--recipes", "rkd", "--seeds", "0", "--write")
    folder = tmp_path / "recipes"
    folder.mkdir()
    for path in bench["run"].RECIPES.glob("*.yaml"):
        (folder / path.name).write_text(path.read_text())
    recipe = yaml.safe_load((folder / "rkd.yaml").read_text())
    recipe["training"]["learning_rate"] = 1e-3
    (folder / "rkd.yaml").write_text(yaml.safe_dump(recipe))
    monkeypatch.setattr(bench["run"], "RECIPES", folder)
    capsys.readouterr()
    tiny("--sets", "tiny", "--recipes", "rkd", "--seeds", "0", "--table")
    printed = capsys.readouterr()
    assert "| rkd |" not in printed.out
    assert "rkd was made by other settings, it is left out" in printed.err


def test_the_entropy_of_several_labels_is_that_of_each(bench):
    logits = np.array([[0.0, 2.0], [-30.0, -1.0]])
    p = 1 / (1 + np.exp(-logits))
    expected = -(p * np.log(p) + (1 - p) * np.log(1 - p))
    np.testing.assert_allclose(bench["scores"].entropies(logits, several=True), expected, atol=1e-9)
    rows = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(bench["scores"].entropies(logits, several=False), -(rows * np.log(rows)).sum(1))


def test_classes_are_grouped_in_every_split(bench, tmp_path):
    rows = {"train": [[0], [1, 2], [], [2, 0, 1]], "test": [[3], [0, 3]]}
    (tmp_path / "data").mkdir()
    for split, labels in rows.items():
        table = pa.table({"text": [f"{split} {i}" for i in range(len(labels))], "labels": labels, "more": labels})
        pq.write_table(table, tmp_path / "data" / f"{split}.parquet")
    groups = {"second": ["b", "d"], "first": ["a", "c"]}
    bench["grouping"].write_grouped(tmp_path / "data", tmp_path / "made", "labels", ["a", "b", "c", "d"], groups)
    made = {split: pq.read_table(tmp_path / "made" / f"{split}.parquet") for split in rows}
    assert made["train"].to_pydict() == {
        "text": [f"train {i}" for i in range(4)],
        "labels": [[1], [0, 1], [], [0, 1]],
    }
    assert made["test"]["labels"].to_pylist() == [[0], [0, 1]]
    names = ["a", "b", "c", "d"]
    bench["grouping"].write_grouped(tmp_path / "data", tmp_path / "one", "labels", names, groups, single=True)
    one = {split: pq.read_table(tmp_path / "one" / f"{split}.parquet").to_pydict() for split in rows}
    assert one["train"] == {"text": ["train 0"], "labels": [1]}
    assert one["test"] == {"text": ["test 0"], "labels": [0]}
    for wrong, named in (({"first": ["a", "c"]}, "b, d"), (groups | {"third": ["a", "x"]}, "a, x")):
        with pytest.raises(ValueError, match=f"each class must stand in one group; there are none or two for {named}"):
            bench["grouping"].write_grouped(tmp_path / "data", tmp_path / "no", "labels", ["a", "b", "c", "d"], wrong)
    assert not (tmp_path / "no").exists()
