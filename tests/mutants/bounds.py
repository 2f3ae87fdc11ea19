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
        "bounds/hidden.py",
        ("bounds/test_single_rows.py",),
        {
            "rows start in float32 for nothing": (
                "margin = (lost + single.to(rows).abs() @",
                "margin = (0 * lost + single.to(rows).abs() @",
            ),
        },
    ),
    *planted(
        "bounds/single_rows.py",
        ("bounds/test_single_rows.py",),
        {
            "float32 rows round nothing": ("return 1.03 * count * UNIT if", "return 0.0 * count * UNIT if"),
            "float32 sums of constants round nothing": (
                "return constants.abs() * (share / (1 - 2 * share) if share < 0.25 else torch.inf)",
                "return constants.abs() * (0.0 if share < 0.25 else torch.inf)",
            ),
            "an input is read by one window": (
                "return operation.weight.shape[0] // operation.groups * operation.overlap",
                "return operation.weight.shape[0] // operation.groups",
            ),
            "what float32 rows were off ends with their layer": (
                "(operation.absolute().linear(carried[0]) if carried else 0.0)",
                "0.0",
            ),
            "small rows are not scaled": ("torch.where(largest > 0, scales, 1.0)", "torch.ones_like(scales)"),
            "float32 rows never underflow": ("_UNDERFLOW = 2.0**-100", "_UNDERFLOW = 0.0"),
            "products of bfloat16 count as float32": (
                'return all(word in ("none", "ieee", "highest") for word in told)',
                "return True",
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
        "bounds/free_pullback.py",
        _ROUNDING,
        {
            "rows of domains start without rounding": (
                "passage.margin = passage.margin + _dot(",
                "passage.margin = passage.margin + 0 * _dot(",
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
    *planted(
        "bounds/simplex.py",
        ("lipschitz/test_exact.py",),
        {
            "softmax weights take the other end of the differences": (
                "weights_lower, weights_upper = 1 / high.exp().sum(1), 1 / low.exp().sum(1)",
                "weights_lower, weights_upper = 1 / low.exp().sum(1), 1 / high.exp().sum(1)",
            ),
            "the simplex's knapsack fills small rows first": (
                "sorted_rows, order = rows.sort(dim=-1, descending=True)",
                "sorted_rows, order = rows.sort(dim=-1, descending=False)",
            ),
            "the simplex's budget is not spent": (
                "return base.squeeze(-1) + (sorted_rows * spent).sum(-1) + sorted_rows[..., 0] * remainder",
                "return base.squeeze(-1) + sorted_rows[..., 0] * remainder",
            ),
            "a difference of logits is read the wrong way round": (
                "low[:, second, first] = torch.maximum(low[:, second, first], -differences[1])",
                "low[:, second, first] = torch.maximum(low[:, second, first], -differences[0])",
            ),
        },
    ),
    *planted(
        "bounds/intervals.py",
        ("bounds/test_intervals.py",),
        {
            "an interval passes a linear layer with signs": (
                "radius = operation.absolute().linear((upper - lower).div_(2))",
                "radius = operation.linear((upper - lower).div_(2)).abs()",
            ),
            "a sum has the interval of one of its parts": (
                "return lower + inputs[1][0], upper + inputs[1][1]",
                "return lower + (inputs[1][0] + inputs[1][1]) / 2, upper + (inputs[1][0] + inputs[1][1]) / 2",
            ),
        },
    ),
    *planted(
        "bounds/backward.py",
        ("bounds/test_crown.py", "bounds/test_single_rows.py"),
        {
            "positive entries take the lower line": (
                "values = torch.addcmul(negative * row.view(slope_low), positive, row.view(slope_high))",
                "values = torch.addcmul(negative * row.view(slope_low), positive, row.view(slope_low))",
            ),
            "the constant of the upper line is lost": (
                "((positive, constant_high), (negative, constant_low))",
                "((positive * 0, constant_high), (negative, constant_low))",
            ),
            "the constant of the lower line is added for positive entries": (
                "((positive, constant_high), (negative, constant_low))",
                "((positive, constant_high), (positive, constant_low))",
            ),
            "a path of the backward pass is lost": (
                "pending[target] = pending[target].plus(batch) if target in pending else batch",
                "pending[target] = batch",
            ),
            "over a box the radius keeps its sign": (
                "sizes = rows.values.abs() if exact is rows else exact.values.abs_()",
                "sizes = rows.values if exact is rows else exact.values",
            ),
            "constants of lines in float32 are not moved": (
                "(constant_high + constants_error(constant_high, size))",
                "constant_high",
            ),
            "transposed layers take rows in float32": ("if isinstance(operation, Transposed):", "if False:"),
            "float32 rows of units meet biases in float32": (
                "current.operation.weight[units.units], exact.bias ",
                "current.operation.weight[units.units], current.operation.bias ",
            ),
            "over l_2 and l_1 balls the centre is all": (
                "return rows.dot(rows.view(ball.center)) + rows.support(ball)",
                "return rows.dot(rows.view(ball.center)) + 0 * rows.support(ball)",
            ),
        },
    ),
    *planted(
        "bounds/windows.py",
        ("bounds/test_crown.py",),
        {
            "a window forgets the padding": (
                "step * stride, before * stride + padding)",
                "step * stride, before * stride)",
            ),
            "a window forgets the dilation": (
                "((size - 1) * stride + (kernel - 1) * dilation + 1, step",
                "((size - 1) * stride + (kernel - 1) + 1, step",
            ),
            "entries outside the layer count": (
                "        if self.inside:\n            return self\n",
                "        if True or self.inside:\n            return self\n",
            ),
            "two windows are joined at the first one's start": (
                "start = window.before[axis] - self.window.before[axis]",
                "start = 0 * window.before[axis]",
            ),
        },
    ),
    *planted(
        "bounds/folding.py",
        ("bounds/test_crown.py",),
        {
            "a folded bias is not scaled": (
                "bias = _plus(_times(scale.factor, operation.bias), scale.bias)",
                "bias = _plus(operation.bias, scale.bias)",
            ),
            "a shift in front of padding is folded everywhere": (
                "convolution and not padded and channelwise(scale.bias, shape) is not None",
                "convolution and channelwise(scale.bias, shape) is not None",
            ),
        },
    ),
    *planted(
        "bounds/free_pullback.py",
        ("bounds/test_free_pullback.py", "bounds/test_domains.py"),
        {
            "multipliers may be negative": (
                "self.smallest[:, part] = open_.to(signs) * operation.slope",
                "self.smallest[:, part] = open_.to(signs) * operation.slope - (~open_).to(signs)",
            ),
            "slopes below a ReLU may exceed 1": (
                "self.largest[:, part].masked_fill_(open_, 1.0)",
                "self.largest[:, part].masked_fill_(open_, 2.0)",
            ),
            "a multiplier pushes against the sign": (
                "push = self._own(number, values) * self._signed[number]",
                "push = self._own(number, values) * -self._signed[number]",
            ),
            "signs count where the first domain has some": (
                "if bool(signs[:, part].any()):",
                "if bool(signs[:1, part].any()):",
            ),
            "what float32 rounds out of the box stays there": (
                "return torch.maximum(torch.minimum(where.to(start), largest), smallest)",
                "return where.to(start)",
            ),
            "an iterate that is NaN counts as better": (
                "better = found.detach() < best",
                "better = ~(found.detach() >= best)",
            ),
            "a slope above a neuron follows the line below": (
                "torch.lerp(below, above, row.sign().clamp_(min=0))",
                "torch.lerp(above, below, row.sign().clamp_(min=0))",
            ),
            "a multiplier's derivative forgets its sign": (
                "choice = choice + self._signed[number]",
                "choice = choice + self._signed[number].abs()",
            ),
        },
    ),
    *planted(
        "networks/transposes.py",
        ("networks/test_transposes.py",),
        {
            "matrices of weights in training are kept": (
                "if operation.weight.requires_grad:",
                "if False:",
            ),
            "windows of one layer share a matrix": (
                "key = (number, *shape, *operation.input_size, *operation.padding)",
                "key = (number, *shape)",
            ),
            "layers of one shape share a matrix": (
                "key = (number, *shape, *operation.input_size, *operation.padding)",
                "key = (*shape, *operation.input_size, *operation.padding)",
            ),
        },
    ),
    *planted(
        "bounds/domains.py",
        ("bounds/test_domains.py",),
        {
            "tightened intervals are those of the search": (
                "value = bound(pullback, rows, unit, offset, pushed, parameters, Passage())",
                (
                    "value = bound(search, rows.float(), unit.float(), offset.float(), {number: row.float() for number, "
                    "row in pushed.items()}, parameters.float(), Passage()).double()"
                ),
            ),
            "a tightened interval replaces a tighter one": (
                "upper = upper.scatter(1, index, torch.fmin(upper.gather(1, index), high))",
                "upper = upper.scatter(1, index, high)",
            ),
            "neurons that matter least are tightened": (
                "order = weight.argsort(dim=1, descending=True, stable=True)[:, :count]",
                "order = weight.argsort(dim=1, descending=not foremost, stable=True)[:, :count]",
            ),
            "the condition's constant is free of charge": (
                "extra = price * offset",
                "extra = 0 * price * offset",
            ),
            "the condition is pushed down through no constants": (
                "offset = offset + passage.margin + constant.unsqueeze(1)",
                "offset = 0 * offset + passage.margin + constant.unsqueeze(1)",
            ),
            "the condition is pushed down without what its logits may be off": (
                "offset = offset + passage.margin + constant.unsqueeze(1)",
                "offset = offset + constant.unsqueeze(1)",
            ),
            "one crossed interval does not empty a domain": (
                "empty = empty | crossed(lower, upper).flatten(1).any(1)",
                "empty = empty | crossed(lower, upper).flatten(1).all(1)",
            ),
            "every domain with a fixed neuron is empty": (
                "empty = empty | crossed(lower, upper).flatten(1).any(1)",
                "empty = empty | (lower >= upper).flatten(1).any(1) | (domains.signs != 0).any(1)",
            ),
        },
    ),
    *planted(
        "bounds/branching.py",
        ("bounds/test_branching.py",),
        {
            "time that is up drops the open leaves": (
                "return torch.maximum(worst, pool.worst(count)), used, late",
                "return torch.where(late, worst, torch.maximum(worst, pool.worst(count))), used, late",
            ),
            "a budget that is spent drops the open leaves": (
                "return torch.maximum(worst, pool.worst(count)), used, late",
                "return worst, used, late",
            ),
            "a ball that is given up counts as closed": (
                "return torch.maximum(worst, pool.worst(count)), used, late",
                "return torch.where(hopeless, worst, torch.maximum(worst, pool.worst(count))), used, late",
            ),
            "the lower half of a leaf is lost": (
                "(neuron & ~above, -1, children.upper)):",
                "(neuron & ~above, 1, children.lower)):",
            ),
            "the upper half of an output's cut is lost": (
                "((~neuron & above, children.outputs_lower), (~neuron & ~above, children.outputs_upper)):",
                "((~neuron & above, children.outputs_upper), (~neuron & ~above, children.outputs_upper)):",
            ),
            "leaves that are not decided are closed": (
                "closed = found.bound < self.goal\n",
                "closed = found.bound < self.goal + 1\n",
            ),
            "a leaf that is tightened again is lost": (
                "leaves = leaves.at(~open_).joined(found.at(~empty))",
                "leaves = leaves.at(~open_)",
            ),
            "an empty leaf stays and a full one goes": (
                "leaves = leaves.at(~open_).joined(found.at(~empty))",
                "leaves = leaves.at(~open_).joined(found.at(empty))",
            ),
        },
    ),
)
