r"""Random changes of training images, drawn from one generator, image by image.

In this order: a random share of the area, resized to full size; a shift within a black margin; a horizontal flip; and
Gaussian noise, x + sigma n with n ~ N(0, I), the training that randomised smoothing asks for. The noise is not clipped:
the smoothed detector averages over points outside the pixel box too; terms over balls clip it themselves. The numbers are drawn on the CPU, so that they do
not depend on the device.

References:
    Cohen, Rosenfeld, Kolter, "Certified Adversarial Robustness via Randomized Smoothing", ICML 2019 (noise);
    Szegedy et al., "Going Deeper with Convolutions", CVPR 2015 (random area and aspect).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from grood_cert.sections import AugmentationSection

_ASPECT = (3 / 4, 4 / 3)


def augment(images: Tensor, section: AugmentationSection, generator: torch.Generator) -> Tensor:
    """Each image changed at random, independently of the others.

    Args:
        images: Pixels in [0, 1], shape (N, C, H, W).
        section: Which changes; the defaults make none.
        generator: On the CPU; what is drawn depends on the number of images and their shape alone.

    Returns:
        The same shape; pixels in [0, 1] but for the noise.

    Example:
        >>> images = torch.rand(2, 1, 8, 8)
        >>> torch.equal(augment(images, AugmentationSection(), torch.Generator()), images)
        True
    """
    if section.resized_crop < 1:
        images = _resized_crop(images, section.resized_crop, generator)
    if section.crop_padding:
        images = _shift(images, section.crop_padding, generator)
    if section.flip:
        flipped = torch.rand(len(images), generator=generator) < 0.5
        images = torch.where(flipped.to(images.device)[:, None, None, None], images.flip(3), images)
    if section.noise_sigma > 0:
        noise = torch.randn(images.shape, generator=generator, dtype=images.dtype)
        images = images + section.noise_sigma * noise.to(images.device)
    return images


def _shift(images: Tensor, padding: int, generator: torch.Generator) -> Tensor:
    """A window of the original size, anywhere in the image with a black margin of `padding` pixels."""
    count, _, height, width = images.shape
    top, left = torch.randint(2 * padding + 1, (2, count), generator=generator).to(images.device)
    padded = functional.pad(images, (padding,) * 4)
    rows = top[:, None] + torch.arange(height, device=images.device)
    columns = left[:, None] + torch.arange(width, device=images.device)
    samples = torch.arange(count, device=images.device)
    return padded[samples[:, None, None], :, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)


def _resized_crop(images: Tensor, smallest: float, generator: torch.Generator) -> Tensor:
    """A window of a random share of the area, at least `smallest`, and of random aspect, resized bilinearly."""
    area, aspect, across, down = torch.rand(4, len(images), generator=generator).to(images)
    low, high = math.log(_ASPECT[0]), math.log(_ASPECT[1])
    side, stretch = (smallest + (1 - smallest) * area).sqrt(), (low + (high - low) * aspect).exp().sqrt()
    width, height = (side * stretch).clamp(max=1), (side / stretch).clamp(max=1)
    zero = torch.zeros_like(width)
    across, down = (2 * across - 1) * (1 - width), (2 * down - 1) * (1 - height)  # the window's centre, in [-1, 1]
    window = torch.stack([torch.stack([width, zero, across], 1), torch.stack([zero, height, down], 1)], 1)
    grid = functional.affine_grid(window, list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, padding_mode="border", align_corners=False).clamp(0, 1)
