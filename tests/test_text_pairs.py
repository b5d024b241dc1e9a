"""Tasks over pairs of texts, from the training to what is delivered: segments, predict, exports."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import BINARY, label_config, make_student, make_teacher, make_tokenizer
from transformers import AutoModelForSequenceClassification, AutoTokenizer, RobertaConfig

from distill_nlp.cli import main
from distill_nlp.errors import UsageError
from distill_nlp.prediction import read_texts
from distill_nlp.tokenization import with_segments

ROWS = {"first": ["w4 w20", "w5", "w30  w31\tw32"], "second": ["w9", "w50 w51 w52", "w7\nw8"], "label": [0, 1, 0]}


def without_segments():
    """A tokenizer that does not list `token_type_ids`, as DistilBERT's."""
    tokenizer = make_tokenizer()
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.init_kwargs["model_input_names"] = list(tokenizer.model_input_names)
    return tokenizer


def saved(folder, model, tokenizer=None):
    model.save_pretrained(folder)
    (tokenizer or make_tokenizer()).save_pretrained(folder)
    return str(folder)


def by_hand(folder, tokenizer, first, second, **settings):
    """The logits of each pair, one at a time, of the stock model."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        pairs = zip(first, second, strict=True)
        found = [model(**tokenizer(a, b, return_tensors="pt", **settings)).logits[0].numpy() for a, b in pairs]
    return np.stack(found)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "pairs.jsonl"
    rows = [dict(zip(ROWS, row, strict=True)) for row in zip(*ROWS.values(), strict=True)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


@pytest.fixture
def bert(tmp_path):
    return saved(tmp_path / "bert", make_teacher(**label_config(BINARY)), without_segments())


# ---- what is saved with a model ----


def test_a_checkpoint_of_pairs_answers_by_its_own_tokenizer_as_in_the_report(experiment, tmp_path, no_doctor):
    backbone = tmp_path / "backbone"
    config = experiment(data__text_pair_column="other", student__from_teacher={"layers": 2, "architecture": "same"})
    without_segments().save_pretrained(backbone)
    assert "token_type_ids" not in AutoTokenizer.from_pretrained(backbone).model_input_names
    assert main(["run", str(config)]) == 0
    test = pd.read_parquet(tmp_path / "data" / "test.parquet")
    reported = np.load(tmp_path / "run" / "predictions.npz")
    for name, key in {"teacher": "teacher", "baseline/seed-0": "baseline/0", "student/seed-0": "student/0"}.items():
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / name)
        assert tokenizer.model_input_names == ["input_ids", "attention_mask", "token_type_ids"]
        found = by_hand(tmp_path / "run" / name, tokenizer, test.text, test.other)
        np.testing.assert_allclose(found, reported[key], atol=1e-5)


def test_a_student_of_one_segment_learns_from_pairs_of_two(experiment, tmp_path, no_doctor):
    """RoBERTa under a BERT's tokenizer: a segment 1 is beyond its embedding."""
    roberta = {"model_type": "roberta", "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}
    roberta |= {"intermediate_size": 32, "type_vocab_size": 1, "max_position_embeddings": 40}
    config = experiment(data__text_pair_column="other", student={"config": roberta}, losses={"ce": {}, "kl": {}})
    assert main(["run", str(config)]) == 0
    student, files = str(tmp_path / "run" / "student" / "seed-0"), tmp_path / "data" / "test.parquet"
    columns = ["--text_column", "text", "--text_pair_column", "other"]
    assert main(["predict", student, str(files), *columns]) == 0
    # By its own tokenizer, in anybody's hands.
    test, reported = pd.read_parquet(files), np.load(tmp_path / "run" / "predictions.npz")
    tokenizer = AutoTokenizer.from_pretrained(student)
    assert tokenizer.model_input_names == ["input_ids", "attention_mask"]
    found = by_hand(student, tokenizer, test.text, test.other)
    np.testing.assert_allclose(found, reported["student/0"], atol=1e-5)


def test_a_teacher_of_one_segment_is_timed_by_the_doctor(experiment, tmp_path, capsys):
    roberta = {"model_type": "roberta", "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}
    roberta |= {"intermediate_size": 32, "type_vocab_size": 1, "max_position_embeddings": 40}
    config = experiment(
        data__text_pair_column="other",
        data__tokenizer=str(tmp_path / "backbone"),
        teacher={"config": roberta, "training": {"max_steps": 4}},
        student={"config": roberta | {"type_vocab_size": 2}},
        losses={"ce": {}, "kl": {}},
    )
    main(["doctor", str(config)])
    said = capsys.readouterr().out
    assert "teacher cache " in said
    assert "could not be checked" not in said


def test_only_models_that_tell_segments_apart_get_a_tokenizer_that_makes_them(tmp_path):
    plain, own = without_segments(), make_tokenizer()
    roberta = RobertaConfig(
        vocab_size=100, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, type_vocab_size=1
    )
    assert with_segments(plain, make_student()) is plain
    assert with_segments(plain, AutoModelForSequenceClassification.from_config(roberta)) is plain
    assert with_segments(own, make_teacher()) is own
    made = with_segments(plain, make_teacher())
    made.save_pretrained(tmp_path)
    for tokenizer in (made, AutoTokenizer.from_pretrained(tmp_path)):
        assert tokenizer("w4", "w5")["token_type_ids"] == [0, 0, 0, 1, 1]
    assert "token_type_ids" not in plain("w4", "w5")


# ---- predict ----


@pytest.mark.parametrize("tokenizer", [make_tokenizer, without_segments])
def test_predict_classifies_pairs(tmp_path, file, capsys, tokenizer):
    folder = saved(tmp_path / "model", make_teacher(**label_config(BINARY)), tokenizer())
    columns = ["--text_column", "first", "--text_pair_column", "second"]
    assert main(["predict", folder, file, *columns, "--format", "jsonl"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["text"], row["text_pair"]) for row in found] == list(zip(ROWS["first"], ROWS["second"], strict=True))
    logits = by_hand(folder, make_tokenizer(), ROWS["first"], ROWS["second"])
    wanted = torch.softmax(torch.from_numpy(logits), dim=-1).numpy()
    np.testing.assert_allclose([[row["scores"][name] for name in BINARY] for row in found], wanted, atol=1e-5)

    assert main(["predict", folder, file, *columns]) == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [line[2] for line in lines] == ["w4 w20 ||| w9", "w5 ||| w50 w51 w52", "w30 w31 w32 ||| w7 w8"]
    assert [line[0] for line in lines] == [row["label"] for row in found]


def test_a_model_without_segments_reads_pairs_too(tmp_path, file, capsys):
    folder = saved(tmp_path / "model", make_student(**label_config(BINARY)))
    assert main(["predict", folder, file, "--text_column", "first", "--text_pair_column", "second"]) == 0
    labels = [line.split("\t")[0] for line in capsys.readouterr().out.splitlines()]
    logits = by_hand(folder, without_segments(), ROWS["first"], ROWS["second"])
    assert labels == [BINARY[i] for i in logits.argmax(axis=1)]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["-"], "is for one file with columns (.csv, .json, .jsonl, .parquet, .tsv), not for stdin"),
        (["a text", "another"], "not for texts"),
        (["a text that ends in .csv"], "not for texts"),
        (["lines.txt"], "not for lines.txt"),
        (["gone.csv"], "cannot read texts from gone.csv: there is no such file"),
        (["pairs.csv"], "pairs.csv has no column 'second'; there is: text, other"),
        (["holes.csv"], "row 1 of holes.csv has no text in second: None"),
    ],
)
def test_pairs_come_from_a_file_with_columns(tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lines.txt").write_text("w4\n")
    (tmp_path / "pairs.csv").write_text("text,other\nw4,w5\n")
    (tmp_path / "holes.csv").write_text("text,second\nw4,w5\nw6,\n")
    with pytest.raises(UsageError) as refused:
        list(read_texts(arguments, text_pair_column="second"))
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)
    with pytest.raises(UsageError, match="--text_column and --text_pair_column are both 'other'"):
        list(read_texts(["pairs.csv"], "other", "other"))


# ---- export ----


@pytest.fixture
def answers(monkeypatch):
    """Rows that an export was compared on, one list of each call, without tracing anything."""
    pytest.importorskip("onnxruntime")
    from distill_nlp.export import build

    seen = []

    def counted(model, tokenizer, rows, *arguments):
        seen.append(rows)
        raise RuntimeError("far enough")

    monkeypatch.setattr(build, "predict_logits", counted)
    return seen


def export(model, *options):
    with pytest.raises(RuntimeError, match="far enough"):
        main(["export", model, "--no-speed", *options, "--debug"])


def test_an_export_reads_pairs_with_their_segments(bert, file, capsys):
    pytest.importorskip("onnxruntime")
    columns = ["--text_column", "first", "--text_pair_column", "second"]
    assert main(["export", bert, "--no-speed", "--data", file, *columns]) == 0
    folder = Path(bert + "-onnx")
    record = json.loads((folder / "export.json").read_text())
    assert record["inputs"] == ["input_ids", "attention_mask", "token_type_ids"]
    assert (record["parity"]["rows"], record["parity"]["flips"]) == (3, 0)
    logits = by_hand(bert, make_tokenizer(), ROWS["first"], ROWS["second"])
    assert record["parity"]["original"] == pytest.approx((logits.argmax(axis=1) == ROWS["label"]).mean(), abs=1e-4)
    assert "token_type_ids" in AutoTokenizer.from_pretrained(folder).model_input_names
    capsys.readouterr()
    found = []
    for model in (bert, str(folder)):
        assert main(["predict", model, file, *columns, "--format", "jsonl"]) == 0
        found.append([json.loads(line)["scores"][BINARY[1]] for line in capsys.readouterr().out.splitlines()])
    np.testing.assert_allclose(found[1], found[0], atol=1e-4)
    wanted = torch.softmax(torch.from_numpy(logits), dim=-1)[:, 1]
    np.testing.assert_allclose(found[1], wanted, atol=1e-4)


def test_without_data_pairs_are_compared_on_built_in_pairs(bert, answers, capsys):
    export(bert, "--text_pair_column", "second")
    assert "built-in pairs, which have no labels" in capsys.readouterr().err
    assert all(1 in row["token_type_ids"] for row in answers[0])
    export(bert)
    assert "token_type_ids" not in answers[1][0]


def test_the_run_says_that_its_models_read_pairs(tmp_path, answers, file, capsys):
    run = tmp_path / "run"
    for name in ("teacher", "student/seed-0"):
        folder = saved(run / name, make_teacher(**label_config(BINARY)), without_segments())
        (run / name / "stage.json").write_text("{}")
        (run / "config.json").write_text(json.dumps({"data": {"text_pair_column": "hypothesis"}}))
        export(folder)
        assert "built-in pairs" in capsys.readouterr().err
        assert 1 in answers[-1][0]["token_type_ids"]
        export(folder, "--data", file, "--text_column", "first")
        assert "give --text_pair_column (in its run 'hypothesis')" in capsys.readouterr().err
        export(folder, "--data", file, "--text_column", "first", "--text_pair_column", "second")
        assert "--text_pair_column" not in capsys.readouterr().err
    (run / "config.json").write_text(json.dumps({"data": {"text_pair_column": None}}))
    export(folder)
    assert "built-in texts" in capsys.readouterr().err
    # The student's own record counts: another run may have begun in its folder since.
    kept = {"run_settings": {"data": {"text_pair_column": "hypothesis"}}}
    (run / "student" / "seed-0" / "stage.json").write_text(json.dumps(kept))
    export(folder)
    assert "built-in pairs" in capsys.readouterr().err
