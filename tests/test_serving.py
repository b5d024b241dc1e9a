"""examples/serve_onnx.py, by a real client over a socket."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from helpers import BINARY, TOPICS, label_config, make_student, make_tokenizer

from distill_nlp.cli import main

httpx = pytest.importorskip("httpx")
uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("fastapi")
pytest.importorskip("onnxruntime")

EXAMPLE = Path(__file__).parent.parent / "examples" / "serve_onnx.py"
TEXTS = ["w4 w20", "w5", "w30 w31 w32 w33 w34"]


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("serve_onnx", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up.
    sys.modules["serve_onnx"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint, which is served as an export is."""
    return saved(tmp_path_factory.mktemp("models") / "student", **label_config(BINARY))


def saved(folder, **config):
    make_student(**config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


@contextmanager
def serving(app):
    """A client of the application, which listens on a free port."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        for _ in range(600):
            if server.started:
                break
            time.sleep(0.05)
        port = server.servers[0].sockets[0].getsockname()[1]
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join(20)


def predicted(model, capsys):
    assert main(["predict", model, *TEXTS, "--format", "jsonl"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.slow
def test_an_exported_folder_answers_as_predict_does(example, folder, capsys):
    assert main(["export", folder, "--no-speed"]) == 0
    capsys.readouterr()
    with serving(example.make_app(folder + "-onnx")) as client:
        assert client.get("/health").json() == {"status": "ok", "labels": list(BINARY)}
        found = client.post("/predict", json={"texts": TEXTS}).json()["predictions"]
    for wanted, got in zip(predicted(folder, capsys), found, strict=True):
        assert got["label"] == wanted["label"]
        assert got["score"] == max(got["scores"].values())
        assert got["scores"] == pytest.approx(wanted["scores"], abs=1e-4)


def test_several_labels_are_all_those_above_a_half(example, tmp_path, capsys):
    model = saved(tmp_path / "topics", **label_config(TOPICS), problem_type="multi_label_classification")
    with serving(example.make_app(model)) as client:
        found = client.post("/predict", json={"texts": TEXTS}).json()["predictions"]
    for wanted, got in zip(predicted(model, capsys), found, strict=True):
        assert set(got["labels"]) == set(wanted["labels"])
        assert got["scores"] == pytest.approx(wanted["scores"], abs=1e-5)
    assert any(got["labels"] for got in found)


def test_a_regression_is_refused_in_one_line_before_it_listens(example, tmp_path, monkeypatch, capsys):
    model = saved(tmp_path / "number", num_labels=1)
    monkeypatch.setattr("sys.argv", ["serve_onnx.py", model])
    monkeypatch.setattr(example.uvicorn, "run", lambda *arguments, **settings: pytest.fail("it listens"))
    with pytest.raises(SystemExit) as ended:
        example.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"error: {model} is a regression (num_labels 1); give a classifier\n"


def test_requests_that_come_together_share_a_pass_and_keep_their_own_answers(example, folder, monkeypatch):
    passes = []
    original = example.predict_logits

    def counted(model, tokenizer, rows, batch_size):
        passes.append(len(rows))
        return original(model, tokenizer, rows, batch_size)

    monkeypatch.setattr(example, "predict_logits", counted)
    with serving(example.make_app(folder, example.Limits(wait=0.3))) as client, ThreadPoolExecutor(12) as pool:
        alone = [client.post("/predict", json={"texts": [f"w{4 + i}"]}).json() for i in range(12)]
        passes.clear()
        together = list(pool.map(lambda i: client.post("/predict", json={"texts": [f"w{4 + i}"]}).json(), range(12)))
    assert sum(passes) == 12
    assert max(passes) > 4
    for one, other in zip(alone, together, strict=True):
        assert other["predictions"][0]["scores"] == pytest.approx(one["predictions"][0]["scores"], abs=1e-5)


def test_no_more_texts_than_a_pass_holds_are_answered_at_once(example, folder, monkeypatch):
    passes = []
    original = example.predict_logits
    monkeypatch.setattr(example, "predict_logits", lambda *a: (passes.append(len(a[2])), original(*a))[1])
    with serving(example.make_app(folder, example.Limits(rows=4))) as client:
        assert len(client.post("/predict", json={"texts": ["w4"] * 10}).json()["predictions"]) == 10
    assert max(passes) == 4


@pytest.mark.parametrize(
    ("body", "code", "said"),
    [
        (b'{"texts": ["' + b"a" * 60 + b'"]}', 413, "a text may have 50 characters"),
        (json.dumps({"texts": ["a"] * 4}).encode(), 413, "a request may have 3 texts, not 4"),
        (b'{"texts": ["' + b" " * 300 + b'"]}', 413, "a request may have 200 bytes"),
        (b'{"texts": "a"}', 422, "the body must be JSON"),
        (b'{"texts": [1]}', 422, "the body must be JSON"),
        (b'{"texts": ["a"], "more": 1}', 422, "the body must be JSON"),
        (b"not json", 422, "the body must be JSON"),
        (b"\xff\xfe", 422, "the body must be JSON"),
        (b"[" * 150, 422, "the body must be JSON"),
        (b'{"texts": ["\\ud83d"]}', 422, "half of a surrogate pair"),
    ],
)
def test_what_is_too_much_or_no_text_is_refused(example, folder, body, code, said):
    limits = example.Limits(texts=3, characters=50, bytes=200)
    with serving(example.make_app(folder, limits)) as client:
        answer = client.post("/predict", content=body)
        assert (answer.status_code, said in answer.json()["detail"]) == (code, True)
        assert client.post("/predict", json={"texts": ["w4"]}).status_code == 200
        assert client.post("/predict", json={"texts": []}).json() == {"predictions": []}


def test_a_full_queue_is_said_at_once(example, folder, monkeypatch):
    release = threading.Event()
    original, calls = example.predict_logits, []

    def slow(model, tokenizer, rows, batch_size):
        calls.append(len(rows))
        # The first pass is the warm-up.
        if len(calls) > 1:
            release.wait(20)
        return original(model, tokenizer, rows, batch_size)

    monkeypatch.setattr(example, "predict_logits", slow)
    put = []

    class Noting(asyncio.Queue):
        def put_nowait(self, item):
            super().put_nowait(item)
            # Uvicorn has queues too.
            put.extend(item[:1] if isinstance(item, tuple) else ())

    monkeypatch.setattr(example.asyncio, "Queue", Noting)
    limits = example.Limits(waiting=3, rows=1, wait=0.0)
    with serving(example.make_app(folder, limits)) as client, ThreadPoolExecutor(2) as pool:
        first = pool.submit(client.post, "/predict", json={"texts": ["w4"]})
        while len(calls) < 2:
            time.sleep(0.01)
        second = pool.submit(client.post, "/predict", json={"texts": ["w5", "w6"]})
        while put[-2:] != ["w5", "w6"]:
            time.sleep(0.01)
        # Two fit by themselves, and not beside those two.
        answer = client.post("/predict", json={"texts": ["w7", "w8"]})
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        release.set()
        assert (first.result().status_code, second.result().status_code) == (200, 200)


def test_a_pass_that_fails_is_an_error_of_its_requests_alone(example, folder, monkeypatch):
    original, calls = example.predict_logits, []

    def failing(*arguments):
        calls.append(None)
        if len(calls) == 2:
            raise RuntimeError("no memory")
        return original(*arguments)

    monkeypatch.setattr(example, "predict_logits", failing)
    with serving(example.make_app(folder)) as client:
        assert client.post("/predict", json={"texts": ["w4"]}).status_code == 500
        assert client.post("/predict", json={"texts": ["w4"]}).status_code == 200


def test_probabilities_of_extreme_logits_are_numbers(example):
    found = example._named(np.array([1000.0, -1000.0], dtype=np.float32), ["a", "b"], several=False)
    assert found == {"label": "a", "score": 1.0, "scores": {"a": 1.0, "b": 0.0}}
