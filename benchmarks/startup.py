"""How long a person waits for `grood-cert COMMAND --help`, and for `import grood_cert`; least of several runs.

python benchmarks/startup.py
"""

from __future__ import annotations

import subprocess
import sys
import time
from typing import Annotated

import typer

from grood_cert.cli import app, run_script


def measure(arguments: list[str], repeats: int) -> float:
    """Least seconds that a Python process with these arguments takes."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        subprocess.run([sys.executable, *arguments], capture_output=True, check=True)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def main(repeats: Annotated[int, typer.Option(min=1, help="Runs of each.")] = 5) -> None:
    """Print seconds, one line a command."""
    commands = sorted(vars(typer.main.get_command(app))["commands"])
    runs = {"import": ["-c", "import grood_cert"], "--help": ["-m", "grood_cert", "--help"]}
    runs |= {name: ["-m", "grood_cert", name, "--help"] for name in commands}
    for name, arguments in runs.items():
        typer.echo(f"{name:>10}  {measure(arguments, repeats):.2f}")


if __name__ == "__main__":
    run_script(main)
