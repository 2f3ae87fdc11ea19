"""Balls against exact convex solutions: vertices for l_inf, the optimality conditions and SLSQP for l_2 with a box."""

import dataclasses

import numpy as np
import pytest
import torch
from scipy import optimize

from grood_cert.ball import Ball, dual_norm
from grood_cert.errors import InputError


def exact_support(row, low, high, eps):
    """max a.d over |d|_2 <= eps, low <= d <= high: at the optimum d = clip(t a) with t as large as the norm allows."""
    corner = np.where(row > 0, high, np.where(row < 0, low, 0.0))
    if np.linalg.norm(corner) <= eps:
        return float(row @ corner)

    def excess(log_step):
        return np.linalg.norm(np.clip(np.exp(log_step) * row, low, high)) - eps

    size = np.abs(row).max()
    span = (np.log(eps / size) - 30, np.log(eps / size) + 60)
    step = np.exp(optimize.brentq(excess, *span, xtol=1e-15, rtol=8.9e-16)) if eps > 0 else 0.0
    return float(row @ np.clip(step * row, low, high))


def random_ball(seed, batch=4, pixels=12, eps=None, norm="l2", dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    center = torch.rand(batch, 1, 3, pixels // 3, generator=generator, dtype=torch.float64)
    center = torch.where(torch.rand(center.shape, generator=generator) < 0.3, center.round(), center).to(dtype)
    radius = (
        torch.full((batch,), eps, dtype=dtype) if eps is not None else torch.rand(batch, generator=generator).to(dtype)
    )
    rows = torch.randn(batch, 5, pixels, generator=generator, dtype=torch.float64).to(dtype)
    return Ball(center, radius, norm), rows


def exact(ball, rows):
    center = ball.center.flatten(1).double()
    low, high = (-center).numpy(), (1 - center).numpy()
    eps = ball.eps.double().numpy()
    return np.array(
        [[exact_support(row, low[i], high[i], eps[i]) for row in rows[i].double().numpy()] for i in range(len(low))]
    )


def test_the_exact_solution_agrees_with_slsqp():
    ball, rows = random_ball(0, batch=2, pixels=6, eps=0.4)
    want = exact(ball, rows)
    center = ball.center.flatten(1).numpy()
    for i in range(2):
        for j in range(5):
            row = rows[i, j].numpy()
            found = optimize.minimize(
                lambda d, row=row: -row @ d,
                np.zeros(6),
                jac=lambda d, row=row: -row,
                bounds=list(zip(-center[i], 1 - center[i], strict=True)),
                constraints={"type": "ineq", "fun": lambda d: 0.4**2 - d @ d, "jac": lambda d: -2 * d},
                method="SLSQP",
                options={"ftol": 1e-12},
            )
            assert want[i, j] == pytest.approx(-found.fun, abs=1e-6)


@pytest.mark.parametrize("eps", [1e-9, 0.01, 0.3, 1.0, 2.0, 10.0, None])
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e6])
def test_l2_support_is_the_exact_maximum(eps, scale):
    for seed in range(5):
        ball, rows = random_ball(seed, eps=eps)
        got, want = ball.support(rows * scale).numpy(), exact(ball, rows * scale)
        size = 1e-300 + np.abs(want)
        assert (got >= want - 1e-12 * size).all()
        assert (got <= want + 1e-9 * size).all()


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_l2_support_is_an_upper_bound_for_any_multiplier(steps, monkeypatch):
    """Water filling is stopped early; what is found then is a bound, not the maximum."""
    monkeypatch.setattr("grood_cert.ball._WATER_FILLING_STEPS", steps)
    looser = False
    for seed in range(5):
        ball, rows = random_ball(seed, eps=1.0)
        got, want = ball.support(rows).numpy(), exact(ball, rows)
        assert (got >= want * (1 - 1e-12)).all()
        looser |= bool((got > want * (1 + 1e-6)).any())
    assert looser


def test_l2_support_with_many_scales_in_one_row():
    ball, rows = random_ball(3, pixels=30, eps=0.7)
    rows = rows * 10.0 ** torch.linspace(-8, 3, 30, dtype=torch.float64)
    got, want = ball.support(rows).numpy(), exact(ball, rows)
    assert (got >= want * (1 - 1e-12)).all()
    assert (got <= want * (1 + 1e-6)).all()


def test_l2_support_in_single_precision():
    for seed in range(5):
        ball, rows = random_ball(seed, eps=0.5, dtype=torch.float32)
        got, want = ball.support(rows), exact(ball, rows)
        assert got.dtype == torch.float32
        assert np.abs(got.double().numpy() - want).max() <= 2e-6 * np.abs(want).max()


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_degenerate_balls_and_rows_give_zero_not_nan(norm, dtype):
    ball, rows = random_ball(1, eps=0.0, norm=norm, dtype=dtype)
    assert (ball.support(rows) == 0).all()
    ball, rows = random_ball(1, eps=0.5, norm=norm, dtype=dtype)
    assert (ball.support(torch.zeros_like(rows)) == 0).all()
    rows[:, 1:] = 0
    rows[:, :, 3:] = 0
    assert torch.isfinite(ball.support(rows)).all()
    tiny = rows * 1e-40
    assert torch.isfinite(ball.support(tiny)).all() and (ball.support(tiny) >= 0).all()


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_row_that_is_no_number_has_no_finite_support(value, norm):
    ball, rows = random_ball(1, eps=0.5, norm=norm)
    broken = rows.clone()
    broken[0, 0, 2] = value
    got, want = ball.support(broken), ball.support(rows)
    assert not bool(torch.isfinite(got[0, 0]))
    assert torch.equal(got[0, 1:], want[0, 1:]) and torch.equal(got[1:], want[1:])


def test_a_blocked_corner_leaves_no_room():
    """At x = 0 a row of negative entries cannot gain anything; at x = 1 neither can positive ones."""
    eps = torch.tensor([0.3, 0.3], dtype=torch.float64)
    ball = Ball(torch.stack([torch.zeros(1, 2, 2), torch.ones(1, 2, 2)]).double(), eps, "l2")
    rows = torch.tensor([-1.0, -2.0, -3.0, -4.0]).double().expand(2, 1, 4) * torch.tensor([1.0, -1.0]).reshape(2, 1, 1)
    assert (ball.support(rows).abs() < 1e-15).all()


def test_blocks_of_rows_change_nothing(monkeypatch):
    ball, rows = random_ball(2, eps=0.4)
    whole = ball.support(rows)
    monkeypatch.setattr("grood_cert.ball._BLOCK", 1)
    assert torch.equal(ball.support(rows), whole)


def test_linf_support_is_the_best_vertex():
    ball, rows = random_ball(4, pixels=9, eps=0.3, norm="linf")
    low, high = (ball.lower - ball.center).flatten(1), (ball.upper - ball.center).flatten(1)
    choice = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * 9)
    for i in range(4):
        vertices = low[i] + choice * (high[i] - low[i])
        assert torch.allclose(ball.support(rows)[i], (rows[i] @ vertices.T).amax(1), rtol=0, atol=1e-14)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_support_has_the_maximiser_as_gradient(norm):
    """d/da max a.d = argmax, which lies in the ball."""
    ball, rows = random_ball(5, eps=0.6, norm=norm)
    rows.requires_grad_()
    value = ball.support(rows)
    (gradient,) = torch.autograd.grad(value.sum(), rows)
    assert torch.allclose((gradient * rows).sum(-1), value, rtol=1e-9, atol=1e-12)
    points = ball.center.flatten(1).unsqueeze(1) + gradient
    assert ((points >= -1e-12) & (points <= 1 + 1e-12)).all()
    order = torch.inf if norm == "linf" else 2
    assert (torch.linalg.vector_norm(gradient, ord=order, dim=-1) <= 0.6 + 1e-9).all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_projection_lands_in_the_ball_and_keeps_what_is_inside(norm):
    ball, _ = random_ball(6, batch=16, norm=norm)
    generator = torch.Generator().manual_seed(0)
    points = ball.center + 3 * torch.randn(ball.center.shape, generator=generator, dtype=torch.float64)
    projected = ball.project(points)
    assert (ball.distance(projected) <= ball.eps * (1 + 1e-12) + 1e-15).all()
    assert ((projected >= 0) & (projected <= 1)).all()
    assert torch.allclose(ball.project(projected), projected, rtol=0, atol=1e-15)
    assert torch.allclose(ball.project(ball.center), ball.center, rtol=0, atol=0)


def test_dual_norm_at_zero_has_a_gradient():
    gradient = torch.zeros(2, 3, requires_grad=True)
    dual_norm(gradient, "l2").sum().backward()
    assert torch.equal(gradient.grad, torch.zeros(2, 3))


@pytest.mark.parametrize(
    ("center", "eps", "norm", "message"),
    [
        (torch.rand(2, 3), torch.rand(2), "l7", "unknown norm 'l7'"),
        (torch.rand(2, 3), torch.rand(3), "l2", "one eps a sample"),
        (torch.rand(2, 3), torch.tensor([0.1, -0.1]), "l2", "not negative"),
        (torch.rand(2, 3), torch.tensor([0.1, torch.nan]), "linf", "finite"),
        (torch.rand(2, 3), torch.tensor([0.1, torch.inf]), "linf", "finite"),
        (torch.rand(2, 3) + 1, torch.rand(2), "linf", r"pixels in \[0, 1\]"),
        (torch.full((2, 3), torch.nan), torch.rand(2), "linf", r"pixels in \[0, 1\]"),
    ],
)
def test_refuses_what_is_no_ball(center, eps, norm, message):
    with pytest.raises(InputError, match=message):
        Ball(center, eps, norm)


def test_a_number_is_the_radius_of_all_balls():
    images = torch.rand(3, 1, 2, 2, dtype=torch.float64)
    for ball in (Ball(images, 0.02, "linf"), Ball(images, eps=0.02, norm="linf")):
        assert ball.eps.dtype == torch.float64 and torch.equal(ball.eps, torch.full((3,), 0.02, dtype=torch.float64))
    assert dataclasses.replace(ball, eps=1).eps.tolist() == [1.0, 1.0, 1.0]
    for eps in (-0.1, float("nan"), float("inf")):
        with pytest.raises(InputError, match="eps must be finite and not negative"):
            Ball(images, eps, "linf")
