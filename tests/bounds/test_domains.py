"""Parts of balls: multipliers are sound, tightened intervals hold, and what is empty is seen."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from grood_cert.bounds.alpha_crown import ScoreProof, optimise
from grood_cert.bounds.domains import Domains, _pushed, emptied, neurons, tightened
from grood_cert.bounds.free_pullback import FreePullback
from grood_cert.bounds.hidden import preactivations
from grood_cert.bounds.reduction import Head, reduction
from grood_cert.networks.capture import capture
from grood_cert.scores import ENERGY, energy
from tests.bounds.test_alpha_crown import SHAPE, balls, leaky, make, mixed, mlp, points_in, residual

HEAD = Head("all", 1.0, torch.zeros(3, dtype=torch.long))


@pytest.mark.parametrize("build", [mlp, leaky, residual])
def test_any_admissible_multiplier_bounds_the_domain(build):
    """A sign the wrong way round would put points of the domain above the bound."""
    network = make(build, seed=3)
    graph, ball = capture(network, SHAPE), balls("linf")
    inputs = list(preactivations(graph, ball).inputs)
    points = points_in(ball, 1000).unflatten(0, (-1, 4))
    generator = torch.Generator().manual_seed(0)
    values = [graph.values(part) for part in points]
    signs, inside = [], torch.ones(len(points), 4, dtype=torch.bool)
    for place, number in enumerate(graph.nonlinear):
        lower, upper = inputs[place]
        layer = torch.zeros_like(lower).flatten(1)
        for sample in range(4):  # fix the most balanced neuron of each layer to the sign it has at a random point
            balance = torch.minimum(-lower[sample], upper[sample]).flatten()
            neuron = int(balance.argmax())
            if float(balance[neuron]) > 0:
                layer[sample, neuron] = values[7][graph.nodes[number].inputs[0]][sample].flatten()[neuron].sign()
        signs.append(layer)
        layer = layer.reshape(lower.shape)
        at = torch.stack([value[graph.nodes[number].inputs[0]] for value in values])
        inside &= (at * layer >= 0).flatten(2).all(2)
        inputs[place] = (
            torch.where(layer > 0, lower.clamp(min=0), lower),
            torch.where(layer < 0, upper.clamp(max=0), upper),
        )
    assert bool((inside.sum(0) > 5).all())
    pullback = FreePullback(graph, ball, inputs, torch.cat(signs, 1))
    logits = torch.stack([value[-1] for value in values])
    for _ in range(30):
        row = torch.randn(4, 1, 3, dtype=torch.float64, generator=generator)
        share = torch.rand(pullback.start.shape, dtype=torch.float64, generator=generator)
        parameters = torch.minimum(pullback.smallest + share * 3, pullback.largest)
        bound = pullback.upper({len(graph.nodes) - 1: row}, parameters.unsqueeze(1)).squeeze(1)
        value = (logits * row.squeeze(1)).sum(-1).masked_fill(~inside, -torch.inf)
        assert bool((value.amax(0) <= bound + 1e-9).all())


@pytest.mark.parametrize("side", ["upper", "lower"])
@pytest.mark.parametrize(
    ("build", "scale", "share", "cut_off"),
    [(mlp, 2.0, 0.9, 3), (residual, 1.0, 0.97, 1), (mixed, 1.0, 0.97, 2)],
    ids=["mlp", "residual", "mixed"],
)
def test_tightened_intervals_hold_where_the_score_is_beyond_the_level(build, scale, share, cut_off, side):
    """In `residual` the condition reaches the image past a layer as well as through it."""
    network = make(build, seed=1, scale=scale)
    graph, ball = capture(network, SHAPE), balls("linf", 3)
    sign, count, last = 1 if side == "upper" else -1, neurons(graph), len(graph.nonlinear)
    hidden = preactivations(graph, ball)
    domains = Domains(graph, ball, hidden.inputs, torch.zeros(3, count, dtype=torch.float64), hidden.logits, HEAD)
    points = points_in(ball, 3000).unflatten(0, (-1, 3))
    score = sign * torch.stack([energy(network(part)) for part in points])
    level = float(score.flatten().quantile(share))
    proof = ScoreProof(domains, reduction(ENERGY, side))
    _, values, _ = optimise(proof, 10)
    found, empty = emptied(tightened(domains, range(last + 1), 4, values[:, :count], proof.condition(values, level)))
    assert not bool((empty & (score >= level).any(0)).any())
    narrower = 0
    for place in range(last + 1):
        node = len(graph.nodes) - 1 if place == last else graph.nodes[graph.nonlinear[place]].inputs[0]
        at = torch.stack([graph.values(part)[node] for part in points])
        lower, upper = found.outputs if place == last else found.inputs[place]
        beyond = (score >= level).reshape(*score.shape, *[1] * (at.dim() - 2))
        assert bool(((at >= lower) & (at <= upper) | ~beyond).all())
        narrower += int((((at < lower) | (at > upper)) & ~beyond).any(0).sum())
    assert narrower > cut_off  # the level does cut something off


@pytest.mark.parametrize("steps", [0, 2])
def test_intervals_are_proved_in_float64(steps):
    """Where no neuron is unstable rows are exact, and their ends are attained at corners: float32 would cut some off."""
    network = make(mlp, seed=2)
    with torch.no_grad():
        network[1].bias.fill_(50.0)
        network[3].bias.fill_(500.0)
    graph, ball = capture(network, SHAPE), balls("linf", 3)
    hidden = preactivations(graph, ball)
    assert all(bool((lower > 0).all()) for lower, _ in hidden.inputs)
    wide = hidden.logits[0] - 100, hidden.logits[1] + 100
    domains = Domains(graph, ball, hidden.inputs, torch.zeros(3, 20, dtype=torch.float64), wide, HEAD)
    lower, upper = tightened(domains, [2], steps).outputs
    rows = (network[5].weight @ network[3].weight @ network[1].weight).reshape(1, 3, *SHAPE)
    least, most = (ends.unsqueeze(1) for ends in (ball.lower, ball.upper))
    for row in range(3):
        for sign, end in ((1, upper), (-1, lower)):
            corner = torch.where(sign * rows[:, row : row + 1] > 0, most, least)[:, 0]
            value = network(corner)[:, row]
            assert bool((sign * (end[:, row] - value) >= 0).all())
            torch.testing.assert_close(end[:, row], value, rtol=1e-9, atol=0)


def test_layers_of_too_many_unstable_neurons_are_left_as_they_are():
    """A matter of each domain: what one gets does not depend on its batch."""
    network = make(mlp, seed=1)
    graph, ball = capture(network, SHAPE), balls("linf", 3)
    hidden = preactivations(graph, ball, "ibp")  # loose, so that all there is to tighten becomes tighter
    lower, upper = (ends.clone() for ends in hidden.inputs[1])
    lower[0, :3] = upper[0, :3].clamp(max=0)  # stable, in one domain
    inputs = hidden.inputs[0], (lower, upper)
    domains = Domains(graph, ball, inputs, torch.zeros(3, 20, dtype=torch.float64), hidden.logits, HEAD)
    unstable = ((lower < 0) & (upper > 0)).sum(1)
    most = int(unstable[0])
    assert most < int(unstable[1:].min())
    (below, above), whole = tightened(domains, [1], 0, most=most).inputs[1], tightened(domains, [1], 0).inputs[1]
    for sample in range(3):
        few = int(unstable[sample]) <= most
        assert bool((below[sample] > lower[sample]).any()) is few
        assert bool((below[sample] == (whole[0] if few else lower)[sample]).all())
        assert bool((above[sample] == (whole[1] if few else upper)[sample]).all())


def test_the_foremost_neurons_are_tightened_and_no_others():
    """As many unstable ones of every domain as are asked for, by their weights; the others keep their intervals."""
    network = make(mlp, seed=1)
    graph, ball = capture(network, SHAPE), balls("linf", 3)
    hidden = preactivations(graph, ball, "ibp")
    domains = Domains(graph, ball, hidden.inputs, torch.zeros(3, 20, dtype=torch.float64), hidden.logits, HEAD)
    lower, upper = hidden.inputs[1]
    unstable, first = (lower < 0) & (upper > 0), lower.shape[1]
    weight = torch.randperm(60, generator=torch.Generator().manual_seed(0)).reshape(3, 20).double()
    weight[:, 20 - first :][~unstable] += 100  # weights of what need not be tightened do not count
    (below, above), whole = (
        tightened(domains, [1], 0, foremost=(weight, 3)).inputs[1],
        tightened(domains, [1], 0).inputs[1],
    )
    for sample in range(3):
        own = torch.where(unstable[sample], weight[sample, 20 - first :], -1.0)
        chosen = own >= own.sort(descending=True).values[2]
        assert int(chosen.sum()) == 3
        assert bool((below[sample] == torch.where(chosen, whole[0][sample], lower[sample])).all())
        assert bool((above[sample] == torch.where(chosen, whole[1][sample], upper[sample])).all())
        assert bool((whole[0][sample] > lower[sample])[chosen].any())


def test_a_crossed_interval_is_empty_and_a_rounding_error_is_not():
    network = make(mlp)
    graph, ball = capture(network, SHAPE), balls("linf", 3)
    hidden = preactivations(graph, ball)
    lower, upper = (end.clone() for end in hidden.logits)
    lower[0, 0] = upper[0, 0] + 1e-3
    lower[1, 0] = upper[1, 0] + 1e-14
    domains = Domains(graph, ball, hidden.inputs, torch.zeros(3, 20, dtype=torch.float64), (lower, upper), HEAD)
    found, empty = emptied(domains)
    assert empty.tolist() == [True, False, False]
    assert bool((found.outputs[0] <= found.outputs[1]).all())
    lower[2, 0] = torch.nan
    assert not bool(emptied(replace(domains, outputs=(lower, upper)))[1][2])


def test_a_condition_that_is_pulled_back_covers_what_rounding_adds_to_it():
    """Where no neuron is unstable it is exact, and large biases round logits in float32: every second one upwards."""
    network = make(mlp, seed=2)
    with torch.no_grad():
        network[1].bias.fill_(50.0)
        network[3].bias.fill_(500.0)
        network[5].bias.fill_(1e6)
    graph, ball = capture(network, SHAPE).deployed("float32"), balls("linf", 3)
    hidden = preactivations(graph, ball)
    domains = Domains(graph, ball, hidden.inputs, torch.zeros(3, 20, dtype=torch.float64), hidden.logits, HEAD)
    coefficients = torch.tensor([[1.0, -1.0, 0.5]] * 3, dtype=torch.float64)
    node = graph.nodes[graph.nonlinear[1]].inputs[0]
    rows, offset, _ = _pushed(domains, node, None, (coefficients, torch.zeros(3, dtype=torch.float64)))
    assert list(rows) == [node]
    points = points_in(ball, 300).float()
    single = copy.deepcopy(network).float()
    with torch.no_grad():
        inputs = single[:4](points).double().unflatten(0, (-1, 3))
        meant = single(points).double().unflatten(0, (-1, 3)) @ coefficients[0]
    bound = (inputs * rows[node][:, 0]).sum(-1) + offset[:, 0]
    assert bool((bound >= meant).all())
    torch.testing.assert_close(bound, meant, rtol=1e-5, atol=0)
