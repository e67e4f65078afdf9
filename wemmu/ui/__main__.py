"""Open the page: `wemmu ui EXPORT`."""

import os
import socket
from importlib.util import find_spec
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated

import typer

from wemmu.command_line import UsageError, plainly, program, start
from wemmu.ui.models import Models

LOOPBACK = "127.0.0.1"


@plainly()
def main(
    source: Annotated[
        Path, typer.Argument(metavar="SOURCE", help="An exported model, RUN (its newest finished stage), or RUN/STAGE.")
    ],
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines connect.")] = LOOPBACK,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port; default: the first free one from 7860.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N; default: cuda if there is one.")] = None,
    browser: Annotated[bool, typer.Option(help="Open the page in a browser.")] = False,
) -> None:
    """Start a page in the browser: generate, edit and reconstruct images, and ask a VLM questions."""
    if find_spec("gradio") is None:
        raise UsageError("the page needs Gradio, which is not installed; install it: pip install 'wemmu[ui]'")
    check_address(host, port)
    # Before Gradio is imported: nothing is sent anywhere.
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}
    models = Models.of(source, device)
    from wemmu.ui.page import serve

    models.open(models.newest)
    if not _is_loopback(host):
        typer.echo(f"warning: everybody who reaches {host} can use this page; it asks for no password", err=True)
    serve(models, host, port, browser)


def check_address(host: str, port: int | None) -> None:
    """Raise UsageError if nothing can listen on this address; port None: on any port of the host."""
    try:
        # Gradio takes IPv6 in brackets, too.
        name = host.removeprefix("[").removesuffix("]")
        # The server listens on every address that a name has, or does not start.
        for family, *_, address in socket.getaddrinfo(name, port or 0, type=socket.SOCK_STREAM):
            with socket.socket(family) as listener:
                # As Gradio does: a port that was just closed is free.
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.bind(address)
    except OSError as error:
        named = f"--host {host}" + (f" --port {port}" if port else "")
        raise UsageError(
            f"{named} cannot be listened on: {error.strerror}; valid: an address of this machine, such as {LOOPBACK}, "
            "and a port that no program uses; without --port, the first free one from 7860"
        ) from error


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host.removeprefix("[").removesuffix("]")).is_loopback
    except ValueError:
        return host == "localhost"


if __name__ == "__main__":
    start(program(main))
