"""The sections of a recipe: typed settings, each with a default that works and with what its value must satisfy."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

from grood_cert.errors import InputError

_Value = TypeVar("_Value")


@dataclass(frozen=True)
class Rule:
    """What a value must satisfy, and how that is said: "expected WORDS, got VALUE"."""

    words: str
    holds: Callable[[Any], bool]


POSITIVE = Rule("a value above 0", lambda value: value > 0)
NOT_NEGATIVE = Rule("0 or more", lambda value: value >= 0)
BELOW_ONE = Rule("a value below 1", lambda value: value < 1)
AT_MOST_ONE = Rule("1 or less", lambda value: value <= 1)
SEED = Rule("a value below 2**63", lambda value: value < 2**63)


def one_of(*choices: str) -> Rule:
    """One of a few words."""
    return Rule(f"one of {', '.join(choices)}", lambda value: value in choices)


def setting(default: _Value, *rules: Rule) -> _Value:
    """A field of a section: its default and the rules for its value."""
    return field(default=default, metadata={"rules": rules})


_KINDS: dict[Any, tuple[Rule, ...]] = {
    int: (Rule("a whole number", lambda value: isinstance(value, int) and not isinstance(value, bool)),),
    float: (
        Rule("a number", lambda value: isinstance(value, int | float) and not isinstance(value, bool)),
        Rule("a finite number", math.isfinite),
    ),
    str: (Rule("a text", lambda value: isinstance(value, str)),),
    bool: (Rule("true or false", lambda value: isinstance(value, bool)),),
    tuple[str, ...]: (
        Rule(
            'a list of texts such as ["digits:8,9"]',
            lambda value: isinstance(value, list | tuple) and all(type(item) is str for item in value),
        ),
    ),
    tuple[float, ...]: (
        Rule(
            "a list of finite numbers such as [0.485, 0.456, 0.406]",
            lambda value: (
                isinstance(value, list | tuple)
                and all(type(item) in (int, float) and math.isfinite(item) for item in value)
            ),
        ),
    ),
    tuple[int, ...]: (
        Rule(
            "a list of whole numbers such as [50, 75]",
            lambda value: isinstance(value, list | tuple) and all(type(item) is int for item in value),
        ),
    ),
}


def _rules(section: type) -> dict[str, tuple[Rule, ...]]:
    """The rules of every setting of a section, those of its type first; a section in it has its own."""
    kinds = typing.get_type_hints(section)
    return {
        item.name: (*_KINDS[kinds[item.name]], *item.metadata.get("rules", ()))
        for item in dataclasses.fields(section)
        if kinds[item.name] in _KINDS
    }


@dataclass(frozen=True)
class Section:
    """Settings that belong together.

    Raises:
        InputError: If a value is not what its field asks for, or two do not go together.
    """

    def __post_init__(self) -> None:
        values = ((name, self.problem(name, getattr(self, name))) for name in _rules(type(self)))
        problems = [f"{name}: {problem}" for name, problem in values if problem]
        problems = problems or [*self.contradictions()]
        if problems:
            raise InputError("; ".join(problems))

    @classmethod
    def problem(cls, name: str, value: Any) -> str | None:
        """What is wrong with a value of a setting, if anything."""
        broken = next((rule for rule in _rules(cls)[name] if not rule.holds(value)), None)
        return f"expected {broken.words}, got {value!r}" if broken else None

    def contradictions(self) -> Iterator[str]:
        """What is wrong with settings that are each well formed but cannot be computed together."""
        yield from ()


@dataclass(frozen=True)
class DataSection(Section):
    """Which images; set specifications are explained in `grood_cert.data`.

    `test` and `calibration` name ID images for these parts; without them, the parts are splits of `id` if it has
    such, and cuts of it by their shares if not.
    """

    id: str = "digits:0-5"
    test: str = ""
    calibration: str = ""
    auxiliary: str = "digits:6,7"
    ood: tuple[str, ...] = ("digits:8,9", "photo-patches", "uniform-noise", "smooth-noise")
    calibration_share: float = 0.2
    test_share: float = 0.2
    heldout_share: float = 0.2
    train_limit: int = setting(0, NOT_NEGATIVE)
    seed: int = setting(0, NOT_NEGATIVE, SEED)


@dataclass(frozen=True)
class NetworkSection(Section):
    """Which network.

    `name` is one of `grood_cert.networks.architectures.NETWORKS`, `width = 0` its own default, `hidden_layers` is for
    the mlp. `mean` and `std` normalise pixels in [0, 1], one value a channel; empty: those of the ID training images.
    `pretrained` is a file of weights to start from, and `pretrained_allow` names the tensors that may be absent from it
    or of another shape.
    """

    name: str = "conv-small"
    width: int = setting(0, Rule("0 to 65536", lambda value: 0 <= value <= 65536))
    hidden_layers: int = setting(2, POSITIVE)
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = setting((), Rule("values above 0", lambda value: all(item > 0 for item in value)))
    pretrained: str = ""
    pretrained_allow: tuple[str, ...] = ()

    def contradictions(self) -> Iterator[str]:
        """A normalisation of which one half is given."""
        if len(self.mean) != len(self.std):
            yield f"mean and std need one value a channel each, got {len(self.mean)} and {len(self.std)}"


@dataclass(frozen=True)
class ObjectiveSection(Section):
    """Weights, margins and variants of `grood_cert.training.objective`.

    Attributes:
        lambda_S: Weight of the outlier loss.
        lambda_grad: Weight of the gradient loss, in the units of the paper's formula; 0 is the plain baseline, and costs
            no second-order pass.
        m_in: Energy that ID samples should lie below.
        m_out: Energy that auxiliary outliers should lie above, m_in < m_out.
        outlier_loss: "energy", L_S; "oe", outlier exposure; or "none".
        slope: What the gradient loss averages: "gradient-norm", ||grad S(x)||_2 at the sample (GReg); "interval", a
            formal upper bound of ||grad S||_2 over the l_2 ball of radius `slope_eps` around it; or "first-order", how
            far S is from its margin after a move of `slope_eps` in l_inf along ||grad S(x)||_1, squared.
        slope_eps: Radius of that ball, length of that move; pixel units.
        penalty: How the norm is differentiated: "exact"; "fast", by a finite difference; or "stochastic", exactly for
            a random share of the active samples.
        penalty_share: That share, in (0, 1].
        reduction: "paper", the formula; or "reference", what the authors' released code computes.
        coordinates: Units of the gradient: "pixels" in [0, 1], or "normalised".
        certified: Samples whose worst score in an l_inf ball is trained: "none", "ood", or "both".
        certified_method: Of the bound on it: "ibp" or "crown-ibp".
        certified_mix: Share of the bound in the certified loss; the rest is the score at the end of an attack. 1 trains
            bounds alone, 0 is adversarial training.
        certified_attack_steps: Gradients of that attack.
        certified_eps: Radius of that ball, pixel units.
        certified_ramp: Share of the training over which this radius and the weight grow from 0, in [0, 1].
        lambda_certified: Weight of the certified loss.
    """

    lambda_S: float = setting(0.1, NOT_NEGATIVE)  # noqa: N815
    lambda_grad: float = setting(0.1, NOT_NEGATIVE)
    m_in: float = -6.0
    m_out: float = -2.0
    outlier_loss: str = setting("energy", one_of("energy", "oe", "none"))
    slope: str = setting("gradient-norm", one_of("gradient-norm", "interval", "first-order"))
    slope_eps: float = setting(0.0, NOT_NEGATIVE)
    penalty: str = setting("exact", one_of("exact", "fast", "stochastic"))
    penalty_share: float = setting(0.25, POSITIVE, AT_MOST_ONE)
    reduction: str = setting("paper", one_of("paper", "reference"))
    coordinates: str = setting("pixels", one_of("pixels", "normalised"))
    certified: str = setting("none", one_of("none", "ood", "both"))
    certified_method: str = setting("ibp", one_of("ibp", "crown-ibp"))
    certified_mix: float = setting(1.0, NOT_NEGATIVE, AT_MOST_ONE)
    certified_attack_steps: int = setting(3, POSITIVE)
    certified_eps: float = setting(0.0, NOT_NEGATIVE)
    certified_ramp: float = setting(0.5, NOT_NEGATIVE, AT_MOST_ONE)
    lambda_certified: float = setting(1.0, NOT_NEGATIVE)

    def contradictions(self) -> Iterator[str]:
        """Variants that have no formula."""
        if self.slope == "interval" and (self.penalty == "fast" or self.coordinates == "normalised"):
            yield 'slope = "interval" is differentiated exactly and in pixels; use neither "fast" nor "normalised"'
        if self.slope == "first-order" and self.coordinates == "normalised":
            yield 'slope = "first-order" is in pixels; use coordinates = "pixels"'
        if self.slope == "first-order" and self.lambda_grad > 0 and self.slope_eps == 0:
            yield 'slope = "first-order" needs a slope_eps above 0'
        if self.reduction == "reference" and (self.slope != "gradient-norm" or self.penalty != "exact"):
            yield 'reduction = "reference" needs slope = "gradient-norm" and penalty = "exact"'

    @property
    def uses_balls(self) -> bool:
        """Whether a term is about balls around the images."""
        return self.certified != "none" or (self.lambda_grad > 0 and self.slope == "interval")

    @property
    def uses_outliers(self) -> bool:
        """Whether a term looks at outliers."""
        return (
            self.certified != "none"
            or self.lambda_grad > 0
            or self.reduction == "reference"
            or (self.lambda_S > 0 and self.outlier_loss != "none")
        )


ROUTINGS = ("printed", "both")


@dataclass(frozen=True)
class SamplingSection(Section):
    """Which auxiliary outliers a step sees: as many as ID images, drawn uniformly, or picked by energy (GReg+).

    For "energy", `pool` candidates a step are clustered by their features, one cluster for each ID image; `routing` is
    explained in `grood_cert.training.sampling`.
    """

    method: str = setting("uniform", one_of("uniform", "energy"))
    pool: int = setting(384, POSITIVE)
    routing: str = setting("printed", one_of(*ROUTINGS))


@dataclass(frozen=True)
class OptimizerSection(Section):
    """How to minimise the objective.

    The learning rate rises linearly to `lr` over `warmup_steps` and then follows the schedule step by step: "cosine"
    from `lr` to `lr_min`, "multistep", times `factor` after each epoch listed in `milestones`, or "constant".
    Gradients longer than `clip_norm` are shortened to it; 0: none is. `batch_size` counts the ID images of one step,
    over all processes; `accumulate` parts of it are computed one after another. A step moves the running statistics of
    BatchNorm by the share `batch_norm_momentum` towards those of its batch; 0 freezes them: layers then normalise by
    them in training too, and train their weights alone.
    """

    name: str = setting("adam", one_of("sgd", "adam"))
    lr: float = setting(2e-3, POSITIVE)
    momentum: float = setting(0.9, NOT_NEGATIVE, BELOW_ONE)
    weight_decay: float = setting(1e-4, NOT_NEGATIVE)
    schedule: str = setting("cosine", one_of("cosine", "multistep", "constant"))
    lr_min: float = setting(1e-6, NOT_NEGATIVE)
    milestones: tuple[int, ...] = ()
    factor: float = setting(0.1, POSITIVE, AT_MOST_ONE)
    warmup_steps: int = setting(0, NOT_NEGATIVE)
    clip_norm: float = setting(0.0, NOT_NEGATIVE)
    epochs: int = setting(60, POSITIVE)
    batch_size: int = setting(64, POSITIVE)
    accumulate: int = setting(1, POSITIVE)
    batch_norm_momentum: float = setting(0.1, NOT_NEGATIVE, AT_MOST_ONE)


@dataclass(frozen=True)
class AugmentationSection(Section):
    """Random changes of the training images, ID and auxiliary alike; see `grood_cert.training.augmentation`."""

    flip: bool = False
    crop_padding: int = setting(0, NOT_NEGATIVE)
    resized_crop: float = setting(1.0, POSITIVE, AT_MOST_ONE)
    noise_sigma: float = setting(0.0, NOT_NEGATIVE)


@dataclass(frozen=True)
class ComputeSection(Section):
    """How the arithmetic of training is done; certificates are always in float64.

    `precision` is that of products: "float32", also on GPUs that would round their factors to TF32; "tf32", on such a
    GPU alone; or "bf16".
    """

    precision: str = setting("float32", one_of("float32", "tf32", "bf16"))
    channels_last: bool = False
    compile: bool = False


@dataclass(frozen=True)
class EvaluationSection(Section):
    """What is measured and kept.

    `score` and its `temperature`, which max-logit does not have, are what is calibrated and certified; the other scores
    of the test sets are reported at the same temperature. The objective trains the energy of temperature 1, whatever
    the score. A run warns when the ID accuracy falls below the share `accuracy_floor` of the way from chance, 1/K, to 1. `keep` says which epoch
    becomes `model.pt`: "last", or "best", the lowest FPR95 on held-out outliers.
    """

    score: str = setting("energy", one_of("energy", "max-logit", "msp"))
    temperature: float = setting(1.0, POSITIVE)
    accuracy_floor: float = setting(0.1, NOT_NEGATIVE, BELOW_ONE)
    keep: str = setting("last", one_of("last", "best"))
