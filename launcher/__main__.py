"""`python -m launcher`, the older name of `wemmu run`, `submit`, `status`, ..."""

from launcher.cli import app
from wemmu.command_line import start

start(app, "python -m launcher")
