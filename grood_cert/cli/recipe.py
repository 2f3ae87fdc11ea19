"""`grood-cert recipe`: the recipes that come with the package."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from grood_cert.cli import options

recipe = typer.Typer(help="Recipes that come with grood-cert: list, show, copy.")
recipe.callback(invoke_without_command=True)(options.help_without_command)

_Name = Annotated[str, typer.Argument(help="A name that `grood-cert recipe list` shows, or a recipe file.")]


def _comment(path: Path) -> str:
    """The first sentence of the comment that a recipe file opens with."""
    lines = path.read_text(encoding="utf-8").splitlines()
    last = next((number for number, line in enumerate(lines) if not line.startswith("#")), len(lines))
    text = " ".join(line.removeprefix("#").strip() for line in lines[:last])
    return text.partition(". ")[0].rstrip(".")


@recipe.command("list")
def list_recipes() -> None:
    """Name every recipe, with what it is for."""
    from grood_cert.recipe import shipped

    files = shipped()
    width = max(map(len, files))
    for name, path in files.items():
        typer.echo(f"{name:{width}}  {_comment(path)}")


@recipe.command()
def show(name: _Name) -> None:
    """Print every setting of a recipe, those of its base and the defaults included, as a recipe file."""
    from grood_cert.recipe import find, load

    found = load(find(name))
    if note := options.bounds_note(found.network.name):
        typer.echo(f"# {note}")
    typer.echo(found.to_toml(), nl=False)


@recipe.command()
def copy(
    name: _Name,
    destination: Annotated[Path | None, typer.Argument(help="File or folder. [default: here, same name]")] = None,
    force: options.Force = False,
) -> None:
    """Copy a recipe file, comments and all, as a start for your own; a base it names is found wherever it lies."""
    from grood_cert.errors import InputError
    from grood_cert.recipe import find, load
    from grood_cert.system.files import check_apart, replacing

    source = find(name)
    load(source)  # refuses what is no recipe
    target = destination or Path(source.name)
    if target.is_dir():
        target /= source.name
    check_apart([target], [source])
    if target.exists() and not force:
        raise InputError(f"{target} exists already; choose another file, or add --force to overwrite it")
    with replacing(target) as temporary:
        temporary.write_bytes(source.read_bytes())
    typer.echo(f"wrote {target}; use it with: grood-cert train {target} --out FOLDER")
