"""Whether a run shows itself in Weights & Biases as it goes. A key is looked for, never read out."""

import netrc
import os
from pathlib import Path
from typing import Literal, NamedTuple
from urllib.parse import urlparse

from wemmu.config.schema import Logging

_HOST = "https://api.wandb.ai"
_VARIABLE = "WANDB_MODE"


class Mode(NamedTuple):
    """online: uploaded while training goes on. offline: not before `tools/wandb_sync.py` does it. reason: in words."""

    name: Literal["online", "offline", "disabled"]
    reason: str


class NoKeyError(ValueError):
    """Where a key would be cannot be read; the message is the reason, as part of a sentence."""


def wandb_mode(logging: Logging) -> Mode:
    """What `logging.wandb` means here: `auto` is WANDB_MODE, else online where there is a key, else offline.

    It has no errors: nothing about W&B stops a run. What is wrong is the reason for being offline.
    """
    if logging.wandb != "auto":
        return Mode(logging.wandb, "logging.wandb says so")
    match os.environ.get(_VARIABLE):
        case "online" | "offline" | "disabled" as name:
            return Mode(name, f"{_VARIABLE} says so")
        case None | "":
            pass
        case other:
            return Mode("offline", f"{_VARIABLE} is {other!r}, which is none of online, offline, disabled")
    try:
        place = key_place()
    except NoKeyError as error:
        return Mode("offline", str(error))
    return Mode("online", f"there is a key in {place}") if place else Mode("offline", "there is no key")


def key_place() -> str | None:
    """Where a key is: `WANDB_API_KEY`, the name of a netrc file, or None.

    Raises:
        NoKeyError: if it cannot be told whether there is one.
    """
    if os.environ.get("WANDB_API_KEY"):
        return "WANDB_API_KEY"
    host = urlparse(os.environ.get("WANDB_BASE_URL", _HOST)).hostname
    named = os.environ.get("NETRC")
    try:
        for file in [Path(named)] if named else [Path.home() / ".netrc", Path.home() / "_netrc"]:
            if file.is_file() and host in netrc.netrc(file).hosts:
                return file.name
    # Its message may quote the line, and with it the key.
    except (netrc.NetrcParseError, UnicodeDecodeError):
        raise NoKeyError("the netrc file cannot be parsed") from None
    except OSError as error:
        raise NoKeyError(f"the netrc file cannot be read ({error.strerror}: {error.filename})") from error
    except RuntimeError as error:
        raise NoKeyError("this user has no home directory, where the netrc file would be") from error
    return None
