"""Bugs of `grood_cert.networks`: activations, operations, capture, rebuilding, and ONNX."""

from __future__ import annotations

from tests.mutants.runner import planted

_LINES = "networks/test_activations.py", "bounds/test_crown.py", "bounds/test_layers.py"
_CAPTURE = "networks/test_capture.py", "networks/test_graph.py"

MUTANTS = (
    *planted(
        "networks/activations.py",
        _LINES,
        {
            "the line above a ReLU passes through 0": (
                "torch.where(unstable, torch.maximum((self.slope - high) * lower, (1 - high) * upper), 0.0)",
                "torch.zeros_like(lower)",
            ),
            "the chord of a leaky ReLU forgets the leak": (
                "chord = (upper - self.slope * lower) / (upper - lower)\n        stable",
                "chord = upper / (upper - lower)\n        stable",
            ),
            "a stable leaky ReLU is flat": (
                "torch.where(lower >= 0, torch.ones_like(lower), torch.full_like(lower, self.slope))",
                "torch.where(lower >= 0, torch.ones_like(lower), torch.zeros_like(lower))",
            ),
            "the line below a ReLU takes the chord for its slope": (
                "return torch.where(unstable, steep, stable), torch.zeros_like(lower), high, constant",
                "return torch.where(unstable, 1 + chord, stable), torch.zeros_like(lower), high, constant",
            ),
            "a ReLU at 0 has slope 1": (
                "return torch.where(lower > 0, one, self.slope * one)",
                "return torch.where(lower >= 0, one, self.slope * one)",
            ),
            "a ReLU at 0 has slope 0": (
                "torch.where(upper < 0, self.slope * one, one)\n",
                "torch.where(upper <= 0, self.slope * one, one)\n",
            ),
            "the slope of an ELU falls": (
                "_widened(self.alpha * lower.clamp(max=0).exp(), self.alpha * upper.clamp(max=0).exp())",
                "_widened(self.alpha * upper.clamp(max=0).exp(), self.alpha * lower.clamp(max=0).exp())",
            ),
            "an ELU is never steeper than 1": ("return max(1.0, self.alpha)", "return 1.0"),
            "hard swish is never steeper than 1": (
                "steepest: float = 1.5\n    lowest",
                "steepest: float = 1.0\n    lowest",
            ),
            "hard swish never falls": ("lowest_slope: float = -0.5", "lowest_slope: float = 0.0"),
            "the kinks of hard swish belong to one side": (
                "between = (lower <= 3) & (upper >= -3)",
                "between = (lower < 3) & (upper > 3)",
            ),
            "turning points inside are forgotten": ("for turn in self.turns:", "for turn in self.turns[:0]:"),
            "the slope of a sigmoid has no turn": (
                "steepest: float = 0.25\n    turns = (0.0,)",
                "steepest: float = 0.25\n    turns = ()",
            ),
            "the slope of a GELU turns once": ("turns = (-_SQRT_TWO, _SQRT_TWO)", "turns = (_SQRT_TWO,)"),
            "the slope of tanh's GELU turns at 0": (
                "turns = (-1.4185040087908284, 1.4185040087908284)",
                "turns = (0.0,)",
            ),
            "SiLU is never steeper than 1": ("steepest: float = 1.0998393202", "steepest: float = 1.0"),
            "the bottom of SiLU is at -1": ("bottom = -1.2784645427610738", "bottom = -1.0"),
            "the bottom of an activation is forgotten": (
                "return torch.where(inside, torch.minimum(low, lowest), low), torch.maximum(first, last)",
                "return low, torch.maximum(first, last)",
            ),
            "lines are checked at the ends of cells alone": (
                "top = torch.maximum(inside.amax(0), gap.amax(0))",
                "top = gap.amax(0)",
            ),
            "lines on the lower side rise by the wrong slope": (
                "if sign > 0 else (slope - self._low, self._high - slope)",
                "if sign > 0 else (self._high - slope, slope - self._low)",
            ),
            "the mean value theorem is read from the other end": (
                "plain = self(end) + sign * self.error(upper) - slope * end",
                "plain = self(end) + sign * self.error(upper) - slope * lower",
            ),
            "torch's switch of softplus costs nothing": (
                "return 2.1e-9 / self.beta * (self.beta * upper > 20).to(upper)",
                "return 0.0 * (self.beta * upper > 20).to(upper)",
            ),
            "the slope of softplus forgets beta": (
                "return torch.sigmoid(self.beta * values)",
                "return torch.sigmoid(values)",
            ),
        },
    ),
    *planted(
        "networks/operations.py",
        ("networks/test_operations.py", "bounds/test_crown.py", "bounds/test_layers.py"),
        {
            "a transposed convolution forgets the stride's remainder": (
                "functional.conv_transpose2d(\n            values, self.weight, None, self.stride, self.padding, extra,",
                "functional.conv_transpose2d(\n            values, self.weight, None, self.stride, self.padding, 0,",
            ),
            "the absolute convolution keeps its signs": (
                "return replace(self, weight=self.weight.abs(), bias=self.size, summed=None)",
                "return replace(self, weight=self.weight, bias=self.size, summed=None)",
            ),
            "the absolute dense layer keeps its signs": (
                "return Dense(self.weight.abs(), self.size)",
                "return Dense(self.weight, self.size)",
            ),
            "the absolute separable map keeps the signs of its rows": (
                "return Separable(self.rows.abs(), self.columns.abs(), _abs(self.bias))",
                "return Separable(self.rows, self.columns.abs(), _abs(self.bias))",
            ),
            "an average pool hands back sums": (
                "weight = torch.full((1, 1, *self.kernel), 1 / math.prod(self.kernel)",
                "weight = torch.full((1, 1, *self.kernel), 1.0",
            ),
            "a permutation is its own transpose": (
                "return values.permute(0, *(self.order.index(axis) + 1 for axis in range(len(self.order))))",
                "return values.permute(0, *(axis + 1 for axis in self.order))",
            ),
            "padding pads again on its way back": (
                "return functional.pad(values, [-end for pair in reversed(self.margins) for end in pair])",
                "return functional.pad(values, [end for pair in reversed(self.margins) for end in pair])",
            ),
            "entries that were taken twice come back once": (
                "return values.new_zeros(shape).index_add(self.axis + 1, self.index, values)",
                "return values.new_zeros(shape).index_copy(self.axis + 1, self.index, values)",
            ),
            "entries that tie in a maximum pool cannot win": (
                "possible = high >= low.amax(2, keepdim=True)",
                "possible = high > low.amax(2, keepdim=True)",
            ),
            "every possible winner of a maximum pool wins": (
                "alone = possible & (possible.sum(2, keepdim=True) == 1)",
                "alone = possible",
            ),
            "the leader of a window is its maximum": (
                "low.amax(2) >= high.masked_fill(best > 0, -math.inf).amax(2)",
                "low.amax(2) >= low.masked_fill(best > 0, -math.inf).amax(2)",
            ),
            "an entry belongs to one window": (
                "-(-kernel // (step // math.gcd(step, dilation)))",
                "1 + 0 * -(-kernel // (step // math.gcd(step, dilation)))",
            ),
            "padding of a maximum pool reads 0": (
                "functional.max_pool2d(self._padded(values, -math.inf)",
                "functional.max_pool2d(self._padded(values, 0.0)",
            ),
        },
    ),
    *planted(
        "networks/builder.py",
        ("networks/test_graph.py", "networks/test_capture.py", "networks/test_onnx.py"),
        {
            "a clamp forgets where it starts": (
                "self.scale(self.relu(self.scale(above, -1.0, high - low)), -1.0, high)",
                "self.scale(self.relu(self.scale(above, -1.0, high)), -1.0, high)",
            ),
            "a minimum is a maximum": (
                "return self.sum(first, self.relu(self.sum(first, second, -1.0)), -1.0)",
                "return self.sum(second, self.relu(self.sum(first, second, -1.0)))",
            ),
            "a magnitude is a ReLU": (
                "return self.sum(self.relu(value), self.relu(self.scale(value, -1.0)))",
                "return self.relu(value)",
            ),
            "a PReLU has slope 1 on both sides": (
                "return self.sum(self.scale(value, slope), self.scale(self.relu(value), 1 - slope))",
                "return self.sum(self.scale(value, slope), self.scale(self.relu(value), 1))",
            ),
            "BatchNorm divides by the variance": (
                "factor = (variance + epsilon).rsqrt()",
                "factor = 1 / (variance + epsilon)",
            ),
            "BatchNorm forgets its epsilon": ("factor = (variance + epsilon).rsqrt()", "factor = variance.rsqrt()"),
            "BatchNorm adds the mean": ("shift = -mean * factor", "shift = mean * factor"),
            "parts of a concatenation lie on one another": (
                "before[axis], after[axis] = (head.shape[axis], 0), (0, tail.shape[axis])",
                "before[axis], after[axis] = (0, head.shape[axis]), (0, tail.shape[axis])",
            ),
            "a sum is a mean": ('if how == "sum" else found', 'if how == "total" else found'),
            "uneven padding is even": (
                "if top != bottom or left != right:",
                "if top != bottom and left != right:",
            ),
            "the last window of a pool may start outside": (
                "if (count - 1) * steps[axis] >= length + before:",
                "if (count - 1) * steps[axis] >= 2 * length + before:",
            ),
        },
    ),
    *planted(
        "networks/graph.py",
        _CAPTURE,
        {
            "graph and network may differ by a thousandth": ("_AGREEMENT = 1e-9", "_AGREEMENT = 1e-3"),
            "graph and network must agree in one logit": (
                "same[finite] = close.all(1) &",
                "same[finite] = close.any(1) &",
            ),
            "numbers that are not finite are read": (
                "if not bool(torch.isfinite(value).all()):",
                "if not bool(torch.isfinite(value).any()):",
            ),
            "a graph may read nodes that come later": (
                "if any(not 0 <= i < len(nodes) for i in inputs):",
                "if any(not 0 <= i for i in inputs):",
            ),
            "a graph may hold a leak above 1": ('own.get("slope", 0) <= 1 and', 'own.get("slope", 0) <= 9 and'),
        },
    ),
    *planted(
        "networks/capture.py",
        _CAPTURE,
        {
            "the captured graph is not compared with the network": (
                "if not bool(graph.agrees(batch, expected).all()):",
                "if not bool(graph.agrees(batch, expected).any()):",
            ),
            "a network may change from call to call": (
                "atol=0.0, equal_nan=True) or before != _state(network):",
                "atol=9.0, equal_nan=True) and before != _state(network):",
            ),
            "a network may change its buffers": (
                "equal_nan=True) or before != _state(network):",
                "equal_nan=True) or before is _state(network):",
            ),
            "a network may compute something else with gradients": (
                "if not bool(graph.agrees(batches[0], _with_gradients(network, batches[0])).all()):",
                "if not bool(graph.agrees(batches[0], answers[0]).all()):",
            ),
            "logits may drown in rounding": (
                "if not ROUNDING * largest <= _DROWNED * max(size, 1.0):",
                "if ROUNDING * largest > 1e300 * max(size, 1.0):",
            ),
            "logits that are never finite are captured": (
                "if not bool(torch.isfinite(expected).all(1).any()):",
                "if not len(expected):",
            ),
            "another view of a value changed in place is read": (
                "later = any(self._place[user] > now for user in other.users)",
                "later = any(self._place[user] < 0 for user in other.users)",
            ),
            "random numbers are captured as constants": (
                "if torch.Tag.nondeterministic_seeded in node.target.tags:",
                "if torch.Tag.nondeterministic_seeded in ():",
            ),
            "further results of a layer are read": (
                "if any(_holds(value, _Unknown) for value in (*positional, *named.values())):",
                "if any(_holds(value, _Unknown) for value in ()):",
            ),
            "rounding to another type in between is overlooked": (
                "if expected.dtype != self._program.kind:",
                "if expected.dtype != expected.dtype:",
            ),
            "hooks on a normalisation are lost": (
                'return not any(hooks) and "forward" not in vars(module)',
                'return "forward" not in vars(module)',
            ),
            "a network in train mode is captured": ("        check_eval(network)\n", "        check_eval\n"),
        },
    ),
    *planted(
        "networks/rebuild.py",
        ("networks/test_graph.py", "networks/test_capture.py", "test_detector.py"),
        {
            "a rebuilt convolution forgets its groups and holes": (
                "options = layer.stride, layer.padding, layer.dilation, layer.groups",
                "options = layer.stride, layer.padding, (1, 1), layer.groups",
            ),
            "a rebuilt leaky ReLU is a ReLU": (
                "return nn.LeakyReLU(operation.slope) if operation.slope else nn.ReLU()",
                "return nn.ReLU()",
            ),
            "a rebuilt scale forgets its bias": (
                "return _pointwise(torch.diag(factor), bias, shape)",
                "return _pointwise(torch.diag(factor), None, shape)",
            ),
        },
    ),
    *planted(
        "networks/onnx.py",
        ("networks/test_onnx.py",),
        {
            "the graph is not compared with the file": (
                "if not float((expected - got).abs().max()) <= agreement * scale:",
                "if not float((expected - got).abs().min()) <= agreement * scale:",
            ),
            "weights may lie outside the file's folder": (
                "if not location or not place.is_relative_to(folder) or place == folder:",
                "if not location or place == folder:",
            ),
            "weights that are not finite are read": (
                "if not np.isfinite(values).all():",
                "if not np.isfinite(values).any():",
            ),
        },
    ),
    *planted(
        "networks/onnx_operators.py",
        ("networks/test_onnx.py",),
        {
            "Gemm forgets alpha": (
                'weight = call.weight(1) * float(call.get("alpha", 1.0))',
                "weight = call.weight(1)",
            ),
            "Gemm forgets beta": (
                'bias = (shift * float(call.get("beta", 1.0)))',
                "bias = shift",
            ),
            "SAME_UPPER pads like SAME_LOWER": (
                'return [*small, *large] if mode == "SAME_UPPER" else [*large, *small]',
                "return [*large, *small]",
            ),
            "padding of an average pool counts": (
                'bool(call.get("count_include_pad", 0))',
                'bool(call.get("count_include_pad", 1))',
            ),
            "nearest neighbours are rounded down": (
                '"round_prefer_floor": (places - 0.5).ceil(),',
                '"round_prefer_floor": places.floor(),',
            ),
            "depth to space is always by columns": (
                'if call.get("mode", "DCR") == "DCR":',
                'if call.get("mode", "DCR") in ("DCR", "CRD"):',
            ),
        },
    ),
    *planted(
        "networks/aten.py",
        ("networks/test_capture.py",),
        {
            "channels are shuffled the other way": (
                "parts = build.reshape(call.value, (groups, channels // groups, *rest))",
                "parts = build.reshape(call.value, (channels // groups, groups, *rest))",
            ),
            "rsub subtracts the other way": (
                '"rsub": lambda call: _sum(call, -1.0, swapped=True)',
                '"rsub": lambda call: _sum(call, -1.0)',
            ),
            "the scale of a SELU is that of an ELU": (
                "return call.builder.scale(value, 1.0507009873554804934193349852946)",
                "return value",
            ),
        },
    ),
)
