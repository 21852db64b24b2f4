"""A local endpoint that speaks as much of the W&B protocol as the real client needs, and remembers what it was told.

Standard library only. History is kept the way the real server keeps it: a line has an offset, and a line sent to an
offset that is taken replaces what was there.
"""

from __future__ import annotations

import gzip
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KEY = "0123456789" * 4


class Endpoint(ThreadingHTTPServer):
    """`history[run id]` is {offset: row}; `summary`, `config` by run id; `uploads` {url path: bytes}; `views` as saved.

    Set `hang` to make it accept requests and never answer, as a dying server does.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.history: dict[str, dict[int, dict]] = {}
        self.summary: dict[str, dict] = {}
        self.config: dict[str, dict] = {}
        self.group: dict[str, str] = {}
        self.uploads: dict[str, bytes] = {}
        self.views: list[dict] = []
        self.requests: list[str] = []
        self.hang = threading.Event()

    def handle_error(self, *_) -> None:
        """A client that was killed breaks its connection: that is what the tests are about."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def rows(self, run_id: str) -> list[dict]:
        return [row for _, row in sorted(self.history.get(run_id, {}).items())]


@contextmanager
def running():
    """The endpoint, serving in a thread."""
    server = Endpoint()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.hang.clear()
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Endpoint

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        self.answer({})

    def do_PUT(self) -> None:
        self.server.uploads[self.path] = self.body()
        self.answer({})

    def do_POST(self) -> None:
        body = self.body()
        while self.server.hang.is_set():
            threading.Event().wait(0.1)
        if self.path.startswith("/graphql"):
            request = json.loads(body)
            name = (
                request.get("operationName") or (re.search(r"(?:query|mutation)\s+(\w+)", request["query"]) or "??")[1]
            )
            self.server.requests.append(name)
            self.answer(self.graphql(name, request["query"], request.get("variables") or {}))
        elif self.path.endswith("/file_stream"):
            self.stream(self.path.split("/")[-2], json.loads(body))
            self.answer({"exitcode": None, "limits": {}})
        else:
            self.answer({})

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            data = b""
            while size := int(self.rfile.readline().strip(), 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        return gzip.decompress(data) if self.headers.get("Content-Encoding") == "gzip" else data

    def answer(self, value: dict) -> None:
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def stream(self, run_id: str, body: dict) -> None:
        for name, chunk in (body.get("files") or {}).items():
            if name == "wandb-history.jsonl":
                for i, line in enumerate(chunk["content"]):
                    self.server.history.setdefault(run_id, {})[chunk["offset"] + i] = json.loads(line)
            elif name == "wandb-summary.json":
                self.server.summary[run_id] = json.loads(chunk["content"][-1])

    def resume_state(self, run_id: str) -> dict | None:
        server = self.server
        if run_id not in server.config:
            return None
        rows = server.rows(run_id)
        bucket = {
            "name": run_id,
            "historyLineCount": len(rows),
            "eventsLineCount": 0,
            "logLineCount": 0,
            "historyTail": json.dumps([json.dumps(row) for row in rows[-1:]]),
            "eventsTail": "[]",
            "summaryMetrics": json.dumps(server.summary.get(run_id, {})),
            "config": json.dumps(server.config[run_id]),
            "tags": [],
            "wandbConfig": json.dumps({"t": 1}),
        }
        return {"id": "m1", "name": "p", "bucket": bucket}

    def graphql(self, name: str, query: str, given: dict) -> dict:
        server = self.server
        if name == "UpsertBucket":
            run_id = given.get("name") or given.get("id") or "run"
            inserted = run_id not in server.config
            server.config[run_id] = json.loads(given.get("config") or "null") or server.config.get(run_id, {})
            server.group[run_id] = given.get("groupName") or server.group.get(run_id, "")
            project = {"id": "p1", "name": given.get("project") or "p", "entity": {"id": "e1", "name": "lab"}}
            bucket = {
                "id": f"b_{run_id}",
                "name": run_id,
                "displayName": given.get("displayName") or run_id,
                "description": "",
                "config": given.get("config") or "{}",
                "sweepName": None,
                "project": project,
                "historyLineCount": len(server.history.get(run_id, {})),
            }
            return {"data": {"upsertBucket": {"bucket": bucket, "inserted": inserted}}}
        if name == "ArtifactType":
            return {"data": {"project": {"artifact": None}}}
        if name == "CreateArtifact":
            sequence = {"id": "s1", "latestArtifact": {"id": "art1", "versionIndex": 0}}
            artifact = {"id": "art1", "state": "COMMITTED", "artifactSequence": sequence}
            return {"data": {"createArtifact": {"artifact": artifact}}}
        if name == "UpsertView2":
            server.views.append(given)
            stamp = "2026-01-01T00:00:00"
            view = {
                "id": "v1",
                "name": given.get("name") or "v",
                "displayName": "x",
                "description": "",
                "spec": given.get("spec") or "{}",
                "project": {"id": "p1", "name": "p", "entityName": "lab"},
                "createdAt": stamp,
                "updatedAt": stamp,
                "user": {"id": "u", "username": "me", "name": "me"},
                "entityName": "lab",
                "type": "project-view",
            }
            return {"data": {"upsertView": {"view": view, "inserted": True}}}
        if name == "ProjectInternalId":
            return {"data": {"project": {"id": "cA==", "internalId": "UHJvamVjdEludGVybmFsSWQ6MQ=="}}}
        if "createRunFiles" in query:
            files = [{"name": f, "uploadUrl": f"{server.url}/upload/{f}"} for f in given.get("files", [])]
            return {"data": {"createRunFiles": {"runID": "x", "uploadHeaders": [], "files": files}}}
        if "viewer" in query or "serverInfo" in query:
            viewer = {
                "id": "u1",
                "entity": "lab",
                "username": "me",
                "name": "me",
                "email": "me@example.org",
                "admin": False,
                "flags": "{}",
                "teams": {"edges": []},
                "defaultEntity": {"name": "lab"},
            }
            server_info = {
                "cliVersionInfo": {"max_cli_version": "9.9.9"},
                "latestLocalVersionInfo": None,
                "features": [],
            }
            fields = {"queryFieldsInfo": {"fields": []}, "mutationFieldsInfo": {"fields": []}}
            return {"data": {"viewer": viewer, "serverInfo": server_info, **fields}}
        if "RunResume" in name:
            return {"data": {"model": self.resume_state(given.get("name"))}}
        return {"data": {}}
