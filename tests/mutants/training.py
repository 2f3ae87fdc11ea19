"""Bugs of `grood_cert.training`: what the objective penalises, bounds and attacks, and in which arithmetic."""

from __future__ import annotations

from tests.mutants.runner import planted

MUTANTS = (
    *planted(
        "training/objective.py",
        ("training/test_objective.py",),
        {
            "the worst move of outliers is the best": (
                "short = torch.cat([self.score_id - self.section.m_in, self.section.m_out - self.score_aux])",
                "short = torch.cat([self.score_id - self.section.m_in, self.score_aux - self.section.m_out])",
            ),
            "the first-order move is a gain": (
                "functional.relu(short[used] + self.section.slope_eps *",
                "functional.relu(short[used] - self.section.slope_eps *",
            ),
            "the first-order move is measured in l_2": (
                'self.samples.norms(used, "linf")).square()',
                'self.samples.norms(used, "l2")).square()',
            ),
            "the first-order worst case is not squared": (
                'self.samples.norms(used, "linf")).square()',
                'self.samples.norms(used, "linf"))',
            ),
            "samples short of their margins have no worst case": (
                '(math.inf, -math.inf) if section.slope == "first-order" else (section.m_in, section.m_out)',
                "(section.m_in, section.m_out)",
            ),
        },
    ),
    *planted(
        "training/penalty.py",
        ("training/test_objective.py", "training/test_penalty.py"),
        {
            "the steepest move in l_inf is along the gradient": (
                "direction = gradient.sign()",
                "direction = gradient",
            ),
            "the moved pass finds kinks of its own": (
                "with self._apart(), self._piece.keep(rows):",
                "with self._apart():",
            ),
            "TF32 moves S as little as float32": ("_TF32: 0.1,", "_TF32: 1e-2,"),
            "float32 on a GPU is taken for TF32": (
                "return _DIFFERENCE[_TF32 if rounded else torch.float32]",
                "return _DIFFERENCE[_TF32]",
            ),
        },
    ),
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
                "points = (points.detach() + step * gradient.sign()).clamp(lower, upper)",
                "points = points.detach() + step * gradient.sign()",
            ),
            "an attack follows the gradient and not its sign": (
                "points = (points.detach() + step * gradient.sign()).clamp(lower, upper)",
                "points = (points.detach() + step * gradient).clamp(lower, upper)",
            ),
            "an attack starts outside the box": (
                "points = lower + noise * (upper - lower)",
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
            "convolutions stay in TF32": (
                "torch.backends.cudnn.allow_tf32 = allowed",
                "torch.backends.cudnn.allow_tf32 = True",
            ),
            "gradients are clipped to 1": (
                "nn.utils.clip_grad_norm_(self.network.parameters(), self.recipe.optimizer.clip_norm)",
                "nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)",
            ),
            "of several parts the last one's statistics stay": ("if self.cuts > 1:", "if self.cuts > 9:"),
            "a part begins with the statistics of the one before": ("if number > 0:", "if number > 9:"),
        },
    ),
    *planted(
        "training/penalty.py",
        ("training/test_penalty.py",),
        {
            "the slope is that of running statistics": ("BatchStatistics() if coupled else None", "None"),
        },
    ),
    *planted(
        "training/penalty.py",
        ("training/test_certified_loss.py",),
        {
            "the statistics of a batch are constants of the parameters in bounds": (
                "values = ((kept.running_mean, kept.mean), (kept.running_var, variance))",
                "values = ((kept.running_mean, kept.mean.detach()), (kept.running_var, variance.detach()))",
            ),
            "bounds take the deviation of a batch for its variance": ("kept.inverse.pow(-2)", "kept.inverse.pow(-1)"),
        },
    ),
    *planted(
        "training/objective.py",
        ("training/test_certified_loss.py",),
        {
            "bounds and attacks are of running statistics": (
                "eps, section, generator, self.buffers)",
                "eps, section, generator)",
            ),
            "the interval slope is that of running statistics": (
                "interval_lipschitz(self.network, ball, self.buffers)",
                "interval_lipschitz(self.network, ball)",
            ),
        },
    ),
)
