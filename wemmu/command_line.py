"""Options, exit codes and error handling of all commands. docs/cli.md has the tables."""

import atexit
import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, NoReturn, TextIO, cast

import typer
from typer.core import TyperGroup

# 75 is EX_TEMPFAIL, 78 is EX_CONFIG, 124 is what `timeout` ends with.
FAILED, USAGE, SAVED, FINAL, HUNG = 1, 2, 75, 78, 124
_OURS = ("wemmu", "launcher", "data_pipeline", "tools", "__main__")

CurriculumFile = Annotated[
    Path, typer.Argument(metavar="CURRICULUM", help="Curriculum in YAML, or one of `wemmu config list`.")
]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.")]
NewestRun = Annotated[Path | None, typer.Argument(metavar="[RUN]", help="Run folder; default: the newest under runs/.")]
# --out is the old name.
Into = Annotated[
    Path | None, typer.Option("--run", "--out", metavar="RUN", help="Run folder to write; default: runs/NAME.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="Change one field, e.g. stages.stage1.steps=100. Repeatable."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, messages on stderr.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, show the plan and stop.")]
Ema = Annotated[
    bool | None, typer.Option(help="Use the moving average of the weights, or not; default: use it if there is one.")
]


class UsageError(ValueError):
    """An invalid command line; the message says what is valid."""

    exit_code = USAGE


@contextmanager
def plainly() -> Iterator[None]:
    """End the process with a sentence and its exit code for an error that a person can mend; of a bug, the traceback.

    A sentence for people has an exception of our own classes, whose `exit_code` is FINAL unless it says otherwise, a
    ValueError that our code raises, and an OSError of a file.
    """
    try:
        os.getcwd()
    except FileNotFoundError:
        fail("the working directory was deleted or replaced: change to it again, or to another one", FINAL)
    try:
        yield
    except Exception as error:
        if (code := exit_code(error)) is None:
            raise
        fail(_of_a_file(error) if isinstance(error, OSError) else str(error), code, error)


def _of_a_file(error: OSError) -> str:
    from wemmu.config.files import FAULTS, LASTING

    remedy = "correct the path"
    if error.errno in FAULTS:
        remedy = "the disk or its file server fails; when it works again, repeat the command"
    elif error.errno in LASTING:
        mend = "free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else "make it writable"
        remedy = f"{mend}, or name another folder; then repeat the command"
    return f"a file cannot be read or written: {error}. What is finished stays as it is; {remedy}"


@contextmanager
def without_unused() -> Iterator[None]:
    """Import diffusers and transformers as if SciPy and bitsandbytes were not installed.

    They load both at once, more than a tenth of what `wemmu sample` takes to start, for schedulers, losses and formats
    that are not ours. Not for training and evaluation, where a judge may be a model that needs SciPy.
    """
    hidden = [name for name in ("scipy", "bitsandbytes") if name not in sys.modules]
    # So Python says that there is no such module.
    sys.modules.update(dict.fromkeys(hidden, cast(ModuleType, None)))
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


def reaches(words: str, stream: TextIO) -> bool:
    """Print `words` and return whether somebody may have read them; if not, nothing more is printed to `stream`.

    For those that must save something when their output's reader ends, such as a `tee` that Ctrl-C reaches as well.
    """
    try:
        print(words, end="", file=stream, flush=True)
    except BrokenPipeError:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())
        return False
    return True


def fail(words: str, code: int, error: BaseException | None = None) -> NoReturn:
    """End the process with these words on stderr and the code."""
    typer.secho(words, fg=typer.colors.RED, err=True)
    ended = SystemExit(words)
    # Else Python would print the words again, and end with 1.
    ended.code = code
    raise ended from error


def exit_code(error: Exception) -> int | None:
    """Return the exit code for `error`; None if it is a bug."""
    # The help of `wemmu` needs nothing of the config.
    from wemmu.config.files import FAULTS, LASTING, MISSING

    if isinstance(error, OSError) and error.errno in (*LASTING, *MISSING):
        return FINAL
    if isinstance(error, OSError) and (error.filename is not None or error.errno in FAULTS):
        return FAILED
    if _is_ours(type(error).__module__) or (type(error) is ValueError and _is_ours(_raised_in(error))):
        return getattr(error, "exit_code", FINAL)
    return None


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] in _OURS


def _raised_in(error: Exception) -> str:
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    return "" if traceback is None else str(traceback.tb_frame.f_globals.get("__name__", ""))


class Group(TyperGroup):
    """A group of commands that lists them if one is unknown."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        # The help of `wemmu` does not need it.
        from wemmu.readable import valid

        if args and args[0] not in self.commands and not args[0].startswith("-"):
            ctx.fail(f"No such command {args[0]!r}; {valid(args[0], self.commands)}")
        return super().resolve_command(ctx, args)


def program(*commands: Callable[..., Any], help: str | None = None) -> typer.Typer:
    """Build one command, or a group of several.

    Without rich_markup_mode Typer prints help without frames and does not import rich's Markdown, which takes longer to
    load than all of the config.
    """
    app = typer.Typer(cls=Group, help=help, no_args_is_help=True, add_completion=False, rich_markup_mode=None)
    for command in commands:
        app.command(no_args_is_help=False)(command)
    return app


def start(app: typer.Typer, name: str | None = None) -> None:
    """Run the app without Typer's framed errors, which print every variable, and end the process.

    A rank ends without the interpreter's shutdown: a thread of gloo that drops its last result meanwhile aborts the
    process (pytorch/pytorch#179291), and destroying the groups does not end threads that DeepSpeed or FSDP2 hold.
    """
    try:
        typer.main.get_command(app)(prog_name=name)
    except SystemExit as ended:
        distributed = sys.modules.get("torch.distributed")
        if distributed is None or not distributed.is_initialized():
            raise
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(ended.code if isinstance(ended.code, int) else ended.code is not None)
