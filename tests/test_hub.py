"""A trainer's pushes with the real Hub client and a loopback server: the student alone, in training and after."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import TOKEN, HubServer
from huggingface_hub import ModelCard

REPO = "tester/tiny-student"
STUDENT = {"README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
SETTINGS = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "hub_model_id": REPO}
SCRIPT = """
import sys
sys.path.insert(0, "tests")
import helpers, json, os
from huggingface_hub import constants
del os.environ["HF_HUB_OFFLINE"]
constants.HF_HUB_OFFLINE = False
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

settings = json.loads(sys.argv[2])
push = settings.pop("push")
trainer = helpers.make_trainer(sys.argv[1], **settings)
trainer.train()
if push:
    print("address", trainer.push_to_hub(**push))
pulled = AutoModelForSequenceClassification.from_pretrained("tester/tiny-student")
AutoTokenizer.from_pretrained("tester/tiny-student")
mine = trainer.student.state_dict()
assert all(torch.equal(mine[name], tensor) for name, tensor in pulled.state_dict().items())
assert pulled.config.id2label == trainer.student.config.id2label
print("pulled the same")
"""


def train(hub: HubServer, folder: Path, push: dict | None = None, **settings) -> subprocess.CompletedProcess:
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": TOKEN,
        "HF_HOME": str(folder.parent / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
    }
    settings = json.dumps(SETTINGS | {"push": push} | settings)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder), settings],
        capture_output=True,
        text=True,
        env=environment,
        cwd=Path(__file__).parent.parent,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "pulled the same" in done.stdout
    return done


def assert_nothing_private(hub: HubServer, folder: Path) -> None:
    everything = hub.all_bytes
    assert b"tiny-student" in everything
    assert TOKEN.encode() not in everything
    assert str(folder.parent).encode() not in everything


@pytest.mark.slow
def test_the_pushed_student_is_pulled_again_and_nothing_else_is_sent(tmp_path):
    with HubServer(token=TOKEN) as hub:
        done = train(hub, tmp_path / "out", push={"license": "mit", "language": "en", "dataset": "stanfordnlp/imdb"})
    assert f"address {hub.url}/{REPO}/commit/" in done.stdout
    assert hub.private == {REPO: True}  # although nothing was said of it
    assert set(hub.files[REPO]) == STUDENT
    assert_nothing_private(hub, tmp_path / "out")
    card = ModelCard(hub.files[REPO]["README.md"].decode())
    data = card.data.to_dict()
    assert (data["license"], data["language"], data["datasets"]) == ("mit", ["en"], ["stanfordnlp/imdb"])
    assert "model-index" not in data
    assert "0.3·ce + 0.7·kl(T=2) + 0.5·hidden(" in card.text
    assert "There is no report" in card.text
    assert "distilled from a bert classifier" in card.text
    assert "distilled from a bert classifier" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


def test_what_an_earlier_student_left_is_removed_by_a_trainer_too(hub, make_trainer):
    """Beside full weights, the config of an adapter would have its base loaded."""
    kept = {"notes.md": b"", "last-checkpoint/adapter_config.json": b"{}"}
    hub.private[REPO], hub.files[REPO] = True, {"adapter_config.json": b"{}", "report.md": b"", **kept}
    make_trainer(hub_model_id=REPO, hub_token=TOKEN).push_to_hub()
    assert set(hub.files[REPO]) == STUDENT | set(kept)
    assert hub.commits[0]["deleted"] == ["adapter_config.json", "report.md"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "more"),
    [("every_save", ""), ("checkpoint", "last-checkpoint/"), ("all_checkpoints", "checkpoint-2/")],
)
def test_checkpoints_are_pushed_while_training_as_the_student_alone(tmp_path, strategy, more):
    with HubServer(token=TOKEN) as hub:
        train(
            hub,
            tmp_path / "out",
            push_to_hub=True,
            hub_strategy=strategy,
            hub_token=TOKEN,
            hub_always_push=True,
            hub_private_repo=False,
            save_total_limit=1,
        )
    assert hub.private == {REPO: False}
    sent = set(hub.files[REPO])
    checkpoint = {more + name for name in STUDENT - {"README.md"}} if more else set()
    earlier = {name.replace("-2/", "-1/") for name in checkpoint} if strategy == "all_checkpoints" else set()
    assert sent == STUDENT | checkpoint | earlier
    assert [commit["summary"] for commit in hub.commits] == [
        "Training in progress, step 1",
        "Training in progress, step 2",
    ]
    assert_nothing_private(hub, tmp_path / "out")
    assert not [path.name for path in (tmp_path / "out").iterdir() if path.name.startswith(".push-")]
    assert not list((tmp_path / "out").rglob("README.md"))


@pytest.mark.slow
def test_a_push_that_fails_in_the_background_is_told_and_training_goes_on(tmp_path):
    with HubServer(token=TOKEN) as hub:
        hub.fail("/commit/", 403)
        done = train(hub, tmp_path / "out", push_to_hub=True, hub_strategy="every_save", hub_always_push=True)
    assert "a checkpoint was not pushed: " in done.stderr
    assert "403" in done.stderr
    assert len(hub.commits) == 1
    assert TOKEN not in done.stderr + done.stdout
