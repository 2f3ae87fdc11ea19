r"""The one place that touches auto_LiRPA: sound bounds of linear functions c . f(x') of the logits over a ball.

auto_LiRPA 0.3 is the newest release on the package index and predates today's torch. What this module touches to run
it, and for how long:

* While 0.3 is imported: `sys.modules` answers for four names it asks for and does not need (`numpy.lib.arraysetops`,
  gone in numpy 2; `appdirs`, with which it would make a folder in the user's home; `setuptools` and
  `torch.utils.cpp_extension`, for CUDA kernels that are never built here), and `torch.onnx.symbolic_helper` and
  `torch.onnx.utils` have two functions that torch has moved. All of it is put back, as are the things that the import
  itself changes for everybody: warning filters, the root logger, the two TorchScript executor switches.
* For good, inside auto_LiRPA only: `parse_graph.parse_graph` sees graph nodes with the item access torch has dropped;
  `BoundedModule._named_members` takes the argument `remove_duplicate` that torch now passes;
  `BoundRelu._relu_mask_alpha` passes gradients on at slopes 0 and 1, where all slopes start: 0.3 relies on the
  derivative of `clamp` at its ends, which is 0 since torch 2.14, and alpha-CROWN would never move;
  `BoundAveragePool.bound_backward` gets contiguous rows: 0.3 asks for a view where only a copy will do.
* For good, inside auto_LiRPA of any version (0.7.1 included): `operators.base.isnan` says no, because its one caller
  answers a NaN constant term by the constant 0 for the whole batch, which is no bound; `print` is silent.
* While a network is built or bounded: torch's default dtype is float64 (0.3 makes constants in the default dtype and
  rounds optimised bounds to it), Python warnings are caught, auto_LiRPA's own logger does not propagate, and the ONNX
  exporter's global opset is what 0.3 sets. All of it is put back at the end of each call.

Versions from 0.4 on are used as they are but for the last two items.

Trust, but verify: a self-test once per process compares the engine with numbers worked out by hand, and every build
compares the converted network with the model, forwards and, on a ball of radius 0, through each bound.

References:
    Xu et al., "Automatic Perturbation Analysis for Scalable Certified Robustness and Beyond", NeurIPS 2020;
    Zhang et al., "Efficient Neural Network Robustness Certification with General Activation Functions" (CROWN),
    NeurIPS 2018; Zhang et al., "Towards Stable and Efficient Training of Verifiably Robust Neural Networks"
    (CROWN-IBP), ICLR 2020; Xu et al., "Fast and Complete" (alpha-CROWN), ICLR 2021.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import importlib.metadata
import logging
import sys
import tempfile
import types
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from grood_cert.ball import Ball, support
from grood_cert.errors import InputError, RunError
from grood_cert.networks.architectures import Normalize

Method = Literal["ibp", "crown-ibp", "crown", "alpha-crown"]
METHODS: tuple[str, ...] = get_args(Method)
INSTALL_COMMAND = "pip install --no-deps auto-LiRPA==0.3"

_ALPHA_ITERATIONS = 20
_ALPHA_STEP = 0.25
_TOLERANCE = 1e-8  # of the spread of values over images
_ROUNDING = 1e-11  # of the values
_LAYERS = {
    *("BoundLinear", "BoundConv", "BoundBatchNormalization", "BoundAdd", "BoundFlatten", "BoundReshape"),
    *("BoundAveragePool", "BoundGlobalAveragePool", "BoundMaxPool"),
    *("BoundRelu", "BoundLeakyRelu", "BoundSigmoid", "BoundTanh"),
}
_TANGENTS = {"BoundSigmoid", "BoundTanh"}  # 0.7.1 searches their tangents to 1e-9 only, on the wrong side
_LEAVES = {"BoundInput", "BoundParams", "BoundBuffers", "BoundConstant", "BoundPrimConstant", "BoundIdentity"}

Intervals = Mapping[str, tuple[Tensor, Tensor]]


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
    """The exporter's graph optimiser (moved in torch 2.9)."""
    for name in ("torch.onnx._internal.torchscript_exporter.utils", "torch.onnx.utils"):
        with contextlib.suppress(ImportError, AttributeError):
            function = importlib.import_module(name)._optimize_graph
            return function(*args, **kwargs)
    raise RunError(f"auto_LiRPA {version()} does not run on torch {torch.__version__}: no graph optimiser")


def _set_opset_version(opset: int) -> None:
    settings = _exporter_globals()
    settings._export_onnx_opset_version = opset
    settings.autograd_inlining = False


def _unavailable(*args: Any, **kwargs: Any) -> Any:
    del args, kwargs
    raise NotImplementedError("not needed for bounds on the CPU or through torch alone")


def _stand_ins() -> dict[str, types.ModuleType]:
    """Modules that the import of 0.3 asks for and does not need."""
    contents: dict[str, dict[str, Any]] = {
        "numpy.lib.arraysetops": {"isin": np.isin},
        "appdirs": {"user_data_dir": lambda *_: tempfile.gettempdir()},
        "setuptools": {"setup": _unavailable},
        "torch.utils.cpp_extension": dict.fromkeys(("load", "BuildExtension", "CUDAExtension"), _unavailable),
    }
    modules = {}
    for name, attributes in contents.items():
        modules[name] = types.ModuleType(name)
        vars(modules[name]).update(attributes)
    return modules


@contextlib.contextmanager
def _old_names() -> Iterator[None]:
    """Names that the import of 0.3 asks for, present while the block runs."""
    missing = object()
    places: list[tuple[Any, str, Any]] = [
        (importlib.import_module("torch.onnx.symbolic_helper"), "_set_opset_version", _set_opset_version),
        (importlib.import_module("torch.onnx.utils"), "_optimize_graph", _optimize_graph),
    ]
    stand_ins = _stand_ins()
    modules = {name: sys.modules.get(name, missing) for name in stand_ins}
    attributes = [getattr(place, name, missing) for place, name, _ in places]
    try:
        sys.modules.update(stand_ins)
        for place, name, value in places:
            setattr(place, name, value)
        yield
    finally:
        for name, module in modules.items():
            if module is missing:
                sys.modules.pop(name, None)
            else:
                sys.modules[name] = module  # type: ignore[assignment]
        for (place, name, _), value in zip(places, attributes, strict=True):
            if value is missing:
                delattr(place, name)
            else:
                setattr(place, name, value)


@contextlib.contextmanager
def _globals_restored() -> Iterator[None]:
    """Put back the process-wide settings that importing auto_LiRPA changes; collect its warnings, show none."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    extension = logging.getLogger("torch.utils.cpp_extension")  # says that there is no CUDA
    extension_level = extension.level
    switches = (torch._C._jit_set_profiling_executor, torch._C._jit_set_profiling_mode)
    states = [switch(True) for switch in switches]
    for switch, state in zip(switches, states, strict=True):
        switch(state)
    try:
        with warnings.catch_warnings(record=True):  # recorded: the import resets the filters, but not the recorder
            warnings.simplefilter("ignore")
            extension.setLevel(logging.ERROR)
            yield
    finally:
        root.handlers[:], root.level = handlers, level
        extension.setLevel(extension_level)
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
    if old:
        parser: Any = importlib.import_module("auto_LiRPA.parse_graph")
        walk = parser.parse_graph
        members = library.BoundedModule._named_members

        def named_members(
            self: Any, get_members_fn: Any, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
        ) -> Any:
            del remove_duplicate
            return members(self, get_members_fn, prefix, recurse)

        relu = importlib.import_module("auto_LiRPA.operators.activation").BoundRelu
        mask = relu._relu_mask_alpha

        def mask_alpha(
            lower: Tensor, upper: Tensor, *alphas: Tensor | None
        ) -> tuple[Tensor | None, Tensor | None, Any]:
            first, second, all_off = mask(lower, upper, *alphas)
            free = ((lower < 0) & (upper > 0)).to(lower)
            slopes = [
                None if alpha is None else slope.detach() + free * (alpha - alpha.detach())
                for slope, alpha in zip((first, second), alphas, strict=True)
            ]
            return slopes[0], slopes[1], all_off

        pool = importlib.import_module("auto_LiRPA.operators.pooling").BoundAveragePool
        spread = pool.bound_backward

        def spread_back(self: Any, lower: Any, upper: Any, x: Any) -> Any:
            return spread(
                self, *(rows.contiguous() if isinstance(rows, Tensor) else rows for rows in (lower, upper)), x
            )

        pool.bound_backward = spread_back
        parser.parse_graph = lambda graph, inputs, params: walk(_Graph(graph), inputs, params)
        library.BoundedModule._named_members = named_members
        relu._relu_mask_alpha = staticmethod(mask_alpha)
    operators: Any = importlib.import_module("auto_LiRPA.operators.base")
    operators.isnan = lambda _: False
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "auto_LiRPA":
            module.print = lambda *_, **__: None  # type: ignore[attr-defined]
    return library


class _Messages(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


@contextlib.contextmanager
def _engine_running() -> Iterator[_Messages]:
    """The settings under which auto_LiRPA builds and bounds; what it logs is handed out, not shown."""
    dtype = torch.get_default_dtype()
    logger = logging.getLogger("auto_LiRPA.utils")
    propagate, messages = logger.propagate, _Messages()
    exporter = vars(_exporter_globals()) if _is_old() else {}
    settings = dict(exporter)
    try:
        torch.set_default_dtype(torch.float64)
        logger.propagate = False
        logger.addHandler(messages)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield messages
    finally:
        torch.set_default_dtype(dtype)
        logger.propagate = propagate
        logger.removeHandler(messages)
        exporter.update(settings)


@functools.cache
def _perturbation_class() -> type:
    """auto_LiRPA's perturbation, with our `Ball` as its set.

    Interval propagation inside the library reads the norm and the box: it is told the l_inf box around the ball,
    which contains it. Linear bounds are made concrete by `ball.support`, which knows the ball and the box.
    """
    library = _library()
    unfold = importlib.import_module("auto_LiRPA.patches").inplace_unfold
    identity_type = importlib.import_module("auto_LiRPA.utils").eyeC

    class BallPerturbation(library.PerturbationLpNorm):  # type: ignore[name-defined, misc]
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
            return bound if _is_old() else bound.flatten(1)

        def _bound(self, rows: Tensor, center: Tensor, low: Tensor, high: Tensor, eps: Tensor, sign: int) -> Tensor:
            return (rows @ center.mT).squeeze(-1) + sign * support(sign * rows, low, high, eps, self.ball.norm)

    return BallPerturbation


def _convertible(network: nn.Module) -> nn.Module:
    """A copy in eval mode and float64, the same function, without the layers that 0.3 gets wrong.

    * `Normalize`: a broadcast subtraction and division come out wrong in 0.3's backward mode. A diagonal 1x1
      convolution is the same function, and unlike folding it into the next layer it is right next to zero padding.
    * Dropout: 0.3 switches the whole network to training mode when it sees one; in eval mode it is the identity.
    """
    holder = nn.Sequential(copy.deepcopy(network)).double().eval().requires_grad_(False)
    for parent in list(holder.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Normalize):
                mean, std = child.mean.flatten(), child.std.flatten()
                with torch.random.fork_rng(devices=[]):
                    scale = nn.Conv2d(len(mean), len(mean), 1).to(mean).requires_grad_(False)
                scale.weight.copy_(torch.diag(1 / std)[..., None, None])
                scale.bias.copy_(-mean / std)  # type: ignore[union-attr]
                setattr(parent, name, scale.eval())
            elif isinstance(child, nn.modules.dropout._DropoutNd):
                setattr(parent, name, nn.Identity())
    return holder


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
        library = _library()
        options = {
            "verbosity": 0,
            "conv_mode": self.convolutions,
            # Bounds of a sample must not depend on its batch, so no selection of neurons by the batch's union.
            "sparse_intermediate_bounds": False,
            "sparse_features_alpha": False,
            "sparse_spec_alpha": False,
            "optimize_bound_args": {"iteration": _ALPHA_ITERATIONS, "lr_alpha": _ALPHA_STEP},
        }
        with _engine_running() as messages:
            try:
                module = library.BoundedModule(
                    _convertible(self.network), self.images(2, 0), bound_opts=options, device=self.device
                )
            except Exception as error:
                names = [text.split(",")[0][6:] for text in messages.texts if text.startswith("Name: ")]
                detail = f"it has the operation {', '.join(dict.fromkeys(names))}" if names else _first_line(error)
                raise RunError(f"auto_LiRPA {version()} cannot convert this network: {detail}") from error
            module.eval()
        kinds = {type(node).__name__ for node in module._modules.values()}
        layers = _LAYERS if _is_old() else _LAYERS - _TANGENTS
        unknown = kinds - layers - _LEAVES
        if unknown:
            names = [", ".join(sorted(kind.removeprefix("Bound") for kind in group)) for group in (unknown, layers)]
            raise RunError(f"no bounds for the operation {names[0]}; there are for {names[1]}")
        for node in module._modules.values():
            if type(node).__name__ == "BoundLeakyRelu":
                slope = node.attr["alpha"]
                if not 0 <= slope <= 1:
                    raise RunError(f"no bounds for LeakyReLU with slope {slope}; use one in [0, 1]")
        # For an l_2 ball the interval of the first layer is looser than its linear bound.
        module.check_IBP_first_linear = lambda _: False
        return module

    def forward(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits, and the value of every node by name."""
        with torch.no_grad(), _engine_running():
            logits = self._module(images)
        values = {name: getattr(node, "forward_value", None) for name, node in self._module._modules.items()}
        return logits, {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def nonlinear(self) -> list[tuple[str, str]]:
        """(name, name of its input) of every node that needs bounds of its input, in the order of execution."""
        nodes = [node for node in self._module._modules.values() if getattr(node, "requires_input_bounds", None)]
        return [(node.name, node.inputs[0].name) for node in nodes]

    def bounds(
        self, ball: Ball, method: str, known: Intervals, rows: Tensor | None = None, node: str | None = None
    ) -> tuple[Tensor, Tensor]:
        """Bounds of rows of a node's output (the logits by default), or of the output itself.

        Args:
            ball: The ball.
            method: "ibp", "crown" or "alpha-crown": how to get from the known bounds to these.
            known: Bounds of the inputs of nonlinear nodes.
            rows: Rows, shape (B, S, *output shape).
            node: Name of the node.
        """
        library = _library()
        old = _is_old()
        module = self._module
        interval_argument = "intermediate_layer_bounds" if old else "interm_bounds"
        library_method = {"ibp": "IBP", "crown": "CROWN", "alpha-crown": "CROWN-Optimized"}[method]
        try:
            with _engine_running(), torch.set_grad_enabled(method == "alpha-crown"):
                inputs = library.BoundedTensor(ball.center, _perturbation_class()(ball))
                if old and method == "alpha-crown":  # 0.3 starts alpha-CROWN without the bounds it is given
                    module.init_slope = functools.partial(
                        type(module).init_slope, module, intermediate_layer_bounds=dict(known)
                    )
                lower, upper = module.compute_bounds(
                    x=(inputs,), C=rows, method=library_method, final_node_name=node, **{interval_argument: dict(known)}
                )
                return lower.detach(), upper.detach()
        except BaseException:
            self._module = self._build()
            raise

    def input_bounds(self, ball: Ball, node: str, known: Intervals) -> tuple[Tensor, Tensor]:
        """CROWN bounds of the input of a node.

        They are what auto_LiRPA needs first to bound the node's output; the row asked for is 0.
        """
        shape = self._module[node].output_shape[1:]
        self.bounds(ball, "crown", known, torch.zeros(len(ball.center), 1, *shape).to(ball.center), node)
        found = self._module[node].inputs[0]
        return found.lower.detach(), found.upper.detach()


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0] or type(error).__name__


class BoundedNetwork:
    r"""A network whose logits can be bounded over balls of inputs.

    * "ibp": interval bound propagation.
    * "crown-ibp": linear bounds of the rows asked for, over intervals of the hidden layers.
    * "crown": linear bounds of the rows and of every hidden layer, hidden ones intersected with their intervals.
    * "alpha-crown": as "crown", then the lower slopes of the unstable neurons are optimised for each row (hidden
      bounds stay those of "crown"); the better of the two is returned, so never looser than "crown".

    For l_2 and l_1 balls the first layer is bounded over the ball itself, not over its box, by every method.

    Args:
        network: The model f: (B, C, H, W) -> (B, K), normalisation included. Copied, put in eval mode and float64.
        shape: Shape (C, H, W) of one image.
        method: "ibp", "crown-ibp", "crown" or "alpha-crown".

    Attributes:
        method: The method in use: "crown" from the moment on when "alpha-crown" was asked for and was found not to work
            (here, on this torch, or in a later call), with a warning.
        network: The copy.

    Raises:
        InputError: If the method is unknown.
        RunError: If auto_LiRPA is missing or fails its self-test on this torch, cannot convert the network, or the
            converted network does not reproduce the model, forwards or through the bounds of a ball of radius 0.
    """

    def __init__(self, network: nn.Module, shape: tuple[int, ...], method: Method) -> None:
        if method not in METHODS:
            raise InputError(f"unknown method {method!r}; use one of {', '.join(METHODS)}")
        _self_test()
        self.method: Method = method
        self.shape = tuple(shape)
        self.network = copy.deepcopy(network).double().eval().requires_grad_(False)
        self.device = next(iter(self.network.parameters())).device
        for convolutions in ("patches", "matrix"):  # patches are fast; matrices know dilation, groups, LeakyReLU
            self._engine = _Engine(self.network, self.shape, convolutions)
            reason = self._disagreement()
            if not reason:
                break
        else:
            raise RunError(
                f"auto_LiRPA {version()} does not reproduce this network ({reason}); build it of other layers"
            )
        if method == "alpha-crown":
            self._check_alpha()

    def _disagreement(self) -> str:
        """Compare with the model: the forward pass, and bounds of all neurons and logits on balls of radius 0."""
        images = self._engine.images(16, 1)
        try:
            with torch.no_grad():
                logits = self.network(images)
            if not _close(logits, self._engine.forward(images)[0]):
                return "other logits"
            images, logits = images[:2], logits[:2]
            _, values = self._engine.forward(images)
            identity = torch.eye(logits.shape[1]).to(images).expand(len(images), -1, -1)
            bounds: list[tuple[str, Tensor, tuple[Tensor, Tensor]]] = []
            eps = torch.zeros(len(images)).to(images)
            Relaxation(self, Ball(images, eps, "l2")).rows(identity, _base(self.method))  # another way through 0.3
            relaxation = Relaxation(self, Ball(images, eps, "linf"))
            hidden = relaxation.intermediate(self.method)
            bounds += [(name, values[name], pair) for name, pair in hidden.items()]
            bounds.append(("the logits", logits, relaxation.rows(identity, _base(self.method))))
        except Exception as error:  # noqa: BLE001 (whatever it is, the network is refused)
            return _first_line(error)
        wrong = [name for name, value, pair in bounds if not _encloses(*pair, value)]
        return f"bounds of {wrong[0]} on a ball of radius 0" if wrong else ""

    def _check_alpha(self) -> None:
        """Fall back to crown, with a warning, where alpha-crown does not work."""
        if not _alpha_improves():
            self.method = "crown"
            return
        images = self._engine.images(1, 1)
        ball = Ball(images, torch.full((1,), 0.01).to(images), "linf")
        Relaxation(self, ball).rows(torch.ones(1, 1, self.network(images).shape[1]).to(images))

    def _alpha_failed(self, error: Exception) -> None:
        self.method = "crown"
        warnings.warn(f"alpha-crown fails on this network, crown used instead: {_first_line(error)}", stacklevel=4)

    def relax(self, ball: Ball) -> Relaxation:
        """Prepare the bounds over a ball; intermediate bounds are computed once, at the first rows asked for.

        Raises:
            InputError: If the images have another shape.
        """
        return Relaxation(self, ball)


def _base(method: Method) -> Method:
    """The method whose hidden bounds a method uses."""
    return "crown" if method == "alpha-crown" else method


def _rounding(values: Tensor) -> Tensor:
    """What rounding may change, measured by how far values spread over the images: small networks are judged as well."""
    return _TOLERANCE * (values - values.mean(0)).abs().max() + _ROUNDING * values.abs().max()


def _close(expected: Tensor, got: Tensor) -> bool:
    return expected.shape == got.shape and bool(((expected - got).abs() <= _rounding(expected)).all())


def _encloses(lower: Tensor, upper: Tensor, value: Tensor) -> bool:
    """Bounds on a ball of radius 0 hold, and are as close as the library's own clamps of 1e-8 let them be."""
    if not lower.shape == upper.shape == value.shape:
        return False
    sound = (lower <= value + _rounding(value)) & (value - _rounding(value) <= upper)
    return bool((sound & (upper - lower <= _TOLERANCE * (1 + value.abs().max()))).all())


class Relaxation:
    """Bounds over one batch of balls. Independent of every other relaxation of the same network.

    Attributes:
        ball: The balls.
    """

    def __init__(self, bounded: BoundedNetwork, ball: Ball) -> None:
        if tuple(ball.center.shape[1:]) != bounded.shape:
            raise InputError(f"expected images of shape {bounded.shape}, got {tuple(ball.center.shape[1:])}")
        self.ball = ball
        self._bounded = bounded
        center, eps = (value.detach().to(bounded.device, torch.float64) for value in (ball.center, ball.eps))
        self._ball = Ball(center, eps, ball.norm)
        self._intermediate: dict[Method, dict[str, tuple[Tensor, Tensor]]] = {}

    def intermediate(self, method: Method) -> Intervals:
        """Bounds of the inputs of the nonlinear nodes, by name of the input, in the order of execution."""
        engine = self._bounded._engine
        base: Method = "crown" if _base(method) == "crown" else "ibp"
        if base not in self._intermediate:
            known: dict[str, tuple[Tensor, Tensor]] = {}
            for node, name in engine.nonlinear():
                if name in known:
                    continue
                lower, upper = engine.bounds(self._ball, "ibp", known, node=name)
                if base == "crown" or (self._ball.norm != "linf" and not known):
                    linear_lower, linear_upper = engine.input_bounds(self._ball, node, known)
                    lower, upper = torch.maximum(lower, linear_lower), torch.minimum(upper, linear_upper)
                known[name] = lower.detach(), upper.detach()
            self._intermediate[base] = known
        return self._intermediate[base]

    def rows(self, coefficients: Tensor, method: Method | None = None) -> tuple[Tensor, Tensor]:
        r"""Bounds of c . f(x') over the ball, for every row c.

        Args:
            coefficients: Rows c, shape (B, S, K).
            method: Method for these rows if it differs from the network's own (alpha-crown asks for crown first).

        Returns:
            lower, upper: Shape (B, S) each, float64, `lower <= c . f(x') <= upper` for all x' in the ball in exact
            arithmetic. NaN where the engine could not give a bound, or a hidden bound was not finite.

        Raises:
            RunError: If alpha-crown is asked for and the network fell back to crown.
        """
        method = method or self._bounded.method
        if method == "alpha-crown" and self._bounded.method != "alpha-crown":
            raise RunError("alpha-crown is not available here; build the BoundedNetwork with it and look at its method")
        coefficients = coefficients.detach().to(self._ball.center)
        known = self.intermediate(method)
        engine = self._bounded._engine
        lower, upper = engine.bounds(self._ball, "ibp" if method == "ibp" else "crown", known, coefficients)
        if method == "alpha-crown" and known:
            try:
                better_lower, better_upper = engine.bounds(self._ball, method, known, coefficients)
            except Exception as error:  # noqa: BLE001 (whatever it is, the bounds of crown stand)
                self._bounded._alpha_failed(error)
            else:
                lower, upper = torch.fmax(lower, better_lower), torch.fmin(upper, better_upper)
        finite = torch.ones(len(lower), 1, dtype=torch.bool, device=lower.device)
        for bound in (bound for pair in known.values() for bound in pair):
            finite &= torch.isfinite(bound).flatten(1).all(1, keepdim=True)
        return torch.where(finite, lower, torch.nan), torch.where(finite, upper, torch.nan)

    def preactivations(self) -> list[tuple[Tensor, Tensor]]:
        """Bounds of the input of every nonlinear layer (ReLU, LeakyReLU, Sigmoid, Tanh, MaxPool).

        Returns:
            One pair (lower, upper) a nonlinear layer, in the order of execution, each with the shape (B, ...) of that
            layer's input; under alpha-crown those of crown. As the engine gives them: NaN stays NaN.
        """
        known = self.intermediate(self._bounded.method)
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


def _test_bounds(method: str) -> tuple[Tensor, Tensor, Tensor]:
    """Bounds of the logits of `_test_network` for |x - (1/2, 1/2)|_inf <= 1/4; sampled logits, corners included."""
    engine = _Engine(_test_network(), (1, 1, 2))
    ball = Ball(torch.full((1, 1, 1, 2), 0.5, dtype=torch.float64), torch.tensor([0.25], dtype=torch.float64), "linf")
    ((node, name),) = engine.nonlinear()
    known = {name: engine.bounds(ball, "ibp", {}, node=name)}
    identity = torch.eye(3, dtype=torch.float64).expand(1, -1, -1)
    side = torch.linspace(0.25, 0.75, 5, dtype=torch.float64)
    with torch.no_grad():
        samples = engine.network(torch.cartesian_prod(side, side).reshape(-1, 1, 1, 2))
    if method == "crown":
        linear = engine.input_bounds(ball, node, {})
        if not all(_close(one, other) for one, other in zip(linear, known[name], strict=True)):
            return torch.full((2, 3), torch.nan), torch.full((2, 3), torch.nan), samples
    lower, upper = engine.bounds(ball, method, known, identity)
    return lower[0], upper[0], samples


# By hand. Intervals: r in [0, 3/4] x [0, 1/4] x [1/2, 3/2] x {0}. CROWN: r1 <= 3/4 (d + 1/4) + 3/16, r1 >= d + 1/4;
# r2 <= 1/4 (d - 1/4) + 3/16, r2 >= 0; r3 = s; r4 = 0. So -2 x2 + 1/4 <= f1 <= -2 x2 + 1/2,
# x1 + 3 x2 - 1/2 <= f2 <= x1 + 3 x2 - 1/4, and d + 1/4 <= f3 <= 3/4 d + 3/8. With slope 0 instead of 1: f3 >= 0.
_BY_HAND = {
    "ibp": ([-1.5, 0.0, 0.0], [0.5, 3.0, 0.75]),
    "crown": ([-1.25, 0.5, -0.25], [0.0, 2.75, 0.75]),
}


@functools.cache
def _self_test() -> None:
    """Interval and CROWN bounds must be those worked out by hand, and hold for samples.

    Raises:
        RunError: If they are not: this auto_LiRPA does not work on this torch.
    """
    for method, bounds in _BY_HAND.items():
        try:
            lower, upper, samples = _test_bounds(method)
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
                f"auto_LiRPA {version()} gives wrong {method} bounds on torch {torch.__version__}; use another"
            )


@functools.cache
def _alpha_improves() -> bool:
    """Whether alpha-CROWN finds the slope that lifts the lower bound of f3 from -1/4 to 0; warns if not."""
    try:
        lower, upper, samples = _test_bounds("alpha-crown")
        sound = bool(((lower - 1e-9 <= samples) & (samples <= upper + 1e-9)).all())
        if sound and bool(lower[2] > -0.05):
            return True
        detail = "it does not improve on crown" if sound else "its bounds are wrong"
    except Exception as error:  # noqa: BLE001 (whatever it is, the answer is crown)
        detail = _first_line(error)
    warnings.warn(
        f"alpha-crown of auto_LiRPA {version()} does not work on torch {torch.__version__} ({detail}); crown is used instead",
        stacklevel=4,
    )
    return False


def gradient_bounds(network: nn.Module, shape: tuple[int, ...], ball: Ball, weights: Tensor) -> tuple[Tensor, Tensor]:
    r"""Bounds of the gradient of p . f over one l_inf ball by auto_LiRPA's JacobianOP: a cross-check for `lipschitz`.

    Args:
        network: The model f, in eval mode; auto_LiRPA knows Jacobians of few layers (Linear, Conv2d, ReLU).
        shape: Shape (C, H, W) of one image.
        ball: One l_inf ball, batch size 1.
        weights: p, shape (K,).

    Returns:
        lower, upper: Shape (1, C, H, W) each, lower <= grad (p . f)(x') <= upper for all x' in the ball.

    Raises:
        InputError: If the ball is not one l_inf ball.
        RunError: If auto_LiRPA is older than 0.4, or cannot bound this Jacobian.

    References:
        Shi et al., "Efficiently Computing Local Lipschitz Constants of Neural Networks via Bound Propagation",
        NeurIPS 2022.
    """
    if ball.norm != "linf" or len(ball.center) != 1:
        raise InputError(f"expected one l_inf ball, got {len(ball.center)} in {ball.norm}")
    if _is_old():
        raise RunError(f"auto_LiRPA {version()} cannot bound Jacobians; this needs 0.4 or newer")
    library = _library()
    jacobian = importlib.import_module("auto_LiRPA.jacobian").JacobianOP
    head = nn.Linear(len(weights), 1, bias=False, dtype=torch.float64).requires_grad_(False)
    head.weight.copy_(weights[None])

    class Gradient(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = _convertible(network)
            self.head = head

        def forward(self, images: Tensor) -> Any:
            return jacobian.apply(self.head(self.network(images)), images).flatten(1)

    images = ball.center.double()
    try:
        with _engine_running():
            module = library.BoundedModule(Gradient(), images, bound_opts={"conv_mode": "matrix", "verbosity": 0})
            inputs = library.BoundedTensor(images, _perturbation_class()(ball))
            lower, upper = module.compute_jacobian_bounds(inputs)
    except Exception as error:
        raise RunError(f"auto_LiRPA {version()} cannot bound this Jacobian: {_first_line(error)}") from error
    return lower.detach().reshape(1, *shape), upper.detach().reshape(1, *shape)
