"""What counts as private, what an adapter's folder gives, and what stays text in a card."""

from __future__ import annotations

import json
import random
import re
import time
from pathlib import Path

import pytest
from hub_server import TOKEN

from distill_nlp.hub.card import CardFacts, fenced, markdown, model_card
from distill_nlp.hub.files import student_files
from distill_nlp.hub.private import Private, hub_name, is_local_path, masked


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (TOKEN, "an access token"),
        ("my-own-token", "an access token"),
        ("ghp_" + "a1B2" * 9, "an access token"),
        ("sk-" + "a1B2" * 9, "an access token"),
        ("at /srv/runs/a/teacher", "a local path"),
        ('"/srv/runs/a"', "a local path"),
        ("File /home/alice/x.py", "a local path"),
        ("C:\\Users\\alice", "a local path"),
        ("/srv/runs/abc and x/srv/runs/a", None),
        ("https://example.org/home/page", None),
        ("and/or, 3/4, /, //, hf_hub, sk-learn", None),
    ],
)
def test_what_is_private(content, found):
    assert Private(["/srv/runs/a"], ["my-own-token", None]).found_in(content.encode()) == found


# What is private, as one reads it: slow, since none of these begins with a literal.
TOKENS = re.compile(rb"\b(?:hf_|api_org_)[A-Za-z0-9]{16,}|\b(?:ghp_|github_pat_|sk-)[A-Za-z0-9_-]{20,}")
HOMES = re.compile(rb"(?<![\w.-])/(?:home|Users)/[\w.-]+/|\b[A-Za-z]:\\{1,2}Users\\{1,2}[\w.-]+")
OWN = re.compile(rb"(?<![\w.-])(?:/srv/runs/abc|/srv/runs/a|/srv)(?![\w.-])")
PIECES = [
    b"hf_",
    b"api_org_",
    b"ghp_",
    b"github_pat_",
    b"sk-",
    b"a1B2" * 4,
    b"a1B2" * 5,
    b"x" * 15,
    b"_",
    b"-",
    b" ",
    b".",
]
PIECES += [
    b"/home/",
    b"/Users/",
    b"C:",
    b":",
    b"\\",
    b"\\",
    b"Users\\",
    b"Users",
    b"/srv",
    b"/runs/a",
    b"bc",
    b"/",
    b"\xff\x00",
]


@pytest.mark.parametrize("seed", range(4))
def test_private_things_are_found_wherever_they_are_planted(monkeypatch, seed):
    monkeypatch.setattr("distill_nlp.hub.private.Path.home", lambda: Path("/srv"))
    monkeypatch.chdir("/")
    draw, private, seen = random.Random(seed), Private(["/srv/runs/a", "/srv/runs/abc"]), set()
    for _ in range(5000):
        content = b"".join(draw.choices(PIECES, k=draw.randint(1, 6)))
        path = OWN.search(content) or HOMES.search(content)
        wanted = "an access token" if TOKENS.search(content) else "a local path" if path else None
        assert private.found_in(content) == wanted, content
        text = content.decode("latin-1")
        assert masked(text) == TOKENS.sub(b"***", text.encode()).decode()
        seen.add(wanted)
    assert len(seen) == 3


def test_weights_are_looked_through_at_a_speed_that_large_ones_need():
    content = random.Random(0).randbytes(4_000_000)
    private, start = Private(["/srv/runs/a"]), time.process_time()
    assert private.found_in(content) is None
    took = time.process_time() - start
    start = time.process_time()
    TOKENS.search(content)
    assert took < (time.process_time() - start) / 2


def test_the_home_and_the_working_directory_are_private(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path, Path.home()):
        assert Private().found_in(f"in {path}/x".encode()) == "a local path"


def test_a_path_is_cut_down_to_what_says_nothing_of_the_machine(monkeypatch):
    monkeypatch.setenv("HOME", "/home/alice")
    private = Private(["/srv/runs/a"])
    names = ["/srv/runs/a/student/seed-0", "/data/reviews/", "/home/alice", "~/", "D:\\data\\x", "../b/c"]
    assert [private.public_name(name) for name in names] == ["student/seed-0", "reviews", "local", "local", "x", "c"]


def test_names_on_the_hub_and_on_this_machine(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    assert hub_name("stanfordnlp/imdb") == "stanfordnlp/imdb"
    assert [hub_name(name) for name in (None, "data", "/srv/x", "a/b/c", "../x", "a--b", "a b")] == [None] * 7
    assert [hub_name(name) for name in ("reviews.csv", "data/reviews.jsonl", "a/b.parquet")] == [None] * 3
    assert hub_name("microsoft/deberta-v3.txt-base") == "microsoft/deberta-v3.txt-base"
    assert [is_local_path(t) for t in ("/srv/x", "~/x", "file:/x/y", "C:/x", "/", "//", "a/b", "[/INST]")] == [
        *[True] * 4,
        False,
        True,
        False,
        False,
    ]


def test_an_adapter_of_a_local_model_is_refused_and_one_of_the_hub_is_sent(tmp_path):
    (tmp_path / "adapter_model.safetensors").write_bytes(b"weights")
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps({"base_model_name_or_path": "distilbert-base-uncased"}))
    assert [file.name for file in student_files(tmp_path, Private())] == [config.name, "adapter_model.safetensors"]
    for base in (str(tmp_path), "/home/alice/bert"):
        config.write_text(json.dumps({"base_model_name_or_path": base}))
        with pytest.raises(ValueError, match="the adapter belongs to a base model in a local folder"):
            student_files(tmp_path, Private())


@pytest.mark.parametrize("named", ["../secret.safetensors", "model-00002-of-00002.safetensors"])
def test_an_index_names_shards_of_the_folder_only(tmp_path, named):
    (tmp_path / "secret.safetensors").write_bytes(b"x")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": named}}))
    with pytest.raises(ValueError, match="which are not there"):
        student_files(tmp_path, Private())


def test_a_text_stays_text_in_markdown():
    assert markdown("a|b <i>\n# *c* [d](e) `f` $g$ ![h]") == (
        "a\\|b &lt;i&gt; \\# \\*c\\* \\[d\\](e) \\`f\\` \\$g\\$ \\!\\[h\\]"
    )
    assert markdown("- item") == "\\- item"
    assert fenced("a ```` b") == ["`````", "a ```` b", "`````"]


def test_a_card_of_nothing_known_claims_nothing():
    card = model_card(CardFacts("x"))
    assert "There is no report" in card
    assert "model-index" not in card
    assert "license" not in card
    assert "load_state_dict" in model_card(CardFacts("x", loads_by_auto_classes=False))
