"""What must not leave the machine: tokens, local paths, the user's name in them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path, PureWindowsPath
from typing import Any

SECRET_KEYS = re.compile(
    r"^(?:.*(?:hub|hf|auth|access|api|bearer|session|security)_?)?token$|secret|password|api_?key|credential",
    re.IGNORECASE,
)
"""Names of settings whose text is nobody else's business; `pad_token` and its like are another matter."""

# A class may be named `reset_password` or `/people/person`.
_NAMES_OF_CLASSES = ("id2label", "label2id", "label_names")


def _patterns(*parts: tuple[bytes, bytes, bytes]) -> list[re.Pattern[bytes]]:
    """A pattern each of what must not stand before a literal, the literal, and what must follow it.

    The literal stands first and what is before it is looked at afterwards: the literal is then searched for as such,
    where a pattern that starts otherwise is tried at each byte, which takes minutes over weights.
    """
    return [
        re.compile(re.escape(text) + b"(?<!" + before + re.escape(text) + b")" + after) for before, text, after in parts
    ]


# Of the Hub, GitHub and OpenAI: what is found in configs and environments.
_TOKENS = _patterns(
    *((rb"\w", text, rb"[A-Za-z0-9]{16,}") for text in (b"hf_", b"api_org_")),
    *((rb"\w", text, rb"[A-Za-z0-9_-]{20,}") for text in (b"ghp_", b"github_pat_", b"sk-")),
)
_ANY_TOKEN = re.compile(b"|".join(pattern.pattern for pattern in _TOKENS))
_CREDENTIALS = re.compile(r"(?<=://)[^/\s@'\"]+(?=@)")
MASK = "***"
# Of a path in weights: among millions of numbers any three bytes stand somewhere, so that `/ws` says nothing.
_FEWEST_BYTES = 5
_NO_PART = rb"[\w.-]"
_HOMES = [
    *_patterns(*((_NO_PART, text, rb"[\w.-]+/") for text in (b"/home/", b"/Users/"))),
    re.compile(rb":\\(?<=\b[A-Za-z]:\\)\\?Users\\{1,2}[\w.-]"),
]


def masked(text: str) -> str:
    """A text for a log or a message: tokens, the one of this environment too, and credentials in addresses left out.

    Example:
        >>> masked("https://alice:secret@example.org/data")
        'https://***@example.org/data'
    """
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        # Shorter ones would take ordinary words out of messages.
        if len(token := os.environ.get(name, "").strip()) >= 8:
            text = text.replace(token, MASK)
    text = _CREDENTIALS.sub(MASK, text)
    return _ANY_TOKEN.sub(MASK.encode(), text.encode("utf-8", "surrogatepass")).decode("utf-8", "surrogatepass")


def secret_in(value: Any, name: str = "") -> str | None:
    """The dotted name of the first setting that holds a token, a password or credentials; None where there is none.

    Args:
        value: nested plain values.
        name: of the whole.
    """
    if isinstance(value, dict):
        items = [(f"{name}.{key}" if name else str(key), inner) for key, inner in value.items()]
        named = (path for path, inner in items if inner and isinstance(inner, str) and _is_secret_name(path))
        return next(named, None) or next((found for path, inner in items if (found := secret_in(inner, path))), None)
    if isinstance(value, list | tuple):
        return next((found for i, inner in enumerate(value) if (found := secret_in(inner, f"{name}.{i}"))), None)
    return name if isinstance(value, str) and masked(value) != value else None


def _is_secret_name(path: str) -> bool:
    return SECRET_KEYS.search(path.rpartition(".")[2]) is not None


class Private:
    """Knows what is private here.

    Args:
        folders: of the model and its run; they and the home and working directories are not to be named.
        tokens: that are in use.

    Example:
        >>> Private(["/srv/runs/a"], ["hf_abc"]).found_in(b'{"path": "/srv/runs/a/teacher"}')
        'a local path'
    """

    def __init__(self, folders: Iterable[str | Path] = (), tokens: Iterable[str | None] = ()) -> None:
        self.folders = [path for folder in folders for path in _spellings(folder)]
        own = [path for folder in (Path.home(), Path.cwd()) for path in _spellings(folder)]
        named = sorted({path for path in self.folders + own if len(path) > 1}, key=len, reverse=True)
        # The whole of a path's part, so that /root is not found in /roots or in example.org/root.
        self._paths = _patterns(*((_NO_PART, path.encode(), rb"(?![\w.-])") for path in named))
        self._paths_in_weights = [
            p for p, path in zip(self._paths, named, strict=True) if len(path.encode()) >= _FEWEST_BYTES
        ]
        self._tokens = [token.encode() for token in tokens if token]

    def found_in(self, content: Any, weights: bool = False) -> str | None:
        """What private thing is in these bytes (or in this memory map), in words; None where there is nothing.

        Args:
            content: of a file.
            weights: whether most of it are numbers.
        """
        if any(content.find(token) >= 0 for token in self._tokens) or any(p.search(content) for p in _TOKENS):
            return "an access token"
        paths = self._paths_in_weights if weights else self._paths
        if any(pattern.search(content) for pattern in (*paths, *_HOMES)):
            return "a local path"
        return None

    def scrubbed(self, value: Any, prefix: str = "") -> Any:
        """Nested plain values without secrets, and with local paths cut down to what says nothing of this machine.

        Args:
            value: of dicts, lists and scalars.
            prefix: before what is left of a path, to tell it from a name on the Hub.
        """
        if isinstance(value, dict):
            kept = {k: v for k, v in value.items() if not (isinstance(v, str) and SECRET_KEYS.search(str(k)))}
            return {k: v if k in _NAMES_OF_CLASSES else self.scrubbed(v, prefix) for k, v in kept.items()}
        if isinstance(value, list):
            return [self.scrubbed(item, prefix) for item in value]
        return prefix + self.public_name(value) if isinstance(value, str) and is_local_path(value) else value

    def public_name(self, path: str) -> str:
        """A local path as others may see it: from the run's folder on, else its last part alone."""
        for folder in sorted(self.folders, key=len, reverse=True):
            if path.startswith(folder + "/"):
                return path.removeprefix(folder + "/")
        windows = "\\" in path
        last = PureWindowsPath(path).name if windows else Path(path).name
        return last if last not in ("", "..", "~", Path.home().name) and not last.startswith("~") else "local"

    def clean_json(self, content: bytes, drop: Iterable[str] = ()) -> bytes:
        """A JSON object scrubbed, without the keys `drop`; the same bytes where nothing changes.

        Raises:
            ValueError: it is no JSON.
        """
        value = json.loads(content)
        cleaned = self.scrubbed(value)
        if isinstance(cleaned, dict):
            cleaned = {k: v for k, v in cleaned.items() if k not in set(drop)}
        if cleaned == value:
            return content
        return (json.dumps(cleaned, indent=2, ensure_ascii=False) + "\n").encode()


def is_local_path(text: str) -> bool:
    """Whether a text names a place on a machine: absolute, from the home directory, or up from here."""
    if "\n" in text or len(text) < 2:
        return False
    up = text.startswith(("./", "../", "~/", "file:/"))
    return up or (text.startswith("/") and text.count("/") > 1) or bool(re.match(r"[A-Za-z]:[\\/]", text))


def hub_name(text: str | None) -> str | None:
    """The text, where it is the id of something on the Hub: of that form, no file of data, no folder here."""
    if text is None or not re.fullmatch(r"\w[\w.-]*(?:/[\w.-]+)?", text):
        return None
    if "--" in text or ".." in text or re.search(r"\.(?:csv|tsv|jsonl?|parquet|txt)$", text):
        return None
    return None if Path(text).expanduser().exists() else text


def _spellings(folder: str | Path) -> list[str]:
    """A folder as it was given, made absolute, and with its links resolved."""
    path = Path(folder).expanduser()
    return sorted({os.path.abspath(path), os.path.realpath(path)})
