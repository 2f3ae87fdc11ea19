"""`grood-cert evaluate`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from grood_cert.cli import options, output

if TYPE_CHECKING:
    from grood_cert.results.evaluation import ScoredSet

_WORDS = {  # of the convention grood; the others keep the names that their toolkit prints
    "auroc": "AUROC",
    "aupr_in": "AUPR-in",
    "aupr_out": "AUPR-out",
    "aupr_in_trapezoid": "AUPR-in, trapezoid",
    "aupr_out_trapezoid": "AUPR-out, trapezoid",
    "detection_error": "detection error",
    "accuracy": "ID accuracy",
    "oscr": "OSCR",
}
_ENDINGS = {"csv": ".csv", "json": ".json"}


def evaluate(
    scores: Annotated[
        Path,
        typer.Argument(help="CSV with a column score and one of kind (id, ood, noise) or set; with --ood, ID alone."),
    ],
    ood: Annotated[list[Path] | None, typer.Option(help="CSV or .npy with scores of an OOD set (repeatable).")] = None,
    column: Annotated[str, typer.Option(help="Name of the column of scores.")] = "score",
    high: Annotated[
        str, typer.Option(help="Which class has high scores: ood, as S of this package, or id, as a confidence.")
    ] = "ood",
    convention: Annotated[
        list[str] | None,
        typer.Option(
            help="Whose figures: grood, openood, pytorch-ood, energy_ood, greg, dos, prood or all (repeatable). "
            "[default: grood]"
        ),
    ] = None,
    tpr: Annotated[float, typer.Option(help="TPR of the FPR, in percent.")] = 95,
    intervals: Annotated[bool, typer.Option("--intervals", help="Add 95 % intervals.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="File for the figures with all digits, .csv or .json. [default: the screen]")
    ] = None,
    partial: options.Partial = False,
    force: options.ForceOut = False,
) -> None:
    """Detection metrics of scores from anywhere, exact, in the convention of this package or of another toolkit."""
    from typing import cast

    from grood_cert.errors import InputError
    from grood_cert.metrics import Class
    from grood_cert.results.evaluation import all_conventions, figures, in_kind
    from grood_cert.results.table import manifest_path
    from grood_cert.system.files import write_csv, write_json

    if high not in ("ood", "id"):
        raise InputError(f"--high {high!r}: the class with high scores is ood or id")
    conventions = all_conventions(convention or [])
    inputs = [file for path in (scores, *(ood or ())) for file in (path, manifest_path(path))]
    form = options.output_format("", out, _ENDINGS, inputs, force)
    sets = _read(scores, column, high, partial)
    if ood:
        sets = in_kind(sets, "id")
        for path in ood:
            sets += in_kind(_read(path, column, high, partial), "ood")
    records = figures(sets, conventions, tpr=tpr, high=cast(Class, high), intervals=intervals)
    direction = "high = OOD" if high == "ood" else "high = ID"
    if out and form == "csv":
        write_csv(out, list(records[0]), records)
    elif out:
        write_json(out, {"scores": str(scores), "column": column, "high_scores": high, "figures": records})
    for name in conventions:
        _print([record for record in records if record["convention"] == name], name, direction)
    if all(record["value"] < 0.5 for record in records if record["figure"] in ("auroc", "AUROC", "AUC")):
        other = "id" if high == "ood" else "ood"
        typer.echo(f"warning: every AUROC is below 50 %; if {other} has the high scores, give --high {other}", err=True)
    if out:
        typer.echo(f"wrote {out}")


def _read(path: Path, column: str, high: str, partial: bool) -> list[ScoredSet]:
    from grood_cert.errors import InputError
    from grood_cert.results.evaluation import is_result, read_scores, sets_of_table
    from grood_cert.results.table import Table

    if not is_result(path):
        return read_scores(path, column)
    if high != "ood":
        raise InputError(f"{path} holds S of this package, where high = OOD; leave --high away")
    table = Table.read(path, partial=partial)
    options.warn_unfinished(table, path)
    return sets_of_table(table, column)


def _print(records: Sequence[Mapping[str, Any]], convention: str, direction: str) -> None:
    """One column a set, and a mean over OOD sets if there are several."""
    shown: dict[str, dict[str, Any]] = {}
    for record in records:
        head = {"set": record["set"], "samples": record["samples_ood"]}
        shown.setdefault(record["set"], head)[record["figure"]] = _percent(record)
    of_ood: dict[str, list[float]] = {}
    for record in records:
        if record["kind"] == "ood":
            of_ood.setdefault(record["figure"], []).append(record["value"])
    count = len(next(iter(of_ood.values()), []))
    columns = list(shown.values())
    if count > 1:
        mean = {name: f"{100 * sum(values) / count:.2f}" for name, values in of_ood.items()}
        columns.append({"set": f"mean of {count}", "samples": "", **mean})
    words = {"samples": "samples"} | {record["figure"]: _word(record["figure"]) for record in records}
    title = f"{records[0]['samples_id']} ID samples against those of each set; percent, as {convention}; {direction}"
    output.print_across(columns, "set", words, title)


def _word(figure: str) -> str:
    name, _, positive = figure.partition("_")
    if name.startswith("fpr") and positive in ("id", "ood"):
        return f"FPR{name[3:]}, {positive.upper()} positive"
    return _WORDS.get(figure, figure)


def _percent(record: Mapping[str, Any]) -> str:
    value = f"{100 * record['value']:.2f}"
    return f"{value} [{100 * record['low']:.1f}, {100 * record['high']:.1f}]" if "low" in record else value
