r"""auto_LiRPA as it must be before it can be trusted: imported, repaired, and its settings while it runs.

auto_LiRPA 0.3 is the newest release on the package index and predates today's torch. What this module touches to run
it, and for how long:

* While 0.3 is imported: `sys.modules` answers for four names it asks for and does not need (`numpy.lib.arraysetops`,
  gone in numpy 2; `appdirs`, with which it would make a folder in the user's home; `setuptools` and
  `torch.utils.cpp_extension`, for CUDA kernels that are never built here), and `torch.onnx.symbolic_helper` and
  `torch.onnx.utils` have two functions that torch has moved. All of it is put back, as are the things that the import
  itself changes for everybody: warning filters, the root logger, the two TorchScript executor switches.
* For good, inside auto_LiRPA only: `parse_graph.parse_graph` sees graph nodes with the item access torch has dropped;
  `BoundedModule._named_members` takes the argument `remove_duplicate` that torch now passes;
  `BoundAveragePool.bound_backward` gets contiguous rows: 0.3 asks for a view where only a copy will do.
* For good, inside auto_LiRPA of any version (0.7.1 included): `operators.base.isnan` says no, because its one caller
  answers a NaN constant term by the constant 0 for the whole batch, which is no bound; `print` is silent.
* While a network is built or bounded: torch's default dtype is float64 (0.3 makes constants in the default dtype),
  Python warnings are caught, auto_LiRPA's own logger does not propagate, and the ONNX exporter's global opset is what
  0.3 sets. All of it is put back at the end of each call.

Versions from 0.4 on are used as they are but for the last two items.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import sys
import tempfile
import types
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from grood_cert.bounds.engine import lirpa_version
from grood_cert.errors import RunError

INSTALL_COMMAND = "pip install --no-deps auto-LiRPA==0.3"


def version() -> str:
    """Version of the installed auto_LiRPA.

    Raises:
        RunError: If it is not installed; the message holds the command that installs it.
    """
    found = lirpa_version()
    if found is None:
        raise RunError(f"this engine needs auto_LiRPA, which is not installed; run: {INSTALL_COMMAND}")
    return found


@functools.cache
def is_old() -> bool:
    """Whether it is older than 0.4; every bound asks, and reading the version of a package takes milliseconds."""
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
def library() -> types.ModuleType:
    """Import auto_LiRPA, repaired where the version needs it."""
    old = is_old()
    try:
        with _globals_restored(), _old_names() if old else contextlib.nullcontext():
            module = importlib.import_module("auto_LiRPA")
    except ImportError as error:
        raise RunError(f"auto_LiRPA {version()} does not import on torch {torch.__version__}: {error}") from error
    if old:
        parser: Any = importlib.import_module("auto_LiRPA.parse_graph")
        walk = parser.parse_graph
        members = module.BoundedModule._named_members

        def named_members(
            self: Any, get_members_fn: Any, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
        ) -> Any:
            del remove_duplicate
            return members(self, get_members_fn, prefix, recurse)

        pool = importlib.import_module("auto_LiRPA.operators.pooling").BoundAveragePool
        spread = pool.bound_backward

        def spread_back(self: Any, lower: Any, upper: Any, x: Any) -> Any:
            return spread(
                self, *(rows.contiguous() if isinstance(rows, Tensor) else rows for rows in (lower, upper)), x
            )

        pool.bound_backward = spread_back
        parser.parse_graph = lambda graph, inputs, params: walk(_Graph(graph), inputs, params)
        module.BoundedModule._named_members = named_members
    operators: Any = importlib.import_module("auto_LiRPA.operators.base")
    operators.isnan = lambda _: False
    for name, part in list(sys.modules.items()):
        if name.partition(".")[0] == "auto_LiRPA":
            part.print = lambda *_, **__: None  # type: ignore[attr-defined]
    return module


class Messages(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the text."""
        self.texts.append(record.getMessage())


@contextlib.contextmanager
def running() -> Iterator[Messages]:
    """The settings under which auto_LiRPA builds and bounds; what it logs is handed out, not shown."""
    dtype = torch.get_default_dtype()
    logger = logging.getLogger("auto_LiRPA.utils")
    propagate, messages = logger.propagate, Messages()
    exporter = vars(_exporter_globals()) if is_old() else {}
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
