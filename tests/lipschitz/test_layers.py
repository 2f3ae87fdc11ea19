"""No gradient met in a ball is longer than what is proved, through every operation and activation."""

from __future__ import annotations

import math

import pytest
import torch

from grood_cert.ball import ORDER, Ball, dual_norm
from grood_cert.bounds.hidden import preactivations
from grood_cert.lipschitz.bound import METHODS, local_lipschitz
from grood_cert.lipschitz.product import operator_norm, product_bound, unrolled
from grood_cert.networks.graph import Graph
from grood_cert.networks.operations import Addition, LinearMap, Pad, Reshape
from grood_cert.scores import energy
from tests.networks.layered import NAMES, OPERATIONS, SHAPE, Builder, build

EPS = {"linf": 0.05, "l2": 0.3, "l1": 0.8}


@pytest.mark.parametrize("name", NAMES)
def test_bounds_lie_above_every_gradient_met(name):
    graph = build(name, seed=1)
    generator = torch.Generator().manual_seed(3)
    images = torch.rand(3, *SHAPE, dtype=torch.float64, generator=generator)
    for norm, eps in EPS.items():
        ball = Ball(images, torch.tensor([0.0, 0.3, 1.0]).double() * eps, norm)
        bounds = local_lipschitz(graph, ball, preactivations(graph, ball), methods=METHODS)
        many = Ball(images.repeat(40, 1, 1, 1), ball.eps.repeat(40), norm)
        noise = torch.randn(many.center.shape, dtype=torch.float64, generator=generator)
        noise = noise / many.per_pixel(torch.linalg.vector_norm(noise.flatten(1), ord=ORDER[norm], dim=1))
        points = many.project(many.center + many.per_pixel(many.eps) * noise).requires_grad_(True)
        (gradient,) = torch.autograd.grad(energy(graph(points)).sum(), points)
        largest = dual_norm(gradient, norm).reshape(40, -1).amax(0)
        assert set(bounds.methods) == set(METHODS)
        for method, bound in bounds.methods.items():
            assert bool((largest <= bound * (1 + 1e-9)).all()), (norm, method)
        # at radius 0 the gradient itself, but for the layers whose derivative is a set there
        assert float(bounds.methods["jacobian-crown"][0]) <= 1.5 * float(largest[0]) + 1e-9


@pytest.mark.parametrize("name", [name for name in OPERATIONS if "max pool" not in name])
def test_operator_norms_are_those_of_the_matrix_and_upper_bounds_where_it_is_large(name, monkeypatch):
    operation = OPERATIONS[name](Builder())
    assert isinstance(operation, LinearMap)
    matrix = unrolled(operation, (4, 5, 4))
    for norm in EPS:
        exact = float(torch.linalg.matrix_norm(matrix, ord=ORDER[norm]))
        assert operator_norm(operation, (4, 5, 4), norm) == pytest.approx(exact, rel=1e-9)
        monkeypatch.setattr("grood_cert.lipschitz.product._UNROLLED_ENTRIES", 0)
        found = operator_norm(operation, (4, 5, 4), norm)
        assert exact <= found * (1 + 1e-12) and found <= math.sqrt(4) * exact
        monkeypatch.undo()


@pytest.mark.parametrize(("shift", "norms"), [(2, (1.0, 2**0.5, 2.0)), (1, (2.0, 2.0, 2.0))])
def test_concatenated_branches_have_the_norm_of_their_norms(shift, norms, monkeypatch):
    """The image twice; with a channel in common the sum of norms is all that is known."""
    builder = Builder()
    rest = ((0, 0), (0, 0))
    first = builder.add(Pad(((0, shift), *rest)), 0)
    builder.add(Addition(), first, builder.add(Pad(((shift, 0), *rest)), 0))
    builder.add(Reshape(builder.shape, (math.prod(builder.shape),)))
    graph = Graph(tuple(builder.nodes))
    monkeypatch.setattr("grood_cert.lipschitz.product._UNROLLED_ENTRIES", 0)
    for norm, expected in zip(EPS, norms, strict=True):
        assert product_bound(graph, norm) == pytest.approx(expected, rel=1e-9)
