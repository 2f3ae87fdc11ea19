r"""The one place that touches auto_LiRPA: sound bounds of linear functions c . f(x') of the logits over a ball.

auto_LiRPA 0.3 is the newest release on the package index and predates today's torch. To run it, this module

* puts the names that its import asks for and that torch or numpy have since moved (`numpy.lib.arraysetops.isin`,
  `torch.onnx.symbolic_helper._set_opset_version`, `torch.onnx.utils._optimize_graph`) in place **during the import
  only**, and puts back what the import changes for everybody: the warning filters, the root logger and the two
  TorchScript executor switches;
* replaces, inside `auto_LiRPA.parse_graph` alone, the function that walks the traced graph by one that sees nodes
  with the item access torch has dropped;
* gives `BoundedModule._named_members` the argument `remove_duplicate` that torch now passes;
* restores the exporter's global opset version after every build of a bounded module.

After the import, the only objects that differ from a fresh interpreter are attributes of auto_LiRPA itself.
Version 0.4 and newer are used as they are.

References:
    Xu et al., "Automatic Perturbation Analysis for Scalable Certified Robustness and Beyond", NeurIPS 2020;
    Zhang et al., "Efficient Neural Network Robustness Certification with General Activation Functions" (CROWN),
    NeurIPS 2018; Xu et al., "Fast and Complete" (alpha-CROWN), ICLR 2021.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import importlib.metadata
import io
import logging
import sys
import types
import warnings
from collections.abc import Iterator
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from grood_cert.ball import Ball
from grood_cert.errors import RunError, InputError

Method = Literal["ibp", "crown-ibp", "crown", "alpha-crown"]
METHODS: tuple[str, ...] = get_args(Method)
INSTALL_COMMAND = "pip install --no-deps auto-LiRPA==0.3"

_LIBRARY_METHOD = {"ibp": "IBP", "crown-ibp": "CROWN-IBP", "crown": "CROWN", "alpha-crown": "CROWN-Optimized"}
_ALPHA_ITERATIONS = 20
_OPSET = 12


def version() -> str:
    """Version of the installed auto_LiRPA.

    Raises:
        RunError: If it is not installed; the message holds the command that installs it.
    """
    try:
        return importlib.metadata.version("auto-LiRPA")
    except importlib.metadata.PackageNotFoundError:
        raise RunError(f"formal bounds need auto_LiRPA, which is not installed; run: {INSTALL_COMMAND}") from None


def _is_old() -> bool:
    major, minor = (int(part) for part in version().split(".")[:2])
    return (major, minor) < (0, 4)


class _Node:
    """A node of a traced graph with `node[name]` for attributes, as torch.onnx once patched it in."""

    def __init__(self, node: Any) -> None:
        self._node = node

    def __getattr__(self, name: str) -> Any:
        return getattr(self._node, name)

    def __getitem__(self, name: str) -> Any:
        return getattr(self._node, self._node.kindOf(name))(name)


class _Graph:
    """A traced graph whose nodes are `_Node`."""

    def __init__(self, graph: Any) -> None:
        self._graph = graph

    def __getattr__(self, name: str) -> Any:
        return getattr(self._graph, name)

    def nodes(self) -> list[_Node]:
        return [_Node(node) for node in self._graph.nodes()]


def _exporter_globals() -> Any:
    """The settings object of the TorchScript ONNX exporter (moved in torch 2.9)."""
    for name in ("torch.onnx._internal.torchscript_exporter._globals", "torch.onnx._globals"):
        with contextlib.suppress(ImportError):
            return importlib.import_module(name).GLOBALS
    raise RunError(f"auto_LiRPA {version()} does not run on torch {torch.__version__}: no TorchScript exporter")


def _optimize_graph(*args: Any, **kwargs: Any) -> Any:
    for name in ("torch.onnx._internal.torchscript_exporter.utils", "torch.onnx.utils"):
        with contextlib.suppress(ImportError, AttributeError):
            return importlib.import_module(name)._optimize_graph(*args, **kwargs)
    raise RunError(f"auto_LiRPA {version()} does not run on torch {torch.__version__}: no graph optimiser")


def _set_opset_version(opset: int) -> None:
    settings = _exporter_globals()
    settings._export_onnx_opset_version = opset
    settings.autograd_inlining = False


@contextlib.contextmanager
def _exporter_restored() -> Iterator[None]:
    """Undo what a build does to the exporter's settings."""
    if not _is_old():
        yield
        return
    settings = _exporter_globals()
    before = dict(vars(settings))
    try:
        yield
    finally:
        vars(settings).update(before)


@contextlib.contextmanager
def _old_names() -> Iterator[None]:
    """Names that the import of 0.3 asks for, present while the block runs."""
    missing = object()
    arraysetops = types.ModuleType("numpy.lib.arraysetops")
    arraysetops.isin = np.isin  # type: ignore[attr-defined]
    module = sys.modules.get("numpy.lib.arraysetops", missing)
    sys.modules["numpy.lib.arraysetops"] = arraysetops
    places = [
        (importlib.import_module("torch.onnx.symbolic_helper"), "_set_opset_version", _set_opset_version),
        (importlib.import_module("torch.onnx.utils"), "_optimize_graph", _optimize_graph),
    ]
    before = [getattr(place, name, missing) for place, name, _ in places]
    for place, name, value in places:
        setattr(place, name, value)
    try:
        yield
    finally:
        if module is missing:
            del sys.modules["numpy.lib.arraysetops"]
        else:
            sys.modules["numpy.lib.arraysetops"] = module  # type: ignore[assignment]
        for (place, name, _), value in zip(places, before, strict=True):
            if value is missing:
                delattr(place, name)
            else:
                setattr(place, name, value)


@contextlib.contextmanager
def _globals_restored() -> Iterator[None]:
    """Put back the process-wide settings that importing auto_LiRPA changes."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    switches = (torch._C._jit_set_profiling_executor, torch._C._jit_set_profiling_mode)
    states = [switch(True) for switch in switches]
    for switch, state in zip(switches, states, strict=True):
        switch(state)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        root.handlers[:], root.level = handlers, level
        for switch, state in zip(switches, states, strict=True):
            switch(state)


@functools.cache
def _library() -> types.ModuleType:
    """Import auto_LiRPA, repaired where the version needs it."""
    old = _is_old()
    try:
        with _globals_restored(), _old_names() if old else contextlib.nullcontext():
            library = importlib.import_module("auto_LiRPA")
    except ImportError as error:
        raise RunError(f"auto_LiRPA {version()} does not import on torch {torch.__version__}: {error}") from error
    logging.getLogger("auto_LiRPA").setLevel(logging.ERROR)
    logging.getLogger("auto_LiRPA.utils").setLevel(logging.ERROR)
    if old:
        parser = importlib.import_module("auto_LiRPA.parse_graph")
        walk = parser.parse_graph
        parser.parse_graph = lambda graph, inputs, params: walk(_Graph(graph), inputs, params)
        members = library.BoundedModule._named_members

        def named_members(
            self: Any, get_members_fn: Any, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
        ) -> Any:
            del remove_duplicate
            return members(self, get_members_fn, prefix, recurse)

        library.BoundedModule._named_members = named_members
    return library


@functools.cache
def _perturbation_class() -> type:
    """auto_LiRPA's perturbation, with our `Ball` as its set.

    Interval propagation inside the library reads the norm and the box: it is told the l_inf box around the ball,
    which contains it. Linear bounds are made concrete by `Ball.support`, which knows the ball and the box.
    """
    library = _library()
    matrix_of_patches = importlib.import_module("auto_LiRPA.patches").patches_to_matrix
    identity_type = importlib.import_module("auto_LiRPA.utils").eyeC

    class BallPerturbation(library.PerturbationLpNorm):  # type: ignore[name-defined, misc]
        def __init__(self, ball: Ball) -> None:
            super().__init__(norm=np.inf, x_L=ball.lower, x_U=ball.upper)
            self.ball = ball

        def concretize(self, x: Tensor, A: Any, sign: int = -1, *args: Any, **kwargs: Any) -> Any:  # noqa: N803
            if A is None or self.ball.norm == "linf" or isinstance(A, identity_type) or getattr(A, "identity", 0):
                return super().concretize(x, A, sign, *args, **kwargs)
            output_shape = None
            if not isinstance(A, Tensor):
                patches = A
                A = matrix_of_patches(  # noqa: N806
                    patches.patches, x.shape, patches.stride, patches.padding, patches.output_shape, patches.unstable_idx
                )
                if patches.unstable_idx is None:
                    output_shape = (x.shape[0], patches.patches.shape[0], *patches.patches.shape[2:4])
            rows = A.reshape(A.shape[0], A.shape[1], -1)
            center = (rows @ x.flatten(1).unsqueeze(-1)).squeeze(-1)
            bound = center + self.ball.support(rows) if sign == 1 else center - self.ball.support(-rows)
            return bound if output_shape is None else bound.reshape(output_shape)

    return BallPerturbation


class BoundedNetwork:
    r"""A network whose logits can be bounded over balls of inputs.

    Args:
        network: The model f: (B, C, H, W) -> (B, K), normalisation included. Copied, put in eval mode and float64.
        shape: Shape (C, H, W) of one image.
        method: "ibp", "crown-ibp", "crown" or "alpha-crown".

    Raises:
        InputError: If the method is unknown.
        RunError: If auto_LiRPA is missing, cannot convert the network, or the converted network does not
            reproduce the model on random images.
    """

    def __init__(self, network: nn.Module, shape: tuple[int, ...], method: Method) -> None:
        if method not in METHODS:
            raise InputError(f"unknown method {method!r}; use one of {', '.join(METHODS)}")
        self.method = method
        self.shape = shape
        self.network = copy.deepcopy(network).double().eval().requires_grad_(False)
        self.device = next(self.network.parameters()).device
        self._module = self._build()

    def _build(self) -> Any:
        library = _library()
        example = torch.rand(2, *self.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        options = {"verbosity": 0, "optimize_bound_args": {"iteration": _ALPHA_ITERATIONS}}
        try:
            with _exporter_restored(), _quiet():
                module = library.BoundedModule(
                    copy.deepcopy(self.network), example.to(self.device), bound_opts=options, device=self.device
                )
                module.eval()
        except Exception as error:
            detail = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise RunError(f"auto_LiRPA {version()} cannot convert this network: {detail}") from error
        check = torch.rand(5, *self.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        check = check.to(self.device)
        with torch.no_grad(), _quiet():
            expected, got = self.network(check), module(check)
        if expected.shape != got.shape or not torch.allclose(expected, got, rtol=1e-9, atol=1e-9):
            raise RunError(
                f"the network converted by auto_LiRPA {version()} does not reproduce the model on random images"
            )
        return module

    def relax(self, ball: Ball) -> Relaxation:
        """Prepare the bounds over a ball; intermediate bounds are computed once, at the first rows asked for."""
        return Relaxation(self, ball)


class Relaxation:
    """Bounds of linear functions of the logits over one batch of balls."""

    def __init__(self, bounded: BoundedNetwork, ball: Ball) -> None:
        self._bounded = bounded
        self.ball = ball
        self._fresh = True

    def rows(self, coefficients: Tensor, method: Method | None = None) -> tuple[Tensor, Tensor]:
        r"""Bounds of c . f(x') over the ball, for every row c.

        Args:
            coefficients: Rows c, shape (B, S, K).
            method: Method for these rows if it differs from the network's own (alpha-crown asks for crown first).

        Returns:
            lower, upper: Shape (B, S) each, float64, `lower <= c . f(x') <= upper` for all x' in the ball in exact
            arithmetic. A bound the engine could not give is NaN.
        """
        method = method or self._bounded.method
        coefficients = coefficients.to(self.ball.center)
        inputs = None
        if self._fresh or method == "alpha-crown":
            inputs = (_library().BoundedTensor(self.ball.center, _perturbation_class()(self.ball)),)
        module = self._bounded._module
        try:
            with _quiet(), torch.set_grad_enabled(method == "alpha-crown"):
                lower, upper = module.compute_bounds(x=inputs, C=coefficients, method=_LIBRARY_METHOD[method])
        except BaseException:
            # After an exception the library's state is not to be trusted: build anew, and never call it a bound.
            self._bounded._module = self._bounded._build()
            self._fresh = True
            raise
        self._fresh = method == "alpha-crown"
        return lower.detach(), upper.detach()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the library's prints and the tracer's warnings."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
