"""The command line: parse, call one plain function, print.

torch and matplotlib are imported inside the commands, so that `--help` answers in a fraction of a second.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

import typer

import grood_cert

if TYPE_CHECKING:
    from rich.console import Console

    from grood_cert.data import ImageSet
    from grood_cert.detector import Detector
    from grood_cert.training import Epoch

app = typer.Typer(
    name="grood-cert",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Train out-of-distribution detectors with gradient-regularised energy and prove how robust their score is.",
    epilog="A first tour: grood-cert demo. Radii and eps are in pixel units, images have pixels in [0, 1].",
)

_INTERRUPTED = 130
_Eps = Annotated[
    list[float] | None, typer.Option(help="Radius in pixel units, ascending (repeatable). [default: a grid of 8]")
]
_Norm = Annotated[str, typer.Option(help="Norm of the ball: linf, l2 or l1.")]
_Ood = Annotated[list[str] | None, typer.Option(help="OOD test set in place of the recipe's (repeatable).")]
_Limit = Annotated[int, typer.Option(help="Most samples of each set, drawn by the seed; 0: all.")]
_BatchSize = Annotated[int, typer.Option(help="Samples bounded together.")]
_DataDir = Annotated[Path | None, typer.Option(help="Folder that holds the torchvision data sets. [default: data]")]
_Download = Annotated[bool, typer.Option("--download", help="Let torchvision download what is missing.")]
_Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ... or auto: a GPU if there is one.")]
_Force = Annotated[bool, typer.Option("--force", help="Overwrite what is already in the folder.")]


def _console(stderr: bool = False) -> Console:
    from rich.console import Console

    return Console(stderr=stderr, highlight=False, soft_wrap=True)


class _Bar:
    """A bar with counts, elapsed time and ETA on stderr; it appears when a stage begins, once the input is checked."""

    def __init__(self) -> None:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("eta"), TimeRemainingColumn())
        self._progress = Progress(TextColumn("{task.description}"), *columns, console=_console(stderr=True))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._progress.tasks:  # stopping a bar that never showed would print an empty line
            self._progress.stop()

    def begin(self, stage: str, total: int) -> None:
        """Show a new line for a stage of this many steps."""
        self._task = self._progress.add_task(stage, total=total)
        self._progress.start()

    def advance(self, steps: int = 1) -> None:
        """Move the newest line on."""
        self._progress.advance(self._task, steps)

    def print(self, text: str) -> None:
        """Print a line above the bar."""
        self._progress.console.print(text)


def _device(name: str) -> str:
    """The device's name, with auto resolved; whether it works is checked where it is used."""
    import torch

    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def _bytes(text: str) -> int:
    """A memory size such as 64M or 1G."""
    from grood_cert.errors import InputError

    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    number, unit = (text[:-1], text[-1:].upper()) if text[-1:].upper() in units else (text, "")
    try:
        size = float(number) * units.get(unit, 1)
        return int(size)
    except (ValueError, OverflowError):
        raise InputError(f"memory {text!r}: expected a size such as 64M or 1G") from None


def _test_sets(loaded: Detector, ood: list[str] | None, data_dir: Path | None, download: bool) -> list[ImageSet]:
    """The ID test set and the OOD test sets of the detector's recipe, or other OOD sets in their place."""
    import dataclasses

    from grood_cert import training

    recipe = loaded.recipe
    if ood:
        recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, ood=tuple(ood)))
    experiment = training.experiment_of(recipe, data_dir, download)
    return [experiment.test, *experiment.ood]


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _print_across(records: Sequence[Mapping[str, Any]], name: str, quantities: Mapping[str, str], title: str) -> None:
    """One column a record, headed by its `name`, and one line a quantity (key: words) that any record has."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left", title_style="bold")
    table.add_column("", no_wrap=True)
    for record in records:
        table.add_column(str(record[name]), justify="right", overflow="fold")
    for key, words in quantities.items():
        if any(record[key] is not None for record in records):
            table.add_row(words, *(_cell(record[key]) for record in records))
    _console().print(table)


def _epoch_line(epoch: Epoch) -> str:
    return (
        f"epoch {epoch.epoch:3d}  loss {epoch.loss:.3f}  CE {epoch.cross_entropy:.3f}  L_S {epoch.energy_loss:.3f}  "
        f"L_grad {epoch.gradient_loss:.3f}  "
        f"active L_S {epoch.active_energy_id:.2f}/{epoch.active_energy_aux:.2f}  "
        f"L_grad {epoch.active_gradient_id:.2f}/{epoch.active_gradient_aux:.2f}  "
        f"|grad S| {epoch.gradient_norm_id:.2f}/{epoch.gradient_norm_aux:.2f}  "
        f"acc {epoch.accuracy:.3f}  fpr95_id {epoch.fpr95_id:.3f}"
    )


_DETECTION = {"kind": "kind", "samples": "samples", "auroc": "AUROC", "fpr95_id": "fpr95_id", "fpr95_ood": "fpr95_ood"}
_COUNTS = {
    "kind": "kind",
    "samples": "samples",
    "certified": "certified",
    "undecided": "undecided",
    "misdecided": "misdecided at x",
}


def _version(value: bool) -> None:
    if value:
        typer.echo(grood_cert.__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    del version


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="Recipe file, for example train/digits-greg.toml.")],
    out: Annotated[Path, typer.Option(help="Folder of the run: model.pt and log.csv.")],
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Change one setting: objective.lambda_grad=0.1 (repeatable).")
    ] = None,
    data_dir: _DataDir = None,
    download: _Download = False,
    device: _Device = "auto",
    force: _Force = False,
) -> None:
    """Train a detector from a recipe. Cross-entropy + energy margins + gradient penalty (GReg)."""
    from grood_cert import recipe as recipes
    from grood_cert import training

    chosen = recipes.load(recipe, settings or ())
    with _Bar() as bar:
        detector = training.run(
            chosen,
            out,
            data_dir=data_dir,
            download=download,
            device=_device(device),
            force=force,
            begin=lambda steps: bar.begin("training", steps),
            advance=bar.advance,
            report=lambda epoch: bar.print(_epoch_line(epoch)),
        )
    found = detector.metrics
    sets = [{"set": name, **values} for name, values in found["ood"].items()]
    title = f"{chosen.name}: ID accuracy {found['accuracy']:.4f}, gamma {detector.gamma:.4f}"
    _print_across(sets, "set", _DETECTION, title)
    typer.echo(f"wrote {out / 'model.pt'} and {out / 'log.csv'}")


@app.command()
def certify(
    model: Annotated[Path, typer.Argument(help="Checkpoint written by grood-cert train.")],
    eps: _Eps = None,
    norm: _Norm = "linf",
    method: Annotated[str, typer.Option(help="ibp, crown-ibp, crown or alpha-crown.")] = "crown",
    out: Annotated[Path | None, typer.Option(help="Folder of rows.csv and rows.json. [default: the model's]")] = None,
    ood: _Ood = None,
    limit: _Limit = 0,
    precision: Annotated[float, typer.Option(help="Relative precision of the certified radius.")] = 1e-3,
    batch_size: _BatchSize = 64,
    seed: Annotated[int, typer.Option(help="Seed of the attacks and of --limit.")] = 0,
    lipschitz: Annotated[bool, typer.Option("--lipschitz", help="Prove radii from Lipschitz bounds too.")] = False,
    data_dir: _DataDir = None,
    download: _Download = False,
    device: _Device = "auto",
    force: _Force = False,
) -> None:
    """Prove bounds of S and certified radii. Attacks bracket them from the other side."""
    from typing import cast

    from grood_cert import certification, curves, detector, runs
    from grood_cert.ball import Norm
    from grood_cert.lirpa import Method

    loaded = detector.load(model, _device(device))
    settings = certification.Settings(
        eps=tuple(eps or runs.DEFAULT_EPS.get(norm, ())),
        norm=cast(Norm, norm),
        method=cast(Method, method),
        precision=precision,
        batch_size=batch_size,
        seed=seed,
        lipschitz=lipschitz,
    )
    settings.check(loaded.architecture.shape)
    sets = _test_sets(loaded, ood, data_dir, download)
    folder = out or model.parent
    with _Bar() as bar:
        rows = certification.run(
            loaded,
            model,
            sets,
            settings,
            folder,
            limit=limit,
            force=force,
            begin=lambda samples: bar.begin("certifying", samples),
            advance=bar.advance,
        )
    used = rows.manifest["method"]
    title = f"medians over the samples that are right at x: radius in {norm}, {used}"
    _print_across(curves.radius_summary(rows), "set", _COUNTS | curves.RADII, title)
    for message, count in rows.manifest["failures"].items():
        typer.echo(f"not proved because the bound engine failed, {count} bounds: {message}", err=True)
    typer.echo(f"wrote {folder / 'rows.csv'} and {folder / 'rows.json'}")


@app.command()
def lipschitz(
    model: Annotated[Path, typer.Argument(help="Checkpoint written by grood-cert train.")],
    eps: _Eps = None,
    norm: _Norm = "linf",
    method: Annotated[str, typer.Option(help="Pre-activation bounds: ibp, crown-ibp or crown.")] = "crown",
    out: Annotated[Path | None, typer.Option(help="Folder of lipschitz.csv and .json. [default: the model's]")] = None,
    ood: _Ood = None,
    limit: _Limit = 50,
    samples: Annotated[int, typer.Option(help="Points sampled in each ball.")] = 256,
    clever_batches: Annotated[int, typer.Option(help="Batch maxima of CLEVER; 0: leave it out.")] = 50,
    memory: Annotated[str, typer.Option(help="Memory that blocks of rows may take, for example 64M or 1G.")] = "16M",
    batch_size: _BatchSize = 64,
    seed: Annotated[int, typer.Option(help="Seed of all sampling and of --limit.")] = 0,
    data_dir: _DataDir = None,
    download: _Download = False,
    device: _Device = "auto",
    force: _Force = False,
) -> None:
    """Bound the local Lipschitz constant of S. Estimates from below stand beside the proofs."""
    from typing import cast

    from grood_cert import detector, runs
    from grood_cert.ball import Norm
    from grood_cert.lipschitz import analysis
    from grood_cert.lirpa import Method

    loaded = detector.load(model, _device(device))
    settings = analysis.Settings(
        eps=tuple(eps or runs.DEFAULT_EPS.get(norm, ())),
        norm=cast(Norm, norm),
        method=cast(Method, method),
        samples=samples,
        clever_batches=clever_batches,
        memory=_bytes(memory),
        batch_size=batch_size,
        seed=seed,
    )
    settings.check(loaded.architecture.shape)
    sets = _test_sets(loaded, ood, data_dir, download)
    folder = out or model.parent
    with _Bar() as bar:
        result = analysis.run(
            loaded,
            model,
            sets,
            settings,
            folder,
            limit=limit,
            force=force,
            begin=lambda samples: bar.begin("analysing", samples),
            advance=bar.advance,
        )
    for kind in result.kinds():
        title = f"{kind}: local Lipschitz constant of S at each eps, medians, {norm} ball, per pixel unit"
        _print_across(result.summary(kind), "eps", analysis.QUANTITIES, title)
    typer.echo(f"wrote {folder / 'lipschitz.csv'} and {folder / 'lipschitz.json'}")


@app.command()
def curve(
    rows: Annotated[list[Path], typer.Argument(help="rows.csv of certifications, or lipschitz.csv of analyses.")],
    out: Annotated[
        Path, typer.Option(help="Figure: .png, .pdf or .svg. A table of its numbers goes beside it (.csv).")
    ],
    label: Annotated[
        list[str] | None, typer.Option(help="Name of each model, in order. [default: the recipe's]")
    ] = None,
    perturb: Annotated[str, typer.Option(help="Which side moves in the FPR95 curve: ood, id or both.")] = "ood",
    at: Annotated[float | None, typer.Option(help="eps of the gamma sweep; must be on the grid.")] = None,
) -> None:
    """Draw curves of one or more results. Robustness against FPR, or Lipschitz constants against eps."""
    from typing import cast

    from grood_cert import plots
    from grood_cert import rows as results
    from grood_cert.curves import Perturbed
    from grood_cert.errors import InputError
    from grood_cert.lipschitz import analysis

    plots.check_format(out)
    kinds = {path.name == "lipschitz.csv" for path in rows}
    if len(kinds) > 1:
        raise InputError("rows.csv and lipschitz.csv make different figures; give files of one kind")
    if kinds == {True}:
        analyses = results.labelled([analysis.read(path) for path in rows], rows, label or [])
        plots.save(plots.lipschitz_figure(analyses), out)
        plots.write_lipschitz_table(analyses, out.with_suffix(".csv"))
    else:
        certifications = results.labelled([results.read(path) for path in rows], rows, label or [])
        side = cast(Perturbed, perturb)
        plots.save(plots.robustness_figure(certifications, side, at), out)
        plots.write_table(certifications, side, out.with_suffix(".csv"))
    typer.echo(f"wrote {out} and {out.with_suffix('.csv')}")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder of everything the demo writes.")] = Path("runs/demo"),
    limit: Annotated[int, typer.Option(help="Samples certified of each set; 0: all.")] = 100,
    device: _Device = "auto",
    force: _Force = False,
) -> None:
    """Train, certify and compare two detectors. Real digits, a few minutes on a CPU."""
    import torch

    from grood_cert import demo as demonstration

    torch.set_num_threads(1)  # networks this small gain nothing from threads, and lose much where cores are shared
    with _Bar() as bar:
        result = demonstration.run(
            out, limit=limit, device=_device(device), force=force, begin=bar.begin, advance=bar.advance
        )
    _print_across(result.summary, "model", demonstration.QUANTITIES, demonstration.TITLE)
    typer.echo(demonstration.NOTE)
    for path, what in result.files.items():
        typer.echo(f"{path}  {what}")


def main() -> None:
    """Run the command line; errors become one line on stderr and an exit code, without a traceback."""
    _run(app, "grood-cert")


def run_script(function: Callable[..., None]) -> None:
    """Run a script's `main` as a command, with the errors and exit codes of the command line."""
    script = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    script.command()(function)
    _run(script, Path(sys.argv[0]).name)


def _run(application: typer.Typer, program: str) -> None:
    from grood_cert.errors import InputError, RunError, SoundnessError

    def fail(message: object, code: int) -> int:
        typer.echo(f"{program}: error: " + " ".join(str(message).split()), err=True)
        return code

    try:
        code = application(standalone_mode=False)
        if code == _INTERRUPTED:  # newer typer turns Ctrl-C into this code
            raise KeyboardInterrupt
    except InputError as error:
        code = fail(error, 2)
    except RunError as error:
        code = fail(error, 1)
    except SoundnessError as error:
        saved = f"; the counterexample is in {error.counterexample}" if error.counterexample else ""
        code = fail(f"SOUNDNESS VIOLATION: {error}{saved}", 3)
    except (KeyboardInterrupt, typer.Abort):
        code = fail("interrupted", _INTERRUPTED)
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        code = fail(error.format_message(), 2)  # a usage error of click, or of the copy of it that typer carries
    sys.exit(code if isinstance(code, int) else 0)
