"""A stand-in of the Hugging Face hub on this machine: as much of its API as publishing and fetching a model needs.

It keeps repositories in memory.
"""

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "a" * 40


class StandInHub(ThreadingHTTPServer):
    """Has `files`, {repository: {path: content}}, and `private`, whether each was to be private."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: list[bool] = []
        self.address = f"http://127.0.0.1:{self.server_port}"

    @contextlib.contextmanager
    def running(self) -> Iterator["StandInHub"]:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        try:
            yield self
        finally:
            self.shutdown()
            self.server_close()


class Handler(BaseHTTPRequestHandler):
    server: StandInHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, body: Any, status: int = 200, **headers: str) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        whole = b""
        while size := int(self.rfile.readline(), 16):
            whole += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return whole

    def do_POST(self) -> None:
        body, path = self.body(), self.path.partition("?")[0]
        name = "/".join(path.split("/")[3:5])
        if self.headers.get("Authorization") != "Bearer hf_right":
            self.answer({"error": "Invalid username or password."}, 401)
        elif path == "/api/repos/create":
            said = json.loads(body)
            name = f"{said['organization']}/{said['name']}"
            private = said.get("private", said.get("visibility") == "private")  # by release of huggingface_hub
            self.server.private.append(private)
            self.server.files.setdefault(name, {})
            self.answer({"url": f"{self.server.address}/{name}", "name": name, "id": name})
        elif "/preupload/" in path:
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            self.answer({"files": files})
        elif "/commit/" in path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            url = f"{self.server.address}/{name}/commit/{COMMIT}"
            self.answer({"commitUrl": url, "commitOid": COMMIT, "hookOutput": ""})
        else:
            self.answer({"errors": [], "warnings": []})

    def do_GET(self) -> None:
        parts = self.path.partition("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            name = "/".join(parts[2:4])
            files = self.server.files.get(name)
            if files is None:
                self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
            elif parts[4:5] == ["tree"]:
                listing = [{"type": "file", "path": p, "size": len(c), "oid": _digest(c)} for p, c in files.items()]
                self.answer(listing)
            else:
                self.answer({"id": name, "sha": COMMIT, "private": True, "siblings": [{"rfilename": p} for p in files]})
        elif parts[2:3] == ["resolve"]:
            content = self.server.files.get("/".join(parts[:2]), {}).get("/".join(parts[4:]))
            if content is None:
                self.answer(b"", 404, X_Error_Code="EntryNotFound")
            else:
                self.answer(content, ETag=f'"{_digest(content)}"', X_Repo_Commit=COMMIT)
        else:
            self.answer({"error": "not here"}, 404)

    do_HEAD = do_GET


def _digest(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
