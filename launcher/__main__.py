"""`python -m launcher`."""

from launcher.cli import app

app(prog_name="python -m launcher")
