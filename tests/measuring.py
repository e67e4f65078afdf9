"""Measure models in forks of a server that has imported the heavy libraries, not in a new process each time."""

import os
from collections.abc import Iterator
from typing import Any

import torch

from tests.parallel.ranks import SERVER
from wemmu.planning.ask import Answer, checked, written


def in_forks(request: dict[str, Any]) -> Iterator[Answer]:
    """The answers that `python -m wemmu.measuring` gives, for `wemmu.planning.ask`."""
    receive, send = SERVER.Pipe(duplex=False)
    process = SERVER.Process(target=_answer_all, args=(send, request), daemon=True)
    process.start()
    send.close()
    try:
        for _ in request["items"]:
            yield checked(receive.recv())
    finally:
        process.kill()
        process.join()


def _answer_all(pipe: Any, request: dict[str, Any]) -> None:
    from wemmu.measuring.__main__ import _answer

    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(1)
    with written(request["configs"]) as folder:
        for item in request["items"]:
            pipe.send(_answer(folder, item))
