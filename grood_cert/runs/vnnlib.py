r"""Hand what is left undecided to a complete verifier: an ONNX network and VNNLIB properties.

A complete verifier knows no logsumexp, but each side of the certificate is decided by one linear function c . f of the
logits (`grood_cert.bounds.score`). On the l_inf ball around x, intersected with the pixel box:

    ID    p . f > -gamma - H(p)  everywhere   =>  S < gamma,   p in the simplex                          (U1, Gibbs)
    OOD   kappa . f < e^(-gamma - M) - sum_k e^(u_k - M) + kappa . u  everywhere   =>  S > gamma         (L1, chords)

for the energy with T = 1; for another T, the same of f / T and gamma / T, multiplied by T; other scores are refused. Here
p is near softmax f(x), l <= f <= u proved by our own bound engine on the same ball, M = max_k u_k, and kappa_k any
slope from 0 to the chord's. A property asserts the negation, so **unsat means certified**. Sat does not mean refuted:
the linear function can cross its threshold where S does not cross gamma (see `grood_cert.runs.verdicts`).

The readers of VNNLIB in alpha-beta-CROWN and in the competition know constraints between single outputs and numbers
only, no linear combinations. So the rows c are the last layer of the network: output i of `model.onnx` is c_i . f, and
the property of instance i speaks of Y_i alone. (Marabou 2.0 reads these files too, but of networks without a
normalisation layer only: its ONNX reader knows neither division nor broadcasting.)

Rounding: every number that is written (rows, thresholds, box) is a float32 value, printed in full, so that reading it
in float32 or float64 changes nothing. p has denominator 2^24 and sums to 1 exactly; kappa is rounded down; thresholds
and box are rounded so that the property is the weaker one to violate. The network is exported only if all its
parameters are float32 values. What a verifier then does in its own arithmetic is its own affair.

References:
    Demarchi et al., "Supporting Standardization of Neural Networks Verification with VNNLIB and CoCoNet", FoMLAS 2023;
    Brix et al., "First Three Years of the International Verification of Neural Networks Competition", STTT 2023.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from grood_cert.ball import Ball
from grood_cert.bounds.engine import BoundedNetwork
from grood_cert.bounds.score import chord_slopes
from grood_cert.data import ImageSet
from grood_cert.detector import Detector, check_network, versions
from grood_cert.errors import InputError, RunError
from grood_cert.interval import ROUNDING
from grood_cert.results.columns import NORMS
from grood_cert.results.table import Table
from grood_cert.runs.onnx_file import write_onnx
from grood_cert.scores import Energy
from grood_cert.system.files import check_apart, check_writable, replacing, sha256, write_json

_DENOMINATOR = 2**24  # n / 2^24 with n <= 2^24 is a float32 value
_LARGEST = 3e38  # below the largest float32 value
_LARGEST_EXPONENT = 80.0  # e^80 is still a float32 value
INSTANCES = "instances.json"


@dataclass(frozen=True)
class Specification:
    """One linear function of the logits and the threshold that decides a ball.

    Attributes:
        row: c, K float32 values.
        threshold: The other side, a float32 value.
        relation: "<=" (ID) or ">=" (OOD): the property asserts c . f `relation` threshold, and its absence certifies.
    """

    row: tuple[float, ...]
    threshold: float
    relation: str


@dataclass(frozen=True)
class Instance:
    """One undecided ball.

    Attributes:
        name: Name of its property, without suffix.
        set: Image set.
        kind: "id", "ood" or "noise".
        index: Position of the image in its set.
        specification: What decides it.
    """

    name: str
    set: str
    kind: str
    index: int
    specification: Specification


def single_below(value: float) -> float:
    """Largest float32 value <= value.

    Example:
        >>> single_below(0.1) <= 0.1 < single_above(0.1)
        True
    """
    single = np.float32(value)
    return float(np.nextafter(single, np.float32(-math.inf)) if float(single) > value else single)


def single_above(value: float) -> float:
    """Smallest float32 value >= value."""
    return -single_below(-value)


def decimal(value: float) -> str:
    """All digits of a number, without an exponent.

    Example:
        >>> decimal(0.5), decimal(2.0**-20)
        ('0.5', '0.00000095367431640625')
    """
    return np.format_float_positional(value, unique=False, precision=1100, trim="0")


def id_specification(logits: Tensor, gamma: float) -> Specification:
    r"""U1: p . f > -gamma - H(p) on the ball proves S < gamma there.

    Args:
        logits: f(x), shape (K,).
        gamma: Threshold.

    Returns:
        Row p, softmax f(x) rounded to a point of the simplex, and the relation p . f <= -gamma - H(p).

    Example:
        >>> id_specification(torch.zeros(2, dtype=torch.float64), -1.0).row
        (0.5, 0.5)
    """
    parts = (torch.softmax(logits, 0) * _DENOMINATOR).floor().long()
    parts[parts.argmax()] += _DENOMINATOR - int(parts.sum())
    weights = parts.double() / _DENOMINATOR
    entropy = -float(torch.xlogy(weights, weights).sum())
    threshold = -gamma - entropy
    threshold += ROUNDING * (1 + abs(gamma) + entropy)
    return Specification(tuple(weights.tolist()), single_above(threshold), "<=")


def ood_specification(lower: Tensor, upper: Tensor, gamma: float) -> Specification:
    r"""L1: kappa . f < e^(-gamma - M) - sum_k e^(u_k - M) + kappa . u on the ball proves S > gamma there.

    Args:
        lower: l <= f on the ball, shape (K,).
        upper: u >= f on the ball.
        gamma: Threshold.

    Returns:
        Row kappa and the relation kappa . f >= that number.

    Raises:
        RunError: If the bounds of the logits are not finite, so that there is no chord.
    """
    if not bool((torch.isfinite(lower) & torch.isfinite(upper) & (lower <= upper)).all()):
        raise RunError("the bound engine proved no interval of the logits, so there is no chord to export")
    slopes = [single_below(slope) for slope in chord_slopes(lower, upper).tolist()]
    largest = float(upper.max())
    products = torch.tensor(slopes, dtype=torch.float64) * upper.cpu()
    allowed = math.exp(min(-gamma - largest, _LARGEST_EXPONENT))
    spent = float(torch.exp(upper - largest).sum())
    threshold = allowed - spent + float(products.sum())
    threshold -= ROUNDING * (1 + allowed * (1 + abs(gamma) + abs(largest)) + spent + float(products.abs().sum()))
    return Specification(tuple(slopes), single_below(threshold), ">=")


def _times(specification: Specification, temperature: float) -> Specification:
    """The property c . f `relation` T t, which means c . (f / T) `relation` t."""
    if temperature == 1:
        return specification
    threshold = max(min(temperature * specification.threshold, _LARGEST), -_LARGEST)
    rounded = single_above(threshold) if specification.relation == "<=" else single_below(threshold)
    return replace(specification, threshold=rounded)


def specification(
    bounded: BoundedNetwork, image: Tensor, eps: float, gamma: float, kind: str, temperature: float = 1.0
) -> Specification:
    """What decides the l_inf ball of radius eps around one image.

    Args:
        bounded: The network inside its bound engine; asked for intervals of the logits on the OOD side.
        image: x, shape (C, H, W).
        eps: Radius.
        gamma: Threshold.
        kind: "id" (to be accepted), "ood" or "noise" (to be rejected).
        temperature: T of the energy.

    Raises:
        RunError: If the engine proves no intervals.
    """
    with torch.no_grad():
        logits = bounded.network(image.unsqueeze(0))[0]
    if kind == "id":
        return _times(id_specification(logits / temperature, gamma / temperature), temperature)
    ball = Ball(image.unsqueeze(0), image.new_tensor([eps]), "linf")
    rows = torch.eye(len(logits)).to(logits).unsqueeze(0)
    lower, upper = (bound[0] for bound in bounded.relax(ball).rows(rows))
    lower, upper = lower / temperature, upper / temperature
    margin = ROUNDING * (1 + torch.maximum(lower.abs(), upper.abs()))
    return _times(ood_specification(lower - margin, upper + margin, gamma / temperature), temperature)


def box(image: Tensor, eps: float) -> tuple[list[float], list[float]]:
    """Ends of the l_inf ball intersected with the pixel box, moved outward to float32 values inside [0, 1].

    Args:
        image: x, any shape, float64.
        eps: Radius.

    Returns:
        Lower and upper ends, a flat list each, in the order in which ONNX flattens an image.
    """
    pixels = image.flatten().tolist()
    lower = [max(0.0, single_below(math.nextafter(pixel - eps, -math.inf))) for pixel in pixels]
    upper = [min(1.0, single_above(math.nextafter(pixel + eps, math.inf))) for pixel in pixels]
    return lower, upper


def property_text(
    instance: Instance, output: int, outputs: int, image: Tensor, eps: float, gamma: float, method: str
) -> str:
    """The text of one property.

    Args:
        instance: The ball.
        output: Which output of the network is its linear function.
        outputs: How many there are.
        image: x.
        eps: Radius.
        gamma: Threshold.
        method: How our engine bounded the logits.
    """
    spec = instance.specification
    right = f"S {'<' if instance.kind == 'id' else '>'} gamma = {gamma!r}"
    lines = [
        f"; {instance.set} {instance.index} ({instance.kind}), l_inf ball of radius {eps!r} within the pixel box [0, 1]",
        f"; unsat: {right} on the whole ball. sat proves nothing; evaluate S at the counterexample.",
        "; The certificate rests on: the verifier and its arithmetic; model.onnx being the network followed by the rows;",
    ]
    if instance.kind == "id":
        lines.append("; the Gibbs inequality T logsumexp(f / T) >= p . f + T H(p).")
    else:
        lines.append(
            f"; exp(z) lying below its chord between the bounds of each logit on this ball, by grood-cert ({method})."
        )
    lines += [f"(declare-const X_{i} Real)" for i in range(image.numel())]
    lines += [f"(declare-const Y_{i} Real)" for i in range(outputs)]
    for i, (low, high) in enumerate(zip(*box(image, eps), strict=True)):
        lines += [f"(assert (>= X_{i} {decimal(low)}))", f"(assert (<= X_{i} {decimal(high)}))"]
    lines.append(f"(assert ({spec.relation} Y_{output} {decimal(spec.threshold)}))")
    return "\n".join(lines) + "\n"


def undecided(rows: Table, eps: float, limit: int = 0) -> list[int]:
    """Positions of the rows that are right at x, not certified at eps, and not refuted there by an attack.

    Args:
        rows: Result of a certification.
        eps: Radius.
        limit: Most positions, in the order of the rows; 0 for all.

    Raises:
        InputError: If the rows are not of l_inf balls, or nothing is left undecided.
    """
    if rows.norm != "linf":
        raise InputError(f"the rows are of {NORMS[rows.norm]} balls; VNNLIB holds boxes only, certify with --norm linf")
    if not 0 < eps <= 1:
        raise InputError(f"eps {eps!r}: expected a number above 0 and at most 1 (pixels lie in [0, 1])")
    open_ = (rows["status"] != "misdecided") & (rows["radius_certified"] < eps) & (eps < rows["radius_attack"])
    positions = [int(position) for position in np.flatnonzero(open_)]
    if not positions:
        raise InputError(f"no sample is undecided at eps {eps!r}: all are certified, refuted or misdecided")
    return positions[:limit] if limit else positions


def _with_rows(network: nn.Module, rows: Sequence[Sequence[float]]) -> nn.Module:
    """The network followed by the rows, in float32."""
    for name, tensor in network.state_dict().items():
        if tensor.is_floating_point() and not torch.equal(tensor.float().to(tensor), tensor):
            raise InputError(f"{name} holds values that float32 cannot hold; a verifier would see another network")
    head = nn.Linear(len(rows[0]), len(rows))  # with a bias of zero, so that it becomes one Gemm
    with torch.no_grad():
        head.bias.zero_()
        head.weight.copy_(torch.tensor(rows, dtype=torch.float64))
    return nn.Sequential(copy.deepcopy(network).cpu().float(), head).eval()


def export(
    detector: Detector,
    model: Path,
    rows: Table,
    sets: Sequence[ImageSet],
    bounded: BoundedNetwork,
    eps: float,
    out: Path,
    *,
    limit: int = 0,
    timeout: int = 300,
    force: bool = False,
) -> list[Instance]:
    """Write model.onnx, one property an undecided sample, instances.csv and instances.json.

    Args:
        detector: The detector.
        model: The checkpoint it came from; it must be the one the rows are of.
        rows: Result of its certification on l_inf balls.
        sets: The image sets of the rows.
        bounded: The network inside its bound engine.
        eps: Radius.
        out: Folder; made if absent.
        limit: Most instances, 0 for all.
        timeout: Seconds for each instance, written to instances.csv.
        force: Overwrite instances that are already there.

    Returns:
        The instances, in the order of the outputs of the network.

    Raises:
        InputError: If the score is not the energy, the rows are not of this model or of l_inf balls, a set
            is missing, or nothing is undecided.
        RunError: If onnx is missing, or the network or a chord cannot be exported.
    """
    if not isinstance(detector.score, Energy):
        raise InputError(f"properties are of the energy only; the detector's score is {detector.score}")
    if rows.manifest["model"].get("sha256") != sha256(model) or rows.gamma != detector.gamma:
        raise InputError(f"the rows are not of {model}; certify it first")
    if limit < 0 or timeout < 1:
        raise InputError(f"expected limit >= 0 and timeout >= 1, got {limit} and {timeout}")
    check_network(detector.network)
    positions = undecided(rows, eps, limit)
    by_name = {images.name: images for images in sets}
    missing = sorted({str(rows["set"][position]) for position in positions} - by_name.keys())
    if missing:
        raise InputError(f"the rows name image sets that are not given: {', '.join(missing)}; add them with --ood")
    if (out / INSTANCES).exists() and not force:
        raise InputError(f"{out / INSTANCES} exists already; choose another --out, or add --force to overwrite it")
    check_writable(out)
    weight = next(detector.network.parameters())
    instances, images = [], []
    for position in positions:
        name, kind, index = str(rows["set"][position]), str(rows["kind"][position]), int(rows["index"][position])
        image = by_name[name].images[index].to(weight)
        if abs(float(detector.scores(image.unsqueeze(0))) - float(rows["score"][position])) > 1e-6:
            raise InputError(f"image {index} of {name} scores differently from its row; the data have changed")
        stem = re.sub(r"[^A-Za-z0-9.]+", "_", name).strip("_")
        spec = specification(bounded, image, eps, detector.gamma, kind, detector.score.temperature)
        instances.append(Instance(f"{stem}-{index}-eps{eps!r}", name, kind, index, spec))
        images.append(image)
    if len({instance.name for instance in instances}) < len(instances):
        raise InputError("two image sets would share the same file names; export them to different folders")
    written = ["model.onnx", "instances.csv", INSTANCES, *(f"{instance.name}.vnnlib" for instance in instances)]
    check_apart((out / name for name in written), [model])
    network = _with_rows(detector.network, [i.specification.row for i in instances])
    write_onnx(network, torch.stack(images[:2]), out / "model.onnx", any_batch=False)
    for output, (instance, image) in enumerate(zip(instances, images, strict=True)):
        text = property_text(instance, output, len(instances), image, eps, detector.gamma, bounded.method)
        with replacing(out / f"{instance.name}.vnnlib") as temporary:
            temporary.write_text(text, encoding="utf-8")
    with replacing(out / "instances.csv") as temporary:
        lines = (f"model.onnx,{instance.name}.vnnlib,{timeout}\n" for instance in instances)
        temporary.write_text("".join(lines), encoding="utf-8")
    manifest = {
        "model": dict(rows.manifest["model"]),
        "score": str(detector.score),
        "gamma": detector.gamma,
        "norm": "linf",
        "eps": eps,
        "method": bounded.method,
        "versions": versions(),
        "instances": [asdict(instance) for instance in instances],
    }
    write_json(out / INSTANCES, manifest)
    return instances
