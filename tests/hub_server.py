"""A loopback server that speaks as much of the Hub's protocol as pushes and pulls of a model need.

Repositories, branches, regular and LFS files, tokens and their rights; and, on demand, every way to fail.
"""

from __future__ import annotations

import base64
import hashlib
import json
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse

import yaml

TOKEN = "hf_" + "Zq9" * 12
"""Of the tests: it must turn up nowhere."""
COMMIT = "0123456789abcdef0123456789abcdef01234567"
LFS_SUFFIXES = (".safetensors", ".onnx", ".bin", ".pt")


def commit_of(revision: str) -> str:
    """Hash of a branch's last commit: its own, as clients ask for files by the hash that a name was resolved to."""
    return COMMIT if revision in ("main", COMMIT) else hashlib.sha1(revision.encode()).hexdigest()


@dataclass
class Failure:
    """Answers to requests whose line contains `where`: a status, or "drop" (no answer), "late" (done, no answer)."""

    where: str
    kind: int | str
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)


class HubServer:
    """Keeps repositories in memory: `files[repo][path]` is what was committed last, `repo@branch` of other branches.

    Use it as a context manager; `url` is what the client takes as its endpoint.

    Args:
        token: the only one that is accepted; None: any.
    """

    def __init__(self, token: str | None = None) -> None:
        self.token = token
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.blobs: dict[str, bytes] = {}
        self.commits: list[dict] = []
        self.calls: list[str] = []
        self.received: list[bytes] = []
        self.failures: list[Failure] = []
        hub = self

        class Handler(_Handler):
            server_state = hub

        self._server = _Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def fail(self, where: str, kind: int | str, times: int = 1, **headers: str) -> None:
        self.failures.append(Failure(where, kind, times, headers))

    def count(self, part: str) -> int:
        return sum(part in call for call in self.calls)

    @property
    def all_bytes(self) -> bytes:
        """All that came, but for the header of the token; contents that came in base64 also in the clear."""
        decoded = [content for files in self.files.values() for content in files.values()]
        return b"\n".join([*self.received, *decoded, *self.blobs.values()])


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        # A client that hangs up is none: what it would print may come while a later test reads what was printed.
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server_state: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        pass

    def _answer(self, status: int, body: bytes | dict | list, **headers: str) -> None:
        if self._mute:
            # The request was done, but its answer is lost.
            self.close_connection = True
            self.connection.close()
            return
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
            headers.setdefault("Content-Type", "application/json")
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _begin(self) -> tuple[str, bytes] | None:
        """Path and body, noted; None where the request was failed."""
        hub, body = self.server_state, self._body()
        path = unquote(urlparse(self.path).path)
        call = f"{self.command} {path}"
        hub.calls.append(call)
        headers = "\n".join(f"{k}: {v}" for k, v in self.headers.items() if k.lower() != "authorization")
        hub.received.append(f"{call}\n{headers}\n".encode() + body)
        self._mute = False
        for failure in hub.failures:
            if failure.times > 0 and failure.where in call:
                failure.times -= 1
                if failure.kind == "drop":
                    self.close_connection = True
                    self.connection.close()
                    return None
                if failure.kind != "late":
                    self._answer(int(failure.kind), {"error": "failed on demand"}, **failure.headers)
                    return None
                self._mute = True
        return path, body

    @property
    def _is_known(self) -> bool:
        given = self.headers.get("Authorization", "")
        token = self.server_state.token
        return given.startswith("Bearer ") if token is None else given == f"Bearer {token}"

    def do_PUT(self) -> None:
        hub = self.server_state
        if (begun := self._begin()) is None:
            return
        path, body = begun
        oid = path.rpartition("/")[2]
        if hashlib.sha256(body).hexdigest() != oid:
            self._answer(400, {"error": "other content than announced"})
        else:
            hub.blobs[oid] = body
            self._answer(200, {}, ETag=f'"{oid}"')

    def do_POST(self) -> None:
        hub = self.server_state
        if (begun := self._begin()) is None:
            return
        path, body = begun
        if not self._is_known:
            self._answer(401, {"error": "Invalid user token."})
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif path == "/api/validate-yaml":
            block = json.loads(body)["content"].split("---\n")[1]
            errors = [] if isinstance(yaml.safe_load(block), dict) else [{"message": "no metadata"}]
            self._answer(400 if errors else 200, {"errors": errors, "warnings": []})
        elif path.endswith(".git/info/lfs/objects/batch"):
            self._lfs_batch(json.loads(body))
        elif path == "/lfs/verify":
            there = json.loads(body)["oid"] in hub.blobs
            self._answer(200 if there else 404, {})
        elif path.startswith("/api/models/"):
            repo, kind, revision = self._parts(path)
            if repo not in hub.files:
                self._answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
            elif kind == "branch":
                known = f"{repo}@{revision}" in hub.files
                hub.files.setdefault(f"{repo}@{revision}", dict(hub.files[repo]))
                self._answer(409 if known else 200, {"error": "exists"} if known else {})
            elif self._files_of(repo, revision) is None:
                self._answer(404, {"error": "Revision not found"}, X_Error_Code="RevisionNotFound")
            elif kind == "preupload":
                self._preupload(self._files_of(repo, revision), json.loads(body)["files"])
            elif kind == "commit":
                self._commit(repo, revision, body)
        else:
            self._answer(404, {"error": f"no POST {path}"})

    def _parts(self, path: str) -> tuple[str, str, str]:
        owner, name, *rest = path.removeprefix("/api/models/").split("/", 3)
        return f"{owner}/{name}", (rest or [""])[0], (rest[1] if len(rest) > 1 else "main")

    def _files_of(self, repo: str, revision: str) -> dict[str, bytes] | None:
        files = self.server_state.files
        if revision in ("main", COMMIT):
            return files.get(repo)
        for place in files:
            name, _, branch = place.partition("@")
            if name == repo and branch and revision in (branch, commit_of(branch)):
                return files[place]
        return None

    def _resolved(self, repo: str, revision: str) -> str:
        """The hash of a branch's name; a hash stays as it is."""
        return (
            commit_of(revision) if revision == "main" or f"{repo}@{revision}" in self.server_state.files else revision
        )

    def _create(self, request: dict) -> None:
        hub = self.server_state
        owner = request.get("organization") or "tester"
        repo = f"{owner}/{request['name']}"
        known = repo in hub.files
        if owner != "tester":
            return self._answer(403, {"error": f"You don't have the rights to create a model under {owner}"})
        if not known:
            hub.files[repo] = {}
            hub.private[repo] = request.get("private") is True or request.get("visibility") == "private"
        body = {"url": f"{hub.url}/{repo}", "id": repo, "name": repo}
        self._answer(409 if known else 200, body | ({"error": "You already created this model repo"} if known else {}))

    def _preupload(self, there: dict[str, bytes], files: list[dict]) -> None:
        answers = []
        for file in files:
            mode = "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular"
            content = there.get(file["path"])
            oid = None
            if content is not None:
                header = f"blob {len(content)}\0".encode()
                lfs = mode == "lfs"
                oid = hashlib.sha256(content).hexdigest() if lfs else hashlib.sha1(header + content).hexdigest()
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._answer(200, {"files": answers})

    def _lfs_batch(self, request: dict) -> None:
        hub = self.server_state
        objects = []
        for wanted in request["objects"]:
            actions = {
                "upload": {"href": f"{hub.url}/lfs/{wanted['oid']}"},
                "verify": {"href": f"{hub.url}/lfs/verify"},
            }
            objects.append(wanted if wanted["oid"] in hub.blobs else wanted | {"actions": actions})
        self._answer(200, {"transfer": "basic", "objects": objects}, Content_Type="application/vnd.git-lfs+json")

    def _commit(self, repo: str, revision: str, body: bytes) -> None:
        hub, files = self.server_state, self._files_of(repo, revision)
        entries = [json.loads(line) for line in body.decode().splitlines()]
        new, gone = {}, []
        for entry in entries:
            value = entry["value"]
            if entry["key"] == "file":
                new[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                if value["oid"] not in hub.blobs:
                    return self._answer(400, {"error": "the LFS object was not uploaded"})
                new[value["path"]] = hub.blobs[value["oid"]]
            elif entry["key"] == "deletedFile":
                if value["path"] not in files:
                    return self._answer(404, {"error": "no such file"}, X_Error_Code="EntryNotFound")
                gone.append(value["path"])
        files.update(new)
        for name in gone:
            del files[name]
        hub.commits.append(
            {"repo": repo, "revision": revision, "files": sorted(new), "deleted": sorted(gone)} | entries[0]["value"]
        )
        oid = commit_of(revision)
        address = {"commitOid": oid, "commitUrl": f"{hub.url}/{repo}/commit/{oid}"}
        self._answer(200, {"success": True, **address, "hookOutput": ""})

    def do_GET(self) -> None:
        hub = self.server_state
        if (begun := self._begin()) is None:
            return
        path = begun[0]
        if path == "/api/whoami-v2":
            known = {"name": "tester", "type": "user", "orgs": []}
            self._answer(200, known) if self._is_known else self._answer(401, {"error": "Invalid user token."})
        elif "/resolve/" in path:
            repo, _, rest = path.lstrip("/").partition("/resolve/")
            revision, _, name = rest.partition("/")
            content, commit = (self._files_of(repo, revision) or {}).get(name), self._resolved(repo, revision)
            if content is None or (hub.private.get(repo) and not self._is_known):
                self._answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
            else:
                self._answer(200, content, ETag=f'"{hash(content) & 0xFFFFFFFF:x}"', X_Repo_Commit=commit)
        elif path.startswith("/api/models/") and "xet" not in path:
            repo, kind, revision = self._parts(path)
            revision, _, inside = revision.partition("/") if kind == "tree" else (revision, "", "")
            files = self._files_of(repo, revision)
            if files is None or (hub.private.get(repo) and not self._is_known):
                self._answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
            elif kind == "tree" and inside:
                self._answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound")
            elif kind == "tree":
                tree = [{"type": "file", "path": n, "size": len(c), "oid": COMMIT} for n, c in files.items()]
                self._answer(200, tree)
            else:
                about = {
                    "id": repo,
                    "modelId": repo,
                    "sha": self._resolved(repo, revision),
                    "private": hub.private[repo],
                    "tags": [],
                }
                self._answer(200, about | {"siblings": [{"rfilename": name} for name in files]})
        else:
            self._answer(404, {"error": f"no GET {path}"})

    do_HEAD = do_GET

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline().strip() or b"0", 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))
