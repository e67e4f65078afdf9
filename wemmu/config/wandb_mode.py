"""Decides whether a run uploads to Weights & Biases. Looks for a key, never reads its value."""

import netrc
import os
from pathlib import Path
from typing import Literal, NamedTuple
from urllib.parse import urlparse

from wemmu.config.schema import Logging

_HOST = "https://api.wandb.ai"
_VARIABLE = "WANDB_MODE"


class Mode(NamedTuple):
    """online: upload during training. offline: `tools/wandb_sync.py` uploads later. reason: in words."""

    name: Literal["online", "offline", "disabled"]
    reason: str


def wandb_mode(logging: Logging) -> Mode:
    """Return the mode for `logging.wandb`; `auto` is WANDB_MODE, else online if there is a key, else offline.

    Never raises: nothing about W&B stops a run. A problem is the reason for being offline.
    """
    if logging.wandb != "auto":
        return Mode(logging.wandb, "logging.wandb says so")
    match os.environ.get(_VARIABLE):
        case "online" | "offline" | "disabled" as name:
            return Mode(name, f"{_VARIABLE} says so")
        case None | "":
            pass
        case other:
            return Mode("offline", f"{_VARIABLE} is {other!r}, not one of online, offline, disabled")
    key, reason = find_key()
    return Mode("online" if key else "offline", reason)


def find_key() -> tuple[str | None, str]:
    """Return where a key is (`WANDB_API_KEY` or the name of a netrc file) or None, and the same in words."""
    key, reason = "WANDB_API_KEY" if os.environ.get("WANDB_API_KEY") else None, "no key found"
    host = urlparse(os.environ.get("WANDB_BASE_URL", _HOST)).hostname
    named = os.environ.get("NETRC")
    try:
        for file in [Path(named)] if named else [Path.home() / ".netrc", Path.home() / "_netrc"]:
            if key is None and file.is_file() and host in netrc.netrc(file).hosts:
                key = file.name
    # The error's message may quote the line with the key.
    except (netrc.NetrcParseError, UnicodeDecodeError):
        reason = "the netrc file cannot be parsed"
    except OSError as error:
        reason = f"the netrc file cannot be read ({error.strerror}: {error.filename})"
    except RuntimeError:
        reason = "this user has no home directory for a netrc file"
    return key, f"key in {key}" if key else reason
