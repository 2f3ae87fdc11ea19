"""Scores that a benchmark can take for S: S itself, or what is proved of it over balls around the images.

A metric of lower bounds on OOD images and S on ID images is one that no attack on the OOD images can push further down:
a guaranteed AUROC or FPR (Bitterwolf et al., NeurIPS 2020). Upper bounds on ID images do the same for the other side.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from grood_cert.api import score_bounds
from grood_cert.ball import Norm
from grood_cert.detector import Detector
from grood_cert.errors import InputError

Bound = Literal["lower", "upper"]


def worst_case_scores(
    detector: Detector, x: Tensor, eps: float = 0.0, bound: Bound = "lower", norm: Norm = "linf"
) -> Tensor:
    """S(x), or a proved bound of S over the ball around each image, in float64.

    Args:
        detector: The detector.
        x: Images, pixels in [0, 1], shape (N, C, H, W).
        eps: Radius of the balls in pixel units; 0: S(x) itself.
        bound: "lower": the least that S can be on the ball; "upper": the most.
        norm: "linf", "l2" or "l1".

    Returns:
        Shape (N,), on the CPU. Where nothing is proved, infinite: -inf as a lower bound, inf as an upper one.

    Raises:
        InputError: If images or settings make no sense, or no engine can bound the network.
        SoundnessError: If S(x) itself lies outside the bounds.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3)).eval()
        >>> x = torch.rand(20, 1, 2, 2)
        >>> detector = Detector.calibrate(model, x)
        >>> bool((worst_case_scores(detector, x, 0.1) < worst_case_scores(detector, x)).all())
        True
    """
    if bound not in get_args(Bound):
        raise InputError(f"unknown bound {bound!r}; use 'lower' or 'upper'")
    if eps == 0:
        return detector.predict(x).score
    found = score_bounds(detector, x, eps, norm)
    if bound == "lower":
        return torch.where(found.lower <= found.upper, found.lower, -torch.inf).cpu()
    return torch.where(found.lower <= found.upper, found.upper, torch.inf).cpu()
