"""`distill-nlp push`, the real Hub client, a loopback server: what arrives, what stays, what fails."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from helpers import TOPICS, make_student, make_teacher, make_tokenizer, write_rows_of_several_labels
from hub_server import TOKEN
from huggingface_hub import ModelCard, constants
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from distill_nlp.cli import main
from distill_nlp.config_file import load_experiment
from distill_nlp.hub import client
from distill_nlp.hub.private import Private
from distill_nlp.loading import checkpoint_print
from distill_nlp.manifests import write_manifest
from distill_nlp.pipeline import Pipeline

REPO = "tester/tiny-student"
LABELS = {"id2label": {0: "bad", 1: "good"}, "label2id": {"bad": 0, "good": 1}}
MODEL_FILES = {"README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


@pytest.fixture
def hub(hub, monkeypatch):
    """Waits are noted instead of waited for."""
    hub.waits = []
    monkeypatch.setattr("time.sleep", hub.waits.append)
    return hub


def save_student(folder: Path, **changes) -> Path:
    make_student(**(LABELS | changes)).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


FINGERPRINT = {"seed": 0, "data": {"max_length": 16}, "training": {"learning_rate": 0.01, "max_steps": 3}}


def write_run(run: Path, seeds=(0,), validation=(0.75,)) -> Path:
    """A finished run as far as a push reads it, with a report on its students."""
    experiment = {
        "output_dir": str(run),
        "seeds": list(seeds),
        "data": {"dataset": "/srv/private/reviews"},
        "teacher": {"model": "google-bert/bert-base-uncased"},
        "student": {"from_teacher": {"layers": 2}},
        "losses": {"kl": {"weight": 0.7}},
        "training": {"hub_token": TOKEN, "logging_dir": str(run / "logs")},
    }
    models = {}
    for seed, accuracy in zip(seeds, validation, strict=True):
        folder = save_student(run / "student" / f"seed-{seed}", seed=seed)
        fingerprint = FINGERPRINT | {"seed": seed}
        record = {"stage": f"student, seed {seed}", "fingerprint": fingerprint, "objective": "0.3·ce + 0.7·kl(T=2)"}
        record |= {"steps": 3, "validation": {"accuracy": accuracy, "f1_macro": 0.5}, "versions": {"torch": "2.13"}}
        record |= {"run_settings": {name: value for name, value in experiment.items() if name != "output_dir"}}
        (folder / "stage.json").write_text(json.dumps(record))
        models[f"student-{seed}"] = fingerprint

    def measured(value):
        per_seed = {str(s): {"path": str(run / f"student/seed-{s}"), "accuracy": value + s / 100} for s in seeds}
        speed = {"parameters": 1000, "size_mb": 0.1, "latency_ms": {"p50": 1.0, "p95": 2.0}, "throughput": 10.0}
        summary = {key: {"mean": value, "sd": None} for key in ("accuracy", "f1_macro", "agreement")}
        for entry in per_seed.values():
            entry |= {"f1_macro": value, "agreement": 0.9}
        return {"seeds": per_seed, **summary, **speed}

    teacher = {k: v for k, v in measured(0.9).items() if k not in ("seeds", "agreement")}
    teacher |= {"path": str(run / "teacher"), "accuracy": 0.9, "f1_macro": 0.9}
    report = {
        "schema_version": 1,
        "metric": "accuracy",
        "test_rows": 16,
        "label_names": ["bad", "good"],
        "models": {"teacher": teacher, "baseline": measured(0.7), "student": measured(0.8125)},
        "comparison": {
            "difference": {"value": 0.1125, "interval": [0.01, 0.2]},
            "retention": {"value": 0.9, "interval": [0.8, 1.0]},
            "gap_closed": {"value": 0.5, "interval": None},
            "accuracy_intervals": {"teacher": [0.8, 0.95], "baseline": [0.6, 0.8], "student": [0.7, 0.9]},
            "mcnemar": {"seeds": {str(s): {"student_only": 3, "baseline_only": 1, "p_value": 0.6} for s in seeds}},
        },
        "machine": {"device": "cpu", "name": "Some CPU", "cores": 2, "threads": 1},
        "run": {"dataset": "/srv/private/reviews", "stages": {}, "versions": {}, "fingerprint": {"models": models}},
    }
    (run / "report.json").write_text(json.dumps(report))
    (run / "report.md").write_text(f"# Report of {run}/student\n")
    (run / "config.json").write_text(json.dumps(experiment))
    return run


def change_record(student: Path, change) -> None:
    """Has `change` do its work on what the student's stage left."""
    record = json.loads((student / "stage.json").read_text())
    change(record)
    (student / "stage.json").write_text(json.dumps(record))


def push(model, *more: str, repo: str = REPO) -> int:
    return main(["push", str(model), "--repo-id", repo, *more])


def test_what_was_pushed_is_pulled_again_and_gives_the_same_logits(hub, tmp_path, capsys):
    student = save_student(tmp_path / "student")
    assert push(student) == 0
    assert capsys.readouterr().out.strip() == f"{hub.url}/{REPO}/commit/0123456789abcdef0123456789abcdef01234567"
    assert hub.private == {REPO: True}
    assert set(hub.files[REPO]) == MODEL_FILES
    assert hub.count("PUT /lfs/") == 1  # the weights, by LFS
    assert len(hub.commits) == 1
    pulled = AutoModelForSequenceClassification.from_pretrained(REPO, cache_dir=tmp_path / "cache").eval()
    tokens = AutoTokenizer.from_pretrained(REPO, cache_dir=tmp_path / "cache")("w4 w20 w9", return_tensors="pt")
    tokens = {name: tokens[name] for name in ("input_ids", "attention_mask")}
    original = AutoModelForSequenceClassification.from_pretrained(student).eval()
    with torch.no_grad():
        assert torch.equal(pulled(**tokens).logits, original(**tokens).logits)
    assert pulled.config.id2label == LABELS["id2label"]


def test_sharded_weights_are_pushed_by_their_index_and_nothing_that_it_does_not_name(hub, tmp_path):
    student = tmp_path / "student"
    make_student(**LABELS).save_pretrained(student, max_shard_size="20KB")
    make_tokenizer().save_pretrained(student)
    shards = {path.name for path in student.glob("model-*.safetensors")}
    assert len(shards) > 1
    shutil.copy(student / min(shards), student / "model-00009-of-00009.safetensors")
    assert push(student) == 0
    assert set(hub.files[REPO]) == MODEL_FILES - {"model.safetensors"} | shards | {"model.safetensors.index.json"}
    AutoModelForSequenceClassification.from_pretrained(REPO, cache_dir=tmp_path / "cache")


@pytest.mark.parametrize("flag", ["--private", "--public"])
def test_a_repository_is_as_visible_as_it_was_asked_for(hub, tmp_path, flag):
    assert push(save_student(tmp_path / "student"), flag) == 0
    assert hub.private == {REPO: flag == "--private"}


def test_a_private_student_is_not_pushed_into_a_public_repository(hub, tmp_path, capsys):
    student = save_student(tmp_path / "student")
    assert push(student, "--public") == 0
    assert push(student) == 2
    assert "was there already, and is public: give --public" in capsys.readouterr().err
    assert len(hub.commits) == 1


def test_branch_and_message(hub, tmp_path):
    assert push(save_student(tmp_path / "student"), "--revision", "v2", "--message", "Second try") == 0
    assert hub.files[REPO] == {}
    assert set(hub.files[f"{REPO}@v2"]) == MODEL_FILES
    assert (hub.commits[0]["revision"], hub.commits[0]["summary"]) == ("v2", "Second try")
    assert push(tmp_path / "student", "--revision", "v2") == 0  # the branch is there already


def test_the_same_student_again_makes_no_second_commit(hub, tmp_path):
    student = save_student(tmp_path / "student")
    assert push(student) == push(student) == 0
    assert len(hub.commits) == 1


OF_EARLIER = {
    *("adapter_config.json", "adapter_model.safetensors", "model.safetensors.index.json"),
    *("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "report.html", "report.json"),
    *("onnx/model.onnx", "onnx/export.json", "onnx-int8/model.onnx_data", "onnx-int8/export.json"),
}
OF_THE_USER = {
    *(".gitattributes", "notes.md", "LICENSE", "pytorch_model.bin", "onnx/notes.md", "onnx-mine/model.onnx"),
    *("last-checkpoint/model.safetensors", "checkpoint-2/adapter_config.json", "docs/report.html"),
}


@pytest.mark.parametrize("revision", [None, "v2"])
def test_what_an_earlier_student_left_is_removed_by_the_same_commit_and_all_else_stays(hub, tmp_path, capsys, revision):
    hub.private[REPO] = True
    hub.files[REPO] = dict.fromkeys(OF_EARLIER | OF_THE_USER | {"config.json"}, b"{}")
    hub.fail("/commit/", "late", times=1)  # what is gone is not to be removed again
    student = save_student(tmp_path / "student")
    assert push(student, *(["--revision", revision] if revision else [])) == 0
    assert set(hub.files[f"{REPO}@{revision}" if revision else REPO]) == MODEL_FILES | OF_THE_USER
    assert [set(commit["deleted"]) for commit in hub.commits] == [OF_EARLIER]
    lines = [line for line in capsys.readouterr().err.splitlines() if "removed from" in line]
    assert len(lines) == 1
    assert all(name in lines[0] for name in OF_EARLIER)
    AutoModelForSequenceClassification.from_pretrained(REPO, revision=revision, cache_dir=tmp_path / "cache")
    assert push(student, *(["--revision", revision] if revision else [])) == 0
    assert len(hub.commits) == 1
    assert "removed from" not in capsys.readouterr().err


def test_a_branch_that_nothing_was_committed_to_yet(hub, tmp_path):
    hub.fail("/tree/", 404, X_Error_Code="EntryNotFound")
    assert push(save_student(tmp_path / "student")) == 0
    assert set(hub.files[REPO]) == MODEL_FILES


# ---- what never leaves ----


def plant(run: Path) -> None:
    """What training, launchers and earlier versions leave beside a student, with a token and a path in it."""
    secret = f"{TOKEN} {run} /home/alice/secrets\n"
    student = run / "student" / "seed-0"
    for name in ("training_args.bin", "optimizer.pt", "trainer_state.json", "objective.safetensors", "notes.txt"):
        (student / name).write_text(secret)
    for name in ("training_log.json", "model-secret.safetensors", ".env", "README.md", "modeling_own.py", "events.out"):
        (student / name).write_text(secret)
    (student / "checkpoint-3").mkdir()
    (student / "checkpoint-3" / "model.safetensors").write_text(secret)
    for name in ("teacher/model.safetensors", "teacher_cache/part.bin", "predictions.npz"):
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text(secret)
    config = json.loads((student / "config.json").read_text())
    config |= {
        "_name_or_path": str(run / "backbone"),
        "resume_from": str(run / "x"),
        "hub_token": TOKEN,
        "WANDB_API_KEY": "a1",
    }
    (student / "config.json").write_text(json.dumps(config))
    settings = json.loads((student / "tokenizer_config.json").read_text())
    settings |= {"name_or_path": "/home/alice/models/bert", "special_tokens_map_file": "/home/alice/map.json"}
    (student / "tokenizer_config.json").write_text(json.dumps(settings))


def test_a_planted_token_and_path_are_in_no_byte_that_the_server_received(hub, tmp_path):
    run = write_run(tmp_path / "run")
    plant(run)
    assert push(run, "--include-report") == 0
    assert set(hub.files[REPO]) == MODEL_FILES | {"report.md", "report.json"}
    everything = hub.all_bytes
    assert b"tiny-student" in everything
    for secret in (TOKEN, str(tmp_path), "/home/alice", "/srv/private"):
        assert secret.encode() not in everything, secret
    config = json.loads(hub.files[REPO]["config.json"])
    assert "_name_or_path" not in config
    assert "hub_token" not in config
    assert config["id2label"] == {"0": "bad", "1": "good"}
    assert "WANDB_API_KEY" not in config
    assert config["resume_from"] == "x"
    tokenizer = json.loads(hub.files[REPO]["tokenizer_config.json"])
    assert tokenizer["pad_token"] == "[PAD]"
    assert "name_or_path" not in tokenizer
    assert json.loads(hub.files[REPO]["report.json"])["models"]["teacher"]["path"] == "teacher"
    AutoTokenizer.from_pretrained(REPO, cache_dir=tmp_path / "cache")


def test_names_of_classes_are_not_taken_for_secrets_or_paths(hub, tmp_path):
    names = ["reset_password", "/people/person/token"]
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    assert push(save_student(tmp_path / "student", **labels)) == 0
    config = json.loads(hub.files[REPO]["config.json"])
    assert config["id2label"] == {"0": "reset_password", "1": "/people/person/token"}
    assert config["label2id"] == labels["label2id"]


@pytest.mark.parametrize(
    ("name", "secret"),
    [
        ("vocab.txt", TOKEN),
        ("merges.txt", "#version\n/home/alice/models/bert x"),
        ("special_tokens_map.json", json.dumps({"note": f"see {Path.home()}/x"})),
    ],
)
def test_what_cannot_be_cleaned_is_refused_by_name_and_not_shown(hub, tmp_path, capsys, name, secret):
    student = save_student(tmp_path / "student")
    (student / name).write_text(secret)
    assert push(student) == 2
    error = capsys.readouterr().err
    assert f"{name} holds {'an access token' if secret == TOKEN else 'a local path'}" in error
    assert TOKEN not in error
    assert hub.calls == []


def test_the_header_of_the_weights_is_looked_through(hub, tmp_path, capsys):
    student = save_student(tmp_path / "student")
    content = (student / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"] = {"format": "pt", "made_in": str(tmp_path / "student")}
    new = json.dumps(header).encode()
    (student / "model.safetensors").write_bytes(struct.pack("<Q", len(new)) + new + content[8 + length :])
    assert push(student) == 2
    assert "model.safetensors holds a local path" in capsys.readouterr().err


@pytest.mark.parametrize(("folder", "found"), [("/ws", None), ("/work", "a local path")])
def test_a_path_of_a_few_bytes_is_not_looked_for_among_numbers(folder, found):
    private = Private([folder])
    numbers = b"\x00\x01" + folder.encode() + b"\x00\x02"
    assert private.found_in(numbers, weights=True) == found
    assert private.found_in(numbers) == "a local path"


def test_an_export_is_pushed_with_its_own_allow_list(hub, tmp_path, capsys):
    student = save_student(tmp_path / "student")
    assert push(student, "--include-onnx") == 2
    assert "there is no ONNX export of" in capsys.readouterr().err
    (student / "onnx").mkdir()
    for name in ("model.onnx", "model.onnx_data", "tokenizer.json", "calibration.npz", "session.log"):
        (student / "onnx" / name).write_text(json.dumps({"a": name}))
    record = {"source": str(student), "model": checkpoint_print(str(student))}
    (student / "onnx" / "export.json").write_text(json.dumps(record))
    shutil.copytree(student / "onnx", tmp_path / "student-onnx-int8")
    assert push(student, "--include-onnx") == 0
    sent = {name for name in hub.files[REPO] if name.startswith("onnx")}
    names = ("model.onnx", "model.onnx_data", "tokenizer.json", "export.json")
    assert sent == {f"{folder}/{name}" for folder in ("onnx", "onnx-int8") for name in names}
    assert str(tmp_path).encode() not in hub.all_bytes
    assert "Exports for ONNX Runtime, with their tokenizer: onnx, onnx-int8." in hub.files[REPO]["README.md"].decode()


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (None, "has no export.json, so it is no export"),
        ("", "is an export of other weights than those of"),
        ({"model": {"architecture": "BertForSequenceClassification"}}, "is an export of other weights"),
        ({"model": {"content": "0" * 16}}, "is an export of other weights"),
    ],
)
def test_an_export_of_other_weights_is_not_pushed(hub, tmp_path, capsys, record, said):
    student = save_student(tmp_path / "student")
    folder = tmp_path / "student-onnx"
    folder.mkdir()
    (folder / "model.onnx").write_bytes(b"graph")
    if record is not None:
        (folder / "export.json").write_text(json.dumps(record) if record else "{torn")
    assert push(student, "--include-onnx", "--dry-run") == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1
    assert push(student, "--dry-run") == 0


def test_an_export_from_before_the_student_was_trained_again_is_not_pushed(hub, tmp_path, capsys):
    student = save_student(tmp_path / "student")
    (tmp_path / "student-onnx").mkdir()
    (tmp_path / "student-onnx" / "model.onnx").write_bytes(b"graph")
    (tmp_path / "student-onnx" / "export.json").write_text(json.dumps({"model": checkpoint_print(str(student))}))
    assert push(student, "--include-onnx", "--dry-run") == 0
    save_student(student, seed=5)
    assert push(student, "--include-onnx", "--dry-run") == 2
    assert "is an export of other weights than those of" in capsys.readouterr().err


# ---- the dry run and the card ----


def test_a_dry_run_lists_what_would_be_sent_and_needs_neither_network_nor_token(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("distill_nlp.push.get_token", lambda: None)
    run = write_run(tmp_path / "run", seeds=(0, 1), validation=(0.5, 0.75))
    assert push(run, "--include-report", "--dry-run") == 0
    out, err = capsys.readouterr()
    assert "student of seed 1: best validation accuracy (0.7500) of 2" in err
    size = (run / "student" / "seed-1" / "model.safetensors").stat().st_size
    assert f"would send to {REPO} (private):" in out
    assert f"{size:,}  model.safetensors" in out
    assert "report.json" in out
    assert "bytes in 7 files" in out
    assert "would remove from there the weights, adapters, reports and ONNX exports of earlier pushes" in out
    assert "# tiny-student" in out


def test_students_that_the_run_did_not_make_as_it_is_now_are_left_out(tmp_path, capsys):
    run = write_run(tmp_path / "run", seeds=(0, 1, 2), validation=(0.5, 0.75, 0.9))
    record = run / "student" / "seed-2" / "stage.json"
    stage = json.loads(record.read_text())
    stage["fingerprint"]["losses"] = {"kl": {"temperature": 9.0}}
    record.write_text(json.dumps(stage))
    assert push(run, "--dry-run") == 0
    said = capsys.readouterr().err
    assert (
        "student of seed 1: best validation accuracy (0.7500) of 2; made with other settings, and left out: seed 2"
        in said
    )
    settings = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(settings | {"seeds": [2]}))
    assert push(run, "--dry-run") == 0
    assert (
        "student of seed 2: the only one; made with other settings, and left out: seed 0, 1" in capsys.readouterr().err
    )


def test_the_card_says_what_the_report_measured_of_this_student(hub, tmp_path):
    run = write_run(tmp_path / "run", seeds=(0, 1), validation=(0.5, 0.75))
    assert push(run, "--license", "apache-2.0", "--language", "en") == 0
    (tmp_path / "README.md").write_bytes(hub.files[REPO]["README.md"])
    card = ModelCard.load(tmp_path / "README.md")
    data = card.data.to_dict()
    assert (data["license"], data["language"], data["base_model"]) == (
        "apache-2.0",
        ["en"],
        "google-bert/bert-base-uncased",
    )
    assert (data["pipeline_tag"], data["library_name"]) == ("text-classification", "transformers")
    assert "datasets" not in data
    (accuracy, f1) = card.data.eval_results
    assert (accuracy.metric_type, accuracy.metric_value) == ("accuracy", 0.8225)  # of seed 1
    assert accuracy.metric_args["interval_95"] == [0.7, 0.9]
    assert accuracy.metric_args["mean_of_seeds"] == 0.8125
    assert accuracy.dataset_name == "reviews"
    assert (f1.metric_type, f1.metric_value) == ("f1", 0.8125)
    assert "interval_95" not in f1.metric_args
    for said in (
        "- Loss: 0.3·ce + 0.7·kl(T=2)\n",
        "| setting | value |\n|---|---|\n| learning\\_rate | 0.01 |\n",
        f'pipeline("text-classification", model="{REPO}")',
        "This student on 16 test rows: accuracy 0.8225",
        "| 95% interval | 0.8000 … 0.9500 | 0.6000 … 0.8000 | 0.7000 … 0.9000 |",
        "| latency p50 / p95, batch 1 | 1.0 / 2.0 ms",
        "Some CPU",
        "The distilled student beats the plain baseline by 11.25 points.",
        "at most 16 tokens",
        "torch 2.13",
        "distill-nlp run config.yaml",
        "dataset: PATH/reviews",
    ):
        assert said in card.text, said
    assert "hub_token" not in card.text


@pytest.mark.parametrize(
    ("data", "split", "config"),
    [({}, "test", None), ({"test_split": "validation_matched", "config_name": "mnli"}, "validation_matched", "mnli")],
)
def test_the_card_names_the_split_and_the_configuration_that_were_read(hub, tmp_path, data, split, config):
    run = write_run(tmp_path / "run")
    data = {"dataset": "nyu-mll/glue"} | data
    change_record(run / "student" / "seed-0", lambda record: record["run_settings"].update(data=data))
    assert push(run) == 0
    results = ModelCard(hub.files[REPO]["README.md"].decode()).data.eval_results
    assert {(r.dataset_type, r.dataset_split, r.dataset_config) for r in results} == {("nyu-mll/glue", split, config)}


@pytest.mark.slow
@pytest.mark.usefixtures("no_doctor")
def test_the_card_is_of_the_run_that_made_the_student_not_of_one_begun_since(experiment, tmp_path, capsys):
    """Another run was begun in the folder and has trained nothing yet."""
    made = experiment(losses={"kl": {}})
    assert main(["run", str(made), "--stages", "teacher,student"]) == 0
    shutil.copytree(tmp_path / "data", tmp_path / "begun-since")
    shutil.copytree(tmp_path / "backbone", tmp_path / "finished")
    make_teacher(**LABELS).save_pretrained(tmp_path / "finished")
    changes = {"data__dataset": str(tmp_path / "begun-since"), "teacher__model": str(tmp_path / "finished")}
    changes |= {"data__label_names": ["bad", "good"], "student": {"config": {"model_type": "distilbert", "dim": 32}}}
    Pipeline(load_experiment(experiment(**changes))).run(stages=[])
    assert str(tmp_path / "begun-since") in (tmp_path / "run" / "config.json").read_text()
    capsys.readouterr()
    assert push(tmp_path / "run", "--dry-run") == 0
    card = capsys.readouterr().out
    assert "- Examples: data, not on the Hub\n" in card
    assert "dataset: PATH/data\n" in card
    assert "model: PATH/backbone\n" in card
    assert "from_teacher" in card
    assert "begun-since" not in card
    assert str(tmp_path) not in card


@pytest.mark.parametrize(
    ("of_report", "of_run", "known"),
    [
        ("/srv/private/reviews", "/srv/private/reviews", True),
        ("./private/reviews", "/srv/private/reviews", True),  # as given, and as kept
        ("nyu-mll/glue", "nyu-mll/glue", True),
        ("/srv/private/reviews", "nyu-mll/glue", False),
        ("nyu-mll/glue", "/srv/private/reviews", False),
        ("/reviews", "/srv/private/reviews", False),
        (None, "nyu-mll/glue", False),  # there is no report
    ],
)
def test_of_an_earlier_version_s_student_the_run_tells_where_its_data_set_is_the_report_s(
    hub, tmp_path, of_report, of_run, known
):
    run = write_run(tmp_path / "run")
    change_record(run / "student" / "seed-0", lambda record: record.pop("run_settings"))
    report, experiment = (json.loads((run / name).read_text()) for name in ("report.json", "config.json"))
    if of_report is None:
        (run / "report.json").unlink()
    else:
        report["run"]["dataset"] = of_report
        (run / "report.json").write_text(json.dumps(report))
    experiment["data"]["dataset"] = of_run
    (run / "config.json").write_text(json.dumps(experiment))
    assert push(run) == 0
    card = ModelCard(hub.files[REPO]["README.md"].decode())
    said = ("google-bert/bert-base-uncased", "- Examples: ", "with the settings", "Made by")
    assert [text in card.text for text in said] == [known] * 4
    named = {result.dataset_name for result in card.data.eval_results or ()}
    assert named == (set() if of_report is None else {of_run.removeprefix("/srv/private/") if known else "not named"})


@pytest.mark.slow
@pytest.mark.parametrize("several", [False, True])
@pytest.mark.usefixtures("no_doctor")
def test_the_card_of_a_real_run_has_the_figures_of_its_report(experiment, tmp_path, capsys, several):
    changes = {"losses": {"kl": {}}}
    if several:
        write_rows_of_several_labels(tmp_path / "several")
        backbone = tmp_path / "for-several"
        make_teacher().bert.save_pretrained(backbone)
        make_tokenizer().save_pretrained(backbone)
        changes |= {"data__dataset": str(tmp_path / "several"), "data__label_column": "labels"}
        changes |= {"data__label_names": list(TOPICS), "teacher__model": str(backbone)}
    assert main(["run", str(experiment(**changes))]) == 0
    capsys.readouterr()
    assert push(tmp_path / "run", "--dry-run", "--include-report") == 0
    out = capsys.readouterr().out
    card = ModelCard(out[out.index("---\n") :])
    measured = json.loads((tmp_path / "run" / "report.json").read_text())["models"]["student"]["seeds"]["0"]
    wanted = {name: measured[name] for name in ("accuracy", "f1_macro", *(["f1_micro"] if several else []))}
    assert {r.metric_name: r.metric_value for r in card.data.eval_results} == wanted
    compared = "f1_macro" if several else "accuracy"
    assert [r.metric_name for r in card.data.eval_results if "interval_95" in r.metric_args] == [compared]
    assert "One seed" in card.text
    assert str(tmp_path) not in out
    assert "1·kl" in card.text


@pytest.mark.parametrize("change", ["no report", "another student", "trained again"])
def test_a_report_that_is_not_on_this_student_is_neither_quoted_nor_sent(hub, tmp_path, capsys, change):
    run = write_run(tmp_path / "run")
    if change == "no report":
        # The page alone says nothing of which student it is on.
        (run / "report.json").unlink()
    elif change == "trained again":
        report = json.loads((run / "report.json").read_text())
        report["run"]["fingerprint"]["weights"] = {"student-0": {"content": "of the student before it"}}
        (run / "report.json").write_text(json.dumps(report))
    else:
        other = {"learning_rate": 0.5}
        change_record(run / "student/seed-0", lambda record: record["fingerprint"].update(training=other))
    # What making the models printed.
    capsys.readouterr()
    assert push(run / "student" / "seed-0", "--include-report") == 2
    err = capsys.readouterr().err
    assert ("--include-report" in err, err.count("\n")) == (True, 1)
    assert REPO not in hub.files
    assert push(run / "student" / "seed-0") == 0
    card = ModelCard(hub.files[REPO]["README.md"].decode())
    assert "model-index" not in card.data.to_dict()
    assert ("There is no report" if change == "no report" else "is not on this student as it is now") in card.text
    assert "0.8125" not in card.text
    assert "license" not in card.data.to_dict()


@pytest.mark.parametrize("kept", [True, False])
def test_each_phase_of_a_training_is_told_in_the_card(hub, tmp_path, kept):
    """With its folder, and by what the student's own record says of it alone."""
    run = write_run(tmp_path / "run")
    student = run / "student" / "seed-0"
    first = {"seed": 0, "training": {"learning_rate": 0.5, "max_steps": 7, "warmup_steps": 2}}
    second = {"seed": 0, "training": {"learning_rate": 0.25, "max_steps": 5}, "after": first}
    for i, (fingerprint, steps) in enumerate([(first, 7), (second, 5)], 1):
        folder = student.with_name(f"seed-0-phase-{i}")
        folder.mkdir()
        record = {"fingerprint": fingerprint, "objective": f"{i}·hidden", "steps": steps}
        (folder / "stage.json").write_text(json.dumps(record if kept else record | {"fingerprint": {"of": "another"}}))
    change_record(student, lambda record: record["fingerprint"].update(after=second))
    assert push(student) == 0
    card = ModelCard(hub.files[REPO]["README.md"].decode()).text
    lines = card.splitlines()
    assert "- Loss, phase 3: 0.3·ce + 0.7·kl(T=2)" in lines
    assert ("- Loss, phase 1: 1·hidden" in lines, "- Loss, phase 2: 2·hidden" in lines) == (kept, kept)
    assert "| setting | phase 1 | phase 2 | phase 3 |" in lines
    assert "| learning\\_rate | 0.5 | 0.25 | 0.01 |" in lines
    assert "| warmup\\_steps | 2 | – | – |" in lines
    assert f"| steps | {'7 | 5' if kept else '– | –'} | 3 |" in lines
    assert "| seed | 0 | 0 | 0 |" in lines


def test_names_from_data_stay_text_in_the_card(hub, tmp_path):
    bad = "a|b\n---\nlicense: mit\n<script>alert(1)</script> [x](http://evil) `c` *d*"
    labels = {"id2label": {0: bad, 1: "good"}, "label2id": {bad: 0, "good": 1}}
    run = write_run(tmp_path / "run")
    save_student(run / "student" / "seed-0", **labels)
    data = {"dataset": "/data/x\n---\n```evil", "label_names": ["```\n# Injected", "good"]}
    change_record(run / "student" / "seed-0", lambda record: record["run_settings"].update(data=data))
    assert push(run) == 0
    card = ModelCard(hub.files[REPO]["README.md"].decode())
    assert "license" not in card.data.to_dict()
    assert "<script>" not in card.text
    assert "[x](" not in card.text
    before, _, settings = card.text.partition("````yaml\n")
    assert "Injected" not in before
    assert "\n````\n" in settings


def test_several_labels_are_told_in_the_card(hub, tmp_path):
    student = save_student(tmp_path / "student", problem_type="multi_label_classification")
    assert push(student) == 0
    text = hub.files[REPO]["README.md"].decode()
    assert "each of which may apply or not" in text
    assert "top_k=None" in text


# ---- what fails ----


@pytest.mark.parametrize(
    ("where", "kind", "headers", "waits"),
    [
        ("POST /api/repos/create", 500, {}, [1.0]),
        ("POST /api/repos/create", "drop", {}, [1.0]),
        ("POST /api/repos/create", "late", {}, [1.0]),
        ("POST /api/validate-yaml", 503, {}, [1.0]),
        ("/preupload/", 429, {"Retry_After": "7"}, [8.0]),
        ("/lfs/objects/batch", 500, {}, [1.0]),
        ("PUT /lfs/", 500, {}, [1.0]),
        ("PUT /lfs/", "drop", {}, [1.0]),
        ("POST /lfs/verify", 502, {}, [1.0]),
        ("/commit/", 429, {"Retry_After": "9"}, [9.0]),
        ("/commit/", 500, {}, [1.0]),
        ("/commit/", "drop", {}, [1.0]),
        ("/commit/", "late", {}, [1.0]),
    ],
)
def test_a_passing_failure_is_waited_for_and_the_push_goes_on(hub, tmp_path, where, kind, headers, waits):
    hub.fail(where, kind, times=1, **headers)
    assert push(save_student(tmp_path / "student")) == 0
    assert hub.waits == waits
    assert set(hub.files[REPO]) == MODEL_FILES
    assert len(hub.commits) == 1
    # What has arrived is not sent again.
    assert len(hub.blobs) == 1
    assert hub.count("PUT /lfs/") == (2 if where == "PUT /lfs/" else 1)


def test_waits_double_and_after_the_last_try_there_is_one_line(hub, tmp_path, capsys):
    hub.fail("/commit/", 500, times=99)
    assert push(save_student(tmp_path / "student")) == 1
    assert hub.waits == [1.0, 2.0, 4.0]
    error = capsys.readouterr().err.strip().splitlines()
    assert error[-1].startswith("error: the Hub failed with status 500 after several tries")
    assert "Traceback" not in "".join(error)
    assert hub.files[REPO] == {}
    hub.failures.clear()
    assert push(tmp_path / "student") == 0  # goes on: the weights are there
    assert hub.count("PUT /lfs/") == 1


def test_a_wait_that_is_too_long_is_left_to_the_user(hub, tmp_path, capsys):
    hub.fail("/commit/", 429, times=99, Retry_After="4000")
    assert push(save_student(tmp_path / "student")) == 1
    assert hub.waits == []
    assert "status 429" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("status", "code", "said"),
    [
        (401, 2, "does not know this token"),
        (403, 2, f"may not write to {REPO}"),
        (404, 2, "the Hub finds no tester/tiny-student"),
        (409, 1, "changed by someone else"),
        (413, 2, "too large"),
    ],
)
def test_a_refusal_is_one_line_and_not_tried_again(hub, tmp_path, capsys, status, code, said):
    hub.fail("/commit/", status, times=99)
    assert push(save_student(tmp_path / "student")) == code
    assert said in capsys.readouterr().err
    assert hub.count("/commit/") == 1


def test_another_owner_and_a_wrong_token(hub, tmp_path, monkeypatch, capsys):
    student = save_student(tmp_path / "student")
    assert push(student, repo="someone/else") == 2
    assert "may not write to someone/else" in capsys.readouterr().err
    wrong = tmp_path / "token"
    wrong.write_text("hf_wrong_but_well_formed\n")
    assert push(student, "--token-file", str(wrong)) == 2
    error = capsys.readouterr().err
    assert "does not know this token" in error
    assert "hf_wrong" not in error
    wrong.write_text(f"{TOKEN}\n")
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    assert push(student, "--token-file", str(wrong)) == 0


def test_without_a_network_there_is_one_line(hub, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert push(save_student(tmp_path / "student")) == 1
    assert "the Hub at http://127.0.0.1:9 was not reached" in capsys.readouterr().err
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert push(tmp_path / "student") == 2
    assert "HF_HUB_OFFLINE is set" in capsys.readouterr().err


def test_where_xet_fails_the_weights_go_by_lfs(hub, tmp_path, monkeypatch, capsys):
    import huggingface_hub._commit_api as api

    def broken(**arguments):
        raise RuntimeError("CAS service unreachable")

    monkeypatch.setattr(api, "is_xet_available", lambda: True)
    monkeypatch.setattr(api, "_upload_xet_files", broken)
    assert push(save_student(tmp_path / "student")) == 0
    assert "trying LFS" in capsys.readouterr().err
    assert hub.count("PUT /lfs/") == 1
    assert set(hub.files[REPO]) == MODEL_FILES


@pytest.mark.parametrize("repo", ["tiny", "a/b/c", "tester/-x", "tester/a..b", "tester/x.git", "te ster/x", ""])
def test_an_unusable_repository_name(hub, tmp_path, capsys, repo):
    assert push(save_student(tmp_path / "student"), repo=repo) == 2
    assert "--repo-id" in capsys.readouterr().err
    assert hub.calls == []


@pytest.mark.parametrize("content", ["", "two words", "line\nline", "hf_ünïcode"])
def test_a_file_without_a_usable_token_is_refused_without_showing_it(hub, tmp_path, capsys, content):
    (tmp_path / "token").write_text(content, encoding="utf-8")
    student = save_student(tmp_path / "student")
    assert push(student, "--token-file", str(tmp_path / "token")) == 2
    error = capsys.readouterr().err
    assert "token" in error
    assert not content or content.split()[0] not in error
    assert hub.calls == []


def test_no_token_at_all(hub, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("HF_TOKEN")
    assert push(save_student(tmp_path / "student")) == 2
    assert "there is no token" in capsys.readouterr().err
    assert push(tmp_path / "student", "--token-file", str(tmp_path / "none")) == 2
    assert "cannot read" in capsys.readouterr().err


def test_folders_that_hold_no_finished_student(hub, tmp_path, capsys):
    run = write_run(tmp_path / "run")

    def refused(path, said):
        assert push(path) == 2
        assert said in capsys.readouterr().err, path

    refused(tmp_path / "nowhere", "there is no folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "holds no model")
    shutil.copytree(run / "student/seed-0", run / "teacher")
    (run / "teacher/stage.json").write_text(json.dumps({"stage": "teacher"}))
    refused(run / "teacher", "is no student, but: teacher")
    shutil.copytree(run / "student/seed-0", run / "student/seed-0-phase-1")
    refused(run / "student/seed-0-phase-1", "is a phase on the way to")
    config = json.loads((run / "student/seed-0/config.json").read_text())
    (run / "student/seed-0/config.json").write_text(json.dumps(config | {"architectures": ["BertModel"]}))
    refused(run / "student/seed-0", "holds no text classifier")
    (run / "student/seed-0").rename(run / "student/seed-0.partial")
    refused(run, "has no finished student yet")
    refused(run / "student/seed-0.partial", "is not finished")
    assert hub.calls == []


@pytest.mark.parametrize(("change", "said"), [("cut", " bytes"), ("altered", "has other bytes than were written")])
@pytest.mark.parametrize("of_run", [True, False])
def test_a_student_that_is_not_as_it_was_written_is_not_pushed(hub, tmp_path, capsys, change, said, of_run):
    run = write_run(tmp_path / "run")
    student = run / "student" / "seed-0"
    write_manifest(student)
    assert push(student, "--dry-run") == 0
    weights = student / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-4] if change == "cut" else content[:-1] + bytes([content[-1] ^ 1]))
    capsys.readouterr()
    assert push(run if of_run else student) == 1
    err = capsys.readouterr().err
    assert f"{student} is not as it was written: model.safetensors has" in err
    assert said in err
    assert err.count("\n") == 1
    assert hub.calls == []


def test_the_tries_are_as_many_as_documented():
    assert client.TRIES == 4
