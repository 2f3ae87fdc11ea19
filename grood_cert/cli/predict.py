"""`grood-cert predict`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from grood_cert.cli import options, output

_FORMATS = {"csv": ".csv", "jsonl": ".jsonl"}


def predict(
    model: options.Model,
    images: Annotated[
        list[str],
        typer.Argument(help="Picture files, folders, .npy and .npz files, or any set that recipes name."),
    ],
    eps: Annotated[
        list[str] | None, options.eps_option(what="Certify and attack each decision, at this radius")
    ] = None,
    norm: Annotated[str | None, typer.Option(help="Norm of --eps: linf, l2 or l1. [default: linf]")] = None,
    effort: Annotated[
        str | None, typer.Option(help="How hard --eps is tried: fast, default or max. [default: default]")
    ] = None,
    engine: Annotated[
        str | None, typer.Option(help="Linear bounds for --eps by native, auto_lirpa, or auto. [default: auto]")
    ] = None,
    gamma: Annotated[float | None, typer.Option(help="Threshold in place of the detector's.")] = None,
    resize: Annotated[
        bool, typer.Option("--resize", help="Fit images of another size: resized to cover, cropped in the centre.")
    ] = False,
    form: Annotated[
        str, typer.Option("--format", help="table, csv or jsonl. [default: as --out ends, else table]")
    ] = "",
    out: Annotated[Path | None, typer.Option(help="File to write, .csv or .jsonl. [default: the screen]")] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, max=2**63 - 1, help="Seed of the attacks of --eps. [default: 0]")
    ] = None,
    data_dir: options.DataDir = None,
    device: options.Device = "auto",
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file that --out names.")] = False,
) -> None:
    """Say of each image whether it is OOD, and at which threshold. With --eps: how far that is certified."""
    from typing import cast

    from grood_cert import detector, predictions
    from grood_cert.bounds.engines import Engine
    from grood_cert.errors import InputError
    from grood_cert.system.files import check_writable

    form = _format(form, out, model, images, force)
    for name, value in {"norm": norm, "effort": effort, "engine": engine, "seed": seed}.items():
        if value is not None and not eps:
            raise InputError(f"--{name} is for certifying; give --eps too")
    query = predictions.Query(
        eps=options.eps_grid(eps),
        norm=options.norm_named(norm or "linf"),
        effort=effort or "default",
        engine=cast(Engine, engine or "auto"),
        seed=seed or 0,
    )
    loaded = options.at_gamma(detector.load(model, options.device_name(device)), gamma)
    query.check(loaded.shape)
    sets = predictions.load_images(images, loaded.shape, resize=resize, data_dir=data_dir)
    for found in sets:
        if found.note:
            typer.echo(f"'{found.name}': {found.note}", err=True)
    if out:
        check_writable(out.parent)
    records: list[dict[str, Any]] = []
    with output.Bar() as bar:
        if query.eps:
            bar.begin("certifying", sum(map(len, sets)))
        for found in sets:
            records += predictions.predict(loaded, found, query, bar)
    if form != "table":
        _write(records, query.columns, form, out)
        return
    threshold = "as given by --gamma" if gamma is not None else _origin(loaded)
    if len(records) == 1:
        output.say(predictions.sentences(records[0], query, str(loaded.score), threshold))
        return
    accepted = sum(record["accepted"] for record in records)
    shown = [record | {"accepted": "ID" if record["accepted"] else "OOD"} for record in records]
    title = f"{loaded.score} score S, gamma {loaded.gamma:.6g}: ID (accepted) iff S <= gamma"
    output.print_down(shown, {name: _words(name) for name in query.columns if name != "gamma"}, title)
    output.say([f"{accepted} of {len(records)} images accepted as ID, {len(records) - accepted} rejected as OOD"])
    output.say([f"gamma: {threshold}"])


def _words(column: str) -> str:
    """What the screen calls a column."""
    words = {"accepted": "decision", "radius_certified": "certified", "radius_attack": "attack"}
    return words.get(column, column.replace("outcome@", "within "))


def _format(form: str, out: Path | None, model: Path, images: Sequence[str], force: bool) -> str:
    """The format to write in.

    Raises:
        InputError: If it is unknown, or the file cannot be of it, is there already or is read.
    """
    from grood_cert.errors import InputError
    from grood_cert.system.files import check_apart

    if form not in ("", "table", *_FORMATS):
        raise InputError(f"unknown format {form!r}; use one of table, {', '.join(_FORMATS)}")
    if out is None:
        if force:
            raise InputError("--force is for the file that --out names; give --out too")
        return form or "table"
    if form == "table":
        raise InputError("a table goes to the screen; leave --out away, or use --format csv or jsonl")
    ending = next((name for name, suffix in _FORMATS.items() if out.suffix == suffix), "")
    if not ending or form not in ("", ending):
        wanted = _FORMATS[form] if form else " or ".join(_FORMATS.values())
        raise InputError(f"{out}: predictions are written to a file that ends in {wanted}")
    check_apart([out], [model, *(Path(part) for text in images for part in _files(text))])
    if out.exists() and not force:
        raise InputError(f"{out} exists already; choose another --out, or add --force to overwrite it")
    return ending


def _files(text: str) -> tuple[str, str]:
    """The file that an argument names, and its class list."""
    return text, text.rpartition("@")[2].removeprefix("!")


def _write(records: Sequence[Mapping[str, Any]], columns: Sequence[str], form: str, out: Path | None) -> None:
    """Write records to a file, or to stdout."""
    import json

    from grood_cert.system.files import as_json, csv_text

    if form == "csv":
        plain = ({key: str(v).lower() if isinstance(v, bool) else v for key, v in record.items()} for record in records)
        text = csv_text(columns, plain, header=True)
    else:
        text = "".join(f"{json.dumps(as_json(record), allow_nan=False)}\n" for record in records)
    options.write_text(text, out, f"{len(records)} predictions")


def _origin(loaded: Any) -> str:
    """Where the detector's threshold comes from, in words."""
    found = loaded.provenance.calibration if loaded.provenance else {}
    if {"percent", "samples"} <= found.keys():
        return (
            f"{loaded.gamma:.6g} accepts {found['percent']} % of ID images (split-conformal, from {found['samples']} "
            "held-out ones)"
        )
    return f"{loaded.gamma:.6g}, the detector's own"
