"""The command through its real entry points, on tiny data: all stages, what is not done again, what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import BINARY, make_student, make_teacher, make_tokenizer, swapped_tokenizer

from distill_nlp.cli import main
from distill_nlp.errors import UsageError
from distill_nlp.loading import check_classifier
from distill_nlp.stages import StageFolder

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.usefixtures("no_doctor")


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "distill_nlp", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
        timeout=300,
    )


@pytest.mark.slow
def test_the_installed_command_runs_all_stages_and_does_nothing_twice(experiment, tmp_path, capsys):
    config = experiment(data__unlabeled="pool")
    first = command("run", str(config), "--losses.kl.temperature", "4")
    assert first.returncode == 0, first.stderr
    assert "gap closed" in first.stdout
    assert "kl(T=4)" in first.stderr
    run = tmp_path / "run"
    for name in ("teacher", "baseline/seed-0", "student/seed-0"):
        record = json.loads((run / name / "stage.json").read_text())
        assert record["steps"] == (4 if name == "teacher" else 3)
        assert {"config.json", "model.safetensors", "tokenizer.json"} <= {p.name for p in (run / name).iterdir()}
    report = json.loads((run / "report.json").read_text())
    assert report["test_rows"] == 16
    assert report["run"]["stages"]["student/seed-0"]["objective"].startswith("0.3·ce + 0.7·kl(T=4)")
    assert not list(run.rglob("*.partial"))

    capsys.readouterr()
    assert main(["run", str(config), "--losses.kl.temperature", "4"]) == 0
    assert capsys.readouterr().err.count("done already") == 4
    assert main(["run", str(config), "--losses.kl.temperature", "2", "--stages", "teacher,baseline,student"]) == 0
    out, err = capsys.readouterr()
    assert err.count("done already") == 2
    assert "student, seed 0" in err
    assert "settings changed, so it is done again (losses.kl.temperature: 4 → " in err
    assert out == ""


@pytest.mark.slow
def test_pairs_of_texts_go_through_all_stages(experiment, tmp_path):
    assert main(["run", str(experiment(data__text_pair_column="other", data__unlabeled="pool"))]) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["test_rows"] == 16


@pytest.mark.slow
def test_the_finished_student_loads_anywhere(experiment, tmp_path, capsys):
    from transformers import AutoModelForSequenceClassification, pipeline

    assert main(["run", str(experiment()), "--stages", "teacher,student"]) == 0
    folder = tmp_path / "run" / "student" / "seed-0"
    model, info = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.config.id2label == dict(enumerate(BINARY))
    assert pipeline("text-classification", model=str(folder))("w4 w9")[0]["label"] in BINARY

    capsys.readouterr()
    assert main(["predict", str(folder), "w4 w20", "w5\nw30", "--format", "jsonl"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["text"] for line in lines] == ["w4 w20", "w5\nw30"]
    assert all(set(line["scores"]) == set(BINARY) for line in lines)
    assert all(line["score"] == max(line["scores"].values()) for line in lines)

    texts = tmp_path / "texts.txt"
    texts.write_text("w4 w20\nw5 w30\n", encoding="utf-8")
    assert main(["predict", str(folder), str(texts)]) == 0
    from_lines = capsys.readouterr().out.splitlines()
    assert main(["predict", str(folder), str(tmp_path / "data" / "test.parquet")]) == 0
    from_table = capsys.readouterr().out.splitlines()
    assert (len(from_lines), len(from_table)) == (2, 16)
    assert from_lines[0].split("\t")[0] in BINARY


def test_a_second_run_of_the_same_stage_is_refused_and_loses_nothing(experiment, tmp_path, capsys):
    config = str(experiment())
    assert main(["run", config, "--stages", "teacher"]) == 0
    with StageFolder(tmp_path / "run" / "student" / "seed-0").claimed():
        assert main(["run", config, "--stages", "baseline,student"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: another run is at work on ")
    assert (tmp_path / "run" / "baseline" / "seed-0" / "stage.json").is_file()
    assert main(["run", config, "--stages", "baseline,student"]) == 0


@pytest.mark.slow
def test_an_interrupted_stage_goes_on_and_ends_like_an_uninterrupted_one(experiment, tmp_path, monkeypatch, capsys):
    import safetensors.torch

    from distill_nlp.trainer import DistillationTrainer

    assert main(["run", str(experiment()), "--stages", "teacher,student"]) == 0
    whole = safetensors.torch.load_file(tmp_path / "run" / "student" / "seed-0" / "model.safetensors")

    step = DistillationTrainer.training_step

    def interrupted(self, *arguments, **keywords):
        if self.state.global_step == 2 and self.teacher is not None:
            raise KeyboardInterrupt
        return step(self, *arguments, **keywords)

    other = ["--output_dir", str(tmp_path / "second"), "--stages", "teacher,student"]
    monkeypatch.setattr(DistillationTrainer, "training_step", interrupted)
    assert main(["run", str(experiment()), *other]) == 130
    assert not (tmp_path / "second" / "student" / "seed-0").exists()
    monkeypatch.setattr(DistillationTrainer, "training_step", step)
    capsys.readouterr()
    assert main(["run", str(experiment()), *other]) == 0
    assert "going on from checkpoint-2" in capsys.readouterr().err
    resumed = safetensors.torch.load_file(tmp_path / "second" / "student" / "seed-0" / "model.safetensors")
    assert all((whole[name] == resumed[name]).all() for name in whole)


@pytest.mark.slow
def test_a_finished_teacher_is_not_trained_and_gives_the_label_names(experiment, tmp_path, capsys):
    ready = tmp_path / "ready"
    names = {"id2label": dict(enumerate(BINARY)), "label2id": {n: i for i, n in enumerate(BINARY)}}
    make_teacher(**names).save_pretrained(ready)
    make_tokenizer().save_pretrained(ready)
    config = experiment(teacher={"model": str(ready)}, data__label_names=None, losses={"kl": {}})
    assert main(["run", str(config), "--stages", "teacher,student"]) == 0
    assert "is a classifier for these labels already: not trained" in capsys.readouterr().err
    saved = json.loads((tmp_path / "run" / "student" / "seed-0" / "config.json").read_text())
    assert saved["id2label"] == {"0": "bad", "1": "good"}


@pytest.mark.slow
def test_nothing_is_made_from_a_teacher_or_reported_on_models_of_other_settings(experiment, tmp_path, capsys):
    config = str(experiment(losses={"kl": {}}))
    assert main(["run", config]) == 0
    capsys.readouterr()
    assert main(["run", config, "--stages", "student", "--teacher.training.learning_rate", "0.01"]) == 2
    assert "was made with other settings (training.learning_rate: 5e-05 → 0.01)" in capsys.readouterr().err
    assert main(["run", config, "--stages", "report", "--data.max_length", "8"]) == 2
    assert "max_length: 16 → 8" in capsys.readouterr().err
    # A setting of the students leaves the teacher alone, and one of the projections the baseline too.
    assert (
        main(["run", config, "--training.projection_learning_rate_factor", "10", "--stages", "teacher,baseline"]) == 0
    )
    assert capsys.readouterr().err.count("done already") == 2
    # Other weights in the same folder are another checkpoint.
    other = make_teacher(seed=9, id2label={0: "LABEL_0", 1: "LABEL_1"}, label2id={"LABEL_0": 0, "LABEL_1": 1})
    other.bert.save_pretrained(tmp_path / "backbone")
    assert main(["run", config, "--stages", "teacher"]) == 0
    assert "settings changed, so it is done again (model.content:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["reviws.csv"], "cannot read texts from reviws.csv: there is no such file"),
        (["tests"], "cannot read texts from tests: give one file, or texts"),
        (["good text", "pyproject.toml"], "cannot read texts from pyproject.toml: give one file"),
        (["reviws.CSV"], "cannot read texts from reviws.CSV: there is no such file"),
    ],
)
def test_a_file_name_is_not_classified_as_a_text(arguments, expected, monkeypatch):
    from distill_nlp.prediction import read_texts

    monkeypatch.chdir(ROOT)
    with pytest.raises(UsageError, match=expected):
        list(read_texts(arguments))
    assert list(read_texts(["What a film. See it.", "no.csv here"])) == ["What a film. See it.", "no.csv here"]


def test_a_table_of_another_spelling_is_not_read_as_lines(tmp_path):
    from distill_nlp.prediction import read_texts

    (tmp_path / "reviews.CSV").write_text("id,text\n1,good\n")
    with pytest.raises(UsageError, match="reviews.CSV is of no kind that is read"):
        list(read_texts([str(tmp_path / "reviews.CSV")]))


@pytest.mark.parametrize("text", ["long " * 60, "l" * 256, "~nobody said so", "half\0", "a/" * 3000, ""])
@pytest.mark.parametrize("others", [[], ["A short one."]])
def test_a_text_that_can_be_no_file_name_is_a_text(text, others):
    from distill_nlp.prediction import read_texts

    assert list(read_texts([text, *others])) == [text, *others]
    assert list(read_texts([*others, text])) == [*others, text]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_it_runs_under_a_launcher_on_one_rank_and_on_two(experiment, tmp_path, ranks):
    """`accelerate launch --cpu --num_processes 2` would start one process only; torchrun starts two on gloo."""
    module = ["-m", "distill_nlp", "run", str(experiment())]
    if ranks == 1:
        launcher = ["accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1"]
        launcher += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    else:
        launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [sys.executable, "-m", *launcher, *module],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("gap closed") == 1
    assert done.stderr.count("labels bad, good") == 1
    for name in ("teacher", "baseline/seed-0", "student/seed-0"):
        record = json.loads((tmp_path / "run" / name / "stage.json").read_text())
        assert record["fingerprint"]["launch"]["processes"] == ranks
    from transformers import AutoModelForSequenceClassification

    student = tmp_path / "run" / "student" / "seed-0"
    _, info = AutoModelForSequenceClassification.from_pretrained(student, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


@pytest.mark.slow
def test_the_quickstart_goes_through_in_a_small_size(tmp_path, capsys, small_synthetic):
    steps = ["--training.max_steps", "2", "--training.eval_steps", "2", "--teacher.training.max_steps", "2"]
    steps += ["--teacher.training.eval_steps", "2", "--seeds", "0", "--data.max_test_samples", "50"]
    assert main(["run", str(ROOT / "configs" / "quickstart.yaml"), "--output_dir", str(tmp_path / "run"), *steps]) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["label_names"] == ["negative", "positive"]
    assert (
        report["run"]["stages"]["baseline/seed-0"]["steps"] == report["run"]["stages"]["student/seed-0"]["steps"] == 2
    )


# ---- the teacher's cache ----

LOGITS_ONLY = {"losses": {"ce": {"weight": 0.3}, "kl": {"weight": 0.7}}, "data__unlabeled": "pool"}


def weights_of(folder: Path) -> dict:
    import safetensors.torch

    return safetensors.torch.load_file(folder / "model.safetensors")


@pytest.fixture
def no_teacher(monkeypatch):
    """`no_teacher()`: from then on, a teacher that is loaded fails the test."""
    from distill_nlp import teacher_source, teacher_stages

    def refuse(*arguments, **settings):
        raise AssertionError("the teacher was loaded")

    def switch():
        monkeypatch.setattr(teacher_source, "load_classifier", refuse)
        monkeypatch.setattr(teacher_stages, "load_classifier", refuse)

    return switch


def cache_lines(capsys) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("teacher cache ")]


@pytest.mark.slow
def test_the_cache_is_filled_ahead_and_the_students_train_without_the_teacher(experiment, tmp_path, capsys, no_teacher):
    config = str(experiment(**LOGITS_ONLY))
    assert main(["run", config, "--stages", "teacher"]) == 0
    assert cache_lines(capsys) == []
    assert main(["cache", config]) == 0
    (line,) = cache_lines(capsys)
    assert "44 rows, 0.0% there, 44 computed" in line
    assert f"; 44 rows, 1.2 kB in {tmp_path / 'run' / 'teacher_cache'}" in line
    assert not (tmp_path / "run" / "student").exists()

    no_teacher()
    assert main(["cache", config, "--training.per_device_eval_batch_size", "3"]) == 0
    (line,) = cache_lines(capsys)
    assert "44 rows, 100.0% there, 0 computed" in line
    assert main(["run", config, "--stages", "student", "--seeds", "0,1"]) == 0
    (line,) = cache_lines(capsys)
    assert "100.0% there" in line
    assert main(["run", config, "--stages", "student", "--seeds", "0,1"]) == 0
    assert cache_lines(capsys) == []
    # Another student, other losses and a part of the rows are served too.
    others = ["--losses.kl.temperature", "3", "--student.from_teacher.layers", "1", "--seeds", "7"]
    assert main(["run", config, "--stages", "student", *others, "--data.max_unlabeled_samples", "5"]) == 0
    assert "100.0% there" in cache_lines(capsys)[0]


@pytest.mark.slow
def test_students_of_the_cache_are_those_of_the_live_teacher(experiment, tmp_path):
    """Their records say the same: one is not done again because of the other."""
    config = str(experiment(**LOGITS_ONLY, training__optim="sgd", training__learning_rate=0.05))
    assert main(["run", config, "--stages", "teacher,student"]) == 0
    folder = tmp_path / "run" / "student" / "seed-0"
    cached, record = weights_of(folder), json.loads((folder / "stage.json").read_text())
    folder.rename(tmp_path / "cached")
    assert main(["run", config, "--stages", "student", "--teacher.cache", "false"]) == 0
    live = weights_of(folder)
    assert max((cached[name] - live[name]).abs().max().item() for name in live) < 1e-6
    start = make_teacher(id2label={0: "LABEL_0", 1: "LABEL_1"}, label2id={"LABEL_0": 0, "LABEL_1": 1})
    words = "embeddings.word_embeddings.weight"
    assert (live[f"distilbert.{words}"] - start.state_dict()[f"bert.{words}"]).abs().max() > 1e-4
    live_record = json.loads((folder / "stage.json").read_text())
    for name in ("fingerprint", "objective", "steps"):
        assert live_record[name] == record[name]


@pytest.mark.slow
def test_a_cache_may_be_shared_and_each_teacher_has_its_own_part(experiment, tmp_path, capsys):
    config = str(experiment(**LOGITS_ONLY, teacher__training__bf16=False))
    shared = ["--cache_dir", str(tmp_path / "shared")]
    for other in ("one", "two"):
        assert main(["run", config, "--stages", "teacher,student", "--output_dir", str(tmp_path / other), *shared]) == 0
    first, second = cache_lines(capsys)
    assert "0.0% there, 44 computed" in first
    assert "100.0% there, 0 computed" in second
    assert not (tmp_path / "one" / "teacher_cache").exists()
    retrained = ["--teacher.training.learning_rate", "0.001", "--teacher.seed", "5"]
    assert main(["run", config, "--stages", "teacher", *retrained, *shared]) == 0
    assert main(["cache", config, *retrained, *shared]) == 0
    assert "0.0% there, 44 computed" in cache_lines(capsys)[0]
    assert main(["cache", config, *retrained, *shared, "--training.bf16", "true"]) == 0
    assert "0.0% there, 44 computed" in cache_lines(capsys)[0]
    assert len(list((tmp_path / "shared").iterdir())) == 3


@pytest.mark.slow
def test_an_interrupted_fill_says_how_to_go_on_and_goes_on(experiment, tmp_path, capsys, monkeypatch):
    from distill_nlp import teacher_filling

    config = str(experiment(**LOGITS_ONLY, training__per_device_eval_batch_size=10))
    assert main(["run", config, "--stages", "teacher"]) == 0
    answer = teacher_filling.batched_answers

    def interrupted(*arguments):
        for i, logits in enumerate(answer(*arguments)):
            if i == 2:
                raise KeyboardInterrupt
            yield logits

    monkeypatch.setattr(teacher_filling, "batched_answers", interrupted)
    capsys.readouterr()
    assert main(["cache", config]) == 130
    assert "interrupted; the same command computes what is missing" in capsys.readouterr().err
    monkeypatch.setattr(teacher_filling, "batched_answers", answer)
    assert main(["cache", config]) == 0
    assert "44 rows, 45.5% there, 24 computed" in cache_lines(capsys)[0]


@pytest.mark.slow
def test_a_cached_teacher_with_its_labels_in_another_order_teaches_the_same(experiment, tmp_path, capsys):
    import torch

    names = {"id2label": dict(enumerate(BINARY)), "label2id": {n: i for i, n in enumerate(BINARY)}}
    teacher = make_teacher(**names)
    teacher.save_pretrained(tmp_path / "plain")
    with torch.no_grad():
        for parameter in (teacher.classifier.weight, teacher.classifier.bias):
            parameter.copy_(parameter.flip(0))
    teacher.config.id2label, teacher.config.label2id = {0: "good", 1: "bad"}, {"good": 0, "bad": 1}
    teacher.save_pretrained(tmp_path / "turned")
    found = []
    for name in ("plain", "turned"):
        make_tokenizer().save_pretrained(tmp_path / name)
        config = experiment(
            **LOGITS_ONLY,
            teacher={"model": str(tmp_path / name)},
            student={"config": {"model_type": "distilbert", "dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 16}},
            training__optim="sgd",
            training__learning_rate=0.05,
        )
        assert main(["run", str(config), "--stages", "student", "--output_dir", str(tmp_path / f"run-{name}")]) == 0
        found.append(weights_of(tmp_path / f"run-{name}" / "student" / "seed-0"))
    assert len(cache_lines(capsys)) == 2
    plain, turned = found
    assert max((plain[name] - turned[name]).abs().max().item() for name in plain) < 1e-6


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (LOGITS_ONLY, "run the stage teacher first (distill-nlp run CONFIG --stages teacher)"),
        ({}, "nothing to cache: losses hidden, attention compare token by token"),
        (LOGITS_ONLY | {"teacher__cache": False}, "nothing to cache: teacher.cache is false"),
        ({"losses": {"ce": {}}}, "nothing to cache: no loss needs the teacher"),
        (LOGITS_ONLY | {"data__max_length": 64}, "data.max_length is 64, but the teacher reads at most 40"),
        (LOGITS_ONLY | {"data__text_column": "review"}, "no column 'review' (data.text_column)"),
    ],
)
def test_there_is_nothing_to_cache_in_one_line_with_exit_code_2(experiment, capsys, tmp_path, changes, expected):
    assert main(["cache", str(experiment(**changes))]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert expected in error
    assert not (tmp_path / "run").exists()


def test_a_loss_of_layers_with_weight_0_does_not_keep_the_teacher_live(experiment, capsys):
    losses = {"kl": {}, "hidden": {"weight": 0}, "attention": {"weight": 0}}
    assert main(["cache", str(experiment(losses=losses))]) == 2
    assert "run the stage teacher first" in capsys.readouterr().err
    losses["hidden"]["weight"] = {"schedule": "linear", "start": 0, "end": 1}
    assert main(["cache", str(experiment(losses=losses))]) == 2
    assert "losses hidden compare token by token" in capsys.readouterr().err


def test_precisions_that_the_cache_does_not_know_keep_the_teacher_live(experiment, capsys, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    assert main(["cache", str(experiment(**LOGITS_ONLY))]) == 2
    assert "nothing to cache: logits are not cached under fp8" in capsys.readouterr().err


def test_a_cache_dir_that_is_a_file_is_refused(experiment, tmp_path, capsys):
    names = {"id2label": dict(enumerate(BINARY)), "label2id": {n: i for i, n in enumerate(BINARY)}}
    make_teacher(**names).save_pretrained(tmp_path / "ready")
    make_tokenizer().save_pretrained(tmp_path / "ready")
    config = experiment(**LOGITS_ONLY, teacher={"model": str(tmp_path / "ready")})
    (tmp_path / "file").write_text("")
    assert main(["cache", str(config), "--cache_dir", str(tmp_path / "file")]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"cache_dir: {tmp_path / 'file'} is a file" in error


def test_too_little_memory_in_the_fill_is_one_line(experiment, tmp_path, capsys, monkeypatch):
    import torch

    from distill_nlp import teacher_filling

    def full(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    names = {"id2label": dict(enumerate(BINARY)), "label2id": {n: i for i, n in enumerate(BINARY)}}
    make_teacher(**names).save_pretrained(tmp_path / "ready")
    make_tokenizer().save_pretrained(tmp_path / "ready")
    monkeypatch.setattr(teacher_filling, "batched_answers", full)
    assert main(["cache", str(experiment(**LOGITS_ONLY, teacher={"model": str(tmp_path / "ready")}))]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: teacher cache: out of memory; lower training.per_device_eval_batch_size (now 64)")


def test_the_cache_command_takes_the_settings_of_run_and_no_stages(experiment, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["cache", "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "--cache_dir" in text
    assert "--teacher.cache" in text
    assert "--training.bf16" in text
    assert main(["cache", str(experiment(**LOGITS_ONLY)), "--stages", "teacher"]) == 2
    assert "stages: unknown setting" in capsys.readouterr().err


REFUSED = {
    "no config": ({}, ["absent.yaml"], "no config file absent.yaml"),
    "missing data": ({"data__dataset": "./nowhere"}, [], "data.dataset: no file or folder ./nowhere"),
    "missing column": ({"data__text_column": "review"}, [], "no column 'review' (data.text_column)"),
    "label out of range": (
        {"data__label_column": "big"},
        [],
        "row 1 of the split 'train' has the label 7, outside 0..1",
    ),
    "one class": ({"data__label_column": "same"}, [], "all 40 rows of the split 'train' have the label 'good'"),
    "missing teacher": ({"teacher__model": "./nothing"}, [], "no model folder ./nothing"),
    "unknown stage": ({}, ["--stages", "techer"], "--stages: unknown techer"),
    "unknown setting": ({}, ["--data.max_lenght", "3"], "data.max_lenght: unknown setting; did you mean max_length?"),
    "long input": ({"data__max_length": 64}, [], "data.max_length is 64, but the teacher reads at most 40"),
    "stage before": ({}, ["--stages", "student"], "run the stage teacher first"),
    "layer beyond": ({"losses": {"hidden": {"layers": [[1, 9]]}}}, [], "teacher layer 9 of pair [1, 9] is not within"),
    "too many layers": ({"student": {"from_teacher": {"layers": 9}}}, [], "from_teacher.layers must be in 1..4"),
    "misspelt override": ({"student__overrides": {"atention_dropout": 0}}, [], "does not know atention_dropout"),
    "teacher's override": ({"teacher__overrides": {"hiden_size": 3}}, [], "bert does not know hiden_size"),
    "report before": ({}, ["--stages", "report"], "there is no finished baseline"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_in_one_line_with_exit_code_2(experiment, capsys, case, tmp_path):
    changes, extra, expected = REFUSED[case]
    config = experiment(**changes)
    arguments = ["run", *([str(config)] if not extra or extra[0].startswith("--") else []), *extra]
    assert main(arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert expected in error
    assert not list((tmp_path / "run").glob("*/stage.json"))
    assert not (tmp_path / "run" / "student").exists()


def test_a_teacher_with_other_labels_is_refused_with_both_lists(experiment, tmp_path, capsys):
    make_teacher().save_pretrained(tmp_path / "three")
    make_tokenizer().save_pretrained(tmp_path / "three")
    assert main(["run", str(experiment(teacher={"model": str(tmp_path / "three")}))]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "3 labels ['negative', 'neutral', 'positive']" in error
    assert "2 ['bad', 'good']" in error
    assert "teacher.finetune: always" in error


def test_losses_that_compare_tokens_are_refused_for_a_student_of_another_vocabulary(experiment, tmp_path, capsys):
    """Of the same size: only a look at the whole of both tells."""
    make_student(id2label=dict(enumerate(BINARY))).save_pretrained(tmp_path / "other")
    swapped_tokenizer().save_pretrained(tmp_path / "other")
    assert main(["run", str(experiment(student={"model": str(tmp_path / "other")}))]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "losses hidden, attention compare token by token, but teacher and student read different tokens" in error
    assert "w40" in error
    assert not (tmp_path / "run" / "teacher").exists()


def test_a_hub_id_without_a_network_fails_in_one_line(experiment, capsys):
    assert main(["run", str(experiment(teacher__model="nobody/no-such-model"))]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "cannot load 'nobody/no-such-model'" in error
    assert "check the name and the network" in error
    assert main(["run", str(experiment(data__dataset="nobody/no-such-data"))]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "cannot load 'nobody/no-such-data'" in error


def test_a_traceback_only_with_debug(experiment):

    with pytest.raises(UsageError):
        main(["run", str(experiment(data__dataset="./nowhere")), "--debug"])


def test_predict_refuses_what_is_no_classifier(experiment, tmp_path, capsys):
    experiment()
    assert main(["predict", str(tmp_path / "backbone"), "w4"]) == 2
    assert "is no classifier" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"num_labels": 1}, "is a regression (num_labels 1); give a classifier"),
        ({"num_labels": 3, "problem_type": "regression"}, "is a regression (num_labels 3)"),
    ],
)
def test_predict_refuses_a_model_whose_scores_would_be_no_probabilities(tmp_path, capsys, settings, said):
    make_student(id2label=None, label2id=None, **settings).save_pretrained(tmp_path)
    # Without a tokenizer or weights: it is refused before they are loaded.
    (tmp_path / "model.safetensors").unlink()
    assert main(["predict", str(tmp_path), "w4"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert len(err.splitlines()) == 1


def test_a_softmax_over_one_class_is_refused_too():
    # Older versions of Transformers load it, newer ones refuse its config.
    kind = {"architectures": ["BertForSequenceClassification"], "num_labels": 1}
    with pytest.raises(UsageError, match="m has a single class, which every text has"):
        check_classifier("m", SimpleNamespace(**kind, problem_type="single_label_classification"))
    check_classifier("m", SimpleNamespace(**kind, problem_type="multi_label_classification"))


def test_help_explains_every_setting(capsys):
    from distill_nlp.config_file import leaves

    with pytest.raises(SystemExit) as caught:
        main(["run", "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    listed = [name for name, _ in leaves() if name != "losses" and not name.startswith("teacher.training.")]
    missing = [name for name in listed if f"--{name}" not in text]
    assert not missing
    assert "--losses.kl.temperature 4" in text
    assert "--teacher.training.learning_rate" in text
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0


def test_unknown_words_of_predict_are_refused(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["predict", "model", "text", "--formt", "jsonl"])
    assert caught.value.code == 2
