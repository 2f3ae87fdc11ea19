"""Bugs of `grood_cert.training`: what the objective bounds and attacks."""

from __future__ import annotations

from tests.mutants.runner import planted

MUTANTS = (
    *planted(
        "training/certified_loss.py",
        ("training/test_certified_loss.py",),
        {
            "bound and attack exchange their shares": (
                "total = total + (1 - share) * loss(score[:count], score[count:])",
                "total = total + share * loss(score[:count], score[count:])",
            ),
            "outliers are pressed by the upper bound": (
                "loss(lower[:count], upper[count:])",
                "loss(upper[:count], lower[count:])",
            ),
            "the attack on outliers climbs": ("sign[:count] = -1", "sign[count:] = -1"),
            "adversarial points leave the ball": (
                "points = ball.project(points.detach() + step * gradient.sign())",
                "points = points.detach() + step * gradient.sign()",
            ),
            "an attack follows the gradient and not its sign": (
                "points = ball.project(points.detach() + step * gradient.sign())",
                "points = ball.project(points.detach() + step * gradient)",
            ),
            "an attack starts outside the box": (
                "points = ball.lower + noise * (ball.upper - ball.lower)",
                "points = ball.center + (2 * noise - 1) * ball.per_pixel(ball.eps)",
            ),
            "the ball is twice as large": (
                'ball = Ball(images.clamp(0, 1), eps, "linf")',
                'ball = Ball(images.clamp(0, 1), 2 * eps, "linf")',
            ),
            "ID counts where only outliers are certified": (
                'if section.certified == "both" else images_aux',
                'if section.certified != "both" else images_aux',
            ),
            "the mean is over all samples": (
                "functional.relu(score_id - section.m_in).square().sum() / max(1, len(score_id))",
                "functional.relu(score_id - section.m_in).square().sum() / max(1, len(images))",
            ),
        },
    ),
    *planted(
        "training/step.py",
        ("training/test_step.py",),
        {
            "gradients are clipped to 1": (
                "nn.utils.clip_grad_norm_(self.network.parameters(), self.recipe.optimizer.clip_norm)",
                "nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)",
            ),
        },
    ),
)
