"""Bugs of `grood_cert.bounds`: intervals, linear bounds, windows, folding, scores, and branch and bound."""

from __future__ import annotations

from tests.mutants.runner import planted

_CROWN = "bounds/test_crown.py", "bounds/test_layers.py"
_ROUNDING = ("bounds/test_rounding.py",)

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
        "bounds/rounding.py",
        _ROUNDING,
        {
            "lines are not moved for what cancels": (
                "self.charges[number] = charge",
                "self.charges[number] = 0 * charge",
            ),
            "sizes cancel as the values do": (
                "summed = absolute(self.magnitudes[inputs[0]])",
                "summed = operation(self.magnitudes[inputs[0]]).abs()",
            ),
            "errors carried forwards stop at activations": (
                "self.errors.append(carried + charge)",
                "self.errors.append(carried)",
            ),
            "float32 rounds as little as float64": (
                '"float32": 2.0**-24}',
                '"float32": 2.0**-53}',
            ),
            "the evaluation of the score rounds nothing": (
                "return score.roundoff(value,",
                "return 0 * score.roundoff(value,",
            ),
        },
    ),
    *planted(
        "bounds/folding.py",
        _ROUNDING,
        {
            "merged layers forget what was summed": (
                "summed = _plus(_times(scale.factor.abs(), operation.size), scale.size)",
                "summed = bias",
            ),
        },
    ),
    *planted(
        "bounds/auto_lirpa.py",
        _ROUNDING,
        {
            "rows of auto_LiRPA are not moved": (
                "lower, upper = lower - margin, upper + margin\n        proved",
                "lower, upper = lower, upper\n        proved",
            ),
            "hidden intervals of auto_LiRPA are not moved": (
                "moved = lower.detach() - errors[name], upper.detach() + errors[name]",
                "moved = lower.detach(), upper.detach()",
            ),
        },
    ),
    *planted(
        "bounds/domains.py",
        _ROUNDING,
        {
            "rows of domains start without rounding": (
                "passage.margin = passage.margin + (rows.abs()",
                "passage.margin = passage.margin + 0 * (rows.abs()",
            ),
        },
    ),
    *planted(
        "networks/builder.py",
        _ROUNDING,
        {
            "BatchNorm forgets how large its mean is": (
                "shift, summed = shift + bias, summed + bias.abs()",
                "shift, summed = shift + bias, (shift + bias).abs()",
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
