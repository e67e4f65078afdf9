import threading
from collections.abc import Iterator

import pytest

from tests.evaluation.servers import Server


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as one:
        threading.Thread(target=one.serve_forever, args=(0.02,), daemon=True).start()
        yield one
        one.shutdown()
