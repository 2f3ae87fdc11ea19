"""What a run measures: after each epoch on images held out for it, at its end on the test sets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from grood_cert import metrics
from grood_cert.data import Evaluation, Experiment, ImageSet
from grood_cert.detector import logits
from grood_cert.recipe import Recipe
from grood_cert.scores import ENERGY, SCORES, Score, gradient_norm_estimate, named

_GRADIENT_BATCH = 64
_WATCHED = 2000


def mean_gradient_norm(network: nn.Module, images: Tensor, score: Score = ENERGY) -> float:
    """Mean over images of ||grad S||_2, per pixel unit; it speaks of the slope at the images, not around them.

    Args:
        network: f in eval mode.
        images: Shape (N, C, H, W).
        score: S.
    """
    weight = next(network.parameters())
    norms = [gradient_norm_estimate(network, batch.to(weight), "l2", score) for batch in images.split(_GRADIENT_BATCH)]
    return float(torch.cat(norms).mean())


def split_calibration(images: ImageSet, recipe: Recipe) -> tuple[ImageSet, ImageSet]:
    """The calibration images that a run watches, and those that gamma is calibrated on.

    The same ones, unless an epoch is chosen by what was watched: then gamma is calibrated on the others, which remain
    exchangeable with test images.
    """
    apart = recipe.evaluation.keep == "best"
    every = max(-(-len(images) // _WATCHED), 2 if apart else 1)
    watched = torch.zeros(len(images), dtype=torch.bool)
    watched[::every] = True
    return images.select(watched), images.select(~watched) if apart else images


def watch(network: nn.Module, experiment: Experiment, recipe: Recipe) -> dict[str, float] | None:
    """What a run looks at after each epoch; None if a logit is not finite."""
    calibration, _ = split_calibration(experiment.calibration, recipe)
    score = named(recipe.evaluation.score, recipe.evaluation.temperature)
    heldout = experiment.auxiliary_heldout
    heldout = heldout.select(range(0, len(heldout), -(-len(heldout) // _WATCHED)))
    inside, outside = logits(network, calibration.images), logits(network, heldout.images)
    if not bool(torch.isfinite(inside).all() and torch.isfinite(outside).all()):
        return None
    return {
        "gradient_norm_id": mean_gradient_norm(network, calibration.images, score),
        "gradient_norm_aux": mean_gradient_norm(network, heldout.images, score),
        "accuracy": _accuracy(inside, calibration),
        "fpr95_id": metrics.fpr95_id(score.value(inside).numpy(), score.value(outside).numpy()),
    }


def _accuracy(values: Tensor, images: ImageSet) -> float:
    return float((values.argmax(1) == images.labels).double().mean())


def _separation(score: Score, inside: Tensor, outside: Tensor) -> dict[str, float]:
    """Detection metrics of one score, from the logits of the ID and the OOD test set."""
    scores = score.value(inside).numpy(), score.value(outside).numpy()
    return {"auroc": metrics.auroc(*scores), "fpr95_id": metrics.fpr95_id(*scores)}


def evaluate(
    network: nn.Module, experiment: Evaluation, score: Score = ENERGY, temperature: float = 1.0
) -> dict[str, Any]:
    """Accuracy, detection metrics of every OOD set, and mean gradient norms, all on the test sets.

    Args:
        network: In eval mode; use float64 for exact metrics.
        experiment: Images.
        score: S, the score that is certified.
        temperature: That of the other `scores`.

    Returns:
        `accuracy`, `gradient_norm_id`, `gradient_norm_ood`, and under `ood` one record a set with `kind`, `samples`,
        and `auroc`, `fpr95_id`, `fpr95_ood` of S; under its `scores`, `auroc` and `fpr95_id` of each
        of `grood_cert.scores.SCORES` at the temperature.
    """
    values = logits(network, experiment.test.images)
    inside = score.value(values).numpy()
    sets = {}
    for images in experiment.ood:
        others = logits(network, images.images)
        outside = score.value(others).numpy()
        sets[images.name] = {
            "kind": images.kind,
            "samples": len(images),
            "auroc": metrics.auroc(inside, outside),
            "fpr95_id": metrics.fpr95_id(inside, outside),
            "fpr95_ood": metrics.fpr95_ood(inside, outside),
            "scores": {name: _separation(named(name, temperature), values, others) for name in SCORES},
        }
    real = [mean_gradient_norm(network, images.images, score) for images in experiment.ood if images.kind == "ood"]
    return {
        "accuracy": _accuracy(values, experiment.test),
        "gradient_norm_id": mean_gradient_norm(network, experiment.test.images, score),
        "gradient_norm_ood": metrics.mean_over_sets(real) if real else None,
        "ood": sets,
    }


def accuracy_floor(recipe: Recipe, classes: int) -> float:
    """ID accuracy below which a classifier counts as collapsed: a share of the way from chance, 1/K, to 1.

    Example:
        >>> accuracy_floor(Recipe(), 10)
        0.19
    """
    return 1 / classes + recipe.evaluation.accuracy_floor * (1 - 1 / classes)


def best_epoch(rows: Sequence[dict[str, Any]], floor: float) -> int | None:
    """The epoch with the lowest FPR95 on the held-out outliers, of those whose accuracy is not below the floor.

    Args:
        rows: Records of the epochs; of equal FPR95 the more accurate one is better, then the later one.
        floor: See `accuracy_floor`.

    Returns:
        Its number; None if every epoch is below the floor.
    """
    sound = [row for row in rows if row["accuracy"] >= floor]
    best = min(sound, key=lambda row: (row["fpr95_id"], -row["accuracy"], -row["epoch"]), default=None)
    return None if best is None else int(best["epoch"])
