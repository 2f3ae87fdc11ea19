r"""Median smoothing of the score: certificates that hold with high probability, for networks of any size.

Let xi ~ N(0, sigma^2 I), and S any measurable score. The *smoothed* score is the median under noise,

    h(x) = h_{1/2}(x),        h_q(x) = inf {y : P(S(x + xi) <= y) >= q},

and the *smoothed detector* accepts x as ID iff h(x) <= gamma. Since Phi^{-1}(P(S(x + xi) <= y)) is 1/sigma-Lipschitz
in x for every y, each perturbation of l_2 length at most eps obeys

    h_ql(x) <= h_q(x + delta) <= h_qu(x),        ql, qu = Phi(Phi^{-1}(q) -+ eps / sigma).

n independent draws of S(x + xi), in ascending order X_(1) <= ... <= X_(n), bound the quantiles (`order_statistics`).
Two statements are made about each sample, and each holds with **probability at least 1 - alpha over its n draws**:

* *Decision and radius* (`smoothed_radius`): unless the method abstains, h(x + delta) < gamma (accepted) or
  h(x + delta) > gamma (rejected) for **all** delta of length below the radius. The decision does not know whether x is
  ID, so each side gets alpha / 2. Nothing is spent on eps: that P(S(x + xi) < gamma) is at least its Clopper-Pearson
  bound p is one event, and from it follows the decision at every eps < sigma Phi^{-1}(p). The interval of h(x) at
  alpha / 2 a side contains gamma exactly if the method abstains.
* *Bounds* (`smoothed_bounds`): s_lb <= h(x + delta) <= s_ub for all eps of a grid of J values and all delta up to that
  length, at once. Each of the 2 J bounds gets alpha / (2 J), exactly binomial. On a grid of a few eps that is narrower
  than a band around the whole distribution function (DKW), above all in the tails, where large eps lie: n = 1000,
  alpha = 0.001, J = 5 cost 0.060, 0.054, 0.043, 0.029, 0.017 of probability at eps / sigma = 0, 0.5, 1, 1.5, 2, the band
  0.062 everywhere. As the bounds hold together and know no gamma, gamma may be chosen later.

Both together hold with probability 1 - 2 alpha. At equal levels the two are the same (X_(k) < gamma iff at least k
draws lie below gamma), so a radius is never below an eps that the grid certifies. Over N samples expect at most
alpha N false statements of either kind.

What is certified is the smoothed detector, not the one it was made from:

* gamma is calibrated anew: the split-conformal quantile of the *estimated* medians of the calibration images. A fresh
  ID image then has an estimated median of at most gamma with probability at least 95 %. That is less than being
  accepted: the share of ID that lands close to gamma and is abstained on comes on top. The noise of calibration images
  is independent of the noise of all others, so gamma is a constant for the statements above.
* S is the network in `dtype`, from rounding its input to that type on; it is this function that is smoothed. Only the
  noise, the sum x + xi and the score of the logits are computed in float64. That float64 and the pseudo-random generator stand
  for real numbers and chance is assumed, as everywhere.
* Noise is added to pixels, before the normalisation inside the network, and not clipped. The network therefore sees
  values outside [0, 1]; one that was not trained with noise of this size loses accuracy.
* Any NaN among the draws of a sample: bounds are infinite and the method abstains.
* The probability is that of one run. Who repeats it with other seeds and keeps the best has certified nothing.

For l_inf only this follows: the ball of radius eps / sqrt(d) in l_inf lies inside that of radius eps in l_2.

References:
    Cohen, Rosenfeld & Kolter, "Certified Adversarial Robustness via Randomized Smoothing", ICML 2019.
    Chiang et al., "Detection as Regression: Certified Object Detection with Median Smoothing", NeurIPS 2020.
    Clopper & Pearson, Biometrika 1934.
"""

from __future__ import annotations

import bisect
import copy
import functools
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.stats import beta, binom, norm
from torch import Tensor, nn

from grood_cert.ball import check_eps, largest_eps
from grood_cert.detector import Detector, check_network
from grood_cert.errors import InputError
from grood_cert.scores import ENERGY, Score

Dtype = Literal["float32", "bfloat16", "float64"]
DTYPES: tuple[str, ...] = get_args(Dtype)
DEFAULT_MEMORY = 2**28
_DEFAULT_SHIFTS = (0.25, 0.5, 1.0, 1.5, 2.0)  # eps / sigma


def _check_noise(sigma: float, alpha: float) -> None:
    if not 0 < sigma < math.inf:
        raise InputError(f"sigma must be a positive number, got {sigma!r}")
    if not 0 < alpha < 1:
        raise InputError(f"alpha must lie between 0 and 1, got {alpha!r}")


def default_eps(sigma: float, shape: Sequence[int]) -> tuple[float, ...]:
    """An eps grid of the scale that noise of this size can certify: 1/4 to 2 sigma, up to the whole pixel box.

    Example:
        >>> default_eps(0.5, (1, 8, 8)), default_eps(8.0, (1, 8, 8))
        ((0.125, 0.25, 0.5, 0.75, 1.0), (2.0, 4.0, 8.0))
    """
    largest = largest_eps(shape, "l2")
    return tuple(dict.fromkeys(min(shift * sigma, largest) for shift in _DEFAULT_SHIFTS))


@functools.cache
def order_statistics(n: int, q: float, shift: float, alpha: float) -> tuple[int | None, int | None]:
    r"""Which of n ordered draws bound the quantiles at ql, qu = Phi(Phi^{-1}(q) -+ shift), each at level alpha.

        upper: smallest k with BinomCDF(k - 1; n, qu) >= 1 - alpha        P(X_(k) >= h_qu) >= 1 - alpha
        lower: largest k with 1 - BinomCDF(k - 1; n, ql) >= 1 - alpha     P(X_(k) <= h_ql) >= 1 - alpha

    Exact for continuous scores and conservative for others: X_(k) < h_qu needs k draws below h_qu, and the
    probability of a draw there is at most qu.

    Args:
        n: Number of draws.
        q: Quantile of the smoothed score, between 0 and 1.
        shift: eps / sigma, at least 0.
        alpha: Level of each bound alone, between 0 and 1.

    Returns:
        k of the lower and of the upper bound, counted from 1; None where no draw is far enough out.

    Raises:
        InputError: If an argument lies outside its range.

    Example:
        >>> order_statistics(1000, 0.5, 0.0, 0.001), order_statistics(1000, 0.5, 3.0, 0.001)
        ((451, 550), (None, None))
    """
    if n < 1:
        raise InputError(f"n must be 1 or more draws, got {n}")
    for name, value in (("q", q), ("alpha", alpha)):
        if not 0 < value < 1:
            raise InputError(f"{name} must lie between 0 and 1, got {value!r}")
    if not 0 <= shift < math.inf:
        raise InputError(f"eps / sigma must be a number of at least 0, got {shift!r}")
    below, above = norm.cdf(norm.ppf(q) - shift), norm.cdf(norm.ppf(q) + shift)
    ranks = range(1, n + 1)
    lower = bisect.bisect_left(ranks, True, key=lambda k: bool(binom.cdf(k - 1, n, below) > alpha))
    upper = 1 + bisect.bisect_left(ranks, True, key=lambda k: bool(binom.sf(k - 1, n, above) <= alpha))
    return lower if lower >= 1 else None, upper if upper <= n else None


def smoothed_bounds(
    draws: ArrayLike, eps: Sequence[float], sigma: float, alpha: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    r"""Bounds of the median h on l_2 balls, all true at once with probability at least 1 - alpha over the draws.

    Args:
        draws: Independent draws of S(x + xi), shape (..., n).
        eps: Radii of the J balls, in pixel units.
        sigma: Standard deviation of the noise.
        alpha: Shared equally by the 2 J bounds.

    Returns:
        s_lb and s_ub, shape (..., J); infinite where nothing was proved.

    Raises:
        InputError: If alpha, eps or sigma lies outside its range.

    Example:
        >>> lower, upper = smoothed_bounds(np.arange(1.0, 101.0), (0.0, 0.5, 9.0), sigma=1.0, alpha=0.05)
        >>> lower.tolist(), upper.tolist()
        ([38.0, 20.0, -inf], [63.0, 81.0, inf])
    """
    _check_noise(sigma, alpha)
    ordered = np.sort(np.asarray(draws, dtype=np.float64), axis=-1)  # NaN comes last
    broken = np.isnan(ordered[..., -1])
    lower = np.full((*ordered.shape[:-1], len(eps)), -np.inf)
    upper = np.full_like(lower, np.inf)
    for position, value in enumerate(eps):
        low, high = order_statistics(ordered.shape[-1], 0.5, value / sigma, alpha / (2 * len(eps)))
        if low is not None:
            lower[..., position] = np.where(broken, -np.inf, ordered[..., low - 1])
        if high is not None:
            upper[..., position] = np.where(broken, np.inf, ordered[..., high - 1])
    return lower, upper


def draws_beyond(draws: ArrayLike, gamma: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """How many of the draws, shape (..., n), lie below gamma and how many above; 0 and 0 if one is NaN."""
    values = np.asarray(draws, dtype=np.float64)
    whole = ~np.isnan(values).any(-1)
    return np.where(whole, (values < gamma).sum(-1), 0), np.where(whole, (values > gamma).sum(-1), 0)


def smoothed_radius(hits: ArrayLike, n: int, sigma: float, alpha: float) -> NDArray[np.float64]:
    r"""l_2 radius within which the median stays on one side of gamma, from the number of draws on that side.

    With p the Clopper-Pearson lower bound, at level alpha / 2, of the probability of that side, the radius is
    sigma Phi^{-1}(p), or 0 if p <= 1/2. Both sides asked of the same draws give the decision: at most one radius is
    positive, and with probability at least 1 - alpha what it says is true.

    Equivalent to the largest eps for which the order statistic of `smoothed_bounds`, at the same level, lies on that
    side of gamma.

    Args:
        hits: Number of draws on the side, out of n.
        n: Number of draws.
        sigma: Standard deviation of the noise, the unit of the radius.
        alpha: Level of both sides together.

    Raises:
        InputError: If alpha or sigma lies outside its range.

    Example:
        >>> smoothed_radius([1000, 900, 540], n=1000, sigma=1.0, alpha=0.002).round(2).tolist()
        [2.46, 1.11, 0.0]
    """
    _check_noise(sigma, alpha)
    hits = np.asarray(hits)
    least = beta.ppf(alpha / 2, hits, n - hits + 1)  # NaN if there are no hits
    return np.asarray(sigma * norm.ppf(np.fmax(least, 0.5)), dtype=np.float64)


def median_estimate(draws: ArrayLike) -> NDArray[np.float64]:
    """Median of the draws, shape (..., n): inf {y : at least half of them are <= y}; NaN if one of them is."""
    ordered = np.sort(np.asarray(draws, dtype=np.float64), axis=-1)
    middle = ordered[..., (ordered.shape[-1] + 1) // 2 - 1]
    return np.asarray(np.where(np.isnan(ordered[..., -1]), np.nan, middle))


def smoothed_scores(
    network: nn.Module,
    image: Tensor,
    sigma: float,
    n: int,
    generator: torch.Generator,
    batch: int,
    score: Score = ENERGY,
) -> Tensor:
    r"""Draws of S(x + xi), xi ~ N(0, sigma^2 I), in the network's floating-point type and on its device.

    The noise is drawn image by image, so it does not depend on `batch`; scores then differ by no more than the rounding
    of the network in batches of other sizes.

    Args:
        network: f in eval mode, for pixels outside [0, 1] too.
        image: x, shape (C, H, W).
        sigma: Standard deviation in pixel units.
        n: Number of draws.
        generator: Source of the noise, on the network's device.
        batch: Noisy images that pass through the network together.
        score: S.

    Returns:
        Shape (n,), float64, on the CPU.
    """
    weight = next(network.parameters())
    center = image.to(weight.device, torch.float64)
    scores = []
    with torch.no_grad():
        for start in range(0, n, batch):
            noise = center.new_empty(min(batch, n - start), *center.shape)
            for single in noise:
                single.normal_(generator=generator)
            logits = network((center + sigma * noise).to(weight.dtype))
            scores.append(score.value(logits.double()).cpu())
    return torch.cat(scores)


def layer_bytes(network: nn.Module, image: Tensor) -> int:
    """Bytes of the outputs of all layers for one image: more than a pass without gradients holds at a time.

    Args:
        network: f.
        image: Shape (C, H, W), of the network's floating-point type and on its device.
    """
    sizes: list[int] = []

    def measure(module: nn.Module, inputs: Any, output: Tensor) -> None:
        del module, inputs
        sizes.append(output.nbytes)

    leaves = [module for module in network.modules() if not any(module.children())]
    handles = [leaf.register_forward_hook(measure) for leaf in leaves]
    try:
        with torch.no_grad():
            network(image[None])
    finally:
        for handle in handles:
            handle.remove()
    return sum(sizes)


@dataclass(frozen=True)
class SmoothingSettings:
    """What to certify.

    Attributes:
        sigma: Standard deviation of the noise in pixel units.
        eps: Grid of l_2 radii in pixel units for the bounds, ascending, without repetition; see `default_eps`.
        n: Draws for each sample.
        alpha: Largest probability of a false statement, for each sample.
        dtype: Floating-point type of the network that is smoothed.
        memory: Bytes that the layers of the noisy images in one batch may take.
        batch_size: Samples saved together.
        calibration_limit: Most calibration images, 0 for all.
        seed: Seed of the noise and of the choice of samples.
        method: What a manifest calls this.
    """

    sigma: float
    eps: tuple[float, ...]
    n: int = 1000
    alpha: float = 0.001
    dtype: Dtype = "float32"
    memory: int = DEFAULT_MEMORY
    batch_size: int = 8
    calibration_limit: int = 0
    seed: int = 0
    method: ClassVar[str] = "smoothing"

    def check(self, shape: tuple[int, int, int]) -> None:
        """Refuse settings that make no sense for images of this shape, or with which nothing could be certified.

        Raises:
            InputError: Naming what is wrong.
        """
        _check_noise(self.sigma, self.alpha)
        check_eps(self.eps, "l2", shape)
        if self.batch_size < 1:
            raise InputError(f"batch size must be 1 or more, got {self.batch_size}")
        if self.n < 1 or 0.5**self.n >= self.alpha / 2:
            least = math.floor(math.log2(2 / self.alpha)) + 1
            raise InputError(f"{self.n} draws certify nothing at alpha {self.alpha:g}; use n of at least {least}")
        if self.dtype not in DTYPES:
            raise InputError(f"unknown dtype {self.dtype!r}; use one of {', '.join(DTYPES)}")
        for name, least in (("memory", 2**16), ("calibration_limit", 0)):
            if getattr(self, name) < least:
                raise InputError(f"{name.replace('_', ' ')} must be {least} or more, got {getattr(self, name)}")


class Smoother:
    """Draws scores under noise and certifies what they say.

    The draws of a sample depend on the seed, the role and name of its set, its index and the kind of device; not on
    which samples are certified beside it.

    Args:
        detector: Network and architecture; its gamma plays no part.
        settings: What to certify.

    Attributes:
        batch: Noisy images that pass through the network together.

    Raises:
        InputError: If the settings make no sense for the detector.
    """

    def __init__(self, detector: Detector, settings: SmoothingSettings) -> None:
        shape = detector.shape
        settings.check(shape)
        check_network(detector.network)
        self.settings = settings
        self._base, self._score = detector.network, detector.score
        self._network = copy.deepcopy(detector.network).to(getattr(torch, settings.dtype))
        blank = torch.zeros(shape).to(next(self._network.parameters()))
        self.batch = min(settings.n, max(1, settings.memory // layer_bytes(self._network, blank)))

    def score(self, image: Tensor) -> float:
        """S(x) without noise, in float64."""
        with torch.no_grad():
            return float(self._score.value(self._base(image[None].to(next(self._base.parameters())))))

    def draws(
        self, image: Tensor, role: Literal["calibration", "test", "verification"], name: str, index: int
    ) -> NDArray[np.float64]:
        """Scores of one image under noise, shape (n,).

        Args:
            image: Shape (C, H, W).
            role: What the sample serves; each role has noise of its own.
            name: Name of its set.
            index: Position in its set.
        """
        settings = self.settings
        key = hashlib.sha256(f"{settings.seed}/{role}/{index}/{name}".encode()).digest()
        generator = torch.Generator(next(self._network.parameters()).device)
        generator.manual_seed(int.from_bytes(key[:8], "little"))
        draws = smoothed_scores(self._network, image, settings.sigma, settings.n, generator, self.batch, self._score)
        return draws.numpy()

    def certify(self, draws: NDArray[np.float64], gamma: float, kind: str) -> dict[str, Any]:
        """What follows from the draws of one sample, by name; the bounds `s_lb_smoothed`, `s_ub_smoothed` one an eps.

        Args:
            draws: Shape (n,).
            gamma: Threshold of the smoothed score, which must not depend on these draws.
            kind: "id" (to be accepted), "ood" or "noise" (to be rejected).
        """
        settings = self.settings
        below, above = draws_beyond(draws, gamma)
        accepted, rejected = smoothed_radius([below, above], settings.n, settings.sigma, settings.alpha).tolist()
        right, wrong = (accepted, rejected) if kind == "id" else (rejected, accepted)
        lower, upper = smoothed_bounds(draws, settings.eps, settings.sigma, settings.alpha)
        return {
            "median_estimate": float(median_estimate(draws)),
            "draws_below": int(below),
            "draws_above": int(above),
            "decision": "accepted" if accepted > 0 else "rejected" if rejected > 0 else "abstained",
            "status": "certified" if right > 0 else "misdecided" if wrong > 0 else "abstained",
            "radius_smoothed": right,
            "sigma": settings.sigma,
            "n": settings.n,
            "alpha": settings.alpha,
            "s_lb_smoothed": lower.tolist(),
            "s_ub_smoothed": upper.tolist(),
        }
