"""What a detector says of images that somebody has: score, decision and class, and how far the decision is certified."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from grood_cert import api
from grood_cert.ball import Norm
from grood_cert.bounds.engines import Engine
from grood_cert.certification.outcomes import Outcome
from grood_cert.certification.settings import Settings
from grood_cert.data import ImageSet, load_pictures, load_set, parse_spec, splits_of
from grood_cert.data.folders import is_picture
from grood_cert.data.images import chunk
from grood_cert.data.spec import split_class_list
from grood_cert.detector import Detector
from grood_cert.results.columns import NORMS, grid_column
from grood_cert.system.reporting import SILENT, Reporter

_COLUMNS = ("file", "score", "gamma", "accepted", "class")
_RADII = ("radius_certified", "radius_attack")


@dataclass(frozen=True)
class Query:
    """What to say of each image beside score, decision and class.

    Attributes:
        eps: Radii in pixel units, ascending; empty: nothing is certified.
        norm: Norm of the balls.
        effort: "fast", "default" or "max".
        engine: Who gives linear bounds.
        seed: Seed of the attacks.
    """

    eps: tuple[float, ...] = ()
    norm: Norm = "linf"
    effort: str = "default"
    engine: Engine = "auto"
    seed: int = 0

    @property
    def columns(self) -> list[str]:
        """The keys of a record, in order."""
        return [*_COLUMNS, *(_RADII if self.eps else ()), *(grid_column("outcome", eps) for eps in self.eps)]

    def check(self, shape: tuple[int, int, int]) -> None:
        """Refuse what makes no sense for images of this shape.

        Raises:
            InputError: Naming what is wrong.
        """
        Settings(self.eps or (0.0,), self.norm, effort=self.effort, engine=self.engine, seed=self.seed).check(shape)


def load_images(
    specs: Sequence[str],
    shape: tuple[int, int, int],
    *,
    resize: bool = False,
    data_dir: Path | None = None,
) -> list[ImageSet]:
    """The images that files, folders and specs name, in order; picture files that follow one another are one set.

    Args:
        specs: What `grood_cert.data` reads.
        shape: Channels, height and width of the detector's images.
        resize: Whether images of another size are fitted to it, and not refused.
        data_dir: Root of the torchvision sets and of the named folders.

    Returns:
        Sets whose `files` name every image as the user would.

    Raises:
        InputError: If images are missing, unreadable or of another size.
    """
    sets: list[ImageSet] = []
    loose: list[str] = []
    for spec in (*specs, None):
        if spec is not None and is_picture(spec):
            loose.append(spec)
            continue
        if loose:
            sets.append(load_pictures(loose, shape=shape, resize=resize))
            loose = []
        if spec is not None:
            sets.append(_load(spec, shape, resize, data_dir))
    return sets


def _load(spec: str, shape: tuple[int, int, int], resize: bool, data_dir: Path | None) -> ImageSet:
    found = load_set(spec, shape=shape, resize=resize, data_dir=data_dir)
    place, _ = split_class_list(parse_spec(spec)[0])
    files = tuple(f"{place.rstrip('/')}/{file}" for file in found.files) or tuple(
        f"{spec}[{index}]" for index in range(len(found))
    )
    split = splits_of(spec, data_dir).get("test")
    words = [f"its split '{split}' alone"] * (split is not None) + [found.note] * bool(found.note)
    return replace(found, files=files, note="; ".join(words))


def predict(
    detector: Detector, images: ImageSet, query: Query, reporter: Reporter = SILENT
) -> Iterator[dict[str, Any]]:
    """One record an image: `Query.columns`.

    `class` is the name of the most likely class, or its number; `radius_certified` is the largest eps found whose whole ball
    is proved to keep the decision, `radius_attack` the distance of the nearest point found with the other one.

    Args:
        detector: The detector.
        images: Images of its shape, with the names of their files.
        query: What to say of each.
        reporter: Hears of every image, and of what kept bounds from being found.

    Raises:
        InputError: If images or settings make no sense, or no engine can bound the network.
        SoundnessError: If an attack contradicts a proof.

    Example:
        >>> import torch
        >>> network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2)).double().eval()
        >>> images = ImageSet("x", "ood", torch.rand(1, 1, 2, 2), torch.zeros(1).long(), ("x",), ("x.png",))
        >>> list(next(predict(Detector(network, 0.0, (1, 2, 2), ("cat", "dog")), images, Query())))
        ['file', 'score', 'gamma', 'accepted', 'class']
    """
    start, notes = 0, set[str]()
    for batch in images.images.split(chunk(images.images.shape)):
        files = images.files[start : start + len(batch)]
        start += len(batch)
        said = detector.predict(batch)
        labels = said.label.tolist()
        names = [detector.class_names[label] if detector.class_names else str(label) for label in labels]
        records: list[dict[str, Any]] = [
            {"file": file, "score": score, "gamma": detector.gamma, "accepted": accepted, "class": name}
            for file, score, accepted, name in zip(
                files, said.score.tolist(), said.accepted.tolist(), names, strict=True
            )
        ]
        if query.eps:
            found = api.certify(
                detector,
                batch,
                query.eps,
                norm=query.norm,
                effort=query.effort,
                engine=query.engine,
                seed=query.seed,
            )
            failures = [f"not proved because a bound engine failed: {message}" for message in found.failures]
            for note in failures:
                if note not in notes:
                    notes.add(note)
                    reporter.say(note)
            radii = zip(found.radius.tolist(), found.attack_radius.tolist(), found.outcome, strict=True)
            for record, (certified, attacked, outcomes) in zip(records, radii, strict=True):
                assert isinstance(outcomes, list)
                words = {
                    grid_column("outcome", eps): outcome.word for eps, outcome in zip(query.eps, outcomes, strict=True)
                }
                record |= {"radius_certified": certified, "radius_attack": attacked, **words}
            reporter.advance(len(batch))
        yield from records


def sentences(record: Mapping[str, Any], query: Query, score: str, threshold: str) -> list[str]:
    r"""What a record says, in words.

    Args:
        record: Of `predict`.
        query: What was asked.
        score: The name of the detector's score.
        threshold: Where gamma comes from.

    Example:
        >>> record = {"file": "x.png", "score": -1.5, "gamma": -2.0, "accepted": False, "class": "cat"}
        >>> print(*sentences(record, Query(), "energy", "as given"), sep="\n")
        x.png is out-of-distribution (OOD) for this detector, which rejects it
          score    energy S = -1.5, lies 0.5 above the threshold gamma = -2; an image is accepted iff S <= gamma
          gamma    as given
          class    cat is the most likely one, for what that is worth of a rejected image
    """
    score_, gamma, accepted = record["score"], record["gamma"], record["accepted"]
    if math.isnan(score_):
        place = f"is not a number; the threshold is gamma = {gamma:.6g}"
    elif accepted:
        place = f"lies {gamma - score_:.4g} below the threshold gamma = {gamma:.6g}"
    else:
        place = f"lies {score_ - gamma:.4g} above the threshold gamma = {gamma:.6g}"
    verdict = (
        "in-distribution (ID) for this detector, which accepts it"
        if accepted
        else "out-of-distribution (OOD) for this detector, which rejects it"
    )
    worth = "" if accepted else ", for what that is worth of a rejected image"
    lines = [
        f"{record['file']} is {verdict}",
        f"  score    {score} S = {score_:.6g}, {place}; an image is accepted iff S <= gamma",
        f"  gamma    {threshold}",
        f"  class    {record['class']} is the most likely one{worth}",
    ]
    if not query.eps:
        return lines
    certified, attacked = record["radius_certified"], record["radius_attack"]
    proved = (
        f"no change of {NORMS[query.norm]} norm up to {certified:.4g} alters this decision"
        if certified > 0
        else "nothing: the decision is not proved for any radius"
    )
    broken = f"a change of {attacked:.4g} alters it" if math.isfinite(attacked) else "none found that alters it"
    lines += [f"  proved   {proved}", f"  attack   {broken}"]
    lines += [f"  eps {eps:<8g} {Outcome.of(record[grid_column('outcome', eps)])}" for eps in query.eps]
    return lines
