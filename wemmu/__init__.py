"""Makes the process work in any locale and under a user id without a name."""

import codecs
import getpass
import io
import logging
import os
import sys

# Libraries in child processes open text files without naming an encoding; our own files are UTF-8.
os.environ["PYTHONUTF8"] = "1"
# Names of files are UTF-8 as well, but only in a process that was started so: our own programs start once more.
_program = dict(zip(sys.orig_argv, sys.orig_argv[1:], strict=False)).get("-m", os.path.basename(sys.argv[0]))
if (
    _program.partition(".")[0] in ("wemmu", "launcher", "data_pipeline")
    and codecs.lookup(sys.getfilesystemencoding()).name != "utf-8"
):
    os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])

# A terminal or a log that cannot show a character must not stop the program.
for _stream in (sys.stdout, sys.stderr):
    if isinstance(_stream, io.TextIOWrapper) and codecs.lookup(_stream.encoding).name != "utf-8":
        _stream.reconfigure(errors="backslashreplace")

# torch, Ray and others name their caches after the user; containers run under numbers that no account has.
try:
    getpass.getuser()
except (KeyError, OSError):
    os.environ["USER"] = f"uid{os.getuid()}"

# diffusers and peft import bitsandbytes if it is installed, and it says each time that a kernel of the Hub is absent.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
