"""A hub on 127.0.0.1 that serves one dataset, a folder, as the ``datasets`` library asks for it."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class _Hub(ThreadingHTTPServer):
    def __init__(self, name: str, folder: Path):
        super().__init__(("127.0.0.1", 0), _Requests)
        self.name, self.folder = name, folder


@contextmanager
def serving(name: str, folder: Path) -> Iterator[str]:
    """The address of a hub that has the dataset ``name`` (``org/name``) only."""
    with _Hub(name, folder) as hub:
        thread = threading.Thread(target=hub.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{hub.server_port}"
        finally:
            hub.shutdown()
            thread.join()


class _Requests(BaseHTTPRequestHandler):
    server: _Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path, hub = self.path.split("?")[0], self.server
        api, files = f"/api/datasets/{hub.name}", f"/datasets/{hub.name}/resolve/"
        if path.startswith(files):
            return self._file(path.removeprefix(files).split("/", 1)[1])
        if not path.startswith(api):
            return self._send(404, code="RepoNotFound")
        kind = path.removeprefix(api).strip("/").split("/")[0]
        names = [file.name for file in sorted(hub.folder.iterdir())]
        if kind == "tree":
            return self._send(200, json.dumps([self._entry(name) for name in names]).encode())
        siblings = [{"rfilename": name} for name in names]
        described = {"id": hub.name, "sha": COMMIT, "siblings": siblings, "tags": [], "private": False, "gated": False}
        return self._send(200, json.dumps(described | {"disabled": False, "downloads": 0, "likes": 0}).encode())

    def _entry(self, name: str) -> dict[str, object]:
        body = (self.server.folder / name).read_bytes()
        return {"type": "file", "path": name, "size": len(body), "oid": hashlib.sha1(body).hexdigest()}

    def _file(self, name: str) -> None:
        if not (self.server.folder / name).is_file():
            return self._send(404, code="EntryNotFound")
        body, status, more = (self.server.folder / name).read_bytes(), 200, {}
        if found := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(found[1]), int(found[2] or len(body) - 1)
            more = {"Content-Range": f"bytes {start}-{min(end, len(body) - 1)}/{len(body)}"}
            body, status = body[start : end + 1], 206
        return self._send(status, body, ETag=f'"{hashlib.sha256(body).hexdigest()}"', **more)

    def _send(self, status: int, body: bytes = b"{}", code: str = "", **headers: str) -> None:
        self.send_response(status)
        for key, value in {"X-Repo-Commit": COMMIT, "X-Error-Code": code, **headers}.items():
            if value:
                self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass
