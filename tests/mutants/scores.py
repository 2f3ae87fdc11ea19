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
        "ball.py",
        ("test_ball.py", "bounds/test_crown.py"),
        {
            "l_inf and l_1 take each other's dual norm": (
                'DUAL_ORDER = {"linf": 1.0, "l2": 2.0, "l1": float("inf")}',
                'DUAL_ORDER = {"linf": float("inf"), "l2": 2.0, "l1": 1.0}',
            ),
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
            "weak duality leaves out the multiplier": (
                "value = (rows * offset).sum(-1) + (eps.square() - offset.square().sum(-1)) / (2 * step)",
                "value = (rows * offset).sum(-1)",
            ),
            "the scale of a row is not put back": (
                "return torch.minimum(best, torch.where(torch.isfinite(value), value, best)) * scale",
                "return torch.minimum(best, torch.where(torch.isfinite(value), value, best))",
            ),
            "a support that is NaN is 0": (
                "torch.where(torch.isfinite(value), value, best)) * scale",
                "torch.where(torch.isfinite(value), value, 0.0)) * scale",
            ),
            "a radius may be negative": (
                "if not bool((torch.isfinite(self.eps) & (self.eps >= 0)).all()):",
                "if not bool(torch.isfinite(self.eps).all()):",
            ),
            "images may leave the pixel box": (
                "if not bool(((self.center >= 0) & (self.center <= 1)).all()):",
                "if not bool((self.center >= 0).all()):",
            ),
            "the largest l_2 ball has radius d": (
                "return math.pow(math.prod(shape), 1 / ORDER[norm])",
                'return math.pow(math.prod(shape), 0 if norm == "linf" else 1)',
            ),
        },
    ),
    *planted(
        "attacks.py",
        ("test_attacks.py",),
        {
            "linear steps ignore the walls": (
                'if norm == "linf" and buys == "length":\n        return torch.minimum(room, budget)',
                'if norm == "linf" and buys == "length":\n        return budget.expand_as(room)',
            ),
            "climbs end outside the ball": (
                "return ball.project(ball.center + (moved * flat.sign()).reshape(gradient.shape))",
                "return (ball.center + 2 * (moved * flat.sign()).reshape(gradient.shape)).clamp(0, 1)",
            ),
            "points found in float32 are not projected": (
                "rounded = ball.project(best.to(start))",
                "rounded = ball.center + 1.01 * (best.to(start) - ball.center)",
            ),
            "the maximum keeps the lower score": (
                "higher = (score > self.maximum) |",
                "higher = (score < self.maximum) |",
            ),
            "a score that is NaN hides the others": (
                "lower = (score < self.minimum) | (self.minimum.isnan() & ~score.isnan())",
                "lower = score < self.minimum",
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
                "best = _where(found & flipped, candidates, best)",
                "best = _where(found & ~flipped, candidates, best)",
            ),
            "searches climb down": (
                "best, best_points, best_gradient = sign * score, points, ball.per_pixel(sign) * gradient",
                "best, best_points, best_gradient = sign * score, points, -ball.per_pixel(sign) * gradient",
            ),
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
        "detector.py",
        ("test_detector.py",),
        {
            "S = gamma is rejected by predictions": (
                "return Prediction(score, score <= self.gamma, values.argmax(1))",
                "return Prediction(score, score < self.gamma, values.argmax(1))",
            ),
            "a checkpoint may compute other scores than when it was saved": (
                "if not (difference := _difference(detector.scores(probes(detector.shape)), stored)) <= _AGREEMENT:",
                "if (difference := _difference(detector.scores(probes(detector.shape)), stored)) < 0:",
            ),
            "a checkpoint may hold weights that are not finite": (
                "bool(torch.isfinite(value).all()) for value in",
                "bool(torch.isfinite(value).any()) for value in",
            ),
            "weights are rounded to float32": (
                "torch.equal(single.to(tensor), tensor) else tensor",
                "torch.equal(single.to(tensor), single.to(tensor)) else tensor",
            ),
            "gamma is calibrated with another score": (
                "detector = Detector(network.requires_grad_(False), 0.0, shape, tuple(class_names), score=score)",
                "detector = Detector(network.requires_grad_(False), 0.0, shape, tuple(class_names))",
            ),
        },
    ),
    *planted(
        "system/torch_files.py",
        ("system/test_torch_files.py", "test_detector.py"),
        {
            "a file whose SHA-256 differs is opened": (
                "if content[_FINGERPRINT] != fingerprint(rest):",
                "if content[_FINGERPRINT] is None:",
            ),
            "pickles are run": ('map_location="cpu", weights_only=True)', 'map_location="cpu", weights_only=False)'),
            "another version of a file is read": (
                'if content.get("format_version") != self.version:',
                'if content.get("format_version") is None:',
            ),
        },
    ),
    *planted(
        "system/memory.py",
        ("system/test_memory.py",),
        {
            "what failed for want of memory is lost": (
                "halves = zip(*(item.tensor_split(2) for item in items), strict=True)",
                "halves = [tuple(item.tensor_split(2)[0] for item in items)]",
            ),
        },
    ),
    *planted(
        "api.py",
        ("test_api.py",),
        {
            "bounds that miss S(x) are returned": (
                "outside = (at_center < found.lower) | (at_center > found.upper)",
                "outside = (at_center < found.lower) & (at_center > found.upper)",
            ),
            "results come back in the order of their sides": (
                "back = torch.cat(order).argsort()",
                "back = torch.arange(len(torch.cat(order)))",
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
    *planted(
        "results/thresholds.py",
        ("results/test_thresholds.py",),
        {
            "S_ub = gamma certifies at another gamma": ('rows.grid["s_ub"] < gamma', 'rows.grid["s_ub"] <= gamma'),
            "certified radii are kept where more is asked": (
                "easier = (gamma > rows.gamma) == inside",
                "easier = (gamma < rows.gamma) == inside",
            ),
            "attacks are kept where less is asked": (
                'np.where(easier, np.inf, rows["radius_attack"])',
                'rows["radius_attack"]',
            ),
            "wrong decisions keep their bounds": (
                'rows.grid["s_lb"] > gamma) & right[:, None]',
                'rows.grid["s_lb"] > gamma)',
            ),
            "the per-logit radius of another gamma is kept": (
                '"radius_certified_per_logit": unknown,',
                '"radius_certified_per_logit": rows["radius_certified_per_logit"],',
            ),
        },
    ),
    *planted(
        "results/table.py",
        ("results/test_table.py",),
        {
            "certified radii beyond the attack are read": (
                'if table.kind == "certification" and (table["radius_certified"] > table["radius_attack"]).any():',
                'if table.kind == "certified" and (table["radius_certified"] > table["radius_attack"]).any():',
            ),
            "a table that lost rows is read": (
                'if len(records) != manifest.get("rows", len(records)):',
                'if len(records) > manifest.get("rows", len(records)):',
            ),
            "a line that broke off is read": (
                'if content and not content.endswith(b"\\n"):',
                "if content and not content:",
            ),
        },
    ),
    *planted(
        "runs/verdicts.py",
        ("runs/test_verdicts.py",),
        {
            "a verifier's timeout certifies": (
                'record |= {"verdict": found.verdict, "certified_external": int(found.verdict == "unsat")}',
                'record |= {"verdict": found.verdict, "certified_external": int(found.verdict != "sat")}',
            ),
            "a verifier's sat is believed": ('record |= {"refuted": int(crossed),', 'record |= {"refuted": 1,'),
            "a counterexample may lie outside the ball": (
                "point = ball.project(image.new_tensor(found.counterexample).reshape(image.shape))",
                "point = image.new_tensor(found.counterexample).reshape(image.shape)",
            ),
            "verdicts that contradict each other are read": (
                "if name in verdicts and verdicts[name].verdict != verdict:",
                "if name in verdicts and verdicts[name].verdict is None:",
            ),
        },
    ),
    *planted(
        "runs/certify.py",
        ("runs/test_certify.py",),
        {
            "the engines are compared on no ball": (
                "for whole in sets for images in whole.images[:_CHECKED]",
                "for whole in sets for images in whole.images[:0]",
            ),
            "a wrong decision is reported as undecided": (
                'record["status"] = "misdecided" if not record.pop("right") else',
                'record["status"] = "undecided" if not record.pop("right") else',
            ),
        },
    ),
    *planted(
        "runs/exports.py",
        ("runs/test_exports.py",),
        {
            "exported weights are not read back": (
                "not all(torch.equal(again[name], state[name]) for name in state)",
                "not all(name in again for name in state)",
            ),
        },
    ),
)
