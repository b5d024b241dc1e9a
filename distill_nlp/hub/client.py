"""One push: repository, branch, commit; tried again where the Hub or the way to it fails for a while."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RevisionNotFoundError
from huggingface_hub.utils import get_session

from distill_nlp.hub.files import HubFile, left_over

TRIES = 4
_PASSING = (408, 429, 500, 502, 503, 504)
# Of whatever the Hub asks for; beyond it, the user had better come again.
_LONGEST_WAIT = 300.0

Say = Callable[[str], None]


def create_repository(api: HfApi, repo_id: str, private: bool, say: Say = lambda line: None) -> tuple[str, bool]:
    """Makes the repository where there is none yet.

    Args:
        api: with endpoint and token.
        repo_id: `name/repository`, or the repository alone under the token's own name.
        private: of a new one; one that is there keeps its visibility.
        say: gets a line for each further try.

    Returns:
        Its full name, and whether only its owners can see it.

    Raises:
        HfHubHTTPError: the Hub refuses, or still fails after all tries.
    """

    def create() -> tuple[str, bool]:
        name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        return name, bool(api.model_info(name).private)

    return with_retries(create, say)


def commit(
    api: HfApi,
    repo_id: str,
    files: Sequence[HubFile],
    message: str,
    revision: str | None = None,
    say: Say = lambda line: None,
) -> str:
    """Sends the files in one commit, so that the repository never holds half of them; gives the commit's address.

    What an earlier push left there and this one does not send is removed by the same commit, see `left_over`. A further
    try sends again only what the Hub has not got yet: it tells that by content.

    Args:
        api: with endpoint and token.
        repo_id: of a repository that is there.
        files: all of the commit.
        message: its first line.
        revision: branch; made where it is missing.
        say: gets a line for each further try, and one on what is removed.

    Raises:
        HfHubHTTPError: the Hub refuses, or still fails after all tries.
    """
    if revision not in (None, "main"):
        with_retries(lambda: api.create_branch(repo_id, branch=revision, exist_ok=True), say)
    removed: set[str] = set()

    def send(streams: bool) -> str:
        # Looked up for each try: the one before may have arrived, and what is gone cannot be removed.
        over = left_over(_names_in(api, repo_id, revision), files)
        removed.update(over)
        with ExitStack() as stack:
            operations = [
                CommitOperationAdd(file.name, stack.enter_context(open(file.content, "rb")))
                if streams and isinstance(file.content, Path)
                else CommitOperationAdd(file.name, file.content)
                for file in files
            ]
            operations += [CommitOperationDelete(name, is_folder=False) for name in over]
            return api.create_commit(repo_id, operations, commit_message=message, revision=revision).commit_url

    def send_by_xet_or_lfs() -> str:
        try:
            return send(streams=False)
        except (HfHubHTTPError, _transport_error(), ValueError):
            raise
        except (RuntimeError, OSError) as error:
            # hf_xet fails in its own ways; streams make the client upload by LFS.
            say(f"upload by xet failed ({_first_line(error)}); trying LFS")
            return send(streams=True)

    address = with_retries(send_by_xet_or_lfs, say)
    if removed:
        say(
            f"removed from {repo_id}, as left by an earlier push and not sent by this one: {', '.join(sorted(removed))}"
        )
    return address


def _names_in(api: HfApi, repo_id: str, revision: str | None) -> list[str]:
    """Of all files of a branch."""
    try:
        return api.list_repo_files(repo_id, revision=revision)
    except (EntryNotFoundError, RevisionNotFoundError):
        # Nothing was ever committed to it; what else is wrong with it, the commit says.
        return []


def with_retries(call: Callable[[], Any], say: Say = lambda line: None) -> Any:
    """What `call` gives; after a failure that may pass it is called again, `TRIES` times in all.

    Waits 1, 2, 4 seconds, or as long as the Hub asks for by `Retry-After`.
    """
    for attempt in count():
        try:
            return call()
        except Exception as error:
            cause = _passing_cause(error)
            wait = max(2.0**attempt, _asked_wait(cause))
            if cause is None or attempt == TRIES - 1 or wait > _LONGEST_WAIT:
                raise
            say(f"the Hub: {_first_line(cause)}; trying again in {wait:g} s")
            time.sleep(wait)


def _passing_cause(error: BaseException | None) -> BaseException | None:
    """The error behind this one that may be gone next time; LFS uploads wrap theirs."""
    while error is not None:
        if isinstance(error, HfHubHTTPError):
            return error if error.response.status_code in _PASSING else None
        if isinstance(error, _transport_error()):
            return error
        error = error.__cause__
    return None


def _asked_wait(error: BaseException | None) -> float:
    asked = error.response.headers.get("Retry-After", "") if isinstance(error, HfHubHTTPError) else ""
    return float(asked) if asked.isdigit() else 0.0


def _transport_error() -> type[Exception]:
    """Of the library that the client speaks through: httpx, or its successor httpx2 in newer versions."""
    return importlib.import_module(type(get_session()).__module__.partition(".")[0]).TransportError


def is_network_error(error: BaseException) -> bool:
    """Whether the Hub was not reached at all."""
    return isinstance(error, _transport_error())


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
