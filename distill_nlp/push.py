"""`distill-nlp push`: a finished student, with its card, to the Hub."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from distill_nlp.errors import DistillError, UsageError
from distill_nlp.hub.card import model_card
from distill_nlp.hub.client import commit, create_repository, is_network_error
from distill_nlp.hub.files import CARD, HubFile, checked, listing, onnx_files, report_files, student_files
from distill_nlp.hub.private import Private
from distill_nlp.loading import checkpoint_print
from distill_nlp.onnx_model import EXPORT_FILE, export_record
from distill_nlp.student_facts import FinishedStudent, find_student, student_facts

Say = Callable[[str], None]
# Which of them are there, only the Hub knows, and a dry run does not ask it.
_REMOVED_TOO = (
    "would remove from there the weights, adapters, reports and ONNX exports of earlier pushes that are not among these"
)


@dataclass
class PushOptions:
    """What `distill-nlp push` was asked for.

    Args:
        model: folder of a finished student, or of a run.
        repo_id: `NAME/REPO`.
        private: visibility of a new repository.
        include_report, include_onnx: send these too.
        dry_run: send nothing.
        token_file: file that holds the token, instead of HF_TOKEN or the stored one.
        revision: branch.
        message: of the commit.
        license, languages: of the card; neither is guessed.
    """

    model: str
    repo_id: str
    private: bool = True
    include_report: bool = False
    include_onnx: bool = False
    dry_run: bool = False
    token_file: str | None = None
    revision: str | None = None
    message: str | None = None
    license: str | None = None
    languages: list[str] = field(default_factory=list)


def push(options: PushOptions, say: Say = lambda line: None) -> str:
    """Collects and looks through the files, then sends them in one commit.

    Args:
        options: what to send, and where.
        say: gets a line on what is done.

    Returns:
        The address of the commit; in a dry run the list of files and the card.

    Raises:
        UsageError: no finished student, an unusable repository id or token, or a file with something private in it.
        DistillError: the student is not as it was written; the Hub was not reached, or failed after several tries.
    """
    check_repo_id(options.repo_id)
    found = find_student(Path(options.model).expanduser())
    if found.note:
        say(found.note)
    token = _token(options)
    try:
        files = _files(options, found, token)
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UsageError(" ".join(str(error).split())) from error
    if any(file.name == "report.html" for file in files):
        say("report.html shows texts of the test rows to everyone who can see the repository")
    if options.dry_run:
        visible = "private" if options.private else "public"
        card = next(file.content for file in files if file.name == CARD)
        sent = [f"would send to {options.repo_id} ({visible}):", *listing(files)]
        return "\n".join([*sent, _REMOVED_TOO, "", card.decode()])
    if token is None:
        raise UsageError("there is no token for the Hub: give --token-file FILE, set HF_TOKEN, or run `hf auth login`")
    with _one_line(options.repo_id, token):
        api = HfApi(token=token)
        name, is_private = create_repository(api, options.repo_id, options.private, say)
        if options.private and not is_private:
            raise UsageError(f"{name} was there already, and is public: give --public if anyone may see the student")
        say(f"{sum(file.size for file in files) / 1e6:.1f} MB in {len(files)} files → {name}")
        return commit(api, name, files, options.message or "Distilled student", options.revision, say)


def check_repo_id(repo_id: str) -> None:
    """Refuses what is no `NAME/REPO`.

    Raises:
        UsageError: with what was given.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UsageError(f"--repo-id: {' '.join(str(error).split())}") from None
    if "/" not in repo_id:
        raise UsageError(f"--repo-id must be NAME/REPO, as alice/tiny-student, got {repo_id!r}")


def _files(options: PushOptions, found: FinishedStudent, token: str | None) -> list[HubFile]:
    folders = [found.folder] + ([found.run] if found.run else [])
    private = Private(folders, [token, os.environ.get("HF_TOKEN"), get_token()])
    files = student_files(found.folder, private)
    if not any(file.name == "config.json" for file in files):
        raise UsageError(f"{found.folder} has no config.json: give the folder of a finished student")
    facts = student_facts(found, private)
    if options.include_report:
        reports = report_files(found.run, private) if found.run else []
        if not reports:
            raise UsageError(f"there is no report beside {found.folder}; leave --include-report, or report first")
        if not facts.comparison:
            raise UsageError(
                f"the report of {found.run} is not on {found.folder} as it is now: "
                f"`distill-nlp report {found.run}` makes it again, or leave --include-report"
            )
        files += reports
    if options.include_onnx:
        for name, folder in _onnx_folders(found.folder).items():
            files += onnx_files(folder, private, name)
    facts.repo_id, facts.name = options.repo_id, options.repo_id.rpartition("/")[2]
    facts.license, facts.languages = options.license, options.languages
    facts.onnx_folders = sorted({f.name.partition("/")[0] for f in files if f.name.endswith(".onnx")})
    return [checked(HubFile(CARD, model_card(facts).encode()), private), *files]


def _onnx_folders(folder: Path) -> dict[str, Path]:
    """Exports inside a student's folder and beside it, `STUDENT-onnx-int8`, by their name in the repository."""
    beside = sorted(folder.absolute().parent.glob(f"{glob.escape(folder.absolute().name)}-onnx*"))
    places = {"onnx": folder / "onnx"} | {path.name.removeprefix(f"{folder.absolute().name}-"): path for path in beside}
    found = {name: path for name, path in places.items() if path.is_dir()}
    if not found:
        raise UsageError(f"there is no ONNX export of {folder}; make one first, or leave --include-onnx")
    own = checkpoint_print(str(folder)) or {}
    for path in found.values():
        if not (path / EXPORT_FILE).is_file():
            raise UsageError(f"{path} has no {EXPORT_FILE}, so it is no export: move it away, or leave --include-onnx")
        if export_record(path, own) is None:
            raise UsageError(f"{path} is an export of other weights than those of {folder}: export again")
    return found


def _token(options: PushOptions) -> str | None:
    if options.token_file is None:
        token = get_token()
    else:
        path = Path(options.token_file).expanduser()
        try:
            token = path.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError):
            raise UsageError(f"--token-file: cannot read {options.token_file}") from None
        if not token:
            raise UsageError(f"--token-file: {options.token_file} is empty")
    # A header with other characters would be refused by an error that shows it.
    if token is not None and not re.fullmatch(r"[!-~]+", token):
        raise UsageError("the token is not one word of plain characters; check the file, or HF_TOKEN")
    return token


@contextmanager
def _one_line(repo_id: str, token: str) -> Iterator[None]:
    """What the Hub or the network says, as one line without the token."""
    try:
        yield
    except DistillError:
        raise
    except OfflineModeIsEnabled:
        raise UsageError("HF_HUB_OFFLINE is set, so nothing can be sent: unset it") from None
    except HfHubHTTPError as error:
        raise _said(error, repo_id, token) from None
    except Exception as error:
        reached = next((cause for cause in _causes(error) if isinstance(cause, HfHubHTTPError)), None)
        if reached is not None:
            raise _said(reached, repo_id, token) from None
        if any(is_network_error(cause) or isinstance(cause, ConnectionError) for cause in _causes(error)):
            raise DistillError(
                f"the Hub at {constants.ENDPOINT} was not reached ({_short(error, token)}); check the network, and "
                "run the command again: what has arrived is not sent twice"
            ) from None
        raise DistillError(f"the push to {repo_id} failed: {_short(error, token)}") from None


def _said(error: HfHubHTTPError, repo_id: str, token: str) -> DistillError:
    status = error.response.status_code
    what = {
        401: "the Hub does not know this token; check it, or make a new one with write access",
        403: f"this token may not write to {repo_id}; it needs write access to {repo_id.partition('/')[0]}",
        404: f"the Hub finds no {repo_id}, or no user or organization {repo_id.partition('/')[0]}",
        409: f"{repo_id} was changed by someone else at the same time; run the command again",
        413: "the Hub finds the files too large",
    }.get(status)
    if what is not None:
        return (DistillError if status == 409 else UsageError)(what)
    return DistillError(f"the Hub failed with status {status} after several tries ({_short(error, token)}); try later")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _short(error: BaseException, token: str) -> str:
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return line.replace(token, "***")
