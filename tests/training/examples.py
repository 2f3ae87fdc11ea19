"""Small recipes, and random images in the place of an experiment."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import nn

from grood_cert.data import Experiment, ImageSet
from grood_cert.recipe import Recipe, from_dict
from grood_cert.training.run import architecture_of

SMALL = {
    "data": {"train_limit": 90, "ood": ["digits:8,9", "uniform-noise"]},
    "network": {"name": "mlp", "width": 8},
    "optimizer": {"epochs": 2, "batch_size": 40},
}


def small(**sections) -> Recipe:
    return from_dict({**SMALL, **{name: {**SMALL.get(name, {}), **values} for name, values in sections.items()}})


def images(count: int, classes: int, seed: int, shape: tuple[int, int, int] = (1, 8, 8), kind: str = "id") -> ImageSet:
    generator = torch.Generator().manual_seed(seed)
    return ImageSet(
        name=f"{kind}-{seed}",
        kind=kind,
        images=torch.rand(count, *shape, generator=generator),
        labels=torch.arange(count) % classes,
        class_names=tuple(map(str, range(classes))),
    )


def experiment(train: int = 20, auxiliary: int = 10, **options) -> Experiment:
    return Experiment(
        train=images(train, 3, 0, **options),
        calibration=images(25, 3, 1, **options),
        test=images(25, 3, 2, **options),
        auxiliary=images(auxiliary, 1, 3, kind="ood", **options),
        auxiliary_heldout=images(10, 1, 4, kind="ood", **options),
        ood=(images(12, 1, 5, kind="ood", **options), images(12, 1, 6, kind="noise", **options)),
    )


def network_of(recipe: Recipe, data: Experiment) -> nn.Sequential:
    torch.manual_seed(0)
    return architecture_of(recipe, data).build()


def bad_images(train: torch.Tensor | None = None, labels: torch.Tensor | None = None, auxiliary=None) -> Experiment:
    data = experiment()
    changed = {} if train is None else {"images": train}
    changed |= {} if labels is None else {"labels": labels}
    outliers = data.auxiliary if auxiliary is None else dataclasses.replace(data.auxiliary, images=auxiliary)
    return dataclasses.replace(data, train=dataclasses.replace(data.train, **changed), auxiliary=outliers)


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="channels last is for a GPU")


def with_batch_statistics(network: nn.Module, images: torch.Tensor) -> nn.Module:
    """The network in eval mode, its running statistics those of this batch: mean, and variance divided by n."""
    fixed = copy.deepcopy(network)

    def read(layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        values = inputs[0].transpose(0, 1).flatten(1)
        layer.running_mean, layer.running_var = values.mean(1), values.var(1, correction=0)
        layer.eval()

    for layer in fixed.modules():
        if isinstance(layer, nn.BatchNorm2d) and layer.training:
            layer.register_forward_pre_hook(read)
    with torch.no_grad():
        fixed(images)
    for layer in fixed.modules():
        layer._forward_pre_hooks.clear()
    return fixed.eval()
