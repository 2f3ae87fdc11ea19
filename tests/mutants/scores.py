"""Bugs of scores, balls, attacks, metrics, detectors, and of who reads results."""

from __future__ import annotations

from tests.mutants.runner import planted

MUTANTS = (
    *planted(
        "scores.py",
        ("test_scores.py", "bounds/test_score.py"),
        {
            "the energy is not scaled by its temperature": (
                "return -temperature * torch.logsumexp(logits / temperature, dim=-1)",
                "return -torch.logsumexp(logits / temperature, dim=-1)",
            ),
            "MSP forgets its temperature": (
                "return -torch.softmax(logits / self.temperature, -1).amax(-1)",
                "return -torch.softmax(logits, -1).amax(-1)",
            ),
            "max-logit takes the smallest": ("return -logits.amax(-1)", "return -logits.amin(-1)"),
            "the order of MSP counts its own class": (
                "others = (logits - logits.gather(-1, own)).scatter(-1, own, -torch.inf)",
                "others = logits - logits.gather(-1, own)",
            ),
            "the order of a threshold is turned around": (
                "max(math.log1p(gamma) - math.log(-gamma), -_LARGEST_ORDER)",
                "max(math.log(-gamma) - math.log1p(gamma), -_LARGEST_ORDER)",
            ),
            "a temperature may be negative": ("if not 0 < temperature < math.inf:", "if not temperature < math.inf:"),
        },
    ),
    *planted(
        "metrics.py",
        ("test_metrics.py", "test_detector.py"),
        {
            "ties count in full": (
                "return float((below + up_to) / (2 * len(inside) * len(outside)))",
                "return float(up_to / (len(inside) * len(outside)))",
            ),
            "a threshold accepts less than 95 %": (
                "return float(ordered[-(-percent * len(ordered) // 100) - 1])",
                "return float(ordered[percent * len(ordered) // 100 - 1])",
            ),
            "the conformal rank forgets the fresh sample": (
                "rank = -(-percent * (len(ordered) + 1) // 100)",
                "rank = -(-percent * len(ordered) // 100)",
            ),
            "the conformal rank is rounded down": (
                "rank = -(-percent * (len(ordered) + 1) // 100)",
                "rank = percent * (len(ordered) + 1) // 100",
            ),
            "too few calibration scores give the largest": (
                "return float(ordered[rank - 1])",
                "return float(ordered[min(rank, len(ordered)) - 2])",
            ),
            "OOD on the threshold is rejected": ("<= threshold_at_tpr(score_id)))", "< threshold_at_tpr(score_id)))"),
            "scores that are NaN are taken": (
                "if bool(np.isnan(values).any()):",
                "if bool(np.isnan(values).all()):",
            ),
        },
    ),
    *planted(
        "results/curves.py",
        ("results/test_curves.py", "results/test_thresholds.py"),
        {
            "a bound on gamma proves OOD": ("proved = formal > gamma_certified", "proved = formal >= gamma_certified"),
            "bounds that are NaN count as proved": (
                "proved = formal > gamma_certified",
                "proved = ~(formal <= gamma_certified)",
            ),
            "an upper bound that is NaN is minus infinity in curves": (
                "nan=np.inf, posinf=np.inf, neginf=np.inf)",
                "nan=-np.inf, posinf=np.inf, neginf=np.inf)",
            ),
            "OOD on gamma is not fooled": ("fooled = witness <= gamma_attacked", "fooled = witness < gamma_attacked"),
            "noise counts among OOD sets": ('sets = rows.sets("ood")', 'sets = rows.sets("ood", "noise")'),
            "ID on gamma is proved to stay": (
                'np.searchsorted(np.sort(upper[np.isfinite(upper)]), gamma, side="left")',
                'np.searchsorted(np.sort(upper[np.isfinite(upper)]), gamma, side="right")',
            ),
            "a smoothed radius of eps is enough": (
                '(rows["radius_smoothed"][mask][:, None] <= eps)',
                '(rows["radius_smoothed"][mask][:, None] < eps)',
            ),
        },
    ),
)
