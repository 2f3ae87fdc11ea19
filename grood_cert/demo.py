"""The first tour: two detectors on real handwritten digits, trained, certified and compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from grood_cert import certification, curves, plots, training
from grood_cert.certification import Settings
from grood_cert.detector import Detector
from grood_cert.files import write_csv
from grood_cert.metrics import mean_over_sets
from grood_cert.recipe import Recipe
from grood_cert.rows import Rows

EPS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15)
SHOWN_EPS = (0.01, 0.03, 0.05)
COLUMNS: dict[str, str] = {
    "model": "model",
    "accuracy": "ID\naccuracy",
    "auroc": "AUROC",
    "fpr95_id": "fpr95_id",
    "gradient_norm_id": "mean ID\n||grad S||_2",
    "radius_gradient_norm_estimate": "ID radius:\nestimate",
    "radius_certified": "\ncertified",
    "radius_attack": "\nattack",
    "certified_to_attack": "certified\n/attack",
    "certified_to_attack_per_logit": "per logit\n/attack",
    **{f"fpr95_id_certified@{eps}": f"certified fpr95_id\nat eps {eps}" for eps in SHOWN_EPS},
}
NOTE = (
    "AUROC and fpr95_id (share of OOD accepted when 95 % of ID is) are means over the real OOD sets, noise apart. "
    "Radii are medians over ID test samples.\nThe estimate proves nothing; the certified radius is proved; "
    "the attack radius is a counterexample, so the true radius lies between the last two."
)


@dataclass(frozen=True)
class Demonstration:
    """What the demo made.

    Attributes:
        summary: One record a model, with the keys of `COLUMNS`.
        files: The files written, with what they are.
    """

    summary: list[dict[str, Any]]
    files: dict[Path, str]


def summarise(name: str, detector: Detector, rows: Rows) -> dict[str, Any]:
    """One line on a certified model; the keys are those of `COLUMNS`."""
    real = [record for record in detector.metrics["ood"].values() if record["kind"] == "ood"]
    (radii,) = (record for record in curves.radius_summary(rows) if record["kind"] == "id")
    fpr = curves.fpr_curve(rows)
    record: dict[str, Any] = {
        "model": name,
        "accuracy": detector.metrics["accuracy"],
        "auroc": mean_over_sets([values["auroc"] for values in real]),
        "fpr95_id": mean_over_sets([values["fpr95_id"] for values in real]),
        "gradient_norm_id": detector.metrics["gradient_norm_id"],
    }
    record |= {key: radii[key] for key in COLUMNS if key in radii}
    for eps in SHOWN_EPS:
        (index,) = np.flatnonzero(fpr.eps == eps)
        record[f"fpr95_id_certified@{eps}"] = float(fpr.certified[index])
    return record


def run(
    out: Path,
    *,
    limit: int = 100,
    device: str = "cpu",
    force: bool = False,
    recipe: Recipe | None = None,
    stage: Callable[[str, int], None] = lambda text, total: None,
    advance: Callable[[int], None] = lambda count: None,
) -> Demonstration:
    """Train energy-only and GReg detectors that differ in lambda_grad alone, certify both, and draw the curves.

    Args:
        out: Folder; one sub-folder a model, `curves.png`, `curves.csv`, `summary.csv`.
        limit: Most samples certified of each set, 0 for all.
        device: "cpu", "cuda", ...
        force: Overwrite an earlier demo.
        recipe: The GReg recipe, by default the embedded digits one.
        stage: Called when a stage begins, with its name and its number of steps.
        advance: Called with the number of steps done.

    Raises:
        InputError: If the folder is in use or cannot be written.
        RunError: If training diverges or the bound engine is missing.
        SoundnessError: If an attack contradicts a proof.
    """
    greg = recipe or Recipe()
    recipes = {
        "energy": replace(greg, name="energy", objective=replace(greg.objective, lambda_grad=0.0)),
        "greg": replace(greg, name="greg"),
    }
    settings = Settings(eps=EPS, norm="linf", method="crown")
    certifications: dict[str, Rows] = {}
    summary: list[dict[str, Any]] = []
    for name, chosen in recipes.items():
        folder = out / name
        detector = training.run(
            chosen,
            folder,
            device=device,
            force=force,
            begin=lambda steps, name=name: stage(f"train {name}", steps),  # type: ignore[misc]
            advance=lambda: advance(1),
        )
        experiment = training.experiment_of(chosen)
        certifications[name] = certification.run(
            detector,
            folder / "model.pt",
            [experiment.test, *experiment.ood],
            settings,
            folder,
            limit=limit,
            force=force,
            begin=lambda samples, name=name: stage(f"certify {name}", samples),  # type: ignore[misc]
            advance=advance,
        )
        summary.append(summarise(name, detector, certifications[name]))
    plots.save(plots.robustness_figure(certifications), out / "curves.png")
    plots.write_table(certifications, "ood", out / "curves.csv")
    write_csv(out / "summary.csv", list(COLUMNS), summary)
    files = {
        out / "curves.png": "the figure: certified and attacked FPR95, radii, robustness against FPR",
        out / "curves.csv": "its FPR95 curves as numbers, with binomial intervals",
        out / "summary.csv": "the table above",
        out / "energy": "model.pt, log.csv, rows.csv, rows.json of the energy-only detector",
        out / "greg": "the same of the GReg detector",
    }
    return Demonstration(summary, files)
