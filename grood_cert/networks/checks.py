"""What every proof, attack and score asks of a network and of images before it looks at them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from grood_cert.errors import InputError, said


def check_eval(network: nn.Module) -> None:
    """Refuse a network in train mode: BatchNorm would use the batch, dropout would be active.

    Raises:
        InputError: Naming the first module in train mode.

    Example:
        >>> check_eval(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).eval())
    """
    for name, module in network.named_modules():
        if module.training:
            what = f"module {name}" if name else f"the network ({type(module).__name__})"
            raise InputError(f"{what} is in train mode; call network.eval() first")


def count_classes(network: nn.Module, shape: tuple[int, ...]) -> int:
    """Number of logits K of a network, which is tried on one image.

    Raises:
        InputError: If it does not turn images of this shape into logits (B, K).

    Example:
        >>> count_classes(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), (1, 2, 2))
        2
    """
    weight = next(network.parameters(), torch.zeros(()))
    try:
        with torch.no_grad():
            found = network(weight.new_zeros(1, *shape))
    except Exception as error:
        reason = said(error)[:160]
        raise InputError(f"the network does not take images of shape {shape} ({reason})") from error
    if not isinstance(found, Tensor):
        raise InputError(f"the network must return one tensor, its logits, not a {type(found).__name__}")
    if found.dim() != 2:
        raise InputError(f"the network must return logits of shape (B, K), got {tuple(found.shape)} for one image")
    return int(found.shape[1])


def check_pixels(images: Tensor, shape: tuple[int, ...] | None = None, name: str = "images") -> None:
    """Refuse what is no batch of images.

    Args:
        images: Pixels in [0, 1], shape (N, C, H, W).
        shape: (C, H, W), if one is expected.
        name: What the message calls them.

    Raises:
        InputError: Naming what is wrong.

    Example:
        >>> check_pixels(torch.rand(2, 3, 8, 8), (3, 8, 8))
    """
    if not isinstance(images, Tensor):
        raise InputError(f"{name}: expected a tensor, got {type(images).__name__}")
    found, wanted = tuple(images.shape), "N, C, H, W" if shape is None else f"N, {', '.join(map(str, shape))}"
    if len(found) != 4 or (shape is not None and found[1:] != shape):
        hint = "; add the axis of the batch: x[None]" if found == shape or (not shape and len(found) == 3) else ""
        raise InputError(f"{name}: expected shape ({wanted}), got {found}{hint}")
    if not len(images):
        raise InputError(f"{name}: expected one image or more, got none")
    if not images.is_floating_point():
        hint = "divide them by 255 as floats" if images.dtype == torch.uint8 else "make them floats in [0, 1]"
        raise InputError(f"{name}: pixels of type {images.dtype}; {hint}")
    low, high = (float(value) for value in images.detach().aminmax())
    if not (low >= 0 and high <= 1):
        raise InputError(
            f"{name}: pixels from {low:g} to {high:g}; all must lie in [0, 1], normalisation is a layer of the model"
        )
