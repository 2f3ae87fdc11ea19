"""Bugs of `grood_cert.bounds`: intervals, linear bounds, windows, folding, scores, and branch and bound."""

from __future__ import annotations

from tests.mutants.runner import planted

_CROWN = "bounds/test_crown.py", "bounds/test_layers.py"

MUTANTS = (
    *planted(
        "interval.py",
        ("test_interval.py", "bounds/test_intervals.py", *_CROWN),
        {
            "rounding moves bounds inward": (
                "return lower - ROUNDING * magnitude, upper + ROUNDING * magnitude",
                "return lower + ROUNDING * magnitude, upper - ROUNDING * magnitude",
            ),
            "an intersection is a union": (
                "return torch.maximum(first[0], second[0]), torch.minimum(first[1], second[1])",
                "return torch.minimum(first[0], second[0]), torch.maximum(first[1], second[1])",
            ),
            "crossed intervals are in order": (
                "torch.isfinite(upper) & (lower <= upper)).flatten(1).all(1)",
                "torch.isfinite(upper)).flatten(1).all(1)",
            ),
            "an infinite upper end is in order": (
                "(torch.isfinite(lower) & torch.isfinite(upper) & (lower <= upper))",
                "(torch.isfinite(lower) & (lower <= upper))",
            ),
            "one entry in order is enough": (
                "(lower <= upper)).flatten(1).all(1)",
                "(lower <= upper)).flatten(1).any(1)",
            ),
        },
    ),
    *planted(
        "bounds/score.py",
        ("bounds/test_score.py",),
        {
            "crossed bounds of the score are let through": (
                "torch.isfinite(best_upper) & (best_lower <= best_upper)",
                "torch.isfinite(best_upper)",
            ),
        },
    ),
)
