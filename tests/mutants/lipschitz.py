"""Bugs of `grood_cert.lipschitz`: products, intervals, Jacobian bounds, radii, and the chain of checks."""

from __future__ import annotations

from tests.mutants.runner import planted

_SOUND = (
    "lipschitz/test_exact.py",
    "lipschitz/test_soundness.py",
    "lipschitz/test_scores.py",
    "lipschitz/test_layers.py",
)

MUTANTS = (
    *planted(
        "lipschitz/bound.py",
        ("lipschitz/test_scores.py", "lipschitz/test_exact.py", "lipschitz/test_soundness.py"),
        {
            "a negative constant wins": (
                "proved = torch.isfinite(stacked) & (stacked >= 0)",
                "proved = torch.isfinite(stacked)",
            ),
            "constants on balls that are not proved count": (
                "found[name] = torch.where(known.proved, found[name], torch.nan)",
                "found[name] = torch.where(known.proved, found[name], found[name])",
            ),
            "the fixed head counts on balls that are not proved": (
                "None if head is None else torch.where(known.proved, head, torch.nan)",
                "head",
            ),
            "possible winners of max-logit all win": (
                "SoftmaxWeights(alone.to(known.gaps[0]), winners.to(known.gaps[0]))",
                "SoftmaxWeights(winners.to(known.gaps[0]), winners.to(known.gaps[0]))",
            ),
            "winners are those that must win": (
                "return ~(known.gaps[1].amin(2) < 0)",
                "return ~(known.gaps[0].amin(2) < 0)",
            ),
            "the slope of the logistic function is taken at the lower end": (
                "bound = bound * around * (1 - around) * (1 + ROUNDING)",
                "bound = bound * low * (1 - low) * (1 + ROUNDING)",
            ),
            "one class of MSP hides the others": (
                "worst[name][index] = torch.maximum(worst[name][index], bound)",
                "worst[name][index] = bound",
            ),
            "MSP takes the head of another class": (
                "head[index] = torch.where(own[index] == k, bound, head[index])",
                "head[index] = torch.where(own[index] != k, bound, head[index])",
            ),
            "the softmax weights forget the temperature": (
                "weights = weights_of_gaps(*_divided(known.gaps, temperature))",
                "weights = weights_of_gaps(*known.gaps)",
            ),
            "the fixed head forgets the temperature": (
                "weight = torch.softmax(logits / score.temperature, 1)",
                "weight = torch.softmax(logits, 1)",
            ),
            "the differences of logits forget the temperature": (
                "node = Node(Dense(rows / temperature, None)",
                "node = Node(Dense(rows, None)",
            ),
            "NaN is the constant 0 of smaller balls": (
                "known = torch.where(torch.isnan(bounds), torch.inf, bounds)",
                "known = torch.where(torch.isnan(bounds), 0.0, bounds)",
            ),
            "larger balls take the constants of smaller ones": (
                "return known.flip(-1).cummin(-1).values.flip(-1)",
                "return known.cummin(-1).values",
            ),
        },
    ),
    *planted(
        "lipschitz/product.py",
        ("lipschitz/test_exact.py", "lipschitz/test_layers.py", "lipschitz/test_soundness.py"),
        {
            "the torus leaves out the padding": (
                "max(length + 2 * pad, dilate * (kernel - 1) + 1)",
                "max(length, dilate * (kernel - 1) + 1)",
            ),
            "the torus leaves out the dilation": (
                "rows, columns = convolution.dilation\n",
                "rows, columns = 1, 1\n",
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
                "if state.matrix is not None and state.summed is not None and bool((low == high).all()):",
                "if state.matrix is not None and state.summed is not None and bool((low == high).any()):",
            ),
            "branches that overlap add up as if apart": (
                "order = ORDER[norm] if self._apart(*node.inputs) else 1.0",
                "order = ORDER[norm]",
            ),
            "a branch is lost where branches are added": (
                "norms = torch.tensor([state.norm(norm), other.norm(norm)], dtype=torch.float64)",
                "norms = torch.tensor([state.norm(norm)], dtype=torch.float64)",
            ),
            "branches through different layers are added as matrices": (
                "if state.base == other.base and len(both)",
                "if len(both)",
            ),
            "the last layer has the average of its row norms": (
                "last.factor * float(rows.max())",
                "last.factor * float(rows.mean())",
            ),
            "the last layer's rows are measured in the ball's norm": (
                "share * torch.linalg.vector_norm(part, ord=DUAL_ORDER[norm], dim=1)",
                "share * torch.linalg.vector_norm(part, ord=ORDER[norm], dim=1)",
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
        {
            "a corner of a product of intervals is forgotten": (
                "torch.maximum(torch.maximum(corners[0], corners[1]), torch.maximum(corners[2], corners[3])),",
                "torch.maximum(torch.maximum(corners[0], corners[1]), corners[3]),",
            ),
            "gradients pass linear layers without a radius": (
                "return Gradient(center - radius - ROUNDING * magnitude, center + radius + ROUNDING * magnitude, magnitude)",
                "return Gradient(center - ROUNDING * magnitude, center + ROUNDING * magnitude, magnitude)",
            ),
            "one branch of the gradient is lost": (
                "return Gradient(self.lower + other.lower, self.upper + other.upper, self.magnitude + other.magnitude)",
                "return Gradient(self.lower, self.upper, self.magnitude + other.magnitude)",
            ),
            "the hull leaves out unlikely classes": (
                "masked_fill(known.weights.upper <= 0, 0.0)",
                "masked_fill(known.weights.upper <= 0.5, 0.0)",
            ),
            "the hull is the average over classes": ("0.0).amax(1)", "0.0).mean(1)"),
            "the interval bound is minimised over P": (
                "low, high = -known.weights.maximum(-lower.mT) - margin, known.weights.maximum(upper.mT) + margin",
                "low, high = known.weights.maximum(lower.mT) - margin, -known.weights.maximum(-upper.mT) + margin",
            ),
            "a box is as long as its upper corner": (
                "largest = torch.maximum(lower.abs(), upper.abs())",
                "largest = upper.abs()",
            ),
            "a box is measured in the ball's norm": (
                "length: Tensor = torch.linalg.vector_norm(largest, ord=DUAL_ORDER[norm], dim=-1)",
                'length: Tensor = torch.linalg.vector_norm(largest, ord={"linf": torch.inf, "l2": 2, "l1": 1}[norm], dim=-1)',
            ),
        },
    ),
    *planted(
        "lipschitz/jacobian_crown.py",
        ("lipschitz/test_jacobian_crown.py", *_SOUND),
        {
            "the constant of a chord is on the wrong side": (
                "constant = torch.maximum(*ends) if top else torch.minimum(*ends)",
                "constant = torch.minimum(*ends) if top else torch.maximum(*ends)",
            ),
            "a chord below T starts from the larger of two slopes": (
                "low = line(torch.minimum(*at_lower), torch.minimum(*at_upper), False)",
                "low = line(torch.maximum(*at_lower), torch.minimum(*at_upper), False)",
            ),
            "a chord around an interval of no width is flat": (
                "slope = torch.where(width > 0, (right - left) / width, slopes[1])",
                "slope = torch.where(width > 0, (right - left) / width, torch.nan)",
            ),
            "negative entries take the upper line": (
                "result = row * mean.unsqueeze(1) + size * half.unsqueeze(1)",
                "result = row * (mean + half).unsqueeze(1)",
            ),
            "constants of lines are added with their sign": (
                "term = term + size.flatten(2) @ constant_half.flatten(1).unsqueeze(-1)",
                "term = term + row.flatten(2) @ constant_half.flatten(1).unsqueeze(-1)",
            ),
            "lines of signs are needed where signs are known": (
                "needed = (undecided & (lower < 0) & (upper > 0)).flatten(1)",
                "needed = (undecided & (lower > 0) & (upper > 0)).flatten(1)",
            ),
            "a window's largest entry is its smallest": (
                "largest = entries.masked_fill(~possible, -torch.inf).amax(3)",
                "largest = entries.masked_fill(~possible, torch.inf).amin(3)",
            ),
            "a window's impossible entries count": (
                "possible = (self._slopes[number][1] > 0).unsqueeze(1)",
                "possible = (self._slopes[number][0] > 0).unsqueeze(1)",
            ),
            "the joint l_1 norm forgets the constants": (
                "return torch.minimum(box, joint(rows, constant).clamp(min=0))",
                "return torch.minimum(box, joint(rows, 0 * constant).clamp(min=0))",
            ),
            "the joint l_2 norm adds the product of ends": (
                "joint(lower + upper, -lower * upper)",
                "joint(lower + upper, lower * upper)",
            ),
            "rows into two branches stay in one": (
                "result = tangents[reached[0]] + tangents[reached[1]]",
                "result = tangents[reached[0]]",
            ),
            "corners of P leave out the budget": (
                "corners = lower.unsqueeze(1) + budget.unsqueeze(1) *",
                "corners = lower.unsqueeze(1) + 0 * budget.unsqueeze(1) *",
            ),
            "the smallest corner of P counts": (
                "return shares.maximum(torch.stack(found, 1).unsqueeze(1)).squeeze(1) * (1 + ROUNDING)",
                "return torch.stack(found, 1).amin(1) * (1 + ROUNDING)",
            ),
        },
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
            "the path goes on after it ended": (
                "going = going & (step >= steps[..., i])",
                "going = going & (step >= 0)",
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
    *planted(
        "lipschitz/analyser.py",
        ("lipschitz/test_analyser.py",),
        {
            "slopes that exceed a bound pass": ("if bool(wrong.any()):", "if bool(wrong.all()) and not len(wrong):"),
            "the ascent is not in the chain": (
                '_LOWER = ("gradient_norm_estimate", "sampled_estimate", "ascended_estimate", "secant_estimate")',
                '_LOWER = ("gradient_norm_estimate", "sampled_estimate", "secant_estimate")',
            ),
            "secants are not in the chain": (
                '_LOWER = ("gradient_norm_estimate", "sampled_estimate", "ascended_estimate", "secant_estimate")',
                '_LOWER = ("gradient_norm_estimate", "sampled_estimate", "ascended_estimate")',
            ),
            "the best bound alone is checked": (
                'if not name.startswith("bound") or name == "bound_fixed_head":',
                'if name != "bound":',
            ),
        },
    ),
    *planted(
        "lipschitz/estimates.py",
        ("lipschitz/test_estimates.py",),
        {
            "points of the l_2 ball are not scaled into it": (
                "offset = offset * (radius / length).reshape(",
                "offset = offset * (1 / radius / length).reshape(",
            ),
            "secants are divided by eps": (
                "slope = risen.clamp(min=0) / distance",
                "slope = risen.clamp(min=0) / ball.eps",
            ),
            "the largest gradient is that of the last points": (
                "best = torch.maximum(best, norms.amax(0))",
                "best = norms.amax(0)",
            ),
        },
    ),
)
