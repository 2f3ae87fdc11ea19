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
            "a timeout of branch and bound is a proof": (
                "state.record(index, eps, found.bound, self.name)",
                "state.record(index, eps, torch.where(found.timed_out, self.means.gamma - 1e-9, found.bound), self.name)",
            ),
            "a timeout of branch and bound is not told": (
                "state.timed_out[index] |= found.timed_out",
                "state.timed_out[index] |= False",
            ),
            "the constant of a fixed head is used for OOD": ('inside = state.kind == "id"', "inside = True"),
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
            "a point counts as nearer whatever its decision": (
                "nearer = flipped & (distance < self.radius)",
                "nearer = distance < self.radius",
            ),
            "a farther counterexample replaces a nearer one": (
                "nearer = flipped & (distance < self.radius)",
                "nearer = flipped",
            ),
            "scores below the envelope pass": ("above | (seen.minimum < lower),", "above,"),
            "scores above the envelope pass": ("above | (seen.minimum < lower),", "seen.minimum < lower,"),
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
            "a search goes on below the least ball": (
                "active = active & (high > least)",
                "active = active & (high > 0)",
            ),
            "a search ends at ten times the least ball": (
                "active = active & (high > least)",
                "active = active & (high > 10 * least)",
            ),
        },
    ),
    *planted(
        "certification/checker.py",
        ("certification/test_checker.py",),
        {
            "a travelling proof of ID holds with S_ub = gamma": (
                '("<", value < gamma) if claim["decision"]',
                '("<", value <= gamma) if claim["decision"]',
            ),
            "a travelling proof of OOD holds with S_lb = gamma": (
                'else (">", value > gamma)',
                'else (">", value >= gamma)',
            ),
            "NaN is a travelling proof": (
                '("<", value < gamma) if claim["decision"]',
                '("<", not value >= gamma) if claim["decision"]',
            ),
            "a travelling proof holds for any network": (
                'or hashlib.sha256(content).hexdigest() != claim["network"]:',
                "or hashlib.sha256(content).hexdigest() is None:",
            ),
            "the checker ignores eps": (
                "low, high = np.nextafter(np.maximum(self.x - eps, 0), -1)",
                "low, high = np.nextafter(np.maximum(self.x, 0), -1)",
            ),
            "the checker pays no rounding of intervals": (
                "self.ends.append((low - self.unit * self.m[-1], high + self.unit * self.m[-1]))",
                "self.ends.append((low, high))",
            ),
            "the checker knows of no rounding at all": ("self.neurons = 2.0**-50 * (", "self.neurons = 0.0 * ("),
            "the checker's chord lies below the neuron": (
                "constant = np.maximum(0, np.maximum((leak - chord) * low, (1 - chord) * high))",
                "constant = np.maximum(0, (leak - chord) * high)",
            ),
            "the checker bounds from below by the chord": (
                "row = positive * chord + (row - positive) * slope",
                "row = positive * chord + (row - positive) * chord",
            ),
            "the checker takes slopes beyond 1": (
                "np.where(constant > 0, np.minimum(slope, 1), chord)",
                "np.where(constant > 0, slope, chord)",
            ),
            "the checker's slope is below the leak": (
                "slope = leak + (1 - leak) * (chord > 0.5",
                "slope = (1 - leak) * (chord > 0.5",
            ),
            "the checker forgets that two layers read a value": (
                "pending[i] = pending.get(i, 0) + row",
                "pending[i] = row",
            ),
            "the checker does not pay for the ball": (
                "gained - price * (move**power).sum(1) + cost + self.unit",
                "gained - price * (move**power).sum(1) + self.unit",
            ),
            "the checker adds the entropy": ("float(upper - t * entropy +", "float(upper + t * entropy +"),
            "the checker takes the best end of a logit": (
                "(power - row * ends).max(0).sum()",
                "(power - row * ends).min(0).sum()",
            ),
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
        },
    ),
)
