"""Pushing the student with the real Hub client, against a loopback server, and pulling it back."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import HubServer

SCRIPT = """
import sys
sys.path.insert(0, "tests")
import helpers, os
from huggingface_hub import constants
del os.environ["HF_HUB_OFFLINE"]
constants.HF_HUB_OFFLINE = False
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

trainer = helpers.make_trainer(sys.argv[1], max_steps=2, save_strategy="steps", save_steps=1,
                               hub_model_id="tester/tiny-student", hub_private_repo=True)
trainer.train()
trainer.push_to_hub()
pulled = AutoModelForSequenceClassification.from_pretrained("tester/tiny-student")
AutoTokenizer.from_pretrained("tester/tiny-student")
mine = trainer.student.state_dict()
assert all(torch.equal(mine[name], tensor) for name, tensor in pulled.state_dict().items())
assert pulled.config.id2label == trainer.student.config.id2label
print("pulled the same")
"""


@pytest.mark.slow
def test_the_pushed_student_is_pulled_again_and_nothing_else_is_sent(tmp_path):
    with HubServer() as hub:
        environment = {
            **os.environ,
            "HF_ENDPOINT": hub.url,
            "HF_TOKEN": "hf_planted_token",
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "127.0.0.1",
        }
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(tmp_path / "out")],
            capture_output=True,
            text=True,
            env=environment,
            cwd=Path(__file__).parent.parent,
            timeout=180,
        )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "pulled the same" in done.stdout
    assert hub.private == {"tester/tiny-student": True}
    sent = hub.files["tester/tiny-student"]
    assert set(sent) == {"README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert not [
        name for name, content in sent.items() if b"hf_planted_token" in content or str(tmp_path).encode() in content
    ]
