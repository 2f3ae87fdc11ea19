"""Bugs of `grood_cert.certification`: the cascade, its checks, and smoothing."""

from __future__ import annotations

from tests.mutants.runner import planted

_CASCADE = "certification/test_checks.py", "certification/test_stages.py", "certification/test_cascade.py"

MUTANTS = (
    *planted(
        "certification/envelope.py",
        ("certification/test_envelope.py", *_CASCADE),
        {
            "a bound counts for larger balls, not for smaller ones": (
                "inside = self.grid <= eps[:, None]",
                "inside = self.grid >= eps[:, None]",
            ),
            "an upper bound that is NaN is minus infinity": (
                "upper = torch.where(torch.isfinite(upper), upper, torch.inf)",
                "upper = torch.where(torch.isfinite(upper), upper, -torch.inf)",
            ),
            "a lower bound that is NaN is infinity": (
                "lower = torch.where(torch.isfinite(lower), lower, -torch.inf)",
                "lower = torch.where(torch.isfinite(lower), lower, torch.inf)",
            ),
            "S_ub = gamma certifies ID": (
                'upper < self.gamma if self.kind == "id" else lower > self.gamma\n        self.certify(index[proved]',
                'upper <= self.gamma if self.kind == "id" else lower > self.gamma\n        self.certify(index[proved]',
            ),
            "S_lb = gamma certifies OOD": (
                "else lower > self.gamma\n        self.certify(index[proved]",
                "else lower >= self.gamma\n        self.certify(index[proved]",
            ),
            "the envelope keeps the looser upper bound": (
                "self.upper[index] = torch.minimum(self.upper[index], gain[1])",
                "self.upper[index] = torch.maximum(self.upper[index], gain[1])",
            ),
            "a radius of 0 certifies": (
                "(self.outcome[index] == 0) & (eps[:, None] > 0)",
                "(self.outcome[index] == 0)",
            ),
            "a ball is certified at radii above its own": (
                "new = (self.grid <= eps[:, None]) &",
                "new = (self.grid <= 1.5 * eps[:, None]) &",
            ),
            "the radius is the last one proved, not the largest": (
                "better = eps > self.radius[index]",
                "better = eps > 0",
            ),
        },
    ),
    *planted(
        "certification/cascade.py",
        _CASCADE,
        {
            "graph and network are not compared on the images": (
                "self._check_graph(images, logits)",
                "self._check_graph(images[:0], logits[:0])",
            ),
            "graph and network are not compared where attacks ended": (
                "self._check_graph(adversary.points, network(adversary.points))",
                "self._check_graph(images, logits)",
            ),
            "S = gamma is rejected": ("accepted = score <= gamma", "accepted = score < gamma"),
            "accepted OOD counts as decided rightly": (
                'right = accepted if kind == "id" else ~accepted',
                "right = torch.ones_like(accepted)",
            ),
            "the time limit is that of a batch": (
                "(settings.time_limit * len(images) or torch.inf)",
                "(settings.time_limit or torch.inf)",
            ),
            "attacked scores are not checked against the envelope": (
                "adversary.check_envelope(envelope)",
                "adversary.check_envelope",
            ),
            "the certified radius is not checked against attacks": (
                '{"radius_certified": envelope.radius, **state.radii}',
                "state.radii",
            ),
            "the per-logit radius is not checked against attacks": (
                '{"radius_certified": envelope.radius, **state.radii}',
                '{"radius_certified": envelope.radius}',
            ),
            "a wrong decision keeps the name of a stage": (
                "stage=torch.where(right, envelope.stage, Outcome.MISDECISION)",
                "stage=envelope.stage",
            ),
            "a wrong decision counts as certified": (
                "return torch.where(state.right[:, None], found, Outcome.MISDECISION)",
                "return found",
            ),
            "a certified ball is called a timeout": (
                "torch.where(open_ & state.timed_out[:, None], Outcome.TIMEOUT, found)",
                "torch.where(state.timed_out[:, None], Outcome.TIMEOUT, found)",
            ),
            "nothing is called a timeout": (
                "torch.where(open_ & state.timed_out[:, None], Outcome.TIMEOUT, found)",
                "found",
            ),
            "balls just beyond a counterexample are called undecided": (
                "attacked = state.envelope.grid >= state.adversary.radius[:, None]",
                "attacked = state.envelope.grid >= 2 * state.adversary.radius[:, None]",
            ),
            "what was not proved is reported as infinite": (
                "return torch.where(torch.isfinite(bound), bound, torch.nan)",
                "return bound",
            ),
            "the lowest attacked score is reported for the highest": (
                "s_attack_max=torch.stack([seen.maximum",
                "s_attack_max=torch.stack([seen.minimum",
            ),
        },
    ),
    *planted(
        "certification/guard.py",
        _CASCADE,
        {
            "proofs begin after their time": (
                "unproved(len(index)) if timed and state.late(index) else prove",
                "prove",
            ),
            "exceptions are not counted": (
                "self.failures[message] = self.failures.get(message, 0) + balls",
                "self.failures.get(message, 0)",
            ),
            "the limit on balls at once is not kept": ("size = self.together or len(index)", "size = len(index)"),
        },
    ),
    *planted(
        "certification/state.py",
        _CASCADE,
        {
            "refining stages prove the upper bound for OOD": (
                'return "upper" if self.kind == "id" else "lower"',
                'return "upper"',
            ),
            "a lower bound is recorded as an upper one": (
                '(nothing, bound) if self.kind == "id" else (bound, nothing)',
                "(nothing, bound)",
            ),
            "time that is up is not noted": ("self.timed_out[index] = True", "self.timed_out[index] = False"),
        },
    ),
    *planted(
        "certification/outcomes.py",
        _CASCADE,
        {
            "a timeout certifies": (
                "return self.word in STAGES or self is Outcome.ENVELOPE",
                "return self.word in STAGES or self >= Outcome.TIMEOUT",
            ),
        },
    ),
    *planted(
        "certification/stages.py",
        _CASCADE,
        {
            "an exception of the linear engine is a proof": (
                "nothing = eps.new_full((balls,), torch.nan)",
                "nothing = eps.new_full((balls,), self.means.gamma - 1e-9)",
            ),
            "an exception of alpha-crown is a proof": (
                "lambda balls: _Bound(eps.new_full((balls,), torch.nan)),",
                "lambda balls: _Bound(eps.new_full((balls,), self.means.gamma - 1e-9)),",
            ),
            "an exception of the Lipschitz bound is the constant 0": (
                "lambda balls: _Bound(eps.new_full((balls,), torch.nan)),",
                "lambda balls: _Bound(eps.new_full((balls,), 0.0)),",
            ),
            "an exception of branch and bound is a proof": (
                "nothing, no = envelope.score.new_full((balls,), torch.nan)",
                "nothing, no = envelope.score.new_full((balls,), self.means.gamma - 1e-9)",
            ),
            "a timeout of branch and bound is a proof": (
                "state.record(index, eps, found.bound, self.name)",
                "state.record(index, eps, torch.where(found.timed_out, self.means.gamma - 1e-9, found.bound), self.name)",
            ),
            "a timeout of branch and bound is not told": (
                "state.timed_out[index] |= found.timed_out",
                "state.timed_out[index] |= False",
            ),
            "every point of branch and bound is a counterexample": (
                "state.adversary.add(flipped, points)",
                "state.adversary.add(state.right, points)",
            ),
            "counterexamples of branch and bound are lost": (
                "state.adversary.add(flipped, points)",
                "state.adversary.add(flipped & ~flipped, points)",
            ),
            "the seconds that are left do not bound branch and bound": (
                "if settings.time_limit > 0 else None",
                "if settings.time_limit < 0 else None",
            ),
            "the constant of a fixed head is used for OOD": ('inside = state.kind == "id"', "inside = True"),
            "the path integral forgets what lies before": (
                "moved = (running_minimum(slopes) * steps).cumsum(1) *",
                "moved = (running_minimum(slopes) * steps) *",
            ),
            "Lipschitz bounds of S point the wrong way": (
                'envelope.score + far if state.kind == "id" else envelope.score - far',
                'envelope.score - far if state.kind == "id" else envelope.score + far',
            ),
            "Lipschitz bounds are not tried beyond the attack": (
                "furthest = torch.where(state.right, 1.25 *",
                "furthest = torch.where(state.right, 0.9 *",
            ),
            "alpha-crown is not tried beyond the attack": ("beyond = 1.1 ", "beyond = 0.9 "),
            "branch and bound is not tried beyond the attack": ("beyond = 1.02", "beyond = 0.95"),
            "the per-logit radius is that of joint bounds": (
                "state.per_logit.record(index, eps, bound.lower_per_logit, bound.upper_per_logit, self.method)",
                "state.per_logit.record(index, eps, bound.lower, bound.upper, self.method)",
            ),
            "a wrong decision gets a Lipschitz radius": (
                "margin = torch.where(state.right, envelope.margin - rounding, 0.0)",
                "margin = envelope.margin.max() - rounding",
            ),
        },
    ),
    *planted(
        "certification/adversary.py",
        ("certification/test_adversary.py", *_CASCADE),
        {
            "wrong decisions have no attack radius": (
                "images.clone(), images.new_zeros(len(images))",
                "images.clone(), images.new_full((len(images),), torch.inf)",
            ),
            "attacks on the grid look for the wrong side": (
                "flipped = found.maximum > self._gamma if self._inside else found.minimum <= self._gamma",
                "flipped = found.minimum > self._gamma if self._inside else found.maximum <= self._gamma",
            ),
            "a point counts as nearer whatever its decision": (
                "nearer = flipped & (distance < self.radius)",
                "nearer = distance < self.radius",
            ),
            "a farther counterexample replaces a nearer one": (
                "nearer = flipped & (distance < self.radius)",
                "nearer = flipped",
            ),
            "a radius may exceed the attack twofold": ("certified > self.radius,", "certified > 2 * self.radius,"),
            "scores below the envelope pass": ("above | (seen.minimum < lower),", "above,"),
            "scores above the envelope pass": ("above | (seen.minimum < lower),", "seen.minimum < lower,"),
            "the envelope is checked at the smallest eps alone": (
                "for column, seen in enumerate(self.seen):",
                "for column, seen in enumerate(self.seen[:1]):",
            ),
            "a contradiction is not raised": ("if bool(wrong.any()):", "if not len(wrong):"),
        },
    ),
    *planted(
        "certification/search.py",
        ("certification/test_search.py", *_CASCADE),
        {
            "a deviation that is NaN counts as proved": (
                "proved = active & (got < margin)",
                "proved = active & ~(got >= margin)",
            ),
            "a deviation equal to the margin counts as proved": (
                "proved = active & (got < margin)",
                "proved = active & (got <= margin)",
            ),
            "the radius that failed is returned": ("    return low\n", "    return torch.fmin(high, low + limit)\n"),
            "the search goes beyond the largest eps": ("eps = guess.clamp(max=limit)", "eps = guess"),
        },
    ),
    *planted(
        "certification/smoothing.py",
        ("certification/test_smoothing.py",),
        {
            "the lower order statistic is one too high": (
                "binom.cdf(k - 1, n, below) > alpha",
                "binom.cdf(k - 2, n, below) > alpha",
            ),
            "the upper order statistic is one too low": (
                "binom.sf(k - 1, n, above) <= alpha",
                "binom.sf(k, n, above) <= alpha",
            ),
            "the lower quantile is not shifted": ("norm.cdf(norm.ppf(q) - shift)", "norm.cdf(norm.ppf(q))"),
            "the upper quantile is not shifted": ("norm.cdf(norm.ppf(q) + shift)", "norm.cdf(norm.ppf(q))"),
            "every eps of the grid spends all of alpha": ("alpha / (2 * len(eps))", "alpha / 2"),
            "both sides of the decision spend all of alpha": (
                "least = beta.ppf(alpha / 2, hits, n - hits + 1)",
                "least = beta.ppf(alpha, hits, n - hits + 1)",
            ),
            "the radius comes from an upper confidence bound": (
                "least = beta.ppf(alpha / 2, hits, n - hits + 1)",
                "least = beta.ppf(1 - alpha / 2, hits + 1, n - hits)",
            ),
            "the radius is not in units of sigma": ("np.asarray(sigma * norm.ppf(", "np.asarray(norm.ppf("),
            "NaN among the draws does not abstain": (
                "whole = ~np.isnan(values).any(-1)",
                "whole = ~np.isnan(values).all(-1)",
            ),
            "NaN among the draws leaves the bounds": (
                "broken = np.isnan(ordered[..., -1])",
                "broken = np.isnan(ordered[..., 0])",
            ),
            "a draw on gamma lies below it": ("(values < gamma).sum(-1)", "(values <= gamma).sum(-1)"),
            "a draw on gamma lies above it": ("(values > gamma).sum(-1)", "(values >= gamma).sum(-1)"),
            "the median of an even number of draws is the upper one": (
                "(ordered.shape[-1] + 1) // 2 - 1",
                "ordered.shape[-1] // 2",
            ),
            "noise is clipped to the pixel box": ("(center + sigma * noise)", "(center + sigma * noise).clamp(0, 1)"),
            "noise has standard deviation 1": ("(center + sigma * noise)", "(center + noise)"),
            "calibration and test share their noise": (
                'f"{settings.seed}/{role}/{index}/{name}"',
                'f"{settings.seed}/{index}/{name}"',
            ),
            "all images share their noise": (
                'f"{settings.seed}/{role}/{index}/{name}"',
                'f"{settings.seed}/{role}/{name}"',
            ),
            "the smoothed network stays in float64": (
                ".to(getattr(torch, settings.dtype))",
                ".to(torch.float64)",
            ),
        },
    ),
)
