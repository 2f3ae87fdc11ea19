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
                "return (2 * below + ties) / (2 * self.samples_id * self.samples_ood)",
                "return (2 * below + 2 * ties) / (2 * self.samples_id * self.samples_ood)",
            ),
            "a threshold accepts less than 95 %": (
                "return int(-(-share * samples // 1))",
                "return max(1, int(share * samples // 1))",
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
            "OOD on the threshold is rejected": (
                'np.searchsorted(outside, thresholds, "right"),',
                'np.searchsorted(outside, thresholds, "left"),',
            ),
            "ties rank in favour of the positives": (
                "np.repeat(false, found)",
                "np.repeat(_before(false), found)",
            ),
            "scores that are NaN are taken": (
                "if bool(np.isnan(values).any()):",
                "if bool(np.isnan(values).all()):",
            ),
        },
    ),
    *planted(
        "guarantees.py",
        ("test_guarantees.py",),
        {
            "a bound that is not finite proves the score": ("sign * limit, np.inf)", "sign * limit, reached)"),
            "scores beyond a proof are taken": ("wrong = reached > proved", "wrong = reached > np.inf"),
            "a tie in GAUC counts half": ("proved.auroc_strict)", "proved.auroc)"),
            "GAUPR ranks ties as scikit-learn does": ('each.aupr(positive, "pessimistic")', "each.aupr(positive)"),
            "a bound on gamma keeps ID": ("inside.proved < gamma if", "inside.proved <= gamma if"),
            "a bound on gamma rejects OOD": ("~(outside.proved > gamma)", "~(outside.proved >= gamma)"),
            "the order of figures is not checked": (
                "if not ascending[0] <= ascending[1] <= ascending[2]:",
                "if not ascending[0] <= ascending[2]:",
            ),
        },
    ),
    *planted(
        "conventions.py",
        ("test_conventions.py",),
        {
            "OpenOOD keeps the points between others": ("kept[1:-1] = (np.diff", "kept[1:-1] |= (np.diff"),
            "the nearest recall is looked for from below": (
                "nearest = full - int(np.argmin(np.abs(recall[full::-1] - _TPR)))",
                "nearest = int(np.argmin(np.abs(recall[: full + 1] - _TPR)))",
            ),
            "DOS counts ties": ("np.mean(outside < threshold)", "np.mean(outside <= threshold)"),
            "ProoD counts ties half": ("ranking.auroc_strict,", "ranking.auroc,"),
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
            "a radius of eps survives eps": ('side="right") / len(ordered)', 'side="left") / len(ordered)'),
            "attacks count as proofs in limits": ("_level(sets))[0])", "_level(sets))[1])"),
            "the limits of a mean hold for each set alone": ("return 1 - (1 - LEVEL) / len(sets)", "return LEVEL"),
            "draws end at the level of both sides": ("inv_cdf(level ** (1 / n))", "inv_cdf((2 * level) ** (1 / n))"),
        },
    ),
    *planted(
        "ball.py",
        ("test_ball.py",),
        {
            "the ball leaves the pixel box at 1": (
                "return (self.center + self.per_pixel(self.eps)).clamp(max=1)",
                "return (self.center + self.per_pixel(self.eps)).clamp(max=2)",
            ),
            "projection lands outside the ball": (
                "self.per_pixel((self.eps / length).clamp(max=1))",
                "self.per_pixel((2 * self.eps / length).clamp(max=1))",
            ),
            "the wrong ends of the box count": (
                "return (rows.clamp(min=0) @ high.mT + rows.clamp(max=0) @ low.mT).squeeze(-1)",
                "return (rows.clamp(min=0) @ low.mT + rows.clamp(max=0) @ high.mT).squeeze(-1)",
            ),
            "the scale of a row is not put back": (
                "return torch.minimum(best, torch.where(torch.isfinite(value), value, best)) * scale",
                "return torch.minimum(best, torch.where(torch.isfinite(value), value, best))",
            ),
            "a radius may be negative": (
                "if not bool((torch.isfinite(self.eps) & (self.eps >= 0)).all()):",
                "if not bool(torch.isfinite(self.eps).all()):",
            ),
            "images may leave the pixel box": (
                "if ends and not bool((ends.min >= 0) & (ends.max <= 1)):",
                "if ends and not bool(ends.min >= 0):",
            ),
        },
    ),
    *planted(
        "ball.py",
        ("bounds/test_crown.py",),
        {
            "the knapsack spends on flat pixels first": (
                "gain, order = rows.abs().sort(dim=-1, descending=True)",
                "gain, order = rows.abs().sort(dim=-1, descending=False)",
            ),
            "the knapsack pays for a pixel before it is moved": (
                "before = room.cumsum(-1) - room\n    spent",
                "before = room.cumsum(-1)\n    spent",
            ),
            "the room of a pixel is on its other side": (
                "room = torch.where(rows > 0, high, -low).gather(-1, order)",
                "room = torch.where(rows < 0, high, -low).gather(-1, order)",
            ),
        },
    ),
    *planted(
        "attacks.py",
        ("test_attacks.py",),
        {
            "climbs end outside the ball": (
                "return ball.project(ball.center + (moved * flat.sign()).reshape(gradient.shape))",
                "return (ball.center + 2 * (moved * flat.sign()).reshape(gradient.shape)).clamp(0, 1)",
            ),
            "points found in float32 are not projected": (
                "ends = ball.project(ended.to(ball.center)),",
                "ends = ball.center + 1.01 * (ended.to(ball.center) - ball.center),",
            ),
            "of two findings the worse is kept": (
                "return (value > best) |",
                "return (value < best) |",
            ),
            "a flip on gamma counts for ID": (
                "torch.where(accepted, score > gamma, score <= gamma)",
                "torch.where(accepted, score >= gamma, score <= gamma)",
            ),
            "a score that is NaN counts as flipped": (
                "return torch.isfinite(score) & torch.where(accepted, score > gamma, score <= gamma)",
                "return torch.where(accepted, ~(score <= gamma), ~(score > gamma))",
            ),
            "the radius is not that of the point": (
                "return MinimumNorm(torch.where(found, distance, torch.inf), best)",
                "return MinimumNorm(torch.where(found, 0.999 * distance, torch.inf), best)",
            ),
            "a search that found nothing has radius 0": (
                "return MinimumNorm(torch.where(found, distance, torch.inf), best)",
                "return MinimumNorm(distance, best)",
            ),
            "bisection keeps the point before the flip": (
                "best[index[flipped]] = candidates[flipped]",
                "best[index[~flipped]] = candidates[~flipped]",
            ),
            "searches climb down": (
                "ball.per_pixel(share) * (towards(velocity, ball) - points)",
                "ball.per_pixel(share) * (towards(-velocity, ball) - points)",
            ),
        },
    ),
    *planted(
        "ball.py",
        ("test_ball.py",),
        {
            "weak duality leaves out the multiplier": (
                "value = (rows * offset).sum(-1) + (eps.square() - offset.square().sum(-1)) / (2 * step)",
                "value = (rows * offset).sum(-1)",
            ),
            "a support that is NaN is 0": (
                "torch.where(torch.isfinite(value), value, best)) * scale",
                "torch.where(torch.isfinite(value), value, 0.0)) * scale",
            ),
        },
    ),
    *planted(
        "attacks.py",
        ("test_attacks.py",),
        {
            "a score that is NaN hides the others": (
                "(value > best) | (best.isnan() & ~value.isnan())",
                "(value > best)",
            ),
        },
    ),
)
