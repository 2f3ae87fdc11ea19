"""The free backward pass: its derivatives are those of autograd, and what a search finds is admissible in float64."""

from __future__ import annotations

import pytest
import torch

from grood_cert.ball import NORMS, Ball
from grood_cert.bounds.domains import neurons
from grood_cert.bounds.free_pullback import FreePullback, Passage, descend
from grood_cert.bounds.hidden import preactivations
from grood_cert.networks.activations import LeakyReLU
from grood_cert.networks.capture import capture
from tests.bounds.test_alpha_crown import SHAPE, balls, conv, leaky, make, mixed, mlp, residual

COUNT, ROWS = 3, 2


def a_pullback(build, norm="linf"):
    """Over balls in which some neurons have a sign, and admissible parameters that differ from row to row."""
    graph, ball = capture(make(build, seed=3), SHAPE), balls(norm, COUNT)
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(-1, 2, (COUNT, neurons(graph)), generator=generator).double()
    inputs, place = [], 0
    for number, (lower, upper) in zip(graph.nonlinear, preactivations(graph, ball).inputs, strict=True):
        if isinstance(graph.nodes[number].operation, LeakyReLU):
            part = slice(place, place + graph.nodes[number].size)
            signs[:, part] *= ((lower < 0) & (upper > 0)).flatten(1)
            own, place = signs[:, part].reshape(lower.shape), part.stop
            lower, upper = torch.where(own > 0, 0.0, lower), torch.where(own < 0, 0.0, upper)
        inputs.append((lower, upper))
    pullback = FreePullback(graph, ball, inputs, signs)
    share = torch.rand(COUNT, ROWS, signs.shape[1], dtype=torch.float64, generator=generator)
    values = torch.minimum(pullback.smallest.unsqueeze(1) + share, pullback.largest.unsqueeze(1))
    assert bool((signs != 0).any()) and bool((values > 0).any())
    hidden = graph.nodes[graph.nonlinear[-1]].inputs[0]
    rows = {
        node: torch.randn(COUNT, ROWS, *graph.nodes[node].shape, dtype=torch.float64, generator=generator)
        for node in (len(graph.nodes) - 1, hidden)
    }
    return pullback, values, rows


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("build", [mlp, leaky, conv, residual, mixed])
def test_derivatives_are_those_of_autograd(build, norm):
    pullback, values, rows = a_pullback(build, norm)
    weight = torch.rand(COUNT, ROWS, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for shared in (False, True):  # rows with parameters of their own, and all of a domain with the same
        given = [values[:, :1] if shared else values, *rows.values()]
        found = []
        for bound in (pullback.upper, lambda rows, values: pullback.backwards(rows, values, Passage())):
            leaves = [part.clone().requires_grad_(True) for part in given]
            value = bound(dict(zip(rows, leaves[1:], strict=True)), leaves[0])
            found.append((value, *torch.autograd.grad((weight * value).sum(), leaves)))
        for mine, theirs in zip(*found, strict=True):
            assert torch.allclose(mine, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("norm", NORMS)
def test_the_search_pass_is_the_proof_pass_up_to_float32(norm):
    pullback, values, rows = a_pullback(mixed, norm)
    single = pullback.single()
    found = single.upper({node: row.float() for node, row in rows.items()}, values.float())
    exact = pullback.upper(rows, values, Passage())
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), exact, rtol=1e-4, atol=1e-3)


def test_a_domain_gets_in_a_batch_what_it_gets_alone():
    """The first one has no signs, the others have."""
    whole, values, rows = a_pullback(mlp)
    signs, inputs = whole.signs.clone(), list(whole.inputs.values())
    signs[0] = 0
    batch = FreePullback(whole.graph, whole.ball, inputs, signs)
    values = torch.minimum(values, batch.largest.unsqueeze(1))
    together = batch.upper(rows, values)
    for i in range(COUNT):
        part = slice(i, i + 1)
        ball = Ball(whole.ball.center[part], whole.ball.eps[part], whole.ball.norm)
        single = FreePullback(whole.graph, ball, [(lower[part], upper[part]) for lower, upper in inputs], signs[part])
        alone = single.upper({node: row[part] for node, row in rows.items()}, values[part])
        torch.testing.assert_close(together[part], alone, rtol=1e-10, atol=1e-10)


def test_what_a_descent_finds_is_admissible_in_float64():
    """0.01 rounds down in float32: a slope below the leak would be no line below a leaky ReLU."""
    low, high = torch.full((1, 2), 0.01, dtype=torch.float64), torch.full((1, 2), 0.3, dtype=torch.float64)
    assert float(low.float()[0, 0]) < 0.01 and float(high.float()[0, 0]) > 0.3
    down = descend(lambda values: values.sum(-1), high, low, high, 1.0, 5)
    up = descend(lambda values: -values.sum(-1), low, low, high, 1.0, 5)
    assert down.dtype == torch.float64
    assert torch.equal(down, low) and torch.equal(up, high)


def test_a_descent_that_meets_nan_keeps_its_best_iterate():
    start = torch.ones(2, 1, dtype=torch.float64)
    found = descend(
        lambda values: torch.where(values < 0.9, torch.nan, values).sum(-1), start, 0 * start, start, 0.05, 8
    )
    assert bool((found >= 0.9).all()) and bool((found < 1).all())
    nothing = descend(lambda values: values.sum(-1) * torch.nan, start, 0 * start, start, 0.05, 8)
    assert torch.equal(nothing, start)
