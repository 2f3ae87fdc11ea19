from __future__ import annotations

import dataclasses
import math
import threading

import numpy as np
import pytest
import torch
from torch import nn

from grood_cert import metrics
from grood_cert.data import ImageSet, StoredImages
from grood_cert.errors import InputError, RunError
from grood_cert.scores import energy
from grood_cert.training import step as steps
from grood_cert.training.loop import _order, fit, one_ahead
from tests.training.examples import bad_images, experiment, network_of, small


@pytest.mark.parametrize(
    ("count", "batch_size", "sizes"), [(20, 8, [7, 7, 6]), (9, 8, [5, 4]), (8, 8, [8]), (1, 8, [1])]
)
def test_an_epoch_sees_every_image_once_in_even_batches(monkeypatch, count, batch_size, sizes):
    """No last batch of one sample, on which BatchNorm would stumble, unless there is but one."""
    data = experiment(train=count, auxiliary=6)
    recipe = small(
        network={"name": "resnet18", "width": 4},
        optimizer={"batch_size": batch_size, "epochs": 2},
        objective={"lambda_grad": 0},
    )
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    original = steps.objective

    def watch(network, images_id, labels, images_aux, weights, **options):
        seen.append((images_id, images_aux))
        for image, label in zip(images_id, labels, strict=True):
            (index,) = [i for i in range(count) if torch.equal(data.train.images[i], image)]
            assert data.train.labels[index] == label
        return original(network, images_id, labels, images_aux, weights, **options)

    monkeypatch.setattr(steps, "objective", watch)
    epochs = list(fit(network_of(recipe, data), data, recipe))
    assert len(epochs) == 2 and all(math.isfinite(epoch.loss) for epoch in epochs)
    assert [len(batch) for batch, _ in seen] == 2 * sizes
    assert [len(batch) for _, batch in seen] == 2 * sizes
    for start in (0, len(sizes)):
        epoch = torch.cat([batch for batch, _ in seen[start : start + len(sizes)]])
        assert sorted(epoch.flatten(1).sum(1).tolist()) == sorted(data.train.images.flatten(1).sum(1).tolist())
    if count >= 6:
        outliers = torch.cat([batch for _, batch in seen[: len(sizes)]]).flatten(1).sum(1).tolist()
        counts = [outliers.count(value) for value in data.auxiliary.images.flatten(1).sum(1).tolist()]
        assert sum(counts) == count and max(counts) - min(counts) <= 1, "outliers in turn, none left out"


def test_the_order_is_reshuffled_every_epoch():
    generator = torch.Generator().manual_seed(0)
    first, second = (_order(50, 50, generator) for _ in range(2))
    assert not torch.equal(first, second)
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(50))
    assert len(set(_order(50, 20, generator).tolist())) == 20
    assert sorted(_order(3, 9, generator).tolist()) == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_the_log_measures_the_network_after_the_epoch():
    recipe, data = small(optimizer={"epochs": 1}), experiment()
    network = network_of(recipe, data)
    (epoch,) = fit(network, data, recipe)
    assert not network.training
    logits = network(data.calibration.images)
    assert epoch.accuracy == pytest.approx(float((logits.argmax(1) == data.calibration.labels).float().mean()))
    inside, outside = (energy(network(part.images)).detach() for part in (data.calibration, data.auxiliary_heldout))
    assert epoch.fpr95_id == metrics.fpr95_id(inside, outside)
    slopes = [
        torch.autograd.functional.jacobian(lambda x: energy(network(x)), image[None]).norm()
        for image in data.auxiliary_heldout.images
    ]
    assert epoch.gradient_norm_aux == pytest.approx(float(torch.stack(slopes).mean()), rel=1e-5)


def test_divergence_is_a_run_error_and_restores_the_last_good_epoch():
    recipe, data = small(optimizer={"name": "sgd", "lr": 0.01, "epochs": 5}), experiment()
    network = network_of(recipe, data)
    epochs = fit(network, data, recipe)
    next(epochs)
    good = {key: value.clone() for key, value in network.state_dict().items()}
    data.train.images[:] = float("nan")
    with pytest.raises(RunError, match=r"training diverged in epoch 2: .*lower optimizer\.lr"):
        next(epochs)
    assert all(torch.equal(good[key], value) for key, value in network.state_dict().items())
    assert all(value.isfinite().all() for value in network.state_dict().values())


def test_a_step_that_ends_in_nan_is_divergence_too(monkeypatch):
    """The loss of the last step was finite, the weights after it are not."""
    recipe, data = small(optimizer={"epochs": 1}), experiment()
    network = network_of(recipe, data)
    network[-1].weight.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(RunError, match="training diverged in epoch 1"):
        list(fit(network, data, recipe))
    assert all(value.isfinite().all() for value in network.state_dict().values())


def test_divergence_with_bounds_names_their_settings():
    recipe, data = small(objective={"certified": "ood", "certified_eps": 0.1}), experiment()
    network = network_of(recipe, data)
    network[-1].weight.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(
        RunError, match=r"lower optimizer\.lr, objective\.lambda_certified, objective\.certified_eps, obj"
    ):
        list(fit(network, data, recipe))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            bad_images(train=torch.full((20, 1, 8, 8), float("nan"))),
            "'id-0' has pixels from nan to nan; all must lie in",
        ),
        (
            bad_images(train=torch.full((20, 1, 8, 8), 255.0)),
            "'id-0' has pixels from 255 to 255; all must lie in [0, 1]",
        ),
        (
            bad_images(train=torch.full((20, 1, 8, 8), 255, dtype=torch.uint8)),
            "pixels of type torch.uint8; divide them",
        ),
        (bad_images(auxiliary=torch.rand(5, 1, 8, 8) - 0.5), "'ood-3' has pixels from -0."),
        (bad_images(auxiliary=torch.zeros(0, 1, 8, 8)), "'ood-3' is empty; training needs ID images and auxiliary"),
        (bad_images(labels=torch.arange(20)), "labels of 'id-0' run from 0 to 19; 3 classes are 0..2"),
        (bad_images(labels=torch.full((20,), -1)), "labels of 'id-0' run from -1 to -1; 3 classes are 0..2"),
    ],
)
def test_images_and_labels_that_cannot_be_trained_on(data, message):
    with pytest.raises(InputError) as caught:
        next(fit(network_of(small(), experiment()), data, small()))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_network_with_other_classes_than_the_labels():
    network = network_of(small(), experiment())
    network[-1] = nn.Linear(8, 5)
    with pytest.raises(InputError, match="the network has 5 logits, 'id-0' has 3 classes"):
        next(fit(network, experiment(), small()))


def test_images_that_are_read_as_they_are_used_train_the_same_network():
    data = experiment()

    def stored(images: ImageSet) -> ImageSet:
        kept = images.images.numpy()
        read = StoredImages(lambda positions: torch.from_numpy(kept[positions]), images.shape, np.arange(len(kept)))
        return dataclasses.replace(images, images=read)

    lazy = dataclasses.replace(
        data,
        train=stored(data.train),
        calibration=stored(data.calibration),
        auxiliary=stored(data.auxiliary),
        auxiliary_heldout=stored(data.auxiliary_heldout),
    )
    recipe = small(augmentation={"noise_sigma": 0.1})
    networks = [network_of(recipe, images) for images in (data, lazy)]
    for network, images in zip(networks, (data, lazy), strict=True):
        list(fit(network, images, recipe))
    assert all(torch.equal(*pair) for pair in zip(*(network.parameters() for network in networks), strict=True))


def test_batches_are_read_in_order_one_ahead_by_one_other_thread():
    read, used, threads = [], [], set()

    def pixels(inside: torch.Tensor, outside: torch.Tensor) -> int:
        threads.add(threading.get_ident())
        read.append(int(inside))
        return 10 * int(inside) + int(outside)

    batches = [(torch.tensor(number), torch.tensor(1)) for number in range(5)]
    for found in one_ahead(pixels, batches):
        used.append(found)
        assert len(read) <= len(used) + 1, "never further"
    assert (read, used) == ([0, 1, 2, 3, 4], [1, 11, 21, 31, 41])
    assert len(threads) == 1 and threading.get_ident() not in threads
    assert list(one_ahead(pixels, [])) == []

    def missing(inside: torch.Tensor, outside: torch.Tensor) -> int:
        raise InputError(f"picture {int(inside)} is gone")

    with pytest.raises(InputError, match="picture 0 is gone"):
        next(one_ahead(missing, batches))
