"""A W&B server on the loopback interface: as much of it as the real `wandb` needs to believe in it."""

import gzip
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

KEY = "0123456789" * 4


@dataclass
class Run:
    """What the server was told of one run. history: the lines, as the file stream placed them."""

    name: str = ""
    group: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    exit_code: int | None = None

    def take(self, stream: dict[str, Any]) -> None:
        part = stream.get("files", {}).get("wandb-history.jsonl")
        if part:
            self.history[part["offset"] : part["offset"] + len(part["content"])] = map(json.loads, part["content"])
        self.exit_code = stream.get("exitcode", self.exit_code)


class _Quiet(ThreadingHTTPServer):
    def handle_error(self, *_: object) -> None:
        """Clients are killed here; what this server does wrong itself, its tests see in `runs`."""


class Server:
    """`runs` by id; `environment`: with what a process finds this server. `writes`: requests that changed a run.

    `answers` is an event: while it is not set, every request waits.
    """

    def __init__(self) -> None:
        self.runs: dict[str, Run] = {}
        self.writes = 0
        self.answers = threading.Event()
        self.answers.set()
        self._http = _Quiet(("127.0.0.1", 0), _handler(self))
        self.environment = {
            "WANDB_BASE_URL": f"http://127.0.0.1:{self._http.server_port}",
            "WANDB_API_KEY": KEY,
            "WANDB_MODE": "online",
            "WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL": "1",
            "no_proxy": "127.0.0.1",
        }

    def __enter__(self) -> Self:
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.answers.set()
        self._http.shutdown()
        self._http.server_close()

    def graphql(self, operation: str, variables: dict[str, Any]) -> dict[str, Any]:
        match operation:
            case "RunResumeStatus":
                bucket = self._resumed(variables["name"])
                return {"model": {"id": "p", "name": "p", "entity": _ENTITY, "bucket": bucket}}
            case "UpsertBucket":
                self.writes += 1
                return {"upsertBucket": self._upserted(variables)}
            case "CreateRunFiles":
                files = [
                    {"name": name, "uploadUrl": f"{self.environment['WANDB_BASE_URL']}/put/{variables['run']}/{name}"}
                    for name in variables["files"]
                ]
                return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}
        return {}

    def _resumed(self, name: str) -> dict[str, Any] | None:
        run = self.runs.get(name)
        if run is None:
            return None
        tail = [json.dumps(line) for line in run.history[-1:]]
        return {
            "id": name,
            "name": name,
            "displayName": run.name,
            "summaryMetrics": "{}",
            "logLineCount": 0,
            "eventsLineCount": 0,
            "historyLineCount": len(run.history),
            "historyTail": json.dumps(tail),
            "eventsTail": "[]",
            "config": json.dumps(run.config),
            "tags": [],
            "notes": "",
            "wandbConfig": '{"t": 1}',
        }

    def _upserted(self, said: dict[str, Any]) -> dict[str, Any]:
        inserted = said["name"] not in self.runs
        run = self.runs.setdefault(said["name"], Run())
        run.name, run.group = said["displayName"] or run.name, said["groupName"] or run.group
        run.config |= json.loads(said["config"] or "{}")
        bucket = {
            "id": said["name"],
            "name": said["name"],
            "displayName": run.name,
            "description": "",
            "config": json.dumps(run.config),
            "sweepName": None,
            "project": {"id": "p", "name": said["project"], "entity": _ENTITY},
            "historyLineCount": len(run.history),
        }
        return {"bucket": bucket, "inserted": inserted}


_ENTITY = {"id": "e", "name": "somebody"}


def _handler(server: Server) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            if self.headers.get("content-encoding") == "gzip":
                body = gzip.decompress(body)
            server.answers.wait()
            answer: dict[str, Any] = {}
            if self.path == "/graphql":
                asked = json.loads(body)
                answer = {"data": server.graphql(asked.get("operationName", ""), asked.get("variables") or {})}
            elif self.path.endswith("/file_stream"):
                server.writes += 1
                server.runs[self.path.split("/")[-2]].take(json.loads(body))
            elif self.path.startswith("/put/"):
                _, _, run, name = self.path.split("/", 3)
                server.runs[run].files[name] = body
            sent = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(sent)))
            self.end_headers()
            self.wfile.write(sent)

        do_GET = do_POST = do_PUT = _answer

        def log_message(self, *_: object) -> None:
            """Silence."""

    return Handler
