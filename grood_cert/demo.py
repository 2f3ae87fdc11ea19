"""The first tour: two detectors on real handwritten digits, trained, certified and compared."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from grood_cert.certification.settings import Settings
from grood_cert.data import experiment_of
from grood_cert.detector import Detector
from grood_cert.metrics import mean_over_sets
from grood_cert.recipe import Recipe
from grood_cert.results import curves, figures, report
from grood_cert.results.card import Result
from grood_cert.results.summary import RADII, radius_summary
from grood_cert.results.sweeps import objective_records
from grood_cert.results.table import Table
from grood_cert.runs import certify
from grood_cert.system.files import write_csv
from grood_cert.system.reporting import SILENT, Reporter
from grood_cert.training import run as training

EPS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15)
SHOWN_EPS = (0.01, 0.03, 0.05)
_RADII = {key: words for key, words in RADII.items() if "lipschitz" not in key}
_CAUSES = {  # of a radius
    "margin": "margin |S - gamma|, median",
    "gradient_norm_estimate": "slope at x, median: gradient norm, estimate",
}
QUANTITIES: dict[str, str] = {
    "accuracy": "ID accuracy",
    "auroc": "AUROC",
    "fpr95_id": "fpr95_id",
    **{
        f"{key}_{kind}": f"{kind.upper()} {what}"
        for kind in ("id", "ood")
        for key, what in {**_CAUSES, **{key: f"radius, median: {words}" for key, words in _RADII.items()}}.items()
    },
    **{f"fpr95_id_certified@{eps}": f"certified fpr95_id at eps {eps}" for eps in SHOWN_EPS},
    **{f"fpr95_id_attacked@{eps}": f"attacked fpr95_id at eps {eps}" for eps in SHOWN_EPS},
}
TITLE = "digits 0-5 (ID) against digits 8-9 and photograph patches (OOD), l_inf, CROWN"
REPORT_TITLE = "Two detectors of handwritten digits: what is proved about their robustness"
NOTE = (
    "fpr95_id: share of OOD accepted when 95 % of ID is. Numbers on OOD are means over the real OOD sets, noise apart.\n"
    "An estimate proves nothing. A certified radius is proved, an attack radius is a counterexample: the true radius\n"
    "lies between the two. Training metrics use the whole test sets, radii and curves the samples certified of each."
)


@dataclass(frozen=True)
class Demonstration:
    """What the demo made.

    Attributes:
        summary: One record a model, `model` and the keys of `QUANTITIES`.
        files: The files written, with what they are.
    """

    summary: list[dict[str, Any]]
    files: dict[Path, str]


def summarise(name: str, detector: Detector, rows: Table) -> dict[str, Any]:
    """One record on a certified model: `model` and the keys of `QUANTITIES`."""
    real = [record for record in detector.origin.metrics["ood"].values() if record["kind"] == "ood"]
    record: dict[str, Any] = {"model": name}
    record["accuracy"] = detector.origin.metrics["accuracy"]
    record |= {key: mean_over_sets([values[key] for values in real]) for key in ("auroc", "fpr95_id")}
    found = [(_RADII, radius_summary(rows)), (_CAUSES, objective_records(rows, None))]
    for (keys, records), kind in itertools.product(found, ("id", "ood")):
        for key in keys:
            values = [item[key] for item in records if item["kind"] == kind and item[key] is not None]
            record[f"{key}_{kind}"] = mean_over_sets(values) if values else None
    fpr = curves.fpr_curve(rows)
    for eps in SHOWN_EPS:
        (index,) = np.flatnonzero(fpr.eps == eps)
        record[f"fpr95_id_certified@{eps}"] = float(fpr.certified[index])
        record[f"fpr95_id_attacked@{eps}"] = float(fpr.attacked[index])
    return record


def run(
    out: Path,
    *,
    limit: int = 100,
    device: str = "cpu",
    force: bool = False,
    recipe: Recipe | None = None,
    reporter: Reporter = SILENT,
) -> Demonstration:
    """Train energy-only and GReg detectors that differ in lambda_grad alone, certify both, and draw the curves.

    Args:
        out: Folder; one sub-folder a model, `curves.png`, `curves.csv`, `summary.csv`, `report.html` and `report.json`.
        limit: Most samples certified of each set, 0 for all.
        device: "cpu", "cuda", ...
        force: Overwrite an earlier demo.
        recipe: The GReg recipe, by default the embedded digits one.
        reporter: Hears of each model's training and certification.

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
    settings = Settings(eps=EPS, stages=("ibp", "crown"), per_logit=True)
    certifications: dict[str, Table] = {}
    summary: list[dict[str, Any]] = []
    for name, chosen in recipes.items():
        folder = out / name
        detector = training.run(chosen, folder, device=device, force=force, reporter=reporter)
        experiment = experiment_of(chosen)
        certifications[name] = certify.run(
            detector,
            folder / "model.pt",
            [experiment.test, *experiment.ood],
            settings,
            folder,
            limit=limit,
            save_adversarial=True,
            force=force,
            stage=f"certify {name}",
            reporter=reporter,
        )
        about = certifications[name].manifest
        reporter.say(f"{name}: bounded by {about['bounded_by']}; {certify.agreement(about['cross_check'])}")
        summary.append(summarise(name, detector, certifications[name]))
    figures.save(figures.robustness(certifications), out / "curves.png")
    figures.write_numbers(figures.numbers(certifications), out / "curves.csv")
    write_csv(out / "summary.csv", ["model", *QUANTITIES], summary)
    results = {name: [Result(out / name / "rows.csv", rows)] for name, rows in certifications.items()}
    report.write(results, out / "report.html", REPORT_TITLE)
    files = {
        out / "curves.png": "the figure: certified and attacked FPR95, radii, robustness against FPR",
        out / "curves.csv": "the points of its curves, with 95 % limits",
        out / "summary.csv": "the table above",
        out
        / "report.html": "all of it on one page to hand in: what was tested, proved, shown, estimated, and its limits",
        out
        / "energy": "model.pt, log.csv, rows.csv, rows.json of the energy-only detector; counterexamples in adversarial/",
        out / "greg": "the same of the GReg detector",
    }
    return Demonstration(summary, files)
