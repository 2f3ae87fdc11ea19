"""The parts of an experiment: disjoint cuts of the ID set and the auxiliary outliers, and the OOD test sets."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from grood_cert.data.images import ImageSet
from grood_cert.data.sources import check_seed, load_set, splits_of
from grood_cert.data.spec import SOURCES, name_of, parse_spec
from grood_cert.data.splits import Part, chosen
from grood_cert.errors import InputError
from grood_cert.recipe import Recipe
from grood_cert.sections import DataSection


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The sets that a detector is calibrated and tested on; all images have the shape of the ID images.

    Attributes:
        calibration: ID images that set thresholds and temperatures.
        test: ID images for evaluation.
        ood: OOD test sets, those of noise (kind ``noise``) included.
        notes: Lines on what the parts of the ID set come from, where it has splits or sets of its own for them, and on
            images that were left out, converted or resized.
    """

    calibration: ImageSet
    test: ImageSet
    ood: tuple[ImageSet, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Experiment(Evaluation):
    """The sets of one experiment.

    Attributes:
        train: ID images to train on.
        auxiliary: Outliers seen in training.
        auxiliary_heldout: Outliers of the same source, kept for the training log.
        auxiliary_removed: How many images the auxiliary source shared with an OOD test set, by the name of that set;
            they were removed from the auxiliary set. Sets that share none are not listed.
    """

    train: ImageSet
    auxiliary: ImageSet
    auxiliary_heldout: ImageSet
    auxiliary_removed: Mapping[str, int] = field(default_factory=dict)


def load_experiment(
    *,
    id: str,
    auxiliary: str,
    ood: Sequence[str],
    test: str = "",
    calibration: str = "",
    data_dir: Path | None = None,
    download: bool = False,
    calibration_share: float = 0.2,
    test_share: float = 0.2,
    heldout_share: float = 0.2,
    train_limit: int = 0,
    seed: int = 0,
) -> Experiment:
    """Load the ID set, the auxiliary outliers and the OOD test sets, cut into disjoint parts.

    A part of the ID set is, in this order, the set that `test` or `calibration` names, the split of the ID set that
    plays it (`grood_cert.data.splits`), or a cut of its train images. Cuts are seeded and stratified by class. An image
    that a source repeats is used once when the source is cut; one that the test part holds too is neither calibrated
    nor trained on, one of a calibration part of its own is not trained on.

    Images are compared pixel by pixel, by hash. One that the ID set shares with another set is an error. One that the
    auxiliary set shares with an OOD test set is removed from the auxiliary set, where a detector would learn the
    answer, and counted in `Experiment.auxiliary_removed`. Noise may coincide.

    Args:
        id: Spec of the ID set; its images set the shape of all others.
        auxiliary: Spec of the outliers to train with.
        ood: Specs of the OOD test sets.
        test: Spec of ID images for the test.
        calibration: Spec of ID images for calibration.
        data_dir: Root of the torchvision sets and of the named folders, ``data`` by default.
        download: Let torchvision download what is missing.
        calibration_share: Share, in (0, 1), of the ID images kept for calibration where that part is cut.
        test_share: Share of the ID images kept for the test where that part is cut.
        heldout_share: Share of the auxiliary images kept out of training.
        train_limit: If positive, most images to train on, of the ID and the auxiliary set each.
        seed: Seed of the cuts, the noise sets and the photo patches.

    Raises:
        InputError: As for `load_set`; or two specs name the same images, the ID set shares images with another set, a
            part has a class that the ID set has not, a share lies outside (0, 1), or a part would be empty.

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
    roles = [("ID set", id), ("test set", test), ("calibration set", calibration), ("auxiliary set", auxiliary)]
    roles = [(role, spec) for role, spec in roles if spec]
    for number, (role, spec) in enumerate(roles):
        for other_role, other in roles[:number]:
            _check_sources(role, spec, other_role, other)
    for spec in ood:
        for role, other in roles:
            _check_sources("OOD set", spec, role, other)

    def load(spec: str, split: Part, shape: tuple[int, int, int] | None) -> ImageSet:
        return load_set(spec, split=split, shape=shape, data_dir=data_dir, download=download, seed=seed)

    shares: dict[Part, float] = {"calibration": calibration_share, "test": test_share}
    rng = np.random.default_rng([seed, 1])
    own, id_keys, notes = _id_parts(
        load, id, splits_of(id, data_dir), {"test": test, "calibration": calibration}, shares, train_limit, rng
    )
    pool = own["train"]
    outliers, keys, _ = _without_repeats(load(auxiliary, "train", pool.shape), set())
    notes += _said(outliers, "train", chosen(splits_of(auxiliary, data_dir), "train"))
    _refuse_shared("auxiliary set", outliers, keys, pool.name, id_keys)
    ood_sets, seen, removed = [], set[bytes](), {}
    found_keys: dict[frozenset[bytes], str] = {}
    for spec in ood:
        ood_set = load(spec, "test", pool.shape)
        notes += _said(ood_set, "test", chosen(splits_of(spec, data_dir), "test"))
        ood_keys = frozenset(found := ood_set.image_keys())
        _refuse_shared("OOD set", ood_set, found, pool.name, id_keys)
        other = found_keys.setdefault(ood_keys, ood_set.name)
        if other != ood_set.name:
            raise InputError(f"OOD sets '{other}' and '{ood_set.name}' hold the same images; give each set once")
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
        notes += [f"'{outliers.name}': {count} images left out, which '{n}' holds too" for n, count in removed.items()]
    rng = np.random.default_rng([seed, 2])
    outliers_train, outliers_heldout = _cut(outliers, {"held-out": heldout_share}, train_limit, rng)
    return Experiment(
        train=own["train"],
        calibration=own["calibration"],
        test=own["test"],
        auxiliary=outliers_train,
        auxiliary_heldout=outliers_heldout,
        ood=tuple(ood_sets),
        auxiliary_removed=removed,
        notes=tuple(notes),
    )


def experiment_of(recipe: Recipe, data_dir: Path | None = None, download: bool = False) -> Experiment:
    """Load the images a recipe asks for; see `load_experiment`."""
    return load_experiment(**asdict(recipe.data), data_dir=data_dir, download=download)


def load_evaluation(data: DataSection, data_dir: Path | None = None, download: bool = False) -> Evaluation:
    """Load the images that a network of unknown training is calibrated and tested on.

    Test images are, in this order, the set `data.test`, the split of the ID set for the test, or the ID set; calibration
    images the set `data.calibration`, the split of the ID set for it, or a seeded cut, stratified by class, of the test
    images of the share `data.calibration_share`. A split to train on is never used: the network may have seen it.

    Args:
        data: Specs, shares and seed; the auxiliary set and what is about training play no part.
        data_dir: As for `load_experiment`.
        download: As for `load_experiment`.

    Raises:
        InputError: As for `load_experiment`.

    >>> sets = load_evaluation(DataSection(id="digits:0-5", ood=("digits:8,9",), calibration_share=0.5))
    >>> len(sets.calibration), len(sets.test), len(sets.ood[0])
    (542, 541, 354)
    """
    check_seed(data.seed)
    if not 0 < data.calibration_share < 1:
        raise InputError(f"the calibration share must lie between 0 and 1, not {data.calibration_share}")
    roles = [("ID set", data.id), ("test set", data.test), ("calibration set", data.calibration)]
    for spec in data.ood:
        for role, other in roles:
            if other:
                _check_sources("OOD set", spec, role, other)

    def load(spec: str, split: Part, shape: tuple[int, int, int] | None) -> ImageSet:
        return load_set(spec, split=split, shape=shape, data_dir=data_dir, download=download, seed=data.seed)

    splits = splits_of(data.id, data_dir)
    test = replace(load(data.test or data.id, "test", None), kind="id")
    notes = _said(test)
    if data.calibration or "calibration" in splits:
        whole = load(data.calibration or data.id, "calibration", test.shape)
        whole = _numbered("calibration", replace(whole, kind="id"), test)
        calibration, _, shared = _without_repeats(whole, set(test.image_keys()))
        notes += _said(whole)
        origin = f"'{data.calibration}'" if data.calibration else f"its split '{splits['calibration']}'"
    else:
        pool, _, shared = _without_repeats(test, set())
        test, calibration = _cut(
            pool, {"calibration": data.calibration_share}, 0, np.random.default_rng([data.seed, 1])
        )
        origin = "a cut of the test images"
    if not len(calibration):
        raise InputError("the calibration set holds nothing but images of the test set")
    if shared:
        notes.append(f"{shared} images are not calibrated on, because the test set holds them too")
    source = f"'{data.test or data.id}'"
    if not data.test and "test" in splits:
        source += f", split '{splits['test']}'"
    notes.insert(
        0, f"ID images: {len(test)} for the test from {source}; {len(calibration)} for calibration from {origin}"
    )
    keys = {*test.image_keys(), *calibration.image_keys()}
    ood: list[ImageSet] = []
    found: dict[frozenset[bytes], str] = {}
    for spec in data.ood:
        images = load(spec, "test", test.shape)
        notes += _said(images, "test", chosen(splits_of(spec, data_dir), "test"))
        own = images.image_keys()
        _refuse_shared("OOD set", images, own, test.name, keys)
        other = found.setdefault(frozenset(own), images.name)
        if other != images.name or images.name in [one.name for one in ood]:
            raise InputError(f"OOD sets '{other}' and '{images.name}' hold the same images; give each set once")
        ood.append(images)
    return Evaluation(calibration=calibration, test=test, ood=tuple(ood), notes=tuple(notes))


def _id_parts(
    load: Callable[[str, Part, tuple[int, int, int] | None], ImageSet],
    id: str,
    splits: Mapping[Part, str],
    given: Mapping[Part, str],
    shares: Mapping[Part, float],
    limit: int,
    rng: np.random.Generator,
) -> tuple[dict[Part, ImageSet], set[bytes], list[str]]:
    """The three parts of the ID set, the keys of all its images, and what there is to say.

    Args:
        load: Loads a part of a spec in a shape.
        id: Spec of the ID set.
        splits: The splits that it comes with.
        given: Specs of sets of their own, by the part they play; "" for none. In this order, an image is of the first
            part that holds it.
        shares: Shares of the parts that are cut.
        limit: Most images to train on, if positive.
        rng: Draws the cuts.
    """
    if splits and "train" not in splits:
        raise InputError(f"ID set '{id}' has splits {' and '.join(splits.values())}, and none to train on")
    pool = replace(load(id, "train", None), kind="id")
    notes = _said(pool)
    parts: dict[Part, ImageSet] = {}
    origin: dict[Part, str] = dict.fromkeys(shares, "a cut of it")
    seen: set[bytes] = set()
    for part, spec in given.items():
        if not spec and part not in splits:
            continue
        whole = _numbered(part, replace(load(spec or id, part, pool.shape), kind="id"), pool)
        notes += _said(whole) if spec or whole.note != pool.note else []
        origin[part] = f"'{whole.name}'" if spec else f"its split '{splits[part]}'"
        found, keys, shared = _without_repeats(whole, seen)
        if not keys:
            raise InputError(f"the {part} set '{whole.name}' holds nothing but images of the test set")
        if shared:
            notes.append(
                f"{shared} images of {origin[part]} are not calibrated on, because the test set holds them too"
            )
        parts[part] = whole if part == "test" else found
        seen |= set(keys)
    pool, keys, shared = _without_repeats(pool, seen)
    if not keys:
        raise InputError(f"the ID set '{pool.name}' holds nothing but images of its {' and '.join(parts)} set")
    if shared:
        notes.append(
            f"{shared} images of '{pool.name}' are not trained on, because its {' or '.join(parts)} set holds them"
        )
    shares = {part: share for part, share in shares.items() if part not in parts}
    train, *cuts = _cut(pool, shares, limit, rng)
    told = bool(parts)
    parts |= {"train": train, **dict(zip(shares, cuts, strict=True))}
    if told:
        source = f"'{pool.name}'" + (f", split '{splits['train']}'" if "train" in splits else "")
        others = [f"{len(parts[part])} for {part} from {whence}" for part, whence in origin.items()]
        notes.insert(0, f"ID images: {len(train)} to train on from {source}; {'; '.join(others)}")
    return parts, seen | set(keys), notes


def _said(images: ImageSet, part: str = "", split: str = "") -> list[str]:
    """A line on the split that a set is, unless it is called like its part, and on what was done to its images."""
    words = [f"its split '{split}'"] * (split != part) * bool(split) + [images.note] * bool(images.note)
    return [f"'{images.name}': {'; '.join(words)}"] if words else []


def _numbered(part: str, images: ImageSet, pool: ImageSet) -> ImageSet:
    """The images with the classes of the ID set: by name, or by number where one of the two only counts its classes."""
    own, names = images.class_names, pool.class_names
    if own == names or len(own) == len(names) == 1:
        return replace(images, class_names=names)
    if any(counted == tuple(map(str, range(len(counted)))) for counted in (own, names)) and len(own) <= len(names):
        return replace(images, class_names=names)
    numbers = torch.tensor([names.index(name) if name in names else -1 for name in own])
    labels = numbers[images.labels]
    if bool((labels < 0).any()):
        unknown = own[int(images.labels[labels < 0][0])]
        raise InputError(
            f"the {part} set '{images.name}' has images of class '{unknown}', which the ID set '{pool.name}' has not; "
            f"its classes are {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
        )
    return replace(images, labels=labels, class_names=names)


def _cut(pool: ImageSet, shares: Mapping[Any, float], limit: int, rng: np.random.Generator) -> list[ImageSet]:
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


def _without_repeats(pool: ImageSet, seen: set[bytes]) -> tuple[ImageSet, list[bytes], int]:
    """Drop images whose key is in ``seen``, and all copies but the first.

    Returns:
        The rest, their keys, and how many images had a key in ``seen``.
    """
    first: dict[bytes, int] = {}
    shared = 0
    for index, key in enumerate(pool.image_keys()):
        if key in seen:
            shared += 1
        else:
            first.setdefault(key, index)
    keep = list(first.values())
    return pool if len(keep) == len(pool) else pool.select(keep), list(first), shared


def _check_sources(role: str, spec: str, other_role: str, other: str) -> None:
    (source, classes), (other_source, other_classes) = parse_spec(spec), parse_spec(other)
    built_in = source in SOURCES or other_source in SOURCES
    paths = {os.path.realpath(name.removeprefix("hf:")) for name in (source, other_source)}
    if source != other_source and (built_in or len(paths) > 1):
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
