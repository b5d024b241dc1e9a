"""The arguments of `distill-nlp push`."""

from __future__ import annotations

import argparse
from typing import Any


def add_push(commands: Any) -> argparse.ArgumentParser:
    """Adds the command to the parser's sub-commands; each argument is named as a field of `PushOptions`."""
    push = commands.add_parser(
        "push",
        help="send a finished student with its model card to the Hub",
        description="Sends config, weights, tokenizer and a generated model card in one commit, and nothing else; "
        "what holds a token or a local path is cleaned of it or refused. The token is read from --token-file, "
        "HF_TOKEN, or what `hf auth login` stored.",
        allow_abbrev=False,
    )
    push.add_argument(
        "model", metavar="MODEL", help="folder of a finished student; or of a run: its student with the best validation"
    )
    push.add_argument("--repo-id", dest="repo_id", required=True, metavar="NAME/REPO", help="made where it is missing")
    visible = push.add_mutually_exclusive_group()
    visible.add_argument("--private", action="store_true", default=True, help="only you can see it [default]")
    visible.add_argument("--public", dest="private", action="store_false", help="anyone can see it")
    push.add_argument("--include-report", action="store_true", help="send report.md, report.html, report.json too")
    push.add_argument("--include-onnx", action="store_true", help="send the exports in MODEL/onnx and MODEL-onnx* too")
    push.add_argument("--dry-run", action="store_true", help="list the files and show the card; send nothing")
    push.add_argument("--token-file", metavar="FILE", help="file with the token")
    push.add_argument("--revision", metavar="BRANCH", help="branch, made where it is missing [main]")
    push.add_argument("--message", metavar="TEXT", help="of the commit")
    push.add_argument("--license", metavar="ID", help="for the card, as apache-2.0; none is assumed")
    push.add_argument(
        "--language", dest="languages", action="append", default=[], metavar="CODE", help="for the card, as en"
    )
    push.add_argument("--debug", action="store_true", help="show tracebacks and the libraries' own messages")
    return push
