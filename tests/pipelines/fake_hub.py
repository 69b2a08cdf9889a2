"""The parts of the Hugging Face Hub that the client calls: repositories in memory behind the real protocol."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Repositories = dict[str, dict[str, bytes]]
"""Files by path, per repository USER/NAME."""


@contextmanager
def fake_hub(token: str) -> Iterator[tuple[str, Repositories]]:
    """Yield the Hub's address and its repositories; writing takes the token."""
    repositories: Repositories = {}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None: ...

        def answer(self, content: Any, status: int = 200, **headers: str) -> None:
            body = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def missing(self) -> None:
            self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.headers.get("Authorization") != f"Bearer {token}":
                self.answer({"error": "Invalid credentials"}, 401)
            elif self.path == "/api/repos/create":
                request = json.loads(body)
                name = f"{request.get('organization') or 'me'}/{request['name']}"
                status = 409 if name in repositories else 200
                repositories.setdefault(name, {})
                self.answer({"url": f"{address}/{name}", "name": name, "error": "exists"}, status)
            elif self.path == "/api/validate-yaml":
                self.answer({"errors": [], "warnings": []})
            elif (match := re.fullmatch(r"/api/models/(.+?/.+?)/preupload/main", self.path)) and match[1] in repositories:
                files = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]]
                self.answer({"files": files})
            elif (match := re.fullmatch(r"/api/models/(.+?/.+?)/commit/main", self.path)) and match[1] in repositories:
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        repositories[match[1]][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                    elif line["key"] == "deletedFile":
                        del repositories[match[1]][line["value"]["path"]]
                self.answer({"commitUrl": f"{address}/{match[1]}/commit/{'0' * 40}", "commitOid": "0" * 40})
            else:
                self.missing()

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            if (match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/main)?", path)) and match[1] in repositories:
                self.answer({"id": match[1], "sha": "0" * 40, "siblings": [{"rfilename": name} for name in repositories[match[1]]]})
            elif (match := re.fullmatch(r"/api/models/(.+?/.+?)/tree/.+?", path)) and match[1] in repositories:
                self.answer([{"type": "file", "path": name, "size": len(data), "oid": ""} for name, data in repositories[match[1]].items()])
            elif (match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path)) and match[2] in repositories.get(match[1], {}):
                data = repositories[match[1]][match[2]]
                self.answer(data, ETag=f'"{hashlib.sha256(data).hexdigest()}"', X_Repo_Commit="0" * 40, Accept_Ranges="bytes")
            else:
                self.missing()

        do_HEAD = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield address, repositories
    finally:
        server.shutdown()
        server.server_close()
