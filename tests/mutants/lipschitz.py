"""Bugs of `grood_cert.lipschitz`: products, intervals, Jacobian bounds, radii, and the chain of checks."""

from __future__ import annotations

from tests.mutants.runner import planted

MUTANTS = (
    *planted(
        "lipschitz/product.py",
        ("lipschitz/test_product.py", "lipschitz/test_exact.py", "lipschitz/test_layers.py"),
        {
            "the torus leaves out the padding": (
                "max(length + 2 * pad, dilate * (kernel - 1) + 1)",
                "max(length, dilate * (kernel - 1) + 1)",
            ),
            "the torus is looked at on average": (
                "torch.linalg.matrix_norm(transformed, ord=2).max()",
                "torch.linalg.matrix_norm(transformed, ord=2).mean()",
            ),
            "l_inf and l_1 take each other's operator norm": (
                'if norm == "linf":\n        return largest_row',
                'if norm == "l1":\n        return largest_row',
            ),
            "rows of a map are added with their signs": (
                "rows = absolute.linear(ones)",
                "rows = operation.linear(ones)",
            ),
            "the geometric mean of row and column sums loses the rows": (
                "bound = math.sqrt(largest_row * largest_column)",
                "bound = largest_column",
            ),
            "a separable map has the norm of its rows": (
                "min(bound, matrix_norm(operation.rows, norm) * matrix_norm(operation.columns, norm))",
                "min(bound, matrix_norm(operation.rows, norm))",
            ),
            "windows that overlap count once": (
                '"l2": math.sqrt(pool.overlap), "l1": float(pool.overlap)',
                '"l2": 1.0, "l1": 1.0',
            ),
            "negative slopes have no size": (
                "size = torch.maximum(low.abs(), high.abs())",
                "size = high.clamp(min=0)",
            ),
            "a slope that is unsure counts as sure": (
                "if state.matrix is not None and bool((low == high).all()):",
                "if state.matrix is not None and bool((low == high).any()):",
            ),
            "branches that overlap add up as if apart": (
                "order = ORDER[norm] if self._apart(*node.inputs) else 1.0",
                "order = ORDER[norm]",
            ),
            "a branch is lost where branches are added": (
                "norms = torch.tensor([state.norm(norm), other.norm(norm)], dtype=torch.float64)",
                "norms = torch.tensor([state.norm(norm)], dtype=torch.float64)",
            ),
            "the last layer has the average of its row norms": (
                "float((entries + ROUNDING * summed).max())",
                "float((entries + ROUNDING * summed).mean())",
            ),
            "the last layer's rows are measured in the ball's norm": (
                "last.matrix.longest_row(DUAL_ORDER[norm])",
                "last.matrix.longest_row(ORDER[norm])",
            ),
            "the steepest slope is taken for 1": (
                "low, high = node.operation.lowest_slope, node.operation.steepest",
                "low, high = node.operation.lowest_slope, 1.0",
            ),
            "unproved balls get an active product": ("if bounded else math.nan)", "if True or bounded else math.nan)"),
        },
    ),
    *planted(
        "lipschitz/interval.py",
        (
            "lipschitz/test_interval.py",
            "lipschitz/test_exact.py",
            "lipschitz/test_layers.py",
            "lipschitz/test_soundness.py",
        ),
        {},
    ),
    *planted(
        "lipschitz/radius.py",
        ("lipschitz/test_radius.py",),
        {
            "a radius exceeds the ball of its constant": (
                "torch.where(usable, torch.minimum(eps, ratio), torch.zeros_like(ratio))",
                "torch.where(usable, ratio, torch.zeros_like(ratio))",
            ),
            "a constant that is NaN gives the whole ball": (
                "usable = torch.isfinite(bound) & (bound >= 0) &",
                "usable = ~(bound < 0) &",
            ),
            "a radius is rounded up": ("_DOWN = 1 - ROUNDING", "_DOWN = 1 + ROUNDING"),
            "margins are measured on the wrong side": (
                "return (gamma - score if accepted else score - gamma).clamp(min=0)",
                "return (score - gamma if accepted else gamma - score).clamp(min=0)",
            ),
            "a wrong decision has a margin": (
                "return (gamma - score if accepted else score - gamma).clamp(min=0)",
                "return (gamma - score if accepted else score - gamma).abs()",
            ),
            "the path forgets what it spent": (
                "spent = spent + slopes[..., i] * steps[..., i]",
                "spent = slopes[..., i] * steps[..., i]",
            ),
            "the path takes the constant of the step before": (
                "slopes = running_minimum(bounds)\n",
                "slopes = running_minimum(bounds).roll(1, -1)\n",
            ),
            "the fixed point is the last ball tried": (
                "best = torch.maximum(best, proved_radius(eps, value, margin))",
                "best = torch.maximum(best, eps)",
            ),
        },
    ),
)
