r"""The adapter of auto_LiRPA: sound bounds of linear functions c . f(x') of the logits over a ball.

Trust, but verify: a self-test once per process compares the engine with numbers worked out by hand, and every build
compares the converted network with the model, forwards and, on a ball of radius 0, through each bound.
`auto_lirpa_repair` says what has to be changed in the library first.

References:
    Xu et al., "Automatic Perturbation Analysis for Scalable Certified Robustness and Beyond", NeurIPS 2020;
    Zhang et al., "Efficient Neural Network Robustness Certification with General Activation Functions" (CROWN),
    NeurIPS 2018; Zhang et al., "Towards Stable and Efficient Training of Verifiably Robust Neural Networks"
    (CROWN-IBP), ICLR 2020.
"""

from __future__ import annotations

import copy
import functools
import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from grood_cert.ball import Ball, support
from grood_cert.bounds.auto_lirpa_repair import is_old, library, running, version
from grood_cert.bounds.engine import Method, Source, way_of
from grood_cert.bounds.folding import folded
from grood_cert.bounds.rounding import Rounding
from grood_cert.errors import InputError, RunError
from grood_cert.interval import Interval, intersect, ordered
from grood_cert.networks.capture import capture
from grood_cert.networks.graph import Graph
from grood_cert.networks.rebuild import Rebuilt

_TOLERANCE = 1e-8  # of the spread of values over images
_RELATIVE_ERROR = 1e-11  # of the values
_LAYERS = {
    *("BoundLinear", "BoundConv", "BoundBatchNormalization", "BoundAdd", "BoundFlatten", "BoundReshape"),
    *("BoundAveragePool", "BoundGlobalAveragePool", "BoundMaxPool"),
    *("BoundRelu", "BoundLeakyRelu", "BoundSigmoid", "BoundTanh"),
}
_TANGENTS = {"BoundSigmoid", "BoundTanh"}  # 0.7.1 searches their tangents to 1e-9 only, on the wrong side
_WAY_OUT = "; the native engine bounds it: --engine native"
_LEAVES = {"BoundInput", "BoundParams", "BoundBuffers", "BoundConstant", "BoundPrimConstant", "BoundIdentity"}

Intervals = Mapping[str, Interval]


@functools.cache
def _perturbation_class() -> type:
    """auto_LiRPA's perturbation, with our `Ball` as its set.

    Interval propagation inside the library reads the norm and the box: it is told the l_inf box around the ball,
    which contains it. Linear bounds are made concrete by `ball.support`, which knows the ball and the box.
    """
    unfold = importlib.import_module("auto_LiRPA.patches").inplace_unfold
    identity_type = importlib.import_module("auto_LiRPA.utils").eyeC

    class BallPerturbation(library().PerturbationLpNorm):  # type: ignore[misc]
        def __init__(self, ball: Ball) -> None:
            super().__init__(norm=np.inf, x_L=ball.lower, x_U=ball.upper)
            self.ball = ball

        def concretize(self, x: Tensor, A: Any, sign: int = -1, *args: Any, **kwargs: Any) -> Any:  # noqa: N803
            ball = self.ball
            if A is None or ball.norm == "linf" or isinstance(A, identity_type) or getattr(A, "identity", 0) == 1:
                return super().concretize(x, A, sign, *args, **kwargs)
            images = x, ball.lower - x, ball.upper - x
            if isinstance(A, Tensor):
                rows = A.reshape(A.shape[0], A.shape[1], -1)
                center, low, high = (image.flatten(1).unsqueeze(1) for image in images)
                return self._bound(rows, center, low, high, ball.eps, sign)
            # Patches: at each of H x W places, S rows over a window of the image, (S, B, H, W, window).
            if A.unstable_idx is not None:
                raise NotImplementedError("a selection of patches")
            patches = A.patches.expand(-1, len(x), -1, -1, -1, -1, -1).flatten(4)
            number, batch, height, width, size = patches.shape
            places = batch * height * width
            windows = A.patches.shape[-2:], A.stride, A.padding, A.inserted_zeros, A.output_padding
            center, low, high = (unfold(image, *windows).reshape(places, 1, size) for image in images)
            rows = patches.permute(1, 2, 3, 0, 4).reshape(places, number, size)
            eps = ball.eps.repeat_interleave(height * width)
            bound = self._bound(rows, center, low, high, eps, sign)
            bound = bound.reshape(batch, height, width, number).permute(0, 3, 1, 2)
            return bound if is_old() else bound.flatten(1)

        def _bound(self, rows: Tensor, center: Tensor, low: Tensor, high: Tensor, eps: Tensor, sign: int) -> Tensor:
            return (rows @ center.mT).squeeze(-1) + sign * support(sign * rows, low, high, eps, self.ball.norm)

    return BallPerturbation


class _Engine:
    """auto_LiRPA's bounded module of one network, rebuilt after any exception.

    Every call hands over the ball and all intermediate bounds it is to use: nothing is taken from an earlier call.
    """

    def __init__(self, network: nn.Module, shape: tuple[int, ...], convolutions: str = "patches") -> None:
        self.network = network
        self.shape = shape
        self.convolutions = convolutions
        self.device = next(iter(network.parameters())).device
        self._module = self._build()

    def images(self, number: int, seed: int) -> Tensor:
        """Random images."""
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(number, *self.shape, dtype=torch.float64, generator=generator).to(self.device)

    def _build(self) -> Any:
        options = {
            "verbosity": 0,
            "conv_mode": self.convolutions,
            # Bounds of a sample must not depend on its batch, so no selection of neurons by the batch's union.
            "sparse_intermediate_bounds": False,
        }
        with running() as messages:
            try:
                module = library().BoundedModule(
                    self.network, self.images(2, 0), bound_opts=options, device=self.device
                )
            except Exception as error:
                names = [text.split(",")[0][6:] for text in messages.texts if text.startswith("Name: ")]
                detail = f"it has the operation {', '.join(dict.fromkeys(names))}" if names else _first_line(error)
                raise RunError(f"auto_LiRPA {version()} cannot convert this network: {detail}{_WAY_OUT}") from error
            module.eval()
        kinds = {type(node).__name__ for node in module._modules.values()}
        layers = _LAYERS if is_old() else _LAYERS - _TANGENTS
        unknown = kinds - layers - _LEAVES
        if unknown:
            names = [", ".join(sorted(kind.removeprefix("Bound") for kind in group)) for group in (unknown, layers)]
            raise RunError(f"auto_LiRPA has no bounds for the operation {names[0]}, but for {names[1]}{_WAY_OUT}")
        # For an l_2 ball the interval of the first layer is looser than its linear bound.
        module.check_IBP_first_linear = lambda _: False
        return module

    def forward(self, images: Tensor) -> Tensor:
        """The logits."""
        with torch.no_grad(), running():
            logits: Tensor = self._module(images)
        return logits

    def nonlinear(self) -> list[tuple[str, str]]:
        """(name, name of its input) of every node that needs bounds of its input, in the order of execution."""
        nodes = [node for node in self._module._modules.values() if getattr(node, "requires_input_bounds", None)]
        return [(node.name, node.inputs[0].name) for node in nodes]

    def bounds(
        self, ball: Ball, source: Source, known: Intervals, rows: Tensor | None = None, node: str | None = None
    ) -> Interval:
        """Bounds of rows of a node's output (the logits by default), or of the output itself.

        Args:
            ball: The ball.
            source: How to get from the known bounds to these.
            known: Bounds of the inputs of nonlinear nodes.
            rows: Rows, shape (B, S, *output shape).
            node: Name of the node.
        """
        interval_argument = "intermediate_layer_bounds" if is_old() else "interm_bounds"
        try:
            with running(), torch.no_grad():
                inputs = library().BoundedTensor(ball.center, _perturbation_class()(ball))
                lower, upper = self._module.compute_bounds(
                    x=(inputs,), C=rows, method=source.upper(), final_node_name=node, **{interval_argument: dict(known)}
                )
                return lower.detach(), upper.detach()
        except BaseException:
            self._module = self._build()
            raise

    def input_bounds(self, ball: Ball, node: str, known: Intervals) -> Interval:
        """CROWN bounds of the input of a node.

        They are what auto_LiRPA needs first to bound the node's output; the row asked for is 0.
        """
        shape = self._module[node].output_shape[1:]
        self.bounds(ball, "crown", known, torch.zeros(len(ball.center), 1, *shape).to(ball.center), node)
        found = self._module[node].inputs[0]
        return found.lower.detach(), found.upper.detach()


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0] or type(error).__name__


class LirpaNetwork:
    r"""A `BoundedNetwork` of auto_LiRPA.

    * "ibp": interval bound propagation.
    * "crown-ibp": linear bounds of the rows asked for, over intervals of the hidden layers.
    * "crown": linear bounds of the rows and of every hidden layer, hidden ones intersected with their intervals.

    For l_2 and l_1 balls the first layer is bounded over the ball itself, not over its box, by every method.

    Args:
        network: The model f: (B, C, H, W) -> (B, K) in eval mode, normalisation included. Copied, in float64.
        shape: Shape (C, H, W) of one image.
        method: "ibp", "crown-ibp" or "crown".
        graph: The network as a graph, if it has been captured already. The library sees a plain module made of it,
            never the network itself.

    Attributes:
        method: As given.
        network: The copy.
        graph: The network as a graph.

    Raises:
        InputError: If the method is unknown, a module is in train mode, or the network cannot be captured.
        RunError: If auto_LiRPA is missing or fails its self-test on this torch, cannot convert the network, or the
            converted network does not reproduce the model, forwards or through the bounds of a ball of radius 0.
    """

    def __init__(self, network: nn.Module, shape: tuple[int, ...], method: Method, graph: Graph | None = None) -> None:
        way_of(method)
        _self_test()
        self.method: Method = method
        self.shape = tuple(shape)
        self.network = copy.deepcopy(network).double().requires_grad_(False)
        self.graph = graph or capture(network, self.shape)
        self.device = self.graph.device
        plain = Rebuilt(folded(self.graph, borders=False))
        for convolutions in ("patches", "matrix"):  # patches are fast; matrices know dilation, groups, LeakyReLU
            self._engine = _Engine(plain, self.shape, convolutions)
            reason = self._disagreement()
            if not reason:
                break
        else:
            raise RunError(f"auto_LiRPA {version()} does not reproduce this network ({reason}){_WAY_OUT}")

    def _disagreement(self) -> str:
        """Compare with the model: the forward pass, and bounds of all neurons and logits on balls of radius 0."""
        images = self._engine.images(16, 1)
        try:
            with torch.no_grad():
                logits = self.network(images)
            if not _close(logits, self._engine.forward(images)):
                return "other logits"
            images, logits = images[:2], logits[:2]
            values, numbers = self.graph.values(images), self.graph.nonlinear
            names = [name for _, name in self._engine.nonlinear()]
            read = {name: values[self.graph.nodes[i].inputs[0]] for name, i in zip(names, numbers, strict=True)}
            identity = torch.eye(logits.shape[1]).to(images).expand(len(images), -1, -1)
            eps = torch.zeros(len(images)).to(images)
            self.relax(Ball(images, eps, "l2")).rows(identity)  # another way through 0.3
            relaxation = self.relax(Ball(images, eps, "linf"))
            hidden = relaxation.intermediate(way_of(self.method).hidden)
            bounds = [(name, read[name], pair, hidden.errors[name]) for name, pair in hidden.bounds.items()]
            bounds.append(("the logits", logits, relaxation.rows(identity), hidden.of_logits))
        except Exception as error:  # noqa: BLE001 (whatever it is, the network is refused)
            return _first_line(error)
        depth = len(bounds)  # intervals are moved at each layer, by no more than at the last
        wrong = [name for name, value, pair, moved in bounds if not _encloses(*pair, value, depth * moved)]
        return f"bounds of {wrong[0]} on a ball of radius 0" if wrong else ""

    def relax(self, ball: Ball) -> LirpaRelaxation:
        """Prepare the bounds over a ball; intermediate bounds are computed once, at the first rows asked for.

        Raises:
            InputError: If the images have another shape.
        """
        return LirpaRelaxation(self, ball)


def _rounding(values: Tensor) -> Tensor:
    """What rounding may change, measured by how far values spread over the images: small networks are judged as well."""
    return _TOLERANCE * (values - values.mean(0)).abs().max() + _RELATIVE_ERROR * values.abs().max()


def _close(expected: Tensor, got: Tensor) -> bool:
    return expected.shape == got.shape and bool(((expected - got).abs() <= _rounding(expected)).all())


def _encloses(lower: Tensor, upper: Tensor, value: Tensor, moved: Tensor) -> bool:
    """Bounds on a ball of radius 0 hold, and are as close as rounding and the library's own clamps of 1e-8 let them be."""
    if not lower.shape == upper.shape == value.shape:
        return False
    sound = (lower <= value + _rounding(value)) & (value - _rounding(value) <= upper)
    return bool((sound & (upper - lower <= _TOLERANCE * (1 + value.abs().max()) + 2 * moved)).all())


@dataclass(frozen=True)
class _Intermediate:
    """Bounds of the inputs of the nonlinear nodes over a batch of balls, moved outward for rounding.

    Attributes:
        bounds: By name of the input, in the order of execution.
        errors: By how much they were moved.
        of_logits: By how much bounds of the logits have to be moved, shape (B, K).
    """

    bounds: Intervals
    errors: Mapping[str, Tensor]
    of_logits: Tensor


class LirpaRelaxation:
    """A `Relaxation` of auto_LiRPA: bounds over one batch of balls, independent of every other one of the network.

    Attributes:
        ball: The balls.
    """

    def __init__(self, bounded: LirpaNetwork, ball: Ball) -> None:
        if tuple(ball.center.shape[1:]) != bounded.shape:
            raise InputError(f"expected images of shape {bounded.shape}, got {tuple(ball.center.shape[1:])}")
        self.ball = ball
        self._bounded = bounded
        center, eps = (value.detach().to(bounded.device, torch.float64) for value in (ball.center, ball.eps))
        self._ball = Ball(center, eps, ball.norm)
        self._intermediate: dict[Source, _Intermediate] = {}

    def intermediate(self, source: Source) -> _Intermediate:
        """Bounds of the inputs of the nonlinear nodes."""
        engine, graph = self._bounded._engine, self._bounded.graph
        if source not in self._intermediate:
            known: dict[str, Interval] = {}
            errors: dict[str, Tensor] = {}
            values: dict[int, Interval] = {}  # of nonlinear nodes; what is 0 at least is so however it is rounded
            rounding = Rounding(graph, self._ball, forwards=True)
            for node, name in engine.nonlinear():
                number = rounding.advance()
                if name not in known:
                    lower, upper = engine.bounds(self._ball, "ibp", known, node=name)
                    if source == "crown" or (self._ball.norm != "linf" and not known):
                        linear_lower, linear_upper = engine.input_bounds(self._ball, node, known)
                        lower, upper = torch.maximum(lower, linear_lower), torch.minimum(upper, linear_upper)
                    origin = graph.nodes[number].inputs[0]
                    errors[name] = rounding.error(origin)
                    moved = lower.detach() - errors[name], upper.detach() + errors[name]
                    known[name] = intersect(moved, values[origin]) if origin in values else moved
                values[number] = rounding.nonlinear(*known[name])
            last = rounding.advance() - 1
            self._intermediate[source] = _Intermediate(known, errors, rounding.error(last))
        return self._intermediate[source]

    def rows(self, coefficients: Tensor, method: Method | None = None) -> Interval:
        r"""Bounds of c . f(x') over the ball, for every row c.

        Args:
            coefficients: Rows c, shape (B, S, K).
            method: Method for these rows if it differs from the network's own.

        Returns:
            lower, upper: Shape (B, S) each, float64, `lower <= c . f(x') <= upper` for all x' in the ball. NaN where the
            engine could not give a bound, or this or a hidden bound is not finite or crosses its partner.
        """
        way = way_of(method or self._bounded.method)
        hidden = self.intermediate(way.hidden)
        coefficients = coefficients.detach().to(self._ball.center)
        lower, upper = self._bounded._engine.bounds(self._ball, way.rows, hidden.bounds, coefficients)
        margin = (coefficients.abs() @ hidden.of_logits.unsqueeze(-1)).squeeze(-1)
        lower, upper = lower - margin, upper + margin
        proved = torch.isfinite(lower) & torch.isfinite(upper) & (lower <= upper)
        for pair in hidden.bounds.values():
            proved &= ordered(*pair).unsqueeze(1)
        return torch.where(proved, lower, torch.nan), torch.where(proved, upper, torch.nan)

    def preactivations(self) -> list[Interval]:
        """Bounds of the input of every nonlinear layer (ReLU, LeakyReLU, Sigmoid, Tanh, MaxPool).

        Returns:
            One pair (lower, upper) a nonlinear layer, in the order of execution, each with the shape (B, ...) of that
            layer's input. NaN stays NaN.
        """
        known = self.intermediate(way_of(self._bounded.method).hidden).bounds
        return [known[name] for _, name in self._bounded._engine.nonlinear()]


def _test_network() -> nn.Module:
    """r_i = relu of d + 1/4, d - 1/4, s, -s with d = x1 - x2, s = x1 + x2; f = (r1 + r2 - r3 + r4, -r1 - r2 + 2 r3, r1)."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        first, second = nn.Linear(2, 4, dtype=torch.float64), nn.Linear(4, 3, dtype=torch.float64)
        first.weight.copy_(torch.tensor([[1, -1], [1, -1], [1, 1], [-1, -1]]))
        first.bias.copy_(torch.tensor([0.25, -0.25, 0, 0]))
        second.weight.copy_(torch.tensor([[1, 1, -1, 1], [-1, -1, 2, 0], [1, 0, 0, 0]]))
        second.bias.zero_()
    return nn.Sequential(nn.Flatten(), first, nn.ReLU(), second)


def _test_bounds(source: Source) -> tuple[Tensor, Tensor, Tensor]:
    """Bounds of the logits of `_test_network` for |x - (1/2, 1/2)|_inf <= 1/4; sampled logits, corners included."""
    engine = _Engine(_test_network(), (1, 1, 2))
    ball = Ball(torch.full((1, 1, 1, 2), 0.5, dtype=torch.float64), torch.tensor([0.25], dtype=torch.float64), "linf")
    ((node, name),) = engine.nonlinear()
    known = {name: engine.bounds(ball, "ibp", {}, node=name)}
    identity = torch.eye(3, dtype=torch.float64).expand(1, -1, -1)
    side = torch.linspace(0.25, 0.75, 5, dtype=torch.float64)
    with torch.no_grad():
        samples = engine.network(torch.cartesian_prod(side, side).reshape(-1, 1, 1, 2))
    if source == "crown":
        linear = engine.input_bounds(ball, node, {})
        if not all(_close(one, other) for one, other in zip(linear, known[name], strict=True)):
            return torch.full((2, 3), torch.nan), torch.full((2, 3), torch.nan), samples
    lower, upper = engine.bounds(ball, source, known, identity)
    return lower[0], upper[0], samples


# By hand. Intervals: r in [0, 3/4] x [0, 1/4] x [1/2, 3/2] x {0}. CROWN: r1 <= 3/4 (d + 1/4) + 3/16, r1 >= d + 1/4;
# r2 <= 1/4 (d - 1/4) + 3/16, r2 >= 0; r3 = s; r4 = 0. So -2 x2 + 1/4 <= f1 <= -2 x2 + 1/2,
# x1 + 3 x2 - 1/2 <= f2 <= x1 + 3 x2 - 1/4, and d + 1/4 <= f3 <= 3/4 d + 3/8. With slope 0 instead of 1: f3 >= 0.
_BY_HAND: dict[Source, tuple[list[float], list[float]]] = {
    "ibp": ([-1.5, 0.0, 0.0], [0.5, 3.0, 0.75]),
    "crown": ([-1.25, 0.5, -0.25], [0.0, 2.75, 0.75]),
}


@functools.cache
def _self_test() -> None:
    """Interval and CROWN bounds must be those worked out by hand, and hold for samples.

    Raises:
        RunError: If they are not: this auto_LiRPA does not work on this torch.
    """
    for source, bounds in _BY_HAND.items():
        try:
            lower, upper, samples = _test_bounds(source)
        except RunError:
            raise
        except Exception as error:
            raise RunError(
                f"auto_LiRPA {version()} fails on torch {torch.__version__}: {_first_line(error)}"
            ) from error
        right = all(
            _close(torch.tensor(want, dtype=torch.float64), got)
            for want, got in zip(bounds, (lower, upper), strict=True)
        )
        sound = bool(((lower - 1e-9 <= samples) & (samples <= upper + 1e-9)).all())
        if not (right and sound):
            raise RunError(
                f"auto_LiRPA {version()} gives wrong {source} bounds on torch {torch.__version__}; use another"
            )
