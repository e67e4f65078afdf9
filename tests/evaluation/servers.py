"""A server that judges as a test says: slow, failing or lying, too."""

import json
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from wemmu.config.benchmarks import ServerOptions

# (status, body of the answer, seconds to wait) of the n-th question, by its text.
Reply = tuple[int, Any, float]
MODEL = {"model": "gray"}


def says(text: str) -> Reply:
    return 200, {"model": "judge-2026", "choices": [{"message": {"content": text}}]}, 0.0


class Server(ThreadingHTTPServer):
    """Answers as `replies` says; remembers the questions and the headers."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.replies: Callable[[str, int], Reply] = lambda text, number: says("yes")
        self.asked: list[str] = []
        self.headers: list[str | None] = []
        self.systems: list[str] = []
        # Number of images of each question.
        self.images: list[int] = []
        self.lock = threading.Lock()

    def options(self, folder: Path, **changes: Any) -> ServerOptions:
        given = {"url": f"http://127.0.0.1:{self.server_port}/v1", "model": "judge", "cache": folder / "answers.jsonl"}
        return ServerOptions(**given | {"timeout_s": 5, "attempts": 3} | changes)


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        *before, user = body["messages"]
        text = user["content"][0]["text"]
        with self.server.lock:
            self.server.asked.append(text)
            self.server.headers.append(self.headers.get("Authorization"))
            self.server.systems += [message["content"] for message in before]
            self.server.images.append(len(user["content"]) - 1)
            number = self.server.asked.count(text)
        status, answer, seconds = self.server.replies(text, number)
        time.sleep(seconds)
        data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        self.end_headers()
        # The client may have given up.
        with suppress(OSError):
            self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass
