"""A stand-in for the W&B service on loopback: it accepts what wandb's own uploader sends and keeps the history.

Not the real service, but the real client against the least that it insists on: a run is created or found, history
lines arrive with their offset, and a run that exists is described with the number of lines it has.
"""

import contextlib
import gzip
import http.server
import json
import threading
import time
from collections.abc import Iterator
from typing import Any


class Server(http.server.ThreadingHTTPServer):
    """Attributes: `history`, the lines of each run by their offset.

    With `silent_after`, it accepts so many runs and then answers nobody any more.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self, silent_after: int | None = None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.runs_left = silent_after
        self.history: dict[str, dict[int, dict[str, Any]]] = {}

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextlib.contextmanager
def wandb_server(silent_after: int | None = None) -> Iterator[Server]:
    with Server(silent_after) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.end_headers()

    def do_POST(self) -> None:
        if self.server.runs_left == 0:
            time.sleep(600)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        answer: dict[str, Any] = {}
        if self.path.endswith("/graphql"):
            request = json.loads(body)
            answer = {"data": self.graphql(request.get("operationName"), request.get("variables") or {})}
        elif self.path.endswith("/file_stream"):
            self.stream(self.path.split("/")[-2], json.loads(body).get("files") or {})
        self.reply(answer)

    def do_GET(self) -> None:
        self.reply({})

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.reply({})

    def graphql(self, operation: str, variables: dict[str, Any]) -> dict[str, Any]:
        entity = {"id": "e", "name": "entity"}
        if operation == "UpsertBucket":
            name = variables["name"]
            if self.server.runs_left is not None:
                self.server.runs_left -= 1
            new = name not in self.server.history
            self.server.history.setdefault(name, {})
            project = {"id": "p", "name": variables["project"], "entity": entity}
            return {"upsertBucket": {"bucket": {**self.bucket(name), "project": project}, "inserted": new}}
        if operation == "RunResumeStatus":
            known = variables["name"] in self.server.history
            bucket = self.bucket(variables["name"]) if known else None
            return {"model": {"id": "p", "name": variables["project"], "entity": entity, "bucket": bucket}}
        if operation == "CreateRunFiles":
            urls = [{"name": name, "uploadUrl": f"{self.server.address}/put/{name}"} for name in variables["files"]]
            return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": urls}}
        return {}

    def bucket(self, name: str) -> dict[str, Any]:
        lines = self.server.history[name]
        tail = json.dumps([json.dumps(lines[max(lines)])] if lines else [])
        counts = {"historyLineCount": len(lines), "eventsLineCount": 0, "logLineCount": 0}
        texts = {"summaryMetrics": "{}", "config": "{}", "historyTail": tail, "eventsTail": "[]", "description": ""}
        return {"id": f"run-{name}", "name": name, "displayName": name, "tags": [], "notes": "", **counts, **texts}

    def stream(self, run: str, files: dict[str, Any]) -> None:
        for name, chunk in files.items():
            if name == "wandb-history.jsonl":
                lines = [json.loads(line) for line in chunk["content"]]
                self.server.history[run].update(dict(enumerate(lines, chunk["offset"])))

    def reply(self, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""
