"""Against transforms written down one image at a time, and the moments of the noise."""

from __future__ import annotations

import pytest
import torch

from grood_cert.sections import AugmentationSection
from grood_cert.training.augmentation import augment


def images(count: int = 64, channels: int = 2, height: int = 5, width: int = 6) -> torch.Tensor:
    return torch.rand(count, channels, height, width, generator=torch.Generator().manual_seed(0))


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_flip_is_the_image_or_its_mirror_image():
    before = images()
    after = augment(before, AugmentationSection(flip=True), draws())
    same = [torch.equal(*pair) for pair in zip(before, after, strict=True)]
    mirrored = [torch.equal(one.flip(-1), other) for one, other in zip(before, after, strict=True)]
    assert all(a != b for a, b in zip(same, mirrored, strict=True))
    assert 16 < sum(mirrored) < 48  # 32 expected, 4 standard deviations of 4


def test_a_shift_is_a_window_of_the_image_with_a_black_margin():
    before, padding = images(), 2
    after = augment(before, AugmentationSection(crop_padding=padding), draws())
    assert after.shape == before.shape
    found = []
    for one, other in zip(before, after, strict=True):
        canvas = torch.zeros(2, 5 + 2 * padding, 6 + 2 * padding)
        canvas[:, padding : padding + 5, padding : padding + 6] = one
        places = [
            (top, left)
            for top in range(2 * padding + 1)
            for left in range(2 * padding + 1)
            if torch.equal(canvas[:, top : top + 5, left : left + 6], other)
        ]
        assert places
        found.append(places[0])
    assert {top for top, _ in found} == {left for _, left in found} == set(range(5)), "every offset occurs"


def test_noise_is_gaussian_and_not_clipped():
    before = torch.full((400, 1, 8, 8), 0.9)
    noise = augment(before, AugmentationSection(noise_sigma=0.25), draws()) - before
    count = noise.numel()
    assert abs(float(noise.mean())) < 5 * 0.25 / count**0.5
    assert float(noise.std()) == pytest.approx(0.25, rel=5 / (2 * count) ** 0.5)
    assert float((noise.abs() < 0.25).float().mean()) == pytest.approx(0.6827, abs=0.015)
    assert float((before + noise).max()) > 1.2
    flat = noise.flatten(1)
    assert abs(float((flat[:, 0] * flat[:, 1]).mean())) < 5 * 0.25**2 / 400**0.5, "pixels are independent"


def test_a_resized_crop_of_a_ramp_is_a_piece_of_the_ramp():
    """On a linear image bilinear interpolation is exact: rows and columns stay equally spaced, within the old range."""
    size, count = 32, 200
    ramp = torch.linspace(0, 1, size).expand(size, size)
    before = torch.stack([ramp, ramp.T]).expand(count, 2, size, size)
    after = augment(before, AugmentationSection(resized_crop=0.25), draws())
    inner = after[:, :, 1:-1, 1:-1]  # the margin may see the border
    across, down = inner[:, 0].diff(dim=2), inner[:, 1].diff(dim=1)
    step = 1 / (size - 1)
    for slopes in (across, down):
        assert float(slopes.flatten(1).std(1).max()) < 1e-5
    width, height = across.flatten(1).mean(1) / step, down.flatten(1).mean(1) / step
    area, aspect = width * height, width / height
    assert 0.2 < float(area.min()) < 0.3 and float(area.max()) <= 1 + 1e-4
    assert float(aspect.min()) > 0.74 and float(aspect.max()) < 1.34
    assert float(after.min()) >= 0 and float(after.max()) <= 1


def test_the_defaults_change_nothing_and_draw_nothing():
    generator = draws()
    state = generator.get_state()
    assert augment(images(), AugmentationSection(), generator).equal(images())
    assert generator.get_state().equal(state)


def test_the_seed_decides():
    section = AugmentationSection(flip=True, crop_padding=1, noise_sigma=0.1, resized_crop=0.5)
    first, again, other = (augment(images(), section, draws(seed)) for seed in (3, 3, 4))
    assert first.equal(again) and not first.equal(other)
