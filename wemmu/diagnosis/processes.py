"""Checks whether the ranks of a run can connect on this machine."""

import re
import sys
import time

from wemmu.diagnosis.commands import answer
from wemmu.diagnosis.findings import Call, Finding, short

# The ranks time out after 60 s; the rest is for importing torch on a loaded machine.
TIMEOUT_S = 180.0
_REMEDIES = {
    "gloo": "does the host's name resolve to an address of this machine? else name an interface that is up in "
    "GLOO_SOCKET_IFNAME (here: lo), and look for a firewall on 127.0.0.1",
    "nccl": "run `NCCL_DEBUG=INFO python -m wemmu.diagnosis.loopback nccl`; NCCL_SOCKET_IFNAME names the interface, "
    "NCCL_P2P_DISABLE=1 leaves out direct copies between GPUs",
}


def calls() -> list[Call]:
    import torch

    backends = ["gloo"] + ["nccl"] * (torch.cuda.device_count() >= 2)
    return [(process_group, backend) for backend in backends]


def process_group(backend: str, timeout_s: float = TIMEOUT_S) -> Finding:
    """Spawn two processes that connect on 127.0.0.1 and all-reduce; the time includes two imports of torch."""
    name = f"two ranks by {backend}"
    started = time.monotonic()
    try:
        code, output = answer([sys.executable, "-m", "wemmu.diagnosis.loopback", backend], timeout_s)
    except TimeoutError:
        return Finding(
            name, "problem", f"no sum on 127.0.0.1 within {timeout_s:g} s, imports included", _REMEDIES[backend]
        )
    took = time.monotonic() - started
    if code:
        # The last line that names an error; what follows are notes of libraries.
        errors = re.findall(r"^\S*(?:Error|Exception)\b.*$", output, re.MULTILINE)
        reason = errors[-1] if errors else output
        return Finding(name, "problem", f"ended with code {code}: {short(reason)}", _REMEDIES[backend])
    return Finding(name, "ok", f"spawned, met on 127.0.0.1 and summed in {took:.1f} s")
