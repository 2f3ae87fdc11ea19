r"""Norms of the score's gradient that parameters can be trained on: which network they belong to, and how they are made.

*Which network.* The slope is that of one sample, ||grad S(x_i)||, so samples must not reach each other. BatchNorm in train
mode keeps the statistics of the loss's own forward pass: the samples in question take a second pass, in which these are constants
of the images. They depend on the parameters, and the parameters' gradient knows it. (With running statistics in their
place, a shift or scale of what such a layer reads would change the slope and not the loss, and the penalty drives the
two networks apart. The same goes for terms over balls.) Without BatchNorm in train mode there is but one function, and the loss's own pass is used where it
can be and is the cheaper one.

*How.* With v held constant, g / ||g||_2 for the Euclidean norm of g and sign g for ||g||_1, the derivative of the norm is
that of the slope in this direction,

    d ||g|| / d theta = v . (d g / d theta) = d / d theta [d S(x + h v) / d h at h = 0].

* "exact" differentiates ||g|| twice. For a share m of the samples, and one forward pass F, a step of 3 F becomes
  6 F on the loss's own pass, or 3 F + 6 m F on a pass of their own.
* "fast" takes v from an ordinary gradient and differentiates [S(x + h v) - S(x)] / h: first-order passes alone, so it
  works where the network is compiled or runs in bfloat16. 4 F + 3 m F, or 3 F + 7 m F. The pass at x + h v keeps the
  ReLU signs of the pass at x (and the winners of maximum pools): where they changed, the derivative would jump by an
  amount of order 1 / h, and the ReLUs of a network are many. What is left is an error of order h from the
  curvature of logsumexp and of smooth activations. The value is the norm itself.

References:
    Sharifi et al., "Gradient-Regularized Out-of-Distribution Detection", ECCV 2024 (arXiv 2404.12368);
    Finlay & Oberman, "Scaleable input gradient regularization for adversarial robustness", 2019 (finite differences).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from grood_cert.ball import DUAL_ORDER
from grood_cert.errors import InputError
from grood_cert.networks.architectures import Normalize
from grood_cert.scores import energy

PenaltyMethod = Literal["exact", "fast"]
_BATCH_NORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_BREAK_EVEN = {"exact": 1 / 2, "fast": 1 / 4}  # share of the samples from which on the loss's own pass is cheaper
_TF32 = "tf32"
_DIFFERENCE = {torch.float64: 1e-6, torch.float32: 1e-2, _TF32: 0.1, torch.float16: 0.1, torch.bfloat16: 0.3}


def _per_channel(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (like.dim() - 2))


class _BatchNorm(torch.autograd.Function):
    """Train-mode BatchNorm with mean and 1 / std as further outputs."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        weight, bias, running_mean, running_var, momentum, eps = arguments
        result = torch.native_batch_norm(values, weight, bias, running_mean, running_var, True, momentum, eps)
        ctx.save_for_backward(values, weight, *result[1:])
        ctx.set_materialize_grads(False)
        ctx.eps = eps
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_mean: Tensor | None, grad_inverse: Tensor | None) -> Any:
        values, weight, mean, inverse = ctx.saved_tensors
        grad_values, grad_weight, grad_bias = torch.zeros_like(values), None, None
        if grad is not None:
            wanted = [True, weight is not None, weight is not None]
            grad_values, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
                grad, values, weight, None, None, mean, inverse, True, ctx.eps, wanted
            )
        share = values.shape[1] / values.numel()
        if grad_mean is not None:
            grad_values = grad_values + _per_channel(grad_mean * share, values)
        if grad_inverse is not None:
            factor = _per_channel(-grad_inverse * inverse.pow(3) * share, values)
            grad_values = torch.addcmul(grad_values, values - _per_channel(mean, values), factor)
        return grad_values, grad_weight, grad_bias, *[None] * 4


class _Statistics(NamedTuple):
    """What a layer in train mode normalised by, and the buffers that it moved."""

    mean: Tensor
    inverse: Tensor
    eps: float
    running_mean: Tensor | None
    running_var: Tensor | None


class BatchStatistics(TorchFunctionMode):
    """BatchNorm in train mode, with statistics that can be used again.

    The first pass under the mode is the ordinary one. A pass inside `again` uses its statistics on other images.
    """

    def __init__(self) -> None:
        super().__init__()
        self._found: list[_Statistics | None] = []
        self._pending: list[_Statistics | None] | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Take over functional.batch_norm, leave everything else."""
        del types
        return (self._batch_norm if func is functional.batch_norm else func)(*args, **(kwargs or {}))

    def _batch_norm(
        self,
        values: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        kept: _Statistics | None = None
        if self._pending is not None:
            kept = self._pending.pop(0)
        elif training:
            result: Tensor
            result, *statistics = _BatchNorm.apply(  # type: ignore[no-untyped-call]
                values, weight, bias, running_mean, running_var, momentum, eps
            )
            self._found.append(_Statistics(statistics[0], statistics[1], eps, running_mean, running_var))
            return result
        else:
            self._found.append(None)
        if kept is None:  # a layer that its owner keeps in eval mode
            return functional.batch_norm(values, running_mean, running_var, weight, bias, False, momentum, eps)
        mean, factor = kept.mean, kept.inverse if weight is None else weight * kept.inverse
        shift = -mean * factor if bias is None else bias - mean * factor
        zero, one = torch.zeros_like(mean), torch.ones_like(mean)
        return torch.batch_norm(values, factor, shift, zero, one, False, 0.0, 0.0, False)

    def buffers(self, network: nn.Module) -> dict[str, Tensor]:
        """The statistics of the first pass, by the names of the running ones in whose place they may stand.

        Raises:
            InputError: If a layer was used twice: it has one place for the statistics of both.
        """
        found: dict[str, Tensor] = {}
        for kept in filter(None, self._found):
            variance = (kept.inverse.pow(-2) - kept.eps).clamp(min=0)
            values = ((kept.running_mean, kept.mean), (kept.running_var, variance))
            names = {name: value for running, value in values for name in _names(network, running)}
            if names.keys() & found.keys():
                layer = next(iter(names)).rpartition(".")[0]
                raise InputError(
                    f"terms over balls need every BatchNorm layer to be used once a pass, and {layer} is used twice; freeze "
                    "the statistics (optimizer.batch_norm_momentum = 0)"
                )
            found |= names
        return found

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """One forward pass with the statistics of the first, the layers in eval mode."""
        self._pending = list(self._found)
        try:
            with self:
                yield
        finally:
            self._pending = None


class LinearPiece(TorchFunctionMode):
    """On which side of its kink every ReLU is, and which entry wins every maximum: found in one pass, kept in the next.

    A piecewise linear network continues in the second pass as the linear function that it is around the first images.
    """

    def __init__(self) -> None:
        super().__init__()
        self._found: list[Tensor] = []
        self._pending: list[Tensor] | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Take over the functions with kinks, leave everything else."""
        del types
        kwargs = kwargs or {}
        if func in (functional.relu, torch.relu, Tensor.relu):
            return self._rectified(func, 0.0, args, kwargs)
        if func is functional.leaky_relu:
            slope = args[1] if len(args) > 1 else kwargs.get("negative_slope", 0.01)
            return self._rectified(func, slope, args, kwargs)
        if func is functional.max_pool2d:
            return self._pooled(*args, **kwargs)
        return func(*args, **kwargs)

    def _rectified(self, func: Any, slope: float, args: Any, kwargs: Any) -> Tensor:
        if self._pending is None:
            result: Tensor = func(*args, **kwargs)
            self._found.append(result.detach())
            return result
        factor = torch.where(self._pending.pop(0) > 0, 1.0, slope).to(args[0])
        return factor * args[0]  # type: ignore[no-any-return]

    def _pooled(self, values: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self._pending is None:
            kwargs.pop("return_indices", None)
            result, winners = functional.max_pool2d_with_indices(values, *args, **kwargs)
            self._found.append(winners)
        else:
            winners = self._pending.pop(0)
            result = values.flatten(2).gather(2, winners.flatten(2)).reshape(winners.shape)
        return result

    @contextlib.contextmanager
    def find(self) -> Iterator[None]:
        """One forward pass that finds the choices."""
        self._found.clear()
        with self:
            yield

    @contextlib.contextmanager
    def keep(self, rows: Tensor) -> Iterator[None]:
        """One forward pass with the choices found for these samples of the batch."""
        self._pending = [choice[rows] for choice in self._found]
        try:
            with self:
                yield
        finally:
            self._pending = None


def _names(network: nn.Module, buffer: Tensor | None) -> list[str]:
    """What a network calls one of its buffers."""
    return [name for name, other in network.named_buffers(remove_duplicate=False) if other is buffer]


def batch_statistics(network: nn.Module) -> BatchStatistics | None:
    """Something to keep the statistics of a pass in, if any layer normalises by them."""
    coupled = any(isinstance(layer, _BATCH_NORM) and layer.training for layer in network.modules())
    return BatchStatistics() if coupled else None


@contextlib.contextmanager
def running_statistics(network: nn.Module) -> Iterator[None]:
    """BatchNorm layers in eval mode while the block runs; those that were in train mode return to it."""
    layers = [layer for layer in network.modules() if isinstance(layer, _BATCH_NORM) and layer.training]
    for layer in layers:
        layer.eval()
    try:
        yield
    finally:
        for layer in layers:
            layer.train()


def scores(logits: Tensor) -> Tensor:
    """S, in float32 at least, whatever type a network under autocast answers in."""
    return energy(logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits)


def pixels_per_unit(network: nn.Module) -> Tensor:
    """Length of a normalised unit in pixel units: the std of each channel, shape (C, 1, 1).

    A gradient per pixel times this is a gradient with respect to the normalised tensor.

    Raises:
        InputError: If the network does not have exactly one `Normalize` layer.
    """
    layers = [layer for layer in network.modules() if isinstance(layer, Normalize)]
    if len(layers) != 1:
        raise InputError(
            f'coordinates = "normalised" needs a network with one Normalize layer, this one has {len(layers)}; '
            'use "pixels"'
        )
    return layers[0].std


def score_difference(images: Tensor) -> float:
    """By how much S should change under "fast": enough for the network's arithmetic, little for its curvature.

    Under autocast that is its type's; else that of the images, or TF32 where a GPU may use it for them.
    """
    kind = images.device.type
    if torch.is_autocast_enabled(kind):
        return _DIFFERENCE[torch.get_autocast_dtype(kind)]
    if kind == "cuda" and images.dtype == torch.float32:
        rounded = torch.backends.cudnn.allow_tf32 or torch.get_float32_matmul_precision() != "highest"
        return _DIFFERENCE[_TF32 if rounded else torch.float32]
    return _DIFFERENCE[images.dtype]


class SampleWise:
    r"""The network as a function of single samples, set up around the loss's own forward pass.

    Args:
        network: f in train mode.
        images: The loss's batch, shape (N, C, H, W).
        method: "exact" or "fast".
        scale: Factor on each channel of a gradient, broadcast against (C, H, W), for other units than pixels.
        part: Largest share of the batch whose norms will be asked for.

    Attributes:
        logits: Those of the loss's own forward pass, shape (N, K); running statistics move as usual.
        score: S from them, shape (N,).
        statistics: What BatchNorm in train mode normalised by in it; None without any.

    Example:
        >>> network = nn.Sequential(nn.Flatten(), nn.Linear(2, 1))  # S = -f, so the norm is that of the weight
        >>> function = SampleWise(network, torch.rand(3, 1, 1, 2), "exact")
        >>> torch.allclose(function.norms(torch.tensor([0, 2])), network[1].weight.norm().expand(2))
        True
    """

    def __init__(
        self,
        network: nn.Module,
        images: Tensor,
        method: PenaltyMethod,
        scale: Tensor | None = None,
        part: float = 1.0,
    ) -> None:
        self._network, self._method, self._scale = network, method, scale
        self.statistics = batch_statistics(network)
        self._piece = LinearPiece() if method == "fast" else None
        self._shareable = self.statistics is None and part >= _BREAK_EVEN[method]
        self._images = images.detach().requires_grad_(self._shareable)
        with self.statistics or nullcontext():
            self.logits = self._first_pass(self._images) if self._shareable else network(self._images)
        self.score = scores(self.logits)

    def _first_pass(self, images: Tensor) -> Tensor:
        """The pass whose gradients norms are made of; it finds the kinks."""
        with self._piece.find() if self._piece else nullcontext():
            logits: Tensor = self._network(images)
        return logits

    @contextlib.contextmanager
    def _apart(self) -> Iterator[None]:
        """A pass with statistics that do not depend on its images, and that moves none."""
        with running_statistics(self._network), self.statistics.again() if self.statistics else nullcontext():
            yield

    def _gradient(self, used: Tensor, share: bool) -> tuple[Tensor, Tensor]:
        """S and grad S of the samples used."""
        if share:
            images, score = self._images, self.score
        else:
            images = self._images.detach()[used].requires_grad_(True)
            with self._apart():
                score = scores(self._first_pass(images))
        total = score[used].sum() if share else score.sum()
        (gradient,) = torch.autograd.grad(total, images, create_graph=self._method == "exact", retain_graph=True)
        return (score[used], gradient[used]) if share else (score, gradient)

    def norms(self, used: Tensor, norm: Literal["l2", "linf"] = "l2") -> Tensor:
        r"""The dual norm of grad S at some samples of the loss's batch; formulas and costs above.

        Args:
            used: Their positions, at least one, shape (n,).
            norm: Of the moves that S is steep along: "l2" for ||grad S||_2, "linf" for ||grad S||_1.

        Returns:
            Shape (n,), per pixel unit (times `scale`); carries the graph to the parameters. The derivative of a norm
            that is 0 is 0.
        """
        share = self._shareable and len(used) >= _BREAK_EVEN[self._method] * len(self._images)
        score, gradient = self._gradient(used, share)
        gradient = gradient if self._scale is None else gradient * self._scale
        length: Tensor = torch.linalg.vector_norm(gradient.flatten(1), ord=DUAL_ORDER[norm], dim=1)
        if self._piece is None:
            return length
        difference = score_difference(self._images)
        step = difference / length.clamp(min=difference)
        if norm == "l2":
            direction = gradient / length.clamp(min=torch.finfo(length.dtype).tiny).reshape(-1, 1, 1, 1)
        else:
            direction = gradient.sign()
        offset = step.reshape(-1, 1, 1, 1) * (direction if self._scale is None else direction * self._scale)
        rows = used if share else torch.arange(len(used), device=used.device)
        with self._apart(), self._piece.keep(rows):
            moved = scores(self._network(self._images.detach()[used] + offset))
        slope = (moved - score) / step
        return length + (slope - slope.detach())
