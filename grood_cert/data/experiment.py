"""The parts of an experiment: disjoint cuts of the ID set and the auxiliary outliers, and the OOD test sets."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np

from grood_cert.data.images import ImageSet
from grood_cert.data.sources import check_seed, load_set
from grood_cert.data.spec import SOURCES, has_official_split, name_of, parse_spec
from grood_cert.errors import InputError
from grood_cert.recipe import Recipe


@dataclass(frozen=True)
class Experiment:
    """The sets of one experiment; all images have the shape of the ID images.

    Attributes:
        train: ID images to train on.
        calibration: ID images that set thresholds and temperatures.
        test: ID images for evaluation.
        auxiliary: Outliers seen in training.
        auxiliary_heldout: Outliers of the same source, kept for the training log.
        ood: OOD test sets, those of noise (kind ``noise``) included.
        auxiliary_removed: How many images the auxiliary source shared with an OOD test set, by the name of that set;
            they were removed from the auxiliary set. Sets that share none are not listed.
    """

    train: ImageSet
    calibration: ImageSet
    test: ImageSet
    auxiliary: ImageSet
    auxiliary_heldout: ImageSet
    ood: tuple[ImageSet, ...]
    auxiliary_removed: Mapping[str, int] = field(default_factory=dict)


def load_experiment(
    *,
    id: str,
    auxiliary: str,
    ood: Sequence[str],
    data_dir: Path | None = None,
    download: bool = False,
    calibration_share: float = 0.2,
    test_share: float = 0.2,
    heldout_share: float = 0.2,
    train_limit: int = 0,
    seed: int = 0,
) -> Experiment:
    """Load the ID set, the auxiliary outliers and the OOD test sets, cut into disjoint parts.

    Cuts are seeded and stratified by class. A source with an official split (the torchvision ones, ``imagenet``) is cut
    within its train split, and its test split is the test part. An image that a source repeats is used once when the
    source is cut, and never for training when the official test split holds it too.

    Images are compared pixel by pixel, by hash. One that the ID set shares with another set is an error. One that the
    auxiliary set shares with an OOD test set is removed from the auxiliary set, where a detector would learn the
    answer, and counted in `Experiment.auxiliary_removed`. Noise may coincide.

    Args:
        id: Spec of the ID set; its images set the shape of all others.
        auxiliary: Spec of the outliers to train with.
        ood: Specs of the OOD test sets.
        data_dir: Root of the torchvision sets and of the named folders, ``data`` by default.
        download: Let torchvision download what is missing.
        calibration_share: Share, in (0, 1), of the ID images (of the official train split) kept for calibration.
        test_share: Share of the ID images kept for the test where there is no official test split.
        heldout_share: Share of the auxiliary images kept out of training.
        train_limit: If positive, most images to train on, of the ID and the auxiliary set each.
        seed: Seed of the cuts, the noise sets and the photo patches.

    Raises:
        InputError: As for `load_set`; or two specs name the same images, the ID set shares images with another set, a
            share lies outside (0, 1), or a part would be empty.

    >>> sets = load_experiment(id="digits:0-5", auxiliary="digits:6,7", ood=["digits:8,9", "uniform-noise"])
    >>> len(sets.train), len(sets.calibration), len(sets.test), [o.kind for o in sets.ood]
    (649, 217, 217, ['ood', 'noise'])
    """
    check_seed(seed)
    if train_limit < 0:
        raise InputError(f"the training limit must be 0 (no limit) or positive, not {train_limit}")
    for part, share in (("calibration", calibration_share), ("test", test_share), ("held-out", heldout_share)):
        if not 0 < share < 1:
            raise InputError(f"the {part} share must lie between 0 and 1, not {share}")
    names = [name_of(spec) for spec in ood]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"two OOD sets would be called '{name}'; give each OOD set once, under its own name")
    _check_sources("auxiliary set", auxiliary, "ID set", id)
    for spec in ood:
        _check_sources("OOD set", spec, "ID set", id)
        _check_sources("OOD set", spec, "auxiliary set", auxiliary)

    def load(spec: str, split: Literal["train", "test"], shape: tuple[int, int, int] | None) -> ImageSet:
        return load_set(spec, split=split, shape=shape, data_dir=data_dir, download=download, seed=seed)

    pool = replace(load(id, "train", None), kind="id")
    rng = np.random.default_rng([seed, 1])
    if has_official_split(id):
        test = replace(load(id, "test", pool.shape), kind="id")
        test_keys = set(test.image_keys())
        pool, keys = _without_repeats(pool, test_keys)
        train, calibration = _cut(pool, {"calibration": calibration_share}, train_limit, rng)
        id_keys = {*keys, *test_keys}
    else:
        pool, keys = _without_repeats(pool, set())
        shares = {"calibration": calibration_share, "test": test_share}
        train, calibration, test = _cut(pool, shares, train_limit, rng)
        id_keys = set(keys)

    outliers, keys = _without_repeats(load(auxiliary, "train", pool.shape), set())
    _refuse_shared("auxiliary set", outliers, keys, pool.name, id_keys)
    ood_sets, seen, removed = [], set[bytes](), {}
    for spec in ood:
        ood_set = load(spec, "test", pool.shape)
        ood_keys = set(found := ood_set.image_keys())
        _refuse_shared("OOD set", ood_set, found, pool.name, id_keys)
        shared = ood_keys.intersection(keys)
        if shared and ood_set.kind != "noise":
            removed[ood_set.name] = len(shared)
            seen |= shared
        ood_sets.append(ood_set)
    if len(seen) == len(outliers):
        raise InputError(
            f"auxiliary set '{outliers.name}' holds nothing but images of the OOD test sets; the two must not overlap"
        )
    if seen:
        outliers = outliers.select([index for index, key in enumerate(keys) if key not in seen])
    rng = np.random.default_rng([seed, 2])
    outliers_train, outliers_heldout = _cut(outliers, {"held-out": heldout_share}, train_limit, rng)
    return Experiment(train, calibration, test, outliers_train, outliers_heldout, tuple(ood_sets), removed)


def experiment_of(recipe: Recipe, data_dir: Path | None = None, download: bool = False) -> Experiment:
    """Load the images a recipe asks for; see `load_experiment`."""
    return load_experiment(**asdict(recipe.data), data_dir=data_dir, download=download)


def _cut(pool: ImageSet, shares: dict[str, float], limit: int, rng: np.random.Generator) -> list[ImageSet]:
    """Cut off a part for each share; the rest, of at most ``limit`` images if positive, comes first."""
    labels = pool.labels.numpy()
    position = np.empty(len(pool))
    for label in np.unique(labels):  # spread each class evenly, so that every stretch of the order is stratified
        members = rng.permutation(np.flatnonzero(labels == label))
        position[members] = (np.arange(len(members)) + rng.random()) / len(members)
    order = np.argsort(position, kind="stable")
    parts = []
    for part, share in shares.items():
        count = round(share * len(pool))
        if count == 0:
            raise InputError(
                f"a {part} share of {share} leaves no {part} images: '{pool.name}' has only "
                f"{len(pool)}; raise the share or give more images"
            )
        parts.append(pool.select(np.sort(order[:count])))
        order = order[count:]
    if len(order) == 0:
        taken = " and ".join(f"{part} share {share}" for part, share in shares.items())
        raise InputError(f"{taken} leave none of the {len(pool)} images of '{pool.name}' to train on; lower them")
    return [pool.select(np.sort(order[:limit] if limit else order)), *parts]


def _without_repeats(pool: ImageSet, seen: set[bytes]) -> tuple[ImageSet, list[bytes]]:
    """Drop images whose key is in ``seen``, and all copies but the first; return the rest with their keys."""
    first: dict[bytes, int] = {}
    for index, key in enumerate(pool.image_keys()):
        if key not in seen:
            first.setdefault(key, index)
    keep = list(first.values())
    return pool if len(keep) == len(pool) else pool.select(keep), list(first)


def _check_sources(role: str, spec: str, other_role: str, other: str) -> None:
    (source, classes), (other_source, other_classes) = parse_spec(spec), parse_spec(other)
    built_in = source in SOURCES or other_source in SOURCES
    if source != other_source and (built_in or os.path.realpath(source) != os.path.realpath(other_source)):
        return
    if classes is None or other_classes is None:
        raise InputError(
            f"{role} '{spec}' and {other_role} '{other}' are the same source; use another set, or give disjoint classes"
        )
    shared = sorted(set(classes) & set(other_classes))
    if shared:
        raise InputError(
            f"{role} '{spec}' and {other_role} '{other}' share {'class' if len(shared) == 1 else 'classes'} "
            f"{', '.join(map(str, shared))}; give disjoint classes"
        )


def _refuse_shared(role: str, images: ImageSet, keys: Sequence[bytes], id_name: str, id_keys: set[bytes]) -> None:
    """Refuse images that the ID set holds too, noise excepted."""
    shared = sum(key in id_keys for key in keys)
    if shared and images.kind != "noise":
        raise InputError(
            f"{role} '{images.name}' shares {shared} image{'s' * (shared > 1)} with the ID set '{id_name}'; the two "
            "must not overlap"
        )
