r"""A sweep: one recipe over a grid of settings and several seeds, each trained, certified and analysed alike.

    OUT/lambda_grad=0.1-seed=2/    model.pt, log.csv, rows.csv, lipschitz.csv of one cell
    OUT/sweep.csv                  one row a cell and image set: `grood_cert.results.sweeps.OBJECTIVE`
    OUT/objective.png              slope, margin, radius, accuracy and FPR95 against lambda_grad, where the grid varies it
    OUT/worst-case.png             FPR95 against eps, means and ranges over the seeds

Every process does the cells of its shard and leaves alone what is there already: a sweep goes on after any interruption,
and can be divided among machines that share a folder.
"""

from __future__ import annotations

import itertools
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from grood_cert import detector, recipe
from grood_cert.certification.settings import Settings
from grood_cert.data import Experiment, experiment_of
from grood_cert.detector import Detector
from grood_cert.errors import InputError, RunError
from grood_cert.lipschitz.analyser import AnalysisSettings
from grood_cert.recipe import Recipe
from grood_cert.results import figures, sweeps
from grood_cert.results.sweeps import objective_records
from grood_cert.results.table import Table
from grood_cert.runs import analyse, certify
from grood_cert.runs.progress import status
from grood_cert.runs.shards import WHOLE, Shard
from grood_cert.system.files import locked, write_csv
from grood_cert.system.reporting import SILENT, Reporter
from grood_cert.training import run as training

_OBJECTIVE = "objective.lambda_grad"


@dataclass(frozen=True)
class Cell:
    """One detector of a sweep.

    Attributes:
        values: The settings of the grid, as given, by their full names.
        recipe: The recipe with these settings; its name tells the cells apart.
        folder: Where everything of it lies.
    """

    values: Mapping[str, str]
    recipe: Recipe
    folder: Path

    @property
    def name(self) -> str:
        """What it is called."""
        return self.folder.name

    def label(self, but: str | None = None) -> str:
        """What it shares with the cells of other seeds: its settings of the grid, without one of them."""
        return _label(self.values, but)

    @property
    def model(self) -> Path:
        """The checkpoint."""
        return self.folder / "model.pt"

    @property
    def unfinished(self) -> bool:
        """Whether its training was begun and not ended."""
        return (self.folder / "last.pt").exists()


@dataclass(frozen=True)
class Limits:
    """Most images of each set, 0 for all.

    Attributes:
        certify: Of a certification.
        lipschitz: Of a Lipschitz analysis.

    Raises:
        InputError: If one is negative.
    """

    certify: int = 0
    lipschitz: int = 0

    def __post_init__(self) -> None:
        if min(self.certify, self.lipschitz) < 0:
            raise InputError(f"limit must be 0 (all) or more, got {min(self.certify, self.lipschitz)}")


ALL = Limits()


@dataclass(frozen=True)
class Measured:
    """What is known of a cell.

    Attributes:
        cell: The cell.
        rows: Its certification; None where the sweep has none.
        slopes: Its Lipschitz analysis; None where the sweep has none.
    """

    cell: Cell
    rows: Table | None
    slopes: Table | None

    @cached_property
    def records(self) -> list[dict[str, Any]]:
        """One record an image set: `cell`, the settings of the grid, and the keys of `OBJECTIVE`."""
        pages = objective_records(self.rows, self.slopes)
        return [{"cell": self.cell.name, **self.cell.values, **page} for page in pages]


def axis(text: str) -> tuple[str, tuple[str, ...]]:
    """A setting and its values, from KEY=VALUE,VALUE,...; values are TOML, and a comma in brackets or quotes is theirs.

    Raises:
        InputError: If it is not of this form, names the seed, or a value twice.

    Example:
        >>> axis("objective.lambda_grad=0,0.1,1")
        ('objective.lambda_grad', ('0', '0.1', '1'))
        >>> axis('data.ood=["digits:8,9"],["digits:8,9", "svhn"]')
        ('data.ood', ('["digits:8,9"]', '["digits:8,9", "svhn"]'))
    """
    key, _, listed = (part.strip() for part in text.partition("="))
    values = tuple(_split(listed))
    if not key or not all(values):
        raise InputError(f"--grid {text}: expected KEY=VALUE,VALUE,... such as objective.lambda_grad=0,0.1,1")
    if key in ("seed", "name"):
        raise InputError(f"--grid {text}: the sweep sets the {key} itself; --seeds N trains every value N times")
    if len(set(values)) < len(values):
        raise InputError(f"--grid {text}: a value is named twice")
    return key, values


def _split(text: str) -> Iterator[str]:
    """The values of a list, each as it is written: a comma ends one wherever what stands before it is whole."""
    start = 0
    for end, character in enumerate(text + ","):
        if character == "," and _whole(text[start:end]):
            yield text[start:end].strip()
            start = end + 1
    if start <= len(text):
        yield text[start:].strip()  # a bracket or a quote that is never closed


def _whole(value: str) -> bool:
    if not value.strip().startswith(("[", '"', "'", "{")):
        return True
    try:
        tomllib.loads(f"value = {value}")
    except tomllib.TOMLDecodeError:
        return False
    return True


def cells(
    source: Path, grid: Mapping[str, Sequence[str]], seeds: int, out: Path, settings: Sequence[str] = ()
) -> list[Cell]:
    """The cells of a sweep: every combination of the grid's values with every seed, the seeds innermost.

    The seeds count up from the recipe's.

    Args:
        source: Recipe file.
        grid: Values by the full name of a setting, as `axis` gives them.
        seeds: Trainings of each combination.
        out: Folder of the sweep.
        settings: KEY=VALUE for all of them.

    Raises:
        InputError: If a recipe is not right, or there is no seed.
    """
    if seeds < 1:
        raise InputError(f"{seeds} seeds leave nothing to train; use 1 or more")
    first = recipe.load(source, settings).seed
    found = []
    for chosen in itertools.product(*grid.values()):
        values = dict(zip(grid, chosen, strict=True))
        changes = [f"{key}={value}" for key, value in values.items()]
        for seed in range(first, first + seeds):
            name = "-".join(filter(None, [_label(values), f"seed={seed}"]))
            own = recipe.load(source, [*settings, *changes, f"seed={seed}", f'name="{name}"'])
            found.append(Cell(values, own, out / name))
    if len({cell.folder for cell in found}) < len(found):
        raise InputError("two values of the grid would go to folders of the same name; write them differently")
    return found


def _label(values: Mapping[str, str], but: str | None = None) -> str:
    """Settings and values as the name of a folder, without one of them; by the last part of their names where it will do."""
    short = {key: key.rpartition(".")[2] for key in values}
    clear = len({*short.values()}) == len(short)
    label = ",".join(f"{short[key] if clear else key}={value}" for key, value in values.items() if key != but)
    return "".join(letter if letter.isalnum() or letter in "=.,-_+" else "_" for letter in label)


def train(cell: Cell, experiment: Experiment, device: str, reporter: Reporter = SILENT) -> Detector:
    """The detector of a cell: trained on its images, its training gone on with, or as it lies there.

    Raises:
        InputError: If the folder holds another recipe's, or the recipe cannot be trained.
        RunError: If the training diverges.
    """
    if not cell.model.exists() or cell.unfinished:
        return training.run(
            cell.recipe,
            cell.folder,
            experiment=experiment,
            device=device,
            resume=cell.unfinished,
            reporter=reporter,
        )
    found = detector.load(cell.model, device)
    if different := recipe.first_difference(found.origin.recipe, cell.recipe):
        raise InputError(f"{cell.model} is of another recipe ({different}); choose another --out")
    return found


def measure(
    cell: Cell,
    experiment: Experiment,
    certifying: Settings | None,
    analysing: AnalysisSettings | None,
    *,
    limits: Limits = ALL,
    device: str = "cpu",
    reporter: Reporter = SILENT,
) -> None:
    """Train, certify and analyse a cell; what is done already is left as it is.

    Args:
        cell: The cell.
        experiment: Its images, as of `experiment_of`.
        certifying: How it is certified; None: not at all.
        analysing: How its Lipschitz constants are bounded; None: not at all. Noise sets are left out.
        limits: Most images of each set.
        device: "cpu", "cuda", ...
        reporter: Hears of all of it.

    Raises:
        InputError: If recipe, settings or folder are unusable.
        RunError: If the training diverges, or an engine is missing.
        SoundnessError: If an attack or an estimate contradicts a proof.
    """
    trained = train(cell, experiment, device, reporter)
    sets = [experiment.test, *experiment.ood]
    if certifying:
        stage = f"certify {cell.name}"
        certify.run(
            trained,
            cell.model,
            sets,
            certifying,
            cell.folder,
            limit=limits.certify,
            stage=stage,
            reporter=reporter,
        )
    if analysing:
        real = [images for images in sets if images.kind != "noise"]
        analyse.run(trained, cell.model, real, analysing, cell.folder, limit=limits.lipschitz, reporter=reporter)


def run(
    chosen: Sequence[Cell],
    certifying: Settings | None,
    analysing: AnalysisSettings | None,
    *,
    limits: Limits = ALL,
    shard: Shard = WHOLE,
    data_dir: Path | None = None,
    download: bool = False,
    device: str = "cpu",
    reporter: Reporter = SILENT,
) -> None:
    """Do the cells of a shard, one after the other; `collected` reads what all shards have done.

    A cell that fails (a training that diverges) does not keep the others from being done.

    Args:
        chosen: All cells of the sweep.
        certifying: As for `measure`.
        analysing: As for `measure`.
        limits: As for `measure`.
        shard: Which cells to do.
        data_dir: Folder that holds downloaded data sets.
        download: Whether a missing torchvision set may be downloaded.
        device: As for `measure`.
        reporter: Hears of every cell.

    Raises:
        InputError: If recipe, settings or folder are unusable.
        RunError: After the last cell, if some failed; it names them, and why the first did.
        SoundnessError: If an attack or an estimate contradicts a proof.
    """
    if shard.count > len(chosen):
        raise InputError(f"{shard.count} shards for {len(chosen)} cells; use fewer")
    own = shard.of(chosen)
    data, experiment = own[0].recipe.data, experiment_of(own[0].recipe, data_dir, download)
    channels, height, width = experiment.test.images.shape[1:]
    if certifying:
        certifying.check((channels, height, width))
    if analysing:
        analysing.check((channels, height, width))
    failed: dict[str, RunError] = {}
    for number, cell in enumerate(own, 1):
        reporter.say(f"{cell.name}: {number} of {len(own)}")
        try:
            if cell.recipe.data != data:
                data, experiment = cell.recipe.data, experiment_of(cell.recipe, data_dir, download)
            measure(cell, experiment, certifying, analysing, limits=limits, device=device, reporter=reporter)
        except RunError as error:
            failed[cell.name] = error
            reporter.say(f"{cell.name}: {error}")
    if failed:
        reason = next(iter(failed.values()))
        raise RunError(f"{len(failed)} of {len(own)} cells failed: {', '.join(failed)} ({reason})")


def lacking(cell: Cell, certified: bool, analysed: bool) -> list[str]:
    """What of a cell is still to be done, in words; nothing: it is complete."""
    found = [] if cell.model.exists() and not cell.unfinished else ["train"]
    done = {run.path.name for run in status(cell.folder) if run.progress.complete} if cell.folder.is_dir() else set()
    if certified and "rows.csv" not in done:
        found.append("certify")
    if analysed and "lipschitz.csv" not in done:
        found.append("lipschitz")
    return found


def collected(chosen: Sequence[Cell], certified: bool, analysed: bool) -> list[Measured]:
    """What complete cells hold, as read from their folders.

    Raises:
        InputError: If something is damaged.
    """
    return [
        Measured(
            cell,
            Table.read(cell.folder / "rows.csv", "certification") if certified else None,
            Table.read(cell.folder / "lipschitz.csv", "lipschitz") if analysed else None,
        )
        for cell in chosen
    ]


def draw(measured: Sequence[Measured], out: Path) -> dict[Path, str]:
    """Write `sweep.csv` and the figures of a complete sweep that was certified or analysed.

    Returns:
        The files, with what they are.

    Raises:
        InputError: If the cells cannot share a figure (their test sets differ), a file cannot be written, or another
            process is writing them.
    """
    found = [record for one in measured for record in one.records]
    table, worst = out / "sweep.csv", out / "worst-case.png"
    files = {table: "one row a detector and image set"}
    varied = _OBJECTIVE in measured[0].cell.values
    groups: dict[Path, set[str]] = {}
    tables: dict[str, list[Table]] = {}
    for one in measured:
        if varied:
            label = one.cell.label(but=_OBJECTIVE)
            groups.setdefault(out / f"{'-'.join(filter(None, ['objective', label]))}.png", set()).add(one.cell.name)
        if one.rows is not None:
            tables.setdefault(one.cell.label() or "recipe", []).append(one.rows)
    with locked(table, worst, *groups):
        write_csv(table, list(found[0]), found)
        for path, names in groups.items():
            figures.save(figures.objective([record for record in found if record["cell"] in names]), path)
            files[path] = "slope, margin, radius, accuracy and FPR95 against lambda_grad"
        if tables:
            figures.save(figures.robustness(tables, panel="fpr95"), worst)
            files[worst] = "FPR95 as OOD is moved, certified and attacked, over the seeds"
    return files


def over_seeds(measured: Sequence[Measured]) -> dict[str, list[dict[str, Any]]]:
    """For each image set, what to print: one record a combination of the grid, `group` and the keys of `SHOWN`.

    Values are means over the seeds; where there are several, plus or minus half the range.
    """
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for one in measured:
        groups.setdefault(one.cell.label() or "recipe", []).extend(one.records)
    return {
        name: [record | {key: sweeps.spread_text(record[key]) for key in sweeps.SHOWN} for record in records]
        for name, records in sweeps.over_seeds(groups).items()
    }
