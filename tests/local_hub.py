"""A hub on 127.0.0.1 that serves one folder as huggingface_hub asks for it, and keeps a record of what was asked."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REVISIONS = "main", "v1.0", COMMIT


class Hub(ThreadingHTTPServer):
    """``repositories``: id → its folder. ``token``: what "org/private" wants. "org/gated" is for nobody."""

    def __init__(self, repositories: dict[str, Path], token: str = "hf_secret"):
        super().__init__(("127.0.0.1", 0), _Requests)
        self.repositories, self.token = repositories, token
        self.asked: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def files(self) -> set[str]:
        """Names of the files whose contents were asked for."""
        return {path.rsplit("/", 1)[-1] for path in self.asked if path.startswith("GET") and "/resolve/" in path}


@contextmanager
def serving(repositories: dict[str, Path]) -> Iterator[Hub]:
    with Hub(repositories) as hub:
        thread = threading.Thread(target=hub.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()


class _Requests(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = self.path.split("?")[0]
        self.server.asked.append(f"{self.command} {path}")
        parts = path.removeprefix("/api/models/").strip("/").split("/")
        name, rest = "/".join(parts[:2]), parts[2:]
        folder = self.server.repositories.get(name)
        if folder is None:
            return self._send(404, code="RepoNotFound")
        if name == "org/gated":
            return self._send(403, code="GatedRepo")
        if name == "org/private" and self.headers.get("Authorization") != f"Bearer {self.server.token}":
            return self._send(401, code="RepoNotFound")
        if path.startswith("/api/"):
            return self._describe(name, folder, rest)
        if rest[1] not in REVISIONS:
            return self._send(404, code="RevisionNotFound")
        file = folder / "/".join(rest[2:])
        if not file.is_file():
            return self._send(404, code="EntryNotFound")
        body = file.read_bytes()
        return self._send(200, body, ETag=f'"{hashlib.sha256(body).hexdigest()}"')

    def _describe(self, name: str, folder: Path, rest: list[str]) -> None:
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        names = [str(file.relative_to(folder)) for file in files]
        if rest and rest[0] in ("revision", "tree") and rest[1] not in REVISIONS:
            return self._send(404, code="RevisionNotFound")
        if rest and rest[0] == "tree":
            listing = [
                {
                    "type": "file",
                    "path": path,
                    "size": file.stat().st_size,
                    "oid": hashlib.sha1(path.encode()).hexdigest(),
                }
                for path, file in zip(names, files, strict=True)
            ]
            return self._send(200, json.dumps(listing).encode())
        described = {"id": name, "modelId": name, "sha": COMMIT, "siblings": [{"rfilename": path} for path in names]}
        return self._send(200, json.dumps(described).encode())

    def _send(self, status: int, body: bytes = b"{}", code: str = "", **headers: str) -> None:
        self.send_response(status)
        for key, value in {"X-Repo-Commit": COMMIT, "X-Error-Code": code, **headers}.items():
            if value:
                self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass
