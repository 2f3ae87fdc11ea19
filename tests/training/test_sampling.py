"""GReg+: Algorithm 1 on pools whose clusters are known, and k-means against scikit-learn's."""

from __future__ import annotations

import copy

import pytest
import torch
from sklearn.cluster import KMeans
from torch import nn
from torch.nn import functional

from grood_cert.errors import InputError
from grood_cert.networks import architectures
from grood_cert.scores import energy
from grood_cert.training import sampling


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pool_of(sizes: list[int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, features and true clusters: directions far apart, lengths from 1 to 100 that must not matter."""
    generator = seeded(seed)
    groups = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    groups = groups[torch.randperm(len(groups), generator=generator)]
    directions = torch.eye(len(sizes))[groups] + 0.01 * torch.randn(len(groups), len(sizes), generator=generator)
    lengths = 1 + 99 * torch.rand(len(groups), 1, generator=generator)
    return torch.randn(len(groups), 4, generator=generator), lengths * directions, groups


def test_printed_routing_sends_each_cluster_s_lowest_energy_to_l_s_and_its_highest_to_l_grad():
    logits, features, groups = pool_of([9, 5, 12, 7])
    picks = sampling.pick(logits, features, 4, "printed", generator=seeded())
    assert len(picks.indices) == len(picks.indices.unique()) == 8
    score = -logits.exp().sum(1).log()
    for group in range(4):
        inside = (groups == group).nonzero().squeeze(1)
        energy_picks = picks.indices[picks.roles.energy & (groups[picks.indices] == group)]
        gradient_picks = picks.indices[picks.roles.gradient & (groups[picks.indices] == group)]
        assert energy_picks.tolist() == [int(inside[score[inside].argmin()])]
        assert gradient_picks.tolist() == [int(inside[score[inside].argmax()])]


def test_routing_both_sends_the_same_picks_everywhere():
    logits, features, _ = pool_of([9, 5, 12, 7])
    printed = sampling.pick(logits, features, 4, "printed", generator=seeded())
    both = sampling.pick(logits, features, 4, "both", generator=seeded())
    assert torch.equal(printed.indices, both.indices)
    assert both.roles.energy.all() and both.roles.gradient.all()


def test_a_cluster_of_one_gives_its_member_once_and_the_pool_fills_up():
    logits, features, groups = pool_of([1, 1, 10])
    picks = sampling.pick(logits, features, 3, "printed", generator=seeded())
    assert len(picks.indices.unique()) == 6
    both = picks.roles.energy & picks.roles.gradient
    assert (picks.roles.energy | picks.roles.gradient).all()
    alone = picks.indices[groups[picks.indices] < 2]
    assert sorted(groups[alone].tolist()) == [0, 1], "each once"
    assert both.sum() == 4, "two clusters of one, and two fillers"
    assert both[torch.isin(picks.indices, alone)].all()


def test_fillers_are_drawn_uniformly_from_the_rest():
    """Ten of the big cluster, two are picks, two of the other eight are drawn; each as often as any other."""
    logits, features, groups = pool_of([1, 1, 10])
    counts = torch.zeros(12)
    for seed in range(400):
        counts[sampling.pick(logits, features, 3, generator=seeded(seed)).indices] += 1
    score = energy(logits)
    inside = (groups == 2).nonzero().squeeze(1)
    ends = torch.stack([score[inside].argmin(), score[inside].argmax()])
    always = torch.cat([(groups < 2).nonzero().squeeze(1), inside[ends]])
    assert (counts[always] == 400).all()
    others = torch.ones(12, dtype=torch.bool)
    others[always] = False
    assert others.sum() == 8
    assert ((counts[others] - 100).abs() < 5 * (400 * 0.25 * 0.75) ** 0.5).all()


def test_a_seed_fixes_the_picks_and_the_global_generator_is_left_alone():
    logits, features = torch.randn(384, 10, generator=seeded(1)), torch.rand(384, 32, generator=seeded(2))
    state = torch.random.get_rng_state()
    first, again = (sampling.pick(logits, features, 64, generator=seeded(3)) for _ in range(2))
    assert torch.equal(first.indices, again.indices) and torch.equal(first.roles.energy, again.roles.energy)
    assert torch.equal(state, torch.random.get_rng_state())
    assert not torch.equal(first.indices, sampling.pick(logits, features, 64, generator=seeded(4)).indices)
    assert len(first.indices.unique()) == 128, "384 candidates for a batch of 64"


def test_repeated_and_zero_features_do_no_harm():
    for features in (torch.ones(20, 3), torch.zeros(20, 3)):
        picks = sampling.pick(torch.randn(20, 4, generator=seeded()), features, 5, generator=seeded())
        assert len(picks.indices.unique()) == 10


def test_too_small_a_pool_is_refused():
    sampling.check(128, 64)
    for call in (
        lambda: sampling.check(127, 64),
        lambda: sampling.pick(torch.rand(127, 4), torch.rand(127, 8), 64, generator=seeded()),
    ):
        with pytest.raises(InputError, match="127 candidates is too small: a step of 64 ID images takes 128 outliers"):
            call()
    with pytest.raises(InputError, match="routing: expected one of printed, both, got 'all'"):
        sampling.pick(torch.rand(9, 4), torch.rand(9, 8), 2, "all", generator=seeded())


@pytest.mark.parametrize(("count", "spread"), [(384, 1.0), (384, 0.1), (1000, 0.3)])
def test_k_means_is_as_good_as_scikit_learn_s(count, spread):
    """Inertia within 5 % of three runs of KMeans, for clusters apart and for clusters that overlap."""
    generator = seeded()
    centers = torch.randn(40, 64, generator=generator)
    points = centers[torch.randint(40, (count,), generator=generator)]
    points = functional.normalize(functional.relu(points + spread * torch.randn(count, 64, generator=generator)))
    truth = KMeans(n_clusters=64, n_init=3, random_state=0).fit(points.numpy()).inertia_
    labels = sampling.kmeans(points, 64, generator)
    inertia = sum(
        float((points[labels == label] - points[labels == label].mean(0)).square().sum()) for label in labels.unique()
    )
    assert inertia < 1.05 * truth


def test_candidates_are_seen_in_eval_mode_and_nothing_changes():
    torch.manual_seed(0)
    network = architectures.build("resnet-small", (1, 8, 8), 5, [0.4], [0.3])
    network(torch.rand(8, 1, 8, 8))
    frozen = next(module for module in network.modules() if isinstance(module, nn.BatchNorm2d)).eval()
    before = copy.deepcopy(network.state_dict())
    modes = {name: module.training for name, module in network.named_modules()}
    images = torch.rand(700, 1, 8, 8)
    logits, features = sampling.candidates(network, images)
    assert {name: module.training for name, module in network.named_modules()} == modes and not frozen.training
    assert all(torch.equal(value, network.state_dict()[key]) for key, value in before.items())
    assert not logits.requires_grad and not features.requires_grad
    twin = copy.deepcopy(network).eval()
    torch.testing.assert_close(logits, twin(images).detach())
    assert features.shape[0] == 700 and features.dim() == 2


def test_the_mode_comes_back_after_an_error():
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    with pytest.raises(TypeError):
        sampling.candidates(network, torch.rand(3, 1, 2, 2))
    assert network.training and network[1].training
