r"""ONNX files as graphs.

The detector made from a file is the function of the file's numbers in float64; the file itself computes in float32, or
float16. Files of opset 13 and later are read as they are, older ones as `onnx.version_converter` writes them anew.

What does not depend on the image (shapes, weights that are computed) is worked out by onnx's own evaluator. Where the
number of images is open, a prime stands for it, so that a shape with it in front keeps images apart. What operators mean
is in `onnx_operators`.

Trust, but verify: a graph is handed out only if it equals the file on random, constant and corner images: to 1e-6 of
the largest logit where onnx's reference evaluator runs the file's numbers in float64, and to 1e-4 (float16: 1e-2) where
onnxruntime, or without it the same evaluator, runs the file as it is, in batches of one, two and five where the number
is open.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from grood_cert.errors import InputError, RunError, said
from grood_cert.networks.aten import refusal
from grood_cert.networks.builder import Builder, Value
from grood_cert.networks.graph import Graph
from grood_cert.networks.onnx_operators import OPERATORS, WHY, Array, Call, Memory, Part, line
from grood_cert.system.torch_files import foreign

INSTALL_COMMAND = "pip install onnx"
_LARGEST = 2**31 - 1  # bytes of a protocol buffer
_OLDEST = 13
_EVALUATED = 14  # below, onnx's evaluator takes BatchNorm to be training; from 13 nothing else changes what is read
_OPEN = 7919  # stands for an open number of images
_EXACT, _SINGLE, _HALF = 1e-6, 1e-4, 1e-2  # agreement relative to the largest logit: float64, float32, float16
_BATCHES = 1, 2, 5
_FLOATS = {"float": np.float32, "float16": np.float16, "double": np.float64}
_WHOLE = "BOOL", "INT8", "INT16", "INT32", "INT64", "UINT8", "UINT16", "UINT32", "UINT64"
_RANDOM = "RandomNormal", "RandomUniform", "Multinomial", "Bernoulli", "RandomNormalLike", "RandomUniformLike"


def read_onnx(path: Path) -> Graph:
    r"""Read a network from an ONNX file.

    Args:
        path: A file of a classifier f: (B, C, H, W) -> (B, K), one input and one output, B open or fixed. Weights may
            lie in files beside it (external data).

    Returns:
        The graph, in float64. It equals the file as said at the top.

    Raises:
        InputError: If the file is missing, damaged or no ONNX file, is no such classifier, holds numbers that are not
            finite or no floats, or an operator that cannot be bounded; the message names it.
        RunError: If the package onnx is missing, or the graph does not reproduce the file.
    """
    model = _loaded(path)
    try:
        image, batch, kind = _image(model)
        exact = _doubled(model)
        graph = _Translation(exact, image, batch).graph()
        _verify(graph, exact, model, batch, kind)
    except (InputError, RunError) as error:
        raise type(error)(f"{path}: {error}") from error
    except (MemoryError, RuntimeError) as error:
        raise RunError(f"{path}: it cannot be run ({line(said(error))})") from error
    return graph


def _onnx(module: str = "") -> Any:
    try:
        return importlib.import_module(f"onnx.{module}" if module else "onnx")
    except ImportError:
        raise RunError(f"reading ONNX needs the package onnx; install it with: {INSTALL_COMMAND}") from None


# The file


def _loaded(path: Path) -> Any:
    """The model in a file, checked, with its external data, without functions."""
    onnx = _onnx()
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            beginning = stream.read(4096)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: not an ONNX file, but {'a folder' if path.is_dir() else said(error)}") from None
    what = foreign(path, beginning) or ("weights that torch.save wrote" if beginning.startswith(b"PK") else "damaged")
    if not what.startswith("an ONNX file"):
        what = what.split(";")[0]
        raise InputError(f"{path}: not an ONNX file{'' if what.startswith('no file') else f', but {what}'}")
    if size > _LARGEST:
        raise InputError(f"{path}: larger than 2 GiB; ONNX keeps weights of that size in files beside it")
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:
        raise InputError(f"{path}: not an ONNX file, or a damaged or truncated one") from error
    if not model.graph.node:
        raise InputError(f"{path}: not an ONNX file, or a damaged or truncated one; it holds no network")
    try:
        for tensor in _tensors(model):
            _check_place(path, tensor)
        onnx.external_data_helper.load_external_data_for_model(model, str(path.parent))
        onnx.checker.check_model(model)
        if model.functions:
            model = _onnx("inliner").inline_local_functions(model)
        return _current(model)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except Exception as error:
        raise InputError(f"{path}: damaged, or against the rules of ONNX ({line(said(error))})") from error


def _nodes(model: Any) -> Iterator[Any]:
    yield from model.graph.node
    for function in model.functions:
        yield from function.node


def _tensors(model: Any) -> Iterator[Any]:
    """All tensors, also those in nodes.

    Raises:
        InputError: If one is sparse, or a node holds nodes.
    """
    if model.graph.sparse_initializer:
        raise InputError("its weights are sparse; expected dense ones")
    yield from model.graph.initializer
    for node in _nodes(model):
        for attribute in node.attribute:
            if attribute.HasField("g") or attribute.graphs:
                raise refusal(_name(node), node.op_type, WHY["If"])
            if attribute.HasField("sparse_tensor") or attribute.sparse_tensors:
                raise InputError("its weights are sparse; expected dense ones")
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors


def _check_place(path: Path, tensor: Any) -> None:
    """External data lies in the file's folder or below it."""
    if tensor.data_location != _onnx().TensorProto.EXTERNAL:
        return
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location, folder = entries.get("location", ""), path.parent.resolve()
    place = (folder / location).resolve()
    if not location or not place.is_relative_to(folder) or place == folder:
        raise InputError(f"its weights lie outside its folder ({line(location)!r}); expected a file beside it")
    if not place.is_file():
        raise InputError(f"its weights should lie beside it in {line(location)}, which is missing")
    try:
        end = int(entries.get("offset", 0)) + int(entries.get("length", 0))
    except ValueError:
        raise InputError(f"damaged: where its weights are in {line(location)} is no number") from None
    if place.stat().st_size < end:
        raise InputError(f"its weights in {line(location)} are truncated")


def _current(model: Any) -> Any:
    """The model at an opset that onnx's evaluator runs right."""
    versions = [entry for entry in model.opset_import if entry.domain in ("", "ai.onnx")]
    if len(versions) != 1:
        raise InputError("it does not say which opset of ONNX it follows")
    if versions[0].version < _OLDEST:
        try:
            return _onnx("version_converter").convert_version(model, 15)
        except Exception as error:
            raise InputError(
                f"its opset {versions[0].version} cannot be brought to {_OLDEST} or later ({line(said(error))})"
            ) from error
    versions[0].version = max(_EVALUATED, versions[0].version)
    return model


def _kind(number: int) -> str:
    """What ONNX calls a type."""
    types = _onnx().TensorProto.DataType
    return str(types.Name(number)).lower() if number in types.values() else f"number {number}"


def _doubled(model: Any) -> Any:
    """The model with all its numbers in float64.

    Raises:
        InputError: If some are not finite, or of a kind that is not read.
    """
    onnx = _onnx()
    exact = onnx.ModelProto()
    exact.CopyFrom(model)
    kinds = {onnx.TensorProto.DataType.Value(name.upper()) for name in _FLOATS}
    whole = {onnx.TensorProto.DataType.Value(name) for name in _WHOLE}
    for tensor in _tensors(exact):
        if tensor.data_type not in kinds | whole:
            kind = _kind(tensor.data_type)
            raise InputError(f"weights {line(tensor.name)} are of type {kind}; expected float, float16 or double")
        try:
            values = onnx.numpy_helper.to_array(tensor)
        except Exception as error:
            raise InputError(f"damaged: weights {line(tensor.name)} are not all there") from error
        if tensor.data_type in kinds:
            with np.errstate(all="ignore"):
                values = values.astype(np.float64)
            if not np.isfinite(values).all():
                raise InputError(f"weights {line(tensor.name)} are NaN or infinite")
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    for node in exact.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == onnx.TensorProto.FLOAT:
                attribute.i = onnx.TensorProto.DOUBLE
    return exact


def _image(model: Any) -> tuple[tuple[int, ...], int | None, Any]:
    """Shape of an image, number of images (None if open), and type of the input."""
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in weights]
    if len(inputs) != 1 or len(model.graph.output) != 1:
        raise InputError(
            f"it has {len(inputs)} inputs and {len(model.graph.output)} outputs; expected one, the images, and one, the "
            "logits"
        )
    kind = _kind(inputs[0].type.tensor_type.elem_type)
    if kind not in _FLOATS:
        raise InputError(f"its input is of type {kind}; expected pixels as float, float16 or double")
    tensor = inputs[0].type.tensor_type
    shape = [int(dim.dim_value) for dim in tensor.shape.dim]
    shown = ", ".join(str(dim.dim_value or line(dim.dim_param) or "?") for dim in tensor.shape.dim)
    if len(shape) != 4:
        raise InputError(f"its input has the shape ({shown}); expected images (B, C, H, W)")
    if not all(size > 0 for size in shape[1:]) or shape[0] < 0:
        raise InputError(f"its input has the shape ({shown}); expected fixed numbers for all but the batch")
    return tuple(shape[1:]), shape[0] or None, _FLOATS[kind]


def _verify(graph: Graph, exact: Any, model: Any, batch: int | None, kind: Any) -> None:
    """Compare graph and file, in float64 on the first images, and as it is on all."""
    generator = torch.Generator().manual_seed(0)
    random = torch.rand(4, *graph.shape, dtype=torch.float64, generator=generator)
    corner = (torch.rand(2, *graph.shape, generator=generator) < 0.5).double()
    level = torch.tensor([0.0, 1.0], dtype=torch.float64).reshape(2, 1, 1, 1).expand(2, *graph.shape)
    images = torch.cat([random[:1], corner[:1], level, random[1:], corner[1:]])
    if batch is None:
        parts = list(images.split(list(_BATCHES)))
    else:  # a file that takes a fixed number of images is given that many
        filled = torch.cat([images, images[:1].expand(-len(images) % batch, *graph.shape)])
        parts = list(filled.split(batch))
    try:
        _compare(graph, parts[:2], _evaluated(exact, parts[:2], np.float64), _EXACT, np.float64)
    except _UnableError:  # on some pools
        pass
    try:
        found = _run(model, parts, kind)
    except _UnableError:
        try:
            found = _evaluated(model, parts, kind)
        except _UnableError as error:
            raise RunError(
                f"it cannot be compared with the file, which onnx's evaluator does not run ({error}); install "
                "onnxruntime to have it run by that, or smooth it"
            ) from error
    _compare(graph, parts, found, _HALF if kind is np.float16 else _SINGLE, kind)


class _UnableError(Exception):
    """A program that does not run a file."""


def _evaluated(model: Any, parts: Sequence[Tensor], kind: Any) -> list[Array]:
    """The logits by onnx's reference evaluator."""
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            session = _onnx("reference").ReferenceEvaluator(model)
            name = session.input_names[0]
            return [session.run(None, {name: part.numpy().astype(kind)})[0] for part in parts]
    except Exception as error:
        raise _UnableError(line(said(error))) from error


def _run(model: Any, parts: Sequence[Tensor], kind: Any) -> list[Array]:
    """The logits by onnxruntime, if it is installed."""
    try:
        runtime = importlib.import_module("onnxruntime")
        options = runtime.SessionOptions()
        options.log_severity_level = 4
        session = runtime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        return [session.run(None, {name: part.numpy().astype(kind)})[0] for part in parts]
    except Exception as error:
        raise _UnableError(line(said(error))) from error


def _compare(graph: Graph, parts: Sequence[Tensor], found: Sequence[Array], agreement: float, kind: Any) -> None:
    for part, values in zip(parts, found, strict=True):
        images = torch.from_numpy(part.numpy().astype(kind).astype(np.float64))
        with torch.no_grad():
            expected = graph(images)
        got = torch.from_numpy(np.asarray(values, dtype=np.float64))
        if expected.shape != got.shape or not bool(torch.isfinite(got).all()):
            what = "not finite" if expected.shape == got.shape else f"of shape {tuple(got.shape)}"
            raise RunError(f"its logits are {what} on {len(part)} images; nothing about it is proved")
        scale = float(expected.abs().max()) + float(np.finfo(kind).eps) / agreement * graph.largest(images)
        if not float((expected - got).abs().max()) <= agreement * scale:
            raise RunError(
                f"the graph does not reproduce the file on a batch of {len(part)}: the file gives other logits "
                "when it is run; nothing about it is proved"
            )


# From nodes to operations


class _Translation:
    """Node by node, from a model in float64 to a builder."""

    def __init__(self, model: Any, image: tuple[int, ...], batch: int | None) -> None:
        self._onnx = _onnx()
        self._model = model
        self._batch = batch or _OPEN
        self._build = Builder(image)
        self._memory = Memory({}, {})
        to_array = self._onnx.numpy_helper.to_array
        self._found: dict[str, Any] = {tensor.name: to_array(tensor) for tensor in model.graph.initializer}
        self._found.update(
            {value.name: self._build.image for value in model.graph.input if value.name not in self._found}
        )

    def graph(self) -> Graph:
        for node in self._model.graph.node:
            results = self._called(node)
            self._found.update(zip(node.output, results, strict=False))
        logits = self._found.get(self._model.graph.output[0].name)
        if isinstance(logits, Part):
            raise logits.refused()
        if not isinstance(logits, Value):
            raise InputError("its output does not depend on the image")
        return self._build.graph(logits)

    def _called(self, node: Any) -> Sequence[Any]:
        self._build.name = _name(node)
        if node.domain not in ("", "ai.onnx"):
            raise refusal(self._build.name, line(f"{node.domain}.{node.op_type}"), "it is no operator of ONNX itself")
        try:
            inputs = tuple(self._found[name] if name else None for name in node.input)
        except KeyError:
            raise refusal(self._build.name, node.op_type, "it reads a further result of an operator") from None
        if node.op_type in _RANDOM:
            raise refusal(self._build.name, node.op_type, WHY[node.op_type])
        attributes = {attribute.name: self._attribute(attribute) for attribute in node.attribute}
        if node.op_type == "Shape" and isinstance(inputs[0], Value):
            whole = np.array([self._batch, *inputs[0].shape], dtype=np.int64)
            return [whole[attributes.get("start", 0) : attributes.get("end", len(whole))]]
        if not any(isinstance(value, Value | Part) for value in inputs):
            return self._computed(node, inputs)
        handler = OPERATORS.get(node.op_type)
        call = Call(node.op_type, inputs, attributes, len(node.output), self._batch, self._build, self._memory)
        if handler is None:
            raise call.refused()
        try:
            found = handler(call)
        except (InputError, KeyError, TypeError, ValueError, IndexError, RuntimeError, ZeroDivisionError) as error:
            if isinstance(error, InputError) and str(error).startswith("layer "):
                raise
            raise refusal(self._build.name, node.op_type, line(said(error))) from error
        return found if isinstance(found, list) else [found]

    def _attribute(self, attribute: Any) -> Any:
        found = self._onnx.helper.get_attribute_value(attribute)
        if isinstance(found, self._onnx.TensorProto):
            return self._onnx.numpy_helper.to_array(found)
        return found.decode("utf-8", "replace") if isinstance(found, bytes) else found

    def _computed(self, node: Any, inputs: Sequence[Any]) -> Sequence[Array]:
        """What does not depend on the image."""
        helper = self._onnx.helper
        names = [name for name in dict.fromkeys(node.input) if name]
        try:
            graph = helper.make_graph(
                [node],
                "constant",
                [helper.make_empty_tensor_value_info(name) for name in names],
                [helper.make_empty_tensor_value_info(name) for name in node.output if name],
            )
            model = helper.make_model(graph, opset_imports=self._model.opset_import)
            with warnings.catch_warnings(), np.errstate(all="ignore"):
                warnings.simplefilter("ignore")
                evaluator = _onnx("reference").ReferenceEvaluator(model)
                found = evaluator.run(None, {name: self._found[name] for name in names})
        except Exception as error:
            raise refusal(self._build.name, node.op_type, f"it cannot be computed ({line(said(error))})") from error
        results = [np.asarray(value) for value in found]
        results = [value.astype(np.float64) if value.dtype.kind == "f" else value for value in results]
        if any(value.dtype.kind not in "fiub" or not np.isfinite(value).all() for value in results):
            raise refusal(self._build.name, node.op_type, "it computes what is no finite number")
        return results


def _name(node: Any) -> str:
    return line(node.name or next(iter(node.output), "") or node.op_type)
