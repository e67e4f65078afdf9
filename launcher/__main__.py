"""`python -m launcher`."""

from launcher.cli import app
from wemmu.config.files import said_plainly

with said_plainly(2):
    app(prog_name="python -m launcher")
