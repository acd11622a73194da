"""The part of the hub's HTTP interface that an upload uses, on this machine."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Hub(ThreadingHTTPServer):
    """Keeps what is uploaded."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.token, self.refuses_commits = "hf_right", False
        self.repositories: dict[str, dict[str, Any]] = {}
        """{name: what it was made with}."""
        self.files: dict[str, bytes] = {}
        """{path: content} of what was committed."""
        self.objects: dict[str, bytes] = {}

    @property
    def address(self) -> str:
        """Where it answers."""
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def hub() -> Iterator[Hub]:
    """Runs a hub."""
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""

    def _answer(self, code: int, content: Any = None) -> None:
        body = json.dumps({} if content is None else content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_GET(self) -> None:
        """What is asked about repositories."""
        if "/revision/" in self.path or self.path.startswith("/api/models/"):
            self._answer(200, {"id": "x", "sha": "0" * 40, "siblings": [], "private": True})
        else:
            self._answer(404, {"error": "unknown"})

    def do_PUT(self) -> None:
        """A large file."""
        self.server.objects[self.path.rpartition("/")[2]] = self._body()
        self._answer(200)

    def do_POST(self) -> None:
        """Repositories, uploads and commits."""
        body = self._body()
        if not self.path.startswith("/objects/") and self.headers.get("Authorization") != f"Bearer {self.server.token}":
            self._answer(401, {"error": "Invalid username or password."})
        elif self.path == "/api/repos/create":
            given = json.loads(body)
            name = f"{given.get('organization')}/{given['name']}"
            self.server.repositories[name] = given
            self._answer(200, {"url": f"{self.server.address}/{name}", "name": name, "id": name})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            large = {one["path"]: one["path"].endswith((".safetensors", ".gguf")) for one in files}
            modes = [{"path": path, "uploadMode": "lfs" if lfs else "regular"} for path, lfs in large.items()]
            self._answer(200, {"files": [{**mode, "shouldIgnore": False, "oid": None} for mode in modes]})
        elif self.path.endswith("/info/lfs/objects/batch"):
            made = []
            for one in json.loads(body)["objects"]:
                upload = {"href": f"{self.server.address}/objects/{one['oid']}"}
                made.append({"oid": one["oid"], "size": one["size"], "actions": {"upload": upload}})
            self._answer(200, {"transfer": "basic", "objects": made})
        elif "/commit/" in self.path:
            self._commit(body)
        else:
            self._answer(200)

    def _commit(self, body: bytes) -> None:
        if self.server.refuses_commits:
            self._answer(403, {"error": "You may not write here."})
            return
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                self.server.files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                content = self.server.objects[value["oid"]]
                assert hashlib.sha256(content).hexdigest() == value["oid"]
                self.server.files[value["path"]] = content
        name = "/".join(self.path.split("/")[3:5])
        commit = {"commitUrl": f"{self.server.address}/{name}/commit/1", "commitOid": "1" * 40, "pullRequestUrl": None}
        self._answer(200, {**commit, "success": True})
