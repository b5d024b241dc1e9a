"""`run`'s report and `distill-nlp report`: the files, their schema, what is taken over and what is done again."""

from __future__ import annotations

import json
import shutil
import sys

import numpy as np
import pytest
from helpers import write_rows_of_several_labels
from safetensors.torch import load_file, save_file

from distill_nlp.cli import main
from distill_nlp.config_file import load_experiment
from distill_nlp.hub.private import Private
from distill_nlp.manifests import write_manifest
from distill_nlp.pipeline import Pipeline
from distill_nlp.report.schema import Report
from distill_nlp.student_facts import FinishedStudent, student_facts

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_doctor")]
FILES = {"report.json", "report.md", "report.html", "predictions.npz"}
OTHERS = {"config.json", "report_manifest.json"}


made = {}


@pytest.fixture
def finished(experiment, tmp_path, capsys):
    """The folder of a finished run, copied from where it was made, once for all tests."""
    if not made:
        assert main(["run", str(experiment(seeds=[0, 1], training__logging_steps=1))]) == 0
        assert capsys.readouterr().out.rstrip().endswith(str(tmp_path / "run" / "report.html"))
        made["run"] = tmp_path / "run"
    return shutil.copytree(made["run"], tmp_path / "a copy")


@pytest.fixture
def predictions(monkeypatch):
    """Counts what the models are asked."""
    from distill_nlp.report import build

    calls = []

    def count(name):
        do = getattr(build, name)
        monkeypatch.setattr(build, name, lambda *arguments: [calls.append(name), do(*arguments)][1])

    count("predict_all")
    count("measure_costs")
    return calls


def saved(folder):
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


def test_the_report_of_a_run_fits_its_schema(finished):
    report = Report.model_validate(saved(finished))
    assert set(report.models.student.seeds) == {"0", "1"}
    assert report.models.student.latency_ms.p50 <= report.models.student.latency_ms.p99
    assert {"teacher", "baseline/seed-0", "student/seed-1"} <= report.run.stages.keys()
    assert sum(part.rows for part in report.slices if part.by == "length") == report.test_rows == 16
    html = (finished / "report.html").read_text(encoding="utf-8")
    assert "loss_attention of the student" in html
    assert "w4 w" in html
    assert {p.name for p in finished.iterdir() if p.is_file() and p.suffix != ".lock"} == FILES | OTHERS


def test_a_report_is_made_again_from_what_the_last_one_found(finished, predictions, capsys):
    before, logits = saved(finished), dict(np.load(finished / "predictions.npz"))
    for name in FILES - {"report.json", "predictions.npz"}:
        (finished / name).unlink()
    assert main(["report", str(finished)]) == 0
    out, err = capsys.readouterr()
    assert predictions == []
    assert "logits, speed and memory as the earlier report found them" in err
    assert "gap closed" in out
    assert out.rstrip().endswith("report.html")
    after = saved(finished)
    for report in (before, after):
        # The copy lies elsewhere.
        for model in [
            report["models"]["teacher"],
            *(s for k in ("baseline", "student") for s in report["models"][k]["seeds"].values()),
        ]:
            model.pop("path")
    assert after == before
    assert {name: values.tolist() for name, values in np.load(finished / "predictions.npz").items()} == {
        name: values.tolist() for name, values in logits.items()
    }
    assert {p.name for p in finished.iterdir() if p.is_file() and p.suffix != ".lock"} == FILES | OTHERS


def change(name):
    """Ways in which an earlier report no longer holds, and what is then done again."""

    def no_json(folder):
        (folder / "report.json").unlink()

    def no_logits(folder):
        (folder / "predictions.npz").write_bytes(b"no zip")

    def others_logits(folder):
        found = dict(np.load(folder / "predictions.npz"))
        found["student/0"] = -found["student/0"]
        np.savez(folder / "predictions.npz", **found)

    def other_labels(folder):
        found = dict(np.load(folder / "predictions.npz"))
        found["labels"] = 1 - found["labels"]
        np.savez(folder / "predictions.npz", **found)

    def edited(folder, edit):
        report = saved(folder)
        edit(report)
        (folder / "report.json").write_text(json.dumps(report))

    def signed(way):
        """As if it had been written so: what is told by the manifest alone has a way of its own."""
        return lambda folder: (way(folder), write_manifest(folder, FILES, "report_manifest.json"))

    def trained_again(folder):
        """With the same settings, after its folder was removed."""
        path = folder / "student" / "seed-1" / "model.safetensors"
        weights = load_file(path)
        weights["classifier.bias"] = weights["classifier.bias"] + 1e-6
        save_file(weights, path, {"format": "pt"})
        write_manifest(folder / "student" / "seed-1")

    ways = {
        "no report": no_json,
        "no logits": signed(no_logits),
        "logits of other models": signed(others_logits),
        "other labels": signed(other_labels),
        "other rows": signed(lambda f: edited(f, lambda r: r["run"]["fingerprint"].update(test="x"))),
        "a student trained again": trained_again,
        "other models": signed(lambda f: edited(f, lambda r: r["run"]["fingerprint"]["models"].pop("student-1"))),
        "another machine": signed(lambda f: edited(f, lambda r: r["machine"].update(name="x"))),
        "an older schema": signed(lambda f: edited(f, lambda r: r.update(schema_version=1))),
        "other bytes": lambda f: edited(f, lambda r: r["models"]["student"].update(throughput=1e9)),
    }
    return ways[name]


@pytest.mark.parametrize(
    ("what", "arguments", "done"),
    [
        ("no report", [], ["predict_all", "measure_costs"]),
        ("no logits", [], ["predict_all", "measure_costs"]),
        ("logits of other models", [], ["predict_all", "measure_costs"]),
        ("other labels", [], ["predict_all", "measure_costs"]),
        ("other rows", [], ["predict_all", "measure_costs"]),
        ("a student trained again", [], ["predict_all", "measure_costs"]),
        ("other models", [], ["predict_all", "measure_costs"]),
        ("other bytes", [], ["predict_all", "measure_costs"]),
        ("another machine", [], ["measure_costs"]),
        ("an older schema", [], ["measure_costs"]),
        (None, ["--fresh"], ["predict_all", "measure_costs"]),
        (None, ["--report.latency_samples", "3"], ["measure_costs"]),
        (None, ["--report.bootstrap_samples", "150"], []),
    ],
)
def test_what_no_longer_holds_is_done_again(what, arguments, done, finished, predictions):
    models = saved(finished)["models"]["student"]["accuracy"]
    if what is not None:
        change(what)(finished)
    assert main(["report", str(finished), *arguments]) == 0
    assert predictions == done
    report = Report.model_validate(saved(finished))
    assert report.models.student.accuracy.model_dump() == models
    assert (finished / "report.html").exists()


def test_a_run_reports_on_a_student_that_was_trained_again(finished, predictions, capsys):
    again = ["run", str(finished / "config.json"), "--output_dir", str(finished)]
    change("a student trained again")(finished)
    assert main(again) == 0
    assert predictions == ["predict_all", "measure_costs"]
    assert main(again) == 0
    assert predictions == ["predict_all", "measure_costs"]
    # A report of an earlier version does not say which weights it is of.
    report = saved(finished)
    del report["run"]["fingerprint"]["weights"]
    (finished / "report.json").write_text(json.dumps(report))
    write_manifest(finished, FILES, "report_manifest.json")
    capsys.readouterr()
    assert main(again) == 0
    assert "report               done already" in capsys.readouterr().err
    assert predictions == ["predict_all", "measure_costs"]


def test_a_run_whose_page_is_gone_writes_it_again(finished, predictions, capsys):
    again = ["run", str(finished / "config.json"), "--output_dir", str(finished)]
    assert main(again) == 0
    assert capsys.readouterr().err.count("report               done already") == 1
    (finished / "report.html").unlink()
    assert main(again) == 0
    assert (finished / "report.html").exists()
    assert predictions == []


def test_a_run_of_several_ranks_is_reported_on_by_one(finished):
    """Its models were made under another launch, which changes what training gives and not what they are."""
    run = finished
    for stage in ("teacher", *(f"{kind}/seed-{seed}" for kind in ("baseline", "student") for seed in (0, 1))):
        record = json.loads((run / stage / "stage.json").read_text())
        for fingerprint in (record["fingerprint"], record["fingerprint"].get("teacher", {})):
            if "launch" in fingerprint:
                fingerprint["launch"]["processes"] = 2
        (run / stage / "stage.json").write_text(json.dumps(record))
        write_manifest(run / stage)
    assert main(["report", str(run)]) == 0


def test_texts_of_several_labels_are_reported_on(experiment, tmp_path):
    data = write_rows_of_several_labels(tmp_path / "several")
    config = experiment(data__dataset=str(data), data__label_column="labels", data__label_names=None)
    assert main(["run", str(config)]) == 0
    report = Report.model_validate(saved(tmp_path / "run"))
    assert report.metric == "f1_macro"
    assert report.models.student.seeds["0"].confusion is None
    (tmp_path / "run" / "report.md").unlink()
    assert main(["report", str(tmp_path / "run")]) == 0
    assert "| money |" in (tmp_path / "run" / "report.md").read_text(encoding="utf-8")


def test_without_matplotlib_a_run_ends_well_and_says_what_to_install(experiment, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["run", str(experiment())]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "matplotlib is not installed" in line]
    assert len(lines) == 1
    assert "pip install 'distill-nlp[report]'" in lines[0]
    assert f"distill-nlp report {tmp_path / 'run'}" in lines[0]
    assert "<svg" not in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


def moved_data(run):
    settings = json.loads((run / "config.json").read_text())
    settings["data"]["dataset"] = "/nowhere/data"
    (run / "config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (lambda run: shutil.rmtree(run / "student"), "there is no finished student in"),
        (lambda run: (run / "config.json").unlink(), "is no folder of a run: it has no config.json"),
        (lambda run: (run / "config.json").write_text('{"sedes": 1}'), "sedes"),
        (lambda run: moved_data(run), "no file or folder /nowhere/data"),
    ],
)
def test_what_is_no_finished_run_is_refused_in_one_line(break_it, said, finished, capsys):
    before = (finished / "report.json").read_bytes()
    break_it(finished)
    assert main(["report", str(finished)]) == 2
    err = capsys.readouterr().err.strip().splitlines()
    assert said in err[-1]
    assert "Traceback" not in "".join(err)
    assert (finished / "report.json").read_bytes() == before
    assert list(finished.glob(".*.tmp*")) == []


def test_the_settings_kept_with_a_run_name_places_that_every_folder_finds(experiment, tmp_path, monkeypatch):
    """A run of relative paths: read again from elsewhere, and told on a card."""
    monkeypatch.chdir(tmp_path)
    names = {"data__dataset": "data", "data__unlabeled": "data/pool.parquet", "data__tokenizer": "./backbone"}
    path = experiment(
        output_dir="run",
        cache_dir="cache",
        **names,
        teacher__model="backbone",
        teacher__ensemble=[{"model": "backbone", "seed": 1}, {"seed": 2}],
    )
    Pipeline(load_experiment(path)).run(stages=[])
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    kept = load_experiment(tmp_path / "run" / "config.json")
    assert (kept.output_dir, kept.cache_dir) == (str(tmp_path / "run"), str(tmp_path / "cache"))
    assert kept.data.dataset == str(tmp_path / "data")
    assert kept.data.unlabeled == str(tmp_path / "data" / "pool.parquet")
    assert kept.data.tokenizer == kept.teacher.model == kept.teacher.ensemble[0].model == str(tmp_path / "backbone")
    assert kept.teacher.ensemble[1].model is None
    assert len(Pipeline(kept).materials.splits.train)
    # As the stage of a student keeps them.
    kept = json.loads((tmp_path / "run" / "config.json").read_text())
    (tmp_path / "backbone" / "stage.json").write_text(json.dumps({"run_settings": kept}))
    student = FinishedStudent(tmp_path / "backbone", tmp_path / "run")
    facts = student_facts(student, Private([tmp_path / "run"]))
    assert (facts.dataset, facts.base_model, facts.dataset_name) == (None, None, "data")
    assert "not on the Hub" in facts.teacher
    assert str(tmp_path) not in facts.settings


def test_what_is_no_path_is_kept_with_a_run_as_it_was_given(experiment, tmp_path, monkeypatch, small_synthetic):
    monkeypatch.chdir(tmp_path)
    for name in ("train", "synthetic", "test"):
        (tmp_path / name).mkdir()
    changes = {"data__dataset": "synthetic", "data__tokenizer": "train", "data__unlabeled": "unlabeled"}
    changes |= {"data__label_names": None, "data__validation_split": None, "data__max_train_samples": 32}
    changes |= {"student": {"config": {"model_type": "distilbert", "dim": 32, "n_heads": 4, "n_layers": 1}}}
    Pipeline(load_experiment(experiment(**changes))).run(stages=[])
    data = json.loads((tmp_path / "run" / "config.json").read_text())["data"]
    assert (data["dataset"], data["tokenizer"], data["unlabeled"]) == ("synthetic", "train", "unlabeled")
