from __future__ import annotations

import numpy as np
import pytest

from grood_cert.errors import InputError
from grood_cert.results import adversarial, figures
from tests.results.examples import random_certification
from tests.results.test_figures import texts


def saved(folder, rows, channels=1, **changes):
    """Images of 4 x 4 and points at the attack radii of the rows (l_inf), in batches of 7, as a run keeps them."""
    folder.mkdir(exist_ok=True)
    generator, pairs, number = np.random.default_rng(0), {}, 0
    for name in dict.fromkeys(rows["set"].tolist()):
        chosen = np.flatnonzero(rows["set"] == name)
        for start in range(0, len(chosen), 7):
            part = chosen[start : start + 7]
            images = generator.random((len(part), channels, 4, 4)).astype(np.float32)
            moves = generator.choice([-1.0, 1.0], images.shape) * generator.random(images.shape)
            moves[:, 0, 0, 0] = 1.0
            radii = rows["radius_attack"][part]
            points = images + np.where(np.isfinite(radii), radii, 0.0)[:, None, None, None] * moves
            content = {"set": name, "index": rows["index"][part], "images": images, "points": points}
            np.savez(folder / f"{number:06d}.npz", **(content | {"radius_attack": radii} | changes))
            pairs |= dict(zip(part.tolist(), zip(images, points, strict=True), strict=True))
            number += 1
    return pairs


@pytest.mark.parametrize("samples", [1, 3, 50])
def test_least_and_most_robust_by_brute_force(samples):
    rows = random_certification(0)
    for name in ("in", "a"):
        mask = rows["set"] == name
        least, most = adversarial.extreme_rows(rows, mask, samples)
        known = [row for row in np.flatnonzero(mask) if rows["status"][row] != "misdecided"]
        assert not set(least) & set(most) and set(least) | set(most) <= set(known)
        assert len(least) + len(most) == min(2 * samples, len(known))
        others = set(known) - set(least)
        assert max(rows["radius_attack"][least]) <= min(rows["radius_attack"][list(others)], default=np.inf)
        rest = others - set(most)
        assert min(rows["radius_certified"][most]) >= max(rows["radius_certified"][list(rest)], default=0)


def test_twins_are_those_of_their_rows(tmp_path):
    rows = random_certification(0)
    pairs = saved(tmp_path / "adversarial", rows)
    chosen = [row for part in adversarial.extreme_rows(rows, rows["set"] == "b", 4) for row in part]
    found = adversarial.read_twins(tmp_path / "adversarial", rows, chosen)
    assert sorted(found) == sorted(chosen)
    for row, twin in found.items():
        np.testing.assert_array_equal(twin.image, pairs[row][0])
        np.testing.assert_array_equal(twin.twin, pairs[row][1])
        assert (twin.set, twin.index, twin.radius_attack) == ("b", rows["index"][row], rows["radius_attack"][row])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"points": np.zeros((7, 1, 4, 4))}, "a point lies .* from its image, the rows say"),
        ({"points": np.full((7, 1, 4, 4), np.nan)}, "images of shape"),
        ({"images": np.zeros((7, 16))}, "images of shape"),
        ({"index": np.arange(7)}, "not the points of these rows|lacks sample"),
        ({"set": np.array("other")}, "lacks sample"),
        ({"images": np.array(["a"] * 7)}, "could not convert"),
        ({"images": np.zeros((1, 1, 4, 4))}, "not the points of these rows"),
    ],
)
def test_points_of_other_rows_are_refused(tmp_path, changes, message):
    rows = random_certification(0)
    saved(tmp_path / "adversarial", rows, **changes)
    with pytest.raises(InputError, match=message):
        figures.gallery(rows, tmp_path / "adversarial")


def test_a_folder_that_lacks_what_is_needed_is_refused(tmp_path):
    rows = random_certification(0)
    with pytest.raises(InputError, match="no such folder; write it with: grood-cert certify MODEL --save-adversarial"):
        figures.gallery(rows, tmp_path / "adversarial")
    saved(tmp_path / "adversarial", rows, channels=2)
    with pytest.raises(InputError, match="images of 2 channels cannot be shown"):
        figures.gallery(rows, tmp_path / "adversarial")
    for content in (b"", b"nonsense", (tmp_path / "adversarial/000000.npz").read_bytes()[:300]):
        (tmp_path / "adversarial/000000.npz").write_bytes(content)
        with pytest.raises(InputError, match=r"000000\.npz: not the points of these rows"):
            figures.gallery(rows, tmp_path / "adversarial")
    with (tmp_path / "adversarial/000000.npz").open("wb") as stream:
        np.savez(stream, set="in", index=rows["index"][:7])
    with pytest.raises(InputError, match=r"lacks 'images.*; certify again with --save-adversarial"):
        figures.gallery(rows, tmp_path / "adversarial")


@pytest.mark.parametrize("channels", [1, 3])
def test_the_gallery_shows_image_twin_and_difference(tmp_path, channels):
    rows = random_certification(0)
    pairs = saved(tmp_path / "adversarial", rows, channels)
    figure = figures.gallery(rows, tmp_path / "adversarial", samples=2, width="single")
    shown = [image.get_array() for axes in figure.axes for image in axes.images]
    assert len(shown) == 3 * 3 * 4  # sets, pictures, samples
    least, most = adversarial.extreme_rows(rows, rows["set"] == "in", 2)
    first, twin = (np.clip(picture, 0, 1) for picture in pairs[least[0]])
    for picture, expected in ((shown[0], first), (shown[2], twin)):
        np.testing.assert_allclose(picture, expected.transpose(1, 2, 0) if channels == 3 else expected[0])
    difference = pairs[least[0]][1].astype(float) - pairs[least[0]][0]
    expected = 0.5 + difference / (2 * np.abs(difference).max())
    np.testing.assert_allclose(shown[4], expected.transpose(1, 2, 0) if channels == 3 else expected[0])
    said = texts(figure)
    assert "in (ID), least robust" in said and "b (OOD), most robust" in said and "n 40 in (ID)" in said
    for row in (*least, *most):
        assert f"certified {rows['radius_certified'][row]:.3g} attack {rows['radius_attack'][row]:.3g}" in said
    with pytest.raises(InputError, match="samples must be 0"):
        figures.gallery(rows, tmp_path / "adversarial", samples=-1)
