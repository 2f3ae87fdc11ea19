"""The command line: parse, call one plain function, print; one module a command.

torch and matplotlib are imported inside the commands, so that `--help` answers in a fraction of a second.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import typer

import grood_cert
from grood_cert.cli import options
from grood_cert.cli.certify import certify
from grood_cert.cli.curve import curve
from grood_cert.cli.demo import demo
from grood_cert.cli.evaluate import evaluate
from grood_cert.cli.export import export
from grood_cert.cli.gallery import gallery
from grood_cert.cli.imports import import_
from grood_cert.cli.lipschitz import lipschitz
from grood_cert.cli.merge import merge
from grood_cert.cli.predict import predict
from grood_cert.cli.recipe import recipe
from grood_cert.cli.report import report
from grood_cert.cli.smooth import smooth
from grood_cert.cli.status import status
from grood_cert.cli.sweep import sweep
from grood_cert.cli.table import table
from grood_cert.cli.threshold import threshold
from grood_cert.cli.train import train
from grood_cert.cli.verify import verify
from grood_cert.cli.vnnlib import verdicts, vnnlib

app = typer.Typer(
    name="grood-cert",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Train out-of-distribution detectors with gradient-regularised energy and prove how robust their score is.",
    epilog="A first tour: grood-cert demo. Radii and eps are in pixel units, images have pixels in [0, 1].",
)

_INTERRUPTED = 130
_TERMINATED = 143
_FULL_COLLECTION = 100  # of the generation before the last; 10 is usual
_FULL = (
    errno.ENOSPC,
    errno.EFBIG,
    errno.EIO,
)  # of what is printed; files are written elsewhere, with words of their own
_NO_MEMORY = (
    *("failed to map segment", "cannot allocate memory", "Cannot allocate memory", "can't start new thread"),
    "Resource temporarily unavailable",
)


class _Terminated(BaseException):
    """SIGTERM: whoever runs the jobs of this machine wants this one to end."""


def _version(value: bool) -> None:
    if value:
        typer.echo(grood_cert.__version__)
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    del version
    options.help_without_command(context)


app.command()(train)
app.command("import")(import_)
for _command in (
    predict,
    certify,
    smooth,
    lipschitz,
    sweep,
    status,
    threshold,
    curve,
    gallery,
    report,
    table,
    evaluate,
    merge,
    verify,
    export,
    vnnlib,
    verdicts,
    demo,
):
    app.command()(_command)
app.add_typer(recipe, name="recipe")


def main() -> None:
    """Run the command line; errors become one line on stderr and an exit code, without a traceback."""
    _run(app, "grood-cert")


def run_script(function: Callable[..., None]) -> None:
    """Run a script's `main` as a command, with the errors and exit codes of the command line."""
    script = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    script.command()(function)
    _run(script, Path(sys.argv[0]).name)


@contextlib.contextmanager
def _termination_raised() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does, so that what is being written is written whole or not at all."""

    def stop(number: int, frame: object) -> None:
        raise _Terminated

    together = os.environ.get("WORLD_SIZE", "1") != "1"  # torchrun must be able to end those that wait for one another
    if together or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _old_garbage_kept() -> Iterator[None]:
    """Look through everything for garbage less often: imports leave none, and looking costs a fifth of their time.

    What was made lately is looked through as often as ever.
    """
    before = gc.get_threshold()
    gc.set_threshold(*before[:2], _FULL_COLLECTION)
    try:
        yield
    finally:
        gc.set_threshold(*before)


def _out_of_memory(error: BaseException) -> bool:
    """Also where a library could not be loaded, or a thread not be started, for want of memory."""
    if isinstance(error, MemoryError) or any(words in str(error) for words in _NO_MEMORY):
        return True
    if "torch" not in sys.modules:
        return False
    from grood_cert.system.memory import is_memory_error

    return is_memory_error(error)


def _run(application: typer.Typer, program: str) -> None:
    from grood_cert.errors import InputError, RunError, SoundnessError, StoppedError

    def fail(message: object, code: int) -> int:
        typer.echo(f"{program}: error: " + " ".join(str(message).split()), err=True)
        return code

    try:
        with _termination_raised(), _old_garbage_kept():
            code = application(standalone_mode=False)
        if code == _INTERRUPTED:  # newer typer turns Ctrl-C into this code
            raise KeyboardInterrupt
    except InputError as error:
        code = fail(error, 2)
    except StoppedError as error:
        from grood_cert.system import jobs

        code = fail(error, jobs.FOLLOWED if jobs.started() else 1)
    except RunError as error:
        code = fail(error, 1)
    except SoundnessError as error:
        saved = f"; the counterexample is in {error.counterexample}" if error.counterexample else ""
        code = fail(f"SOUNDNESS VIOLATION: {error}{saved}", 3)
    except _Terminated:
        code = fail("terminated; the same command goes on (train: with --resume)", _TERMINATED)
    except (KeyboardInterrupt, typer.Abort):
        code = fail("interrupted; the same command goes on (train: with --resume)", _INTERRUPTED)
    except Exception as error:
        if hasattr(error, "format_message"):  # a usage error of click, or of the copy of it that typer carries
            code = fail(error.format_message(), 2)
        elif _out_of_memory(error):
            code = fail(
                "out of memory; smaller batches need less, and the same command goes on (train: with --resume)", 1
            )
        elif isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
            code = fail(f"{str(error.filename)[:60]}...: {error.strerror}; give a shorter one", 2)
        elif isinstance(error, OSError) and error.errno in _FULL and error.filename is None:
            code = fail(f"cannot print: {error.strerror}", 1)
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python prints what is left when it ends
        else:
            raise
    sys.exit(code if isinstance(code, int) else 0)
