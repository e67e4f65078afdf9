"""A judge behind any OpenAI-compatible server. A cache keeps every answer, so scoring can be repeated."""

import base64
import hashlib
import io
import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import httpx
from PIL import Image
from tenacity import Retrying, retry_if_result, stop_after_attempt, wait_exponential

from wemmu.config.benchmarks import ServerOptions
from wemmu.evaluation.benchmark import BenchmarkError
from wemmu.jsonlines import append_line, read_lines

T = TypeVar("T")
# Answers of a server that another attempt may get past; others are the user's to fix.
TRANSIENT = (408, 409, 425, 429, 500, 502, 503, 504)
# So many questions in a row without any answer: the server is gone.
GONE = 8
# Longest answer that is kept, characters; a verdict is a few lines.
LONGEST = 20_000


class Answer(NamedTuple):
    """model: the name the server gave."""

    text: str
    model: str


class ServerJudge:
    """Asks a server; earlier answers come from `cache`, a JSONL file.

    The key comes from the environment variable `options.key_env` and is written nowhere.
    """

    def __init__(self, options: ServerOptions, cache: Path, sleep: Callable[[float], None] = time.sleep):
        self.options, self._file, self._sleep, self._lock = options, cache, sleep, threading.Lock()
        lines = (line for line in read_lines(cache) if {"ask", "answer"} <= line.keys())
        self._cache = {line["ask"]: Answer(line["answer"], line.get("model", "")) for line in lines}
        # What went wrong last; questions without any answer since the last one.
        self._trouble, self._silent, self.understood = "", 0, False
        self.models = {answer.model for answer in self._cache.values() if answer.model}
        key = os.environ.get(options.key_env)
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}

    def identity(self) -> dict[str, Any]:
        """Return the judge for the card: the asked model and the names that the server gave it."""
        return {"model": self.options.model, "served": sorted(self.models), "temperature": 0}

    def ask(
        self, text: str, images: Sequence[Image.Image], understood: Callable[[str], T | None], system: str = ""
    ) -> T | None:
        """Return what `understood` makes of the answer to a text and images; None if no attempt gave such an answer.

        Only an answer that is understood is kept. system: a message before the text.

        Raises:
            BenchmarkError: if the server refuses the request itself, such as for a wrong key, or answers no longer.
        """
        body = self._body(text, images, system)
        name = hashlib.sha256(json.dumps([self.options.url, body], sort_keys=True).encode()).hexdigest()
        if (kept := self._cache.get(name)) and (found := understood(kept.text)) is not None:
            self.understood = True
            return found

        def attempt() -> T | None:
            answer = self._post(body)
            if answer is None:
                return None
            self._silent, found = 0, understood(answer.text)
            if found is None:
                self._trouble = f"it answered {answer.text[-200:]!r}"
            else:
                with self._lock:
                    self._cache[name] = answer
                    self.models.add(answer.model)
                    append_line(self._file, {"ask": name, "answer": answer.text, "model": answer.model})
            return found

        found = Retrying(
            retry=retry_if_result(lambda found: found is None),
            stop=stop_after_attempt(self.options.attempts),
            wait=wait_exponential(multiplier=2, max=60),
            sleep=self._sleep,
            retry_error_callback=lambda _: None,
        )(attempt)
        self._silent += found is None
        self.understood |= found is not None
        if self._silent >= GONE:
            raise self.useless(f"has left {GONE} questions in a row without an answer")
        return found

    def useless(self, words: str) -> BenchmarkError:
        """Return the error of a judge that says nothing."""
        return BenchmarkError(
            f"the judge {self.options.model} at {self.options.url} {words}; at last {self._trouble}. Images and "
            "answers are kept: start or choose a server (judge.url, judge.model), then give the same command"
        )

    def each(self, work: Callable[[Any], T], items: Iterable[Any]) -> Iterator[T]:
        """Yield work(item) in order, several at a time, without reading far ahead."""
        with ThreadPoolExecutor(self.options.concurrent) as pool:
            waiting = []
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) >= 2 * self.options.concurrent:
                    yield waiting.pop(0).result()
            for future in waiting:
                yield future.result()

    def _body(self, text: str, images: Sequence[Image.Image], system: str) -> dict[str, Any]:
        content: list[dict[str, Any]] = [{"type": "text", "text": text}]
        content += [{"type": "image_url", "image_url": {"url": _data_url(image)}} for image in images]
        before = [{"role": "system", "content": system}] if system else []
        return {
            "model": self.options.model,
            "messages": [*before, {"role": "user", "content": content}],
            "temperature": 0,
            "max_tokens": self.options.max_tokens,
        }

    def _post(self, body: dict[str, Any]) -> Answer | None:
        """Return the server's answer; None for a failure that another attempt may get past."""
        url = f"{self.options.url.rstrip('/')}/chat/completions"
        try:
            reply = httpx.post(url, json=body, headers=self._headers, timeout=self.options.timeout_s)
        except httpx.TransportError as error:
            self._trouble = f"{type(error).__name__}: {error}"
            return None
        if reply.status_code in TRANSIENT:
            self._trouble = f"status {reply.status_code}: {reply.text[:200]}"
            return None
        if reply.status_code != 200:
            hint = f"; the key comes from the environment variable {self.options.key_env}"
            raise BenchmarkError(
                f"the judge at {self.options.url} refuses with status {reply.status_code}: {reply.text[:200]}"
                + (hint if reply.status_code in (401, 403) else "")
            )
        try:
            content = reply.json()
            text, model = content["choices"][0]["message"]["content"], content.get("model", "")
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            text = None
        if isinstance(text, str) and text.strip():
            return Answer(text[:LONGEST], str(model))
        self._trouble = f"no text of a chat completion: {reply.text[:200]!r}"
        return None


def _data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
