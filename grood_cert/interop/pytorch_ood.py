"""Our detectors in pytorch-ood: its benchmarks, metrics and pipelines take them as they take its own."""

from __future__ import annotations

from pytorch_ood.api import Detector as Base
from torch import Tensor

from grood_cert.ball import Norm
from grood_cert.detector import Detector
from grood_cert.interop.worst_case import Bound, worst_case_scores


class CertifiedDetector(Base):  # type: ignore[misc]
    """A detector for pytorch-ood, whose outlier scores are S(x), or proved bounds of S over balls.

    It needs no `fit`: the detector is calibrated, and scores do not depend on gamma. Images are pixels in [0, 1], because
    the detector normalises them itself.

    Args:
        detector: The detector.
        eps: Radius of the balls in pixel units; 0: S(x) itself.
        bound: "lower" for OOD images, "upper" for ID images: what the worst point of the ball can make of S.
        norm: "linf", "l2" or "l1".
    """

    def __init__(self, detector: Detector, eps: float = 0.0, bound: Bound = "lower", norm: Norm = "linf") -> None:
        super().__init__()
        self.model = detector.network  # `to` moves it
        self.detector, self.eps, self.bound, self.norm = detector, eps, bound, norm

    def predict(self, x: Tensor) -> Tensor:
        """Outlier scores, higher for OOD, shape (N,), float64.

        Raises:
            InputError: If images or settings make no sense, or no engine can bound the network.
            SoundnessError: If S(x) itself lies outside the bounds.
        """
        return worst_case_scores(self.detector, x, self.eps, self.bound, self.norm)
