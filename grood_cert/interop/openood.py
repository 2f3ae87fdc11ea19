"""Our detectors in OpenOOD, as a postprocessor; it runs where the network is, on a CPU too.

OpenOOD hands a postprocessor the network and images that its preprocessor normalised. Balls are in pixel units, so that
the postprocessor has to know that normalisation, undoes it, and puts it in front of the network.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from grood_cert.ball import Norm
from grood_cert.detector import Detector
from grood_cert.errors import InputError
from grood_cert.interop.worst_case import Bound, worst_case_scores
from grood_cert.scores import ENERGY, Score

_ROUNDING = 1e-3  # of pixels that were normalised and are brought back


def _base() -> Any:
    try:
        return importlib.import_module("openood.postprocessors").BasePostprocessor
    except ImportError:
        return object


class CertifiedPostprocessor(_base()):  # type: ignore[misc]
    """A postprocessor whose confidence is -S(x), or a proved bound of it over balls.

    Its class is OpenOOD's `BasePostprocessor` where OpenOOD is installed, so that `Evaluator(net, id_name,
    postprocessor=...)` takes it.

    Args:
        mean: Of the preprocessor, one value a channel.
        std: Likewise.
        eps: Radius of the balls in pixel units; 0: S(x) itself.
        bound: "lower" for OOD images, "upper" for ID images: what the worst point of the ball can make of S.
        norm: "linf", "l2" or "l1".
        score: S.
        tpr: Percent of ID to accept.
    """

    APS_mode = False
    hyperparam_search_done = True

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        eps: float = 0.0,
        bound: Bound = "lower",
        norm: Norm = "linf",
        score: Score = ENERGY,
        tpr: int = 95,
    ) -> None:
        self.mean, self.std, self.score, self.tpr = tuple(mean), tuple(std), score, tpr
        self.eps, self.bound, self.norm = eps, bound, norm
        self.detector: Detector | None = None

    def setup(self, net: nn.Module, id_loader_dict: Mapping[str, Any], ood_loader_dict: Mapping[str, Any]) -> None:
        """Make a detector of a copy of the network: gamma comes from the ID images in `id_loader_dict["val"]`.

        Raises:
            InputError: If the network is in train mode, there are too few images, or the normalisation is another one.
        """
        del ood_loader_dict
        images = torch.cat([self._pixels(batch["data"]) for batch in id_loader_dict["val"]])
        self.detector = Detector.calibrate(net, images, score=self.score, tpr=self.tpr, mean=self.mean, std=self.std)

    def postprocess(self, net: nn.Module, data: Tensor) -> tuple[Tensor, Tensor]:
        """Class and confidence of normalised images, shape (N,) each; the confidence is higher for ID.

        Raises:
            InputError: If `setup` was not called, or images or settings make no sense.
            SoundnessError: If S(x) itself lies outside the bounds.
        """
        del net  # the detector has its copy
        if self.detector is None:
            raise InputError("call setup(net, id_loader_dict, ood_loader_dict) first; it calibrates the detector")
        pixels = self._pixels(data)
        scores = worst_case_scores(self.detector, pixels, self.eps, self.bound, self.norm)
        return self.detector.predict(pixels).label, -scores

    def inference(
        self, net: nn.Module, data_loader: Iterable[Mapping[str, Tensor]], progress: bool = True
    ) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.int64]]:
        """Classes, confidences and labels of the batches `{"data": ..., "label": ...}` of a loader.

        Args:
            net: The network.
            data_loader: Batches of normalised images.
            progress: Not used; OpenOOD gives it.
        """
        del progress
        found = [(*self.postprocess(net, batch["data"]), batch["label"]) for batch in data_loader]
        classes, confidence, labels = (torch.cat(parts).cpu().numpy() for parts in zip(*found, strict=True))
        return classes.astype(np.int64), confidence, labels.astype(np.int64)

    def _pixels(self, data: Tensor) -> Tensor:
        mean, std = (data.new_tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        pixels = data * std + mean
        low, high = (float(value) for value in pixels.aminmax())
        if not (low >= -_ROUNDING and high <= 1 + _ROUNDING):
            raise InputError(f"pixels from {low:g} to {high:g}: mean and std are not those of the preprocessor")
        return pixels.clamp(0, 1)
