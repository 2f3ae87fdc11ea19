"""Radii from Lipschitz bounds: closed forms, soundness against the true decision, and what must give 0."""

import pytest
import torch
from torch import nn

from grood_cert.ball import Ball
from grood_cert.errors import InputError
from grood_cert.lipschitz.bound import local_lipschitz, running_minimum
from grood_cert.lipschitz.radius import fixed_point_radius, margins, path_radius, proved_radius
from grood_cert.networks.capture import capture

NAN, INF = float("nan"), float("inf")


def vector(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_linear_score_has_its_exact_radius():
    # one logit w . x: the radius is m / ||w||_1, for the fixed point and the path alike
    weight = vector(3.0, -1.0)
    bound = 4.0
    margin = vector(0.4, 0.0, 2.0)
    fixed = fixed_point_radius(lambda eps: torch.full_like(eps, bound), margin, 0.3)
    assert float(weight.abs().sum()) == bound
    assert fixed.tolist() == pytest.approx([0.1, 0.0, 0.3], rel=1e-9)
    grid = torch.linspace(0.03, 0.3, 10, dtype=torch.float64)
    path = path_radius(grid, torch.full((3, 10), bound, dtype=torch.float64), margin)
    assert path.tolist() == pytest.approx([0.1, 0.0, 0.3], rel=1e-9)
    assert bool((bound * fixed <= margin).all() and (bound * path <= margin).all())
    assert float(bound * fixed[0]) < float(margin[0])  # strictly: equality on the OOD side would be ID


@pytest.mark.parametrize(
    ("eps", "bound", "margin"),
    [
        (0.1, NAN, 1.0),
        (0.1, INF, 1.0),
        (0.1, -1.0, 1.0),
        (0.1, 1.0, NAN),
        (0.1, 1.0, INF),
        (0.1, 1.0, -1.0),
        (0.1, 0.0, 0.0),
    ],
)
def test_what_is_not_a_proof_gives_radius_zero(eps, bound, margin):
    assert proved_radius(vector(eps), vector(bound), vector(margin)).item() == 0.0
    assert fixed_point_radius(lambda _: vector(bound), vector(margin), 0.2).item() == 0.0
    if not (bound == 0.0 or bound == -1.0):
        assert path_radius(vector(0.1, 0.2), vector(bound, bound)[None], vector(margin)).item() == 0.0


def test_constant_score_is_proved_up_to_the_ball():
    assert proved_radius(vector(0.1), vector(0.0), vector(0.5)).item() == pytest.approx(0.1)


def test_wrong_side_has_no_margin():
    score = vector(-3.0, 1.0, 0.0)
    assert margins(score, 0.0, accepted=True).tolist() == [3.0, 0.0, 0.0]
    assert margins(score, 0.0, accepted=False).tolist() == [0.0, 1.0, 0.0]


def test_bounds_that_are_not_monotone_cost_tightness_but_no_proof():
    # L(eps) drops again beyond .5; each tested eps is its own proof
    margin = vector(1.0)
    tested = []

    def bound(eps):
        tested.append((float(eps), float(torch.where(eps > 0.5, 1.0, 10.0))))
        return torch.where(eps > 0.5, 1.0, 10.0).double()

    radius = fixed_point_radius(bound, margin, 1.0).item()
    assert radius <= max(min(eps, 1 / value) for eps, value in tested)
    assert radius == pytest.approx(1.0)


def test_path_uses_each_slope_for_its_own_shell_only():
    grid = vector(1.0, 2.0, 4.0)
    slopes = torch.tensor([[1.0, 2.0, 5.0], [NAN, NAN, 2.0], [1.0, INF, NAN], [4.0, 2.0, 1.0]], dtype=torch.float64)
    found = path_radius(grid, slopes, vector(6.0, 6.0, 6.0, 3.5))
    # 1 + 2 + 5 t = 6; NaN inherits 2 from the larger ball; stops where nothing is known; minimum from the right is 1
    assert found.tolist() == pytest.approx([2.6, 3.0, 1.0, 3.5])
    with pytest.raises(InputError, match="increase"):
        path_radius(vector(0.0, 1.0), slopes[:, :2], vector(1.0, 1.0, 1.0, 1.0))
    with pytest.raises(InputError, match="round"):
        fixed_point_radius(lambda eps: eps, vector(1.0), 0.1, rounds=0)


def test_running_minimum_is_non_decreasing_and_never_above():
    bounds = vector(3.0, 2.0, NAN, 5.0, 4.0, INF)
    assert running_minimum(bounds).tolist() == [2.0, 2.0, 4.0, 4.0, 4.0, INF]


@pytest.mark.parametrize("accepted", [True, False])
def test_no_decision_flips_inside_a_proved_radius(accepted):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(2, 12), nn.ReLU(), nn.Linear(12, 3)).double().eval()
    network.requires_grad_(False)
    for parameter in network.parameters():
        parameter.mul_(3.0)
    graph = capture(network, (1, 1, 2))
    axis = torch.linspace(0, 1, 201, dtype=torch.float64)
    points = torch.cartesian_prod(axis, axis)
    scores = -torch.logsumexp(network(points.reshape(-1, 1, 1, 2)), 1)
    gamma = float(scores.median())
    chosen = torch.randperm(len(points), generator=torch.Generator().manual_seed(1))[:25]
    margin = margins(scores[chosen], gamma, accepted)
    images = points[chosen].reshape(-1, 1, 1, 2)

    def bound(eps):
        found = local_lipschitz(graph, Ball(images, eps, "linf"), fixed_head=accepted)
        return torch.minimum(found.auto, found.fixed_head) if accepted else found.auto

    fixed = fixed_point_radius(bound, margin, 1.0)
    grid = torch.logspace(-3, 0, 20, dtype=torch.float64)
    path = path_radius(grid, torch.stack([bound(t.expand(25)) for t in grid], 1), margin)
    wrong = scores > gamma if accepted else scores <= gamma
    distance = (points[None] - points[chosen][:, None]).abs().amax(2)
    exact = torch.where(wrong[None], distance, torch.inf).amin(1)  # distance to the nearest grid point that flips
    positive = margin > 0
    assert bool((fixed[~positive] == 0).all() and (path[~positive] == 0).all())
    assert bool((fixed[positive] > 0).all())
    assert bool((fixed <= exact).all() and (path <= exact).all())
    assert float((path / exact)[positive & torch.isfinite(exact)].median()) > 0.6  # and it is not a trivial proof
