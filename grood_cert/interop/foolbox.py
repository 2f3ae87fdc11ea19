"""A detector's decision as two logits, for attacks that know classifiers only, such as those of foolbox.

fmodel = foolbox.PyTorchModel(DecisionLogits(detector), bounds=(0, 1), device="cpu")
foolbox.attacks.LinfPGD()(fmodel, images, decisions, epsilons=[2 / 255])
"""

from __future__ import annotations

from torch import Tensor, nn
from torch import stack as stacked

from grood_cert.detector import Detector


class DecisionLogits(nn.Module):
    """x -> (gamma - S(x), S(x) - gamma): class 0 is accepted, class 1 rejected, up to rounding where they tie.

    An attack that changes the class changes the detector's decision, and its distance bounds the certified radius from
    above. For MSP, S and gamma go through the increasing function `Score.order`, because S itself has no gradient where
    it saturates.

    Args:
        detector: The detector; images are pixels in [0, 1].

    Example:
        >>> import torch
        >>> model, x = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).eval(), torch.rand(40, 1, 2, 2)
        >>> detector = Detector.calibrate(model, x)
        >>> torch.equal(DecisionLogits(detector)(x).argmax(1) == 0, detector.predict(x).accepted)
        True
    """

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.network, self.order, self.gamma = (
            detector.network,
            detector.score.order,
            detector.score.order_at(detector.gamma),
        )
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Two logits in float64, shape (N, 2), with gradients to the images."""
        weight = next(self.network.parameters())
        excess = self.order(self.network(images.to(weight))) - self.gamma
        return stacked([-excess, excess], 1)
