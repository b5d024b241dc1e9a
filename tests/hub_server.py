"""A loopback server that speaks as much of the Hub's protocol as a push and a pull of one model need."""

from __future__ import annotations

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubServer:
    """Keeps repositories in memory: `files[repo][path]` is what was committed last.

    Use it as a context manager; `url` is what the client takes as its endpoint.
    """

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.calls: list[str] = []
        hub = self

        class Handler(_Handler):
            server_state = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    server_state: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        pass

    def _answer(self, status: int, body: bytes | dict | list, **headers: str) -> None:
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

    def do_POST(self) -> None:
        hub = self.server_state
        body = self._body()
        path = unquote(urlparse(self.path).path)
        hub.calls.append(f"POST {path}")
        if not self.headers.get("Authorization", "").startswith("Bearer "):
            self._answer(401, {"error": "Unauthorized"})
        elif path == "/api/repos/create":
            request = json.loads(body)
            repo = f"{request.get('organization') or 'tester'}/{request['name']}"
            hub.files.setdefault(repo, {})
            hub.private[repo] = request.get("private") is True or request.get("visibility") == "private"
            self._answer(200, {"url": f"{hub.url}/{repo}", "id": repo, "name": repo})
        elif path == "/api/validate-yaml":
            self._answer(200, {"errors": [], "warnings": []})
        elif "/preupload/" in path:
            # "regular": the content comes with the commit, whatever its size.
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            self._answer(200, {"files": files})
        elif "/commit/" in path:
            repo = path.removeprefix("/api/models/").rpartition("/commit/")[0]
            for line in body.decode().splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    hub.files[repo][entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            self._answer(
                200,
                {
                    "success": True,
                    "commitOid": COMMIT,
                    "commitUrl": f"{hub.url}/{repo}/commit/{COMMIT}",
                    "hookOutput": "",
                },
            )
        else:
            self._answer(404, {"error": f"no POST {path}"})

    def do_GET(self) -> None:
        hub = self.server_state
        path = unquote(urlparse(self.path).path)
        hub.calls.append(f"{self.command} {path}")
        if path == "/api/whoami-v2":
            self._answer(200, {"name": "tester", "type": "user", "orgs": []})
        elif "/resolve/" in path:
            repo, _, rest = path.lstrip("/").partition("/resolve/")
            content = hub.files.get(repo, {}).get(rest.partition("/")[2])
            if content is None:
                self._answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
            else:
                self._answer(200, content, ETag=f'"{hash(content) & 0xFFFFFFFF:x}"', X_Repo_Commit=COMMIT)
        elif path.startswith("/api/models/"):
            repo = "/".join(path.removeprefix("/api/models/").split("/")[:2])
            if repo not in hub.files:
                self._answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
            else:
                siblings = [{"rfilename": name} for name in hub.files[repo]]
                if "/tree/" in path:
                    self._answer(
                        200,
                        [
                            {"type": "file", "path": name, "size": len(content), "oid": COMMIT}
                            for name, content in hub.files[repo].items()
                        ],
                    )
                else:
                    self._answer(200, {"id": repo, "modelId": repo, "sha": COMMIT, "siblings": siblings, "tags": []})
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
