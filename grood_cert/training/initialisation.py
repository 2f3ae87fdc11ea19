r"""Random weights under which the intervals of bounds keep their width from layer to layer.

Through z = W x + b an interval of radius r becomes one of radius |W| r. With n inputs of a neuron, weights of W normal with mean
0 and standard deviation s, E|W| = s sqrt(2 / pi), and inputs that are ReLUs of neurons whose intervals lie around centres
symmetric about 0, which halve the mean radius,

    E[radius of z] = n E|W| E[radius of ReLU] = n s sqrt(2 / pi) / 2 E[radius before it],

which stays what it was at s = sqrt(2 pi) / n. The usual s of order 1 / sqrt(n) lets it grow by sqrt(n) a layer instead. The first
layer, whose inputs are no ReLUs, doubles it; sums of branches add up. What is paid: values shrink by sqrt(2 pi / n) a layer.

References:
    Shi et al., "Fast Certified Robust Training with Short Warmup", NeurIPS 2021.
"""

from __future__ import annotations

import math

from torch import nn


def keep_interval_width(network: nn.Module) -> None:
    """Draw the weights of all linear layers anew as above, in place; their biases become 0.

    Example:
        >>> layer = nn.Linear(1000, 1000)
        >>> keep_interval_width(layer)
        >>> round(layer.weight.std().item() * 1000 / math.sqrt(2 * math.pi), 2)
        1.0
    """
    for layer in network.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            nn.init.normal_(layer.weight, std=math.sqrt(2 * math.pi) / layer.weight[0].numel())
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
