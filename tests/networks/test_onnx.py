"""ONNX files become the function they are, or are refused by name; what they are comes from torch and onnx itself."""

from __future__ import annotations

import contextlib
import io
import itertools
import sys
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from grood_cert.ball import Ball
from grood_cert.bounds.crown import NativeNetwork
from grood_cert.errors import InputError, RunError
from grood_cert.networks.architectures import build
from grood_cert.networks.onnx import read_onnx
from grood_cert.networks.onnx_operators import OPERATORS
from grood_cert.networks.rebuild import Rebuilt
from grood_cert.runs.onnx_file import write_onnx

onnx = pytest.importorskip("onnx", reason="needs the optional package onnx")
evaluation = pytest.importorskip("onnx.reference")
SHAPE = (1, 4, 4)
FLOAT, DOUBLE, HALF = 1, 11, 10


class Function(nn.Module):
    """A function between a convolution and a linear head."""

    def __init__(self, function):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.function, self.last = nn.Conv2d(1, 4, 3, padding=1), function, nn.Linear(64, 3)
        self.matrix = nn.Parameter(torch.randn(4, 4))

    def forward(self, images):
        return self.last(self.function(self.first(images), self).flatten(1))


FUNCTIONS = {
    "arithmetic": lambda x, m: (2 * x - 1) / 0.5 + (1 - x) - -x * m.matrix + m.matrix[0],
    "gates": lambda x, m: functional.gelu(x) + functional.silu(2 * x) + functional.hardswish(6 * x),
    "gates written out": lambda x, m: (
        functional.gelu(3 * x, approximate="tanh")
        + x * torch.sigmoid(1.702 * x)
        + x * functional.relu6(x + 3) / 6
        + x * (0.5 * (1 + torch.erf(x / 2**0.5)))
    ),
    "exponential": lambda x, m: (
        functional.softplus(x) + functional.selu(x) + functional.celu(x, 2.0) + functional.elu(x, 0.5) + x.tanh()
    ),
    "kinks": lambda x, m: (
        functional.hardsigmoid(8 * x) + functional.relu6(9 * x) + functional.leaky_relu(x, 0.2) + x.abs() + x.relu()
    ),
    "switches": lambda x, m: functional.logsigmoid(x) + functional.threshold(x, 0.0, 0.0) + x.sigmoid(),
    "ends": lambda x, m: x.clamp(-0.1, 0.2) + x.clamp(min=0.1) + torch.maximum(x, -x) + torch.minimum(x, 2 * x),
    "views": lambda x, m: x.view(x.size(0), -1).reshape(-1, 4, 16).transpose(1, 2).reshape(x.shape[0], 4, 4, 4),
    "reductions": lambda x, m: x - x.mean((2, 3), keepdim=True) + x.amax(1, keepdim=True) + x.sum(3, keepdim=True),
    "no entries": lambda x, m: x + torch.roll(x[:, :1], 1, 1),
    "parts": lambda x, m: torch.cat(torch.chunk(x, 2, 1)[::-1], 1) + torch.stack([x, x.relu()], 1).sum(1),
    "padding": lambda x, m: (
        functional.pad(x, (1, 0, 0, 2), value=0.5)[:, :, 2:, 1:]
        + functional.pad(x, (1, 1, 1, 1), mode="reflect")[..., 1:5, :4]
        + functional.pad(x, (1, 1, 1, 1), mode="circular")[..., 2:6, 1:5]
        + functional.pad(x, (1, 1, 1, 1), mode="replicate")[..., :4, 1:5]
    ),
    "selections": lambda x, m: x[:, 0].unsqueeze(1) + x[:, :, 1:2].expand(-1, -1, 4, -1) + x.repeat(1, 2, 1, 1)[:, 4:],
    "order": lambda x, m: x.flip(-1).roll(1, 2) + functional.pixel_unshuffle(functional.pixel_shuffle(x, 2), 2),
    "matrices": lambda x, m: x @ m.matrix + functional.linear(x, m.matrix),
    "pools": lambda x, m: (
        functional.interpolate(functional.avg_pool2d(x, 3, 2, 1, True, False), size=4)
        + functional.interpolate(functional.max_pool2d(x, 3, 2, 0, ceil_mode=True), size=4)
        + functional.adaptive_avg_pool2d(x, 1)
        + functional.interpolate(x[..., ::2, ::2], scale_factor=2)
    ),
    "sizes": lambda x, m: (
        functional.interpolate(functional.avg_pool2d(x, 2), size=(4, 4), mode="bilinear", align_corners=True)
        + functional.interpolate(functional.avg_pool2d(x, 2), scale_factor=2.0, mode="bicubic")
        + functional.interpolate(functional.adaptive_avg_pool2d(x, (2, 1)), size=4, mode="bilinear")
    ),
}


def images(count=7, shape=SHAPE):
    return torch.rand(count, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def exported(network, path, opset=17, batch=True, shape=SHAPE):
    """By the exporter that goes through TorchScript."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network.eval(),
            (torch.rand(3 if batch is True else batch, *shape),),
            str(path),
            dynamo=False,
            opset_version=opset,
            input_names=["X"],
            dynamic_axes={"X": {0: "N"}} if batch is True else None,
        )
    return path


def same(graph, network, shape=SHAPE, tolerance=1e-7):
    x = images(shape=shape)
    with torch.no_grad():
        torch.testing.assert_close(graph(x), network.double()(x), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("name", "opset"), [*zip(FUNCTIONS, itertools.cycle((13, 17))), ("gates", 17), ("gates", 11)])
def test_functions_exported_through_torchscript(name, opset, tmp_path):
    network = Function(FUNCTIONS[name]).eval()
    same(read_onnx(exported(network, tmp_path / "x.onnx", opset)), network)


def test_functions_exported_by_dynamo(tmp_path):
    pytest.importorskip("onnxscript", reason="this exporter needs the package onnxscript")
    names = "gates", "views", "parts", "exponential"
    network = Function(lambda x, m: sum(FUNCTIONS[name](x, m) for name in names)).eval()
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        sizes = ({0: torch.export.Dim("batch")},)
        program = torch.onnx.export(network, (torch.rand(3, *SHAPE),), dynamo=True, dynamic_shapes=sizes, verbose=False)
    program.save(str(tmp_path / "x.onnx"), external_data=True)
    assert (tmp_path / "x.onnx.data").is_file()
    same(read_onnx(tmp_path / "x.onnx"), network)


@pytest.mark.parametrize(
    ("name", "shape"), [("conv-small", (1, 8, 8)), ("resnet-small", (3, 8, 8)), ("mlp", (1, 4, 4))]
)
@pytest.mark.parametrize("any_batch", [True, False])
def test_our_own_files_come_back(name, shape, any_batch, tmp_path):
    torch.manual_seed(0)
    network = build(name, shape, 4, [0.4] * shape[0], [0.3] * shape[0])
    network(torch.rand(8, *shape))
    network.eval()
    write_onnx(network, images(2, shape), tmp_path / "x.onnx", any_batch=any_batch)
    graph = read_onnx(tmp_path / "x.onnx")
    same(graph, network.float(), shape, 1e-6)
    same(Rebuilt(graph), network, shape, 1e-6)


def test_proofs_about_a_file_hold(tmp_path):
    network = Function(FUNCTIONS["gates"]).eval()
    graph = read_onnx(exported(network, tmp_path / "x.onnx"))
    ball, rows = Ball(images(2), 0.05, "linf"), torch.eye(3, dtype=torch.float64).expand(2, -1, -1)
    lower, upper = NativeNetwork(Rebuilt(graph), SHAPE, "crown").relax(ball).rows(rows)
    for _ in range(20):
        found = network.double()(ball.lower + torch.rand_like(ball.lower) * (ball.upper - ball.lower))
        assert bool(((lower <= found + 1e-7) & (found - 1e-7 <= upper)).all())


# Files made by hand: what torch does not write.


def constant(name, values, kind=np.float32):
    return onnx.numpy_helper.from_array(np.asarray(values, dtype=kind), name)


def made(path, nodes, weights=(), *, opset=18, batch="N", shape=SHAPE, functions=(), domains=(), kind=FLOAT, inputs=()):
    """A file of nodes from "x" to "y", a value that a linear head reads."""
    helper = onnx.helper
    dtype = {FLOAT: np.float32, DOUBLE: np.float64, HALF: np.float16}[kind]
    head = [
        helper.make_node("GlobalAveragePool", ["y"], ["pooled"], name="pool"),
        helper.make_node("Flatten", ["pooled"], ["flat"], name="flatten"),
        helper.make_node("Mul", ["flat", "three"], ["logits"], name="head"),
    ]
    graph = helper.make_graph(
        [*nodes, *head],
        "net",
        [helper.make_tensor_value_info("x", kind, [batch, *shape]), *inputs],
        [helper.make_tensor_value_info("logits", kind, [batch, None])],
        [*weights, constant("three", 3.0, dtype)],
    )
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
    model = helper.make_model(graph, opset_imports=imports, functions=list(functions), ir_version=8)
    path.write_bytes(model.SerializeToString())
    return path


def node(kind, inputs, outputs=("y",), **attributes):
    return onnx.helper.make_node(kind, list(inputs), list(outputs), name=f"my {kind}", **attributes)


def weights(**arrays):
    return [
        constant(name, values, np.int64 if np.asarray(values).dtype.kind == "i" else np.float32)
        for name, values in arrays.items()
    ]


RANDOM = np.random.default_rng(0)
KERNEL = RANDOM.normal(size=(2, 1, 3, 2))
MATRIX = RANDOM.normal(size=(4, 4))
HAND = {
    "same upper": ([node("Conv", ["x", "w"], auto_pad="SAME_UPPER", strides=[2, 2])], weights(w=KERNEL)),
    "same lower": ([node("Conv", ["x", "w"], auto_pad="SAME_LOWER")], weights(w=KERNEL)),
    "uneven pads": ([node("Conv", ["x", "w"], pads=[0, 1, 2, 0], dilations=[1, 2])], weights(w=KERNEL)),
    "transposed": (
        [node("ConvTranspose", ["x", "w", "b"], pads=[1, 0, 0, 1], strides=[2, 1])],
        weights(w=KERNEL.reshape(1, 2, 3, 2), b=[1.0, 2.0]),
    ),
    "average with padding": (
        [node("AveragePool", ["x"], kernel_shape=[3, 2], pads=[1, 0, 0, 1], count_include_pad=1)],
        (),
    ),
    "average of the same size": ([node("AveragePool", ["x"], kernel_shape=[2, 3], auto_pad="SAME_UPPER")], ()),
    "maximum of the same size": ([node("MaxPool", ["x"], kernel_shape=[2, 3], auto_pad="SAME_LOWER")], ()),
    "global maximum": ([node("GlobalMaxPool", ["x"])], ()),
    "depth": (
        [
            node("SpaceToDepth", ["x"], ["a"], blocksize=2),
            node("Conv", ["a", "w"], ["b"]),
            node("DepthToSpace", ["b"], blocksize=2),
        ],
        weights(w=RANDOM.normal(size=(8, 4, 1, 1))),
    ),
    "columns and rows": (
        [node("DepthToSpace", ["a"], blocksize=2, mode="CRD"), *[node("Conv", ["x", "w"], ["a"])]][::-1],
        weights(w=RANDOM.normal(size=(8, 1, 1, 1))),
    ),
    "slopes": ([node("PRelu", ["a", "s"])], weights(s=[[[0.3]], [[1.5]]])),
    "powers": ([node("Conv", ["x", "w"], ["a"]), node("Elu", ["a"], alpha=0.5)], weights(w=KERNEL)),
    "matrix in front": ([node("MatMul", ["w", "x"])], weights(w=MATRIX)),
    "many terms": (
        [node("Relu", ["x"], ["a"]), node("Sum", ["x", "a", "w", "x"], ["b"]), node("Mean", ["a", "b"])],
        weights(w=MATRIX),
    ),
    "many ends": (
        [node("Neg", ["x"], ["a"]), node("Max", ["a", "w", "x"], ["b"]), node("Min", ["b", "c"])],
        weights(w=MATRIX, c=0.3),
    ),
    "gather": ([node("Gather", ["x", "i"], axis=2)], weights(i=[3, 0, -1])),
    "split": ([node("Split", ["x", "i"], ["a", "b"], axis=3), node("Concat", ["b", "a"], axis=2)], weights(i=[2, 2])),
    "norm": (
        [node("BatchNormalization", ["x", "a", "b", "m", "v"], epsilon=0.01)],
        weights(a=[2.0], b=[0.1], m=[0.5], v=[0.2]),
    ),
    "nearest": (
        [node("Resize", ["x", "", "s"], mode="nearest", nearest_mode="round_prefer_ceil")],
        weights(s=[1.0, 1.0, 1.6, 2.0]),
    ),
    "nearest floor": (
        [
            node(
                "Resize",
                ["x", "", "", "i"],
                mode="nearest",
                coordinate_transformation_mode="pytorch_half_pixel",
                axes=[2, 3],
            )
        ],
        weights(i=[1, 3]),
    ),
    "shape arithmetic": (
        [
            node("Shape", ["x"], ["s"]),
            node("Gather", ["s", "i"], ["n"]),
            node("Concat", ["n", "j"], ["t"], axis=0),
            node("Reshape", ["x", "t"]),
        ],
        weights(i=[0], j=[2, 2, -1]),
    ),
}
HAND["slopes"][0].insert(0, node("Conv", ["x", "w"], ["a"]))
HAND["slopes"][1].extend(weights(w=KERNEL))


def evaluator_pads_wrongly():
    """Whether this version of onnx (1.20 and older) pads a convolution as if its stride were 1."""
    nodes = [node("Conv", ["x", "w"], ["y"], auto_pad="SAME_UPPER", strides=[2, 2])]
    tensors = [
        onnx.helper.make_tensor_value_info(name, FLOAT, shape) for name, shape in (("x", [1, 1, 4, 4]), ("y", None))
    ]
    graph = onnx.helper.make_graph(nodes, "g", tensors[:1], tensors[1:], weights(w=KERNEL))
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    x = images(1).float()
    (found,) = evaluation.ReferenceEvaluator(model).run(None, {"x": x.numpy()})
    padded = functional.pad(x, (0, 0, 0, 1))  # 3 rows and 2 columns a window, two steps each: one row is lacking
    right = functional.conv2d(padded, torch.from_numpy(KERNEL).float(), stride=2)
    return not np.allclose(found, right.numpy(), atol=1e-5)


@pytest.mark.parametrize("name", HAND)
def test_other_operators(name, tmp_path):
    """`read_onnx` itself compares with onnx's evaluator in float64; here it is asked again, on other images."""
    nodes, arrays = HAND[name]
    path = made(tmp_path / "x.onnx", nodes, arrays)
    x = images(3)
    (found,) = evaluation.ReferenceEvaluator(str(path)).run(None, {"x": x.float().numpy()})
    if name == "same upper" and evaluator_pads_wrongly():
        with pytest.raises(RunError, match="does not reproduce the file"):
            read_onnx(path)
        return
    graph = read_onnx(path)
    torch.testing.assert_close(graph(x.float().double()), torch.from_numpy(found).double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("runtime", [True, False])
def test_what_onnx_cannot_run_is_run_by_onnxruntime(runtime, tmp_path, monkeypatch):
    """onnx 1.23's evaluator fails on padded pools over one axis."""
    if runtime:
        pytest.importorskip("onnxruntime")
    else:
        monkeypatch.setitem(sys.modules, "onnxruntime", None)
    pools = lambda x, m: functional.max_pool1d(x.flatten(2), 3, 1, 1)
    network = Function(pools).eval()
    path = exported(network, tmp_path / "x.onnx")
    try:
        same(read_onnx(path), network)
    except RunError as error:
        assert not runtime and "install onnxruntime" in str(error)
    monkeypatch.setitem(OPERATORS, "Conv", lambda call: call.builder.scale(call.value, torch.ones(4, 1, 1)))
    with pytest.raises(RunError, match=r"reproduce|install onnxruntime"):
        read_onnx(path)


@pytest.mark.parametrize("runtime", [True, False])
@pytest.mark.parametrize("batch", [1, 4])
def test_a_fixed_number_of_images(batch, runtime, tmp_path, monkeypatch):
    if not runtime:
        monkeypatch.setitem(sys.modules, "onnxruntime", None)
    network = Function(FUNCTIONS["views"]).eval()
    same(read_onnx(exported(network, tmp_path / "x.onnx", 17, batch)), network)


def test_a_function_is_taken_apart(tmp_path):
    helper = onnx.helper
    body = [helper.make_node("Sigmoid", ["z"], ["s"]), helper.make_node("Mul", ["z", "s"], ["out"])]
    function = helper.make_function("mine", "Swish", ["z"], ["out"], body, [helper.make_opsetid("", 18)])
    call = helper.make_node("Swish", ["x"], ["y"], domain="mine")
    graph = read_onnx(made(tmp_path / "x.onnx", [call], functions=[function], domains=["mine"]))
    torch.testing.assert_close(graph(images()), 3 * functional.silu(images()).mean((2, 3)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", [HALF, DOUBLE])
def test_other_types_become_float64(kind, tmp_path):
    dtype = {HALF: np.float16, DOUBLE: np.float64}[kind]
    path = made(tmp_path / "x.onnx", [node("Conv", ["x", "w"])], [constant("w", KERNEL, dtype)], kind=kind)
    expected = functional.conv2d(images(), torch.from_numpy(KERNEL.astype(dtype).astype(np.float64)))
    torch.testing.assert_close(read_onnx(path)(images()), 3 * expected.mean((2, 3)), rtol=1e-12, atol=1e-12)


def test_an_older_file_is_brought_up_to_date(tmp_path):
    nodes = [node("Clip", ["x"], ["a"], min=0.2, max=0.7), node("Upsample", ["a", "s"], mode="nearest")]
    path = made(tmp_path / "x.onnx", nodes, weights(s=[1.0, 1.0, 2.0, 2.0]), opset=9)
    expected = 3 * images().clamp(0.2, 0.7).mean((2, 3))
    torch.testing.assert_close(read_onnx(path)(images()), expected, rtol=1e-6, atol=1e-6)


# Refusals.


def refused(path, message, kind=InputError):
    with pytest.raises(kind, match=message) as found:
        read_onnx(path)
    assert str(found.value).startswith(str(path)) and str(found.value).isprintable() and len(str(found.value)) < 500


REFUSED = {
    "Mul": ([node("Mul", ["x", "x"])], (), "layer my Mul: Mul cannot be bounded: a product of two values"),
    "gate of another": (
        [node("Relu", ["x"], ["a"]), node("Sigmoid", ["a"], ["b"]), node("Mul", ["x", "b"])],
        (),
        "Mul cannot be bounded: a product of two values",
    ),
    "MatMul": ([node("MatMul", ["x", "x"])], (), "MatMul cannot be bounded: a product"),
    "Div": ([node("Div", ["w", "x"])], weights(w=[1.0]), "Div cannot be bounded: a division by a value"),
    "Erf": ([node("Erf", ["x"])], (), "layer my Erf: Erf cannot be bounded: it is read as a part of GELU alone"),
    "cube": ([node("Pow", ["x", "w"])], weights(w=3.0), "layer my Pow: Pow cannot be bounded: a product"),
    "softmax": ([node("Softmax", ["x"])], (), "Softmax cannot be bounded: scores are made of logits"),
    "norm": (
        [node("InstanceNormalization", ["x", "w", "w"])],
        weights(w=[1.0]),
        "it divides by a spread of the image's own values",
    ),
    "jump": ([node("Where", ["c", "x", "w"])], [constant("c", True, bool), *weights(w=0.0)], "it may jump"),
    "cast": ([node("Cast", ["x"], ["a"], to=HALF), node("Cast", ["a"], to=FLOAT)], (), "Cast .*it rounds to another"),
    "batch axis": ([node("Transpose", ["x"], perm=[1, 0, 2, 3])], (), "Transpose .*moves the axis of the batch"),
    "mean of all": ([node("ReduceMean", ["x"])], (), "without axes it goes over the batch"),
    "mean of the batch": ([node("ReduceMean", ["x", "i"])], weights(i=[0]), "along the batch: images would influence"),
    "mixed": ([node("Reshape", ["x", "i"])], weights(i=[1, -1, 4, 4]), "does not keep the images of a batch apart"),
    "size of the batch": (
        [node("Shape", ["x"], ["s"], end=1), node("Cast", ["s"], ["n"], to=FLOAT), node("Mul", ["x", "n"])],
        (),
        "does not reproduce",
    ),
    "wider constant": ([node("Add", ["x", "w"])], weights(w=np.ones((1, 1, 1, 4, 4))), "does not keep the images"),
    "random": ([node("RandomNormal", [], ["r"], shape=[4]), node("Add", ["x", "r"])], (), "RandomNormal .*is random"),
    "training": (
        [node("BatchNormalization", ["x", "a", "a", "a", "a"], ["y", "m", "v"], training_mode=1)],
        weights(a=[1.0]),
        "in train mode it depends on the batch",
    ),
    "variance": (
        [node("BatchNormalization", ["x", "a", "a", "a", "v"])],
        weights(a=[1.0], v=[-1.0]),
        "BatchNormalization .*a negative variance",
    ),
    "whole weights": ([node("Add", ["x", "w"])], weights(w=[2]), "numbers of type int64; expected floats"),
    "not a number": ([node("Add", ["x", "w"])], weights(w=[np.nan]), "weights w are NaN or infinite"),
    "infinite": ([node("Div", ["v", "w"], ["i"]), node("Add", ["x", "i"])], weights(v=1.0, w=0.0), "no finite number"),
    "complex": ([node("Add", ["x", "w"])], [constant("w", [1j], np.complex64)], "weights w are of type complex64"),
    "no image": ([node("Identity", ["w"])], weights(w=np.ones((1, 1, 4, 4))), "does not depend on the image"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_bounded_is_refused_by_name(name, tmp_path):
    nodes, arrays, message = REFUSED[name]
    path = made(tmp_path / "x.onnx", nodes, arrays)
    refused(path, message, RunError if message == "does not reproduce" else InputError)


def test_an_unknown_domain_and_control_flow_are_refused(tmp_path):
    helper = onnx.helper
    foreign = helper.make_node("Fast", ["x"], ["y"], domain="com.vendor", name="\x1b[31mred\n")
    path = made(tmp_path / "a.onnx", [foreign], domains=["com.vendor"])
    refused(path, r"layer \?\[31mred\?: com.vendor.Fast cannot be bounded: it is no operator of ONNX itself")
    inner = [helper.make_node("Identity", ["x"], ["z"])]
    branch = helper.make_graph(inner, "branch", [], [helper.make_empty_tensor_value_info("z")])
    choice = node("If", ["c"], then_branch=branch, else_branch=branch)
    path = made(tmp_path / "b.onnx", [choice], [constant("c", True, bool)])
    refused(path, "layer my If: If cannot be bounded: what is computed hangs on")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shape": (4, 4)}, r"its input has the shape \(N, 4, 4\); expected images \(B, C, H, W\)"),
        ({"shape": (1, "H", 4)}, r"\(N, 1, H, 4\); expected fixed numbers for all but the batch"),
        ({"inputs": [onnx.helper.make_tensor_value_info("more", FLOAT, [1])]}, "it has 2 inputs and 1 output"),
    ],
)
def test_what_is_no_classifier_of_images_is_refused(options, message, tmp_path):
    refused(made(tmp_path / "x.onnx", [node("Relu", ["x"])], **options), message)


def test_files_that_are_no_onnx_are_called_what_they_are(tmp_path):
    path = tmp_path / "x.onnx"
    refused(path, "no such file")
    refused(tmp_path, "not an ONNX file, but a folder")
    torch.save({"w": torch.ones(2)}, path)
    refused(path, "not an ONNX file, but weights that torch.save wrote")
    for content, message in {
        b"": "but empty",
        b"<html></html>": "but a web page",
        b"1,2,3\n": "but a CSV file",
        b"version https://git-lfs.github.com/spec/v1": "but a Git LFS pointer",
        b"\x00\xff" * 40: "not an ONNX file",
        b"\x08\x08": "not an ONNX file",
    }.items():
        path.write_bytes(content)
        refused(path, message)
    whole = made(path, [node("Conv", ["x", "w"])], weights(w=KERNEL)).read_bytes()
    for length in range(10, len(whole), 29):
        path.write_bytes(whole[:length])
        refused(path, "damaged|not an ONNX file")


def external(folder, location="weights.bin", **entries):
    """A file whose kernel lies beside it."""
    tensor = constant("w", KERNEL)
    (folder / "weights.bin").write_bytes(tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in {"location": location, **entries}.items():
        entry = tensor.external_data.add()
        entry.key, entry.value = key, str(value)
    return made(folder / "x.onnx", [node("Conv", ["x", "w"])], [tensor])


def test_weights_beside_the_file(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    expected = functional.conv2d(images(), torch.from_numpy(KERNEL.astype(np.float32)).double())
    found = read_onnx(external(folder))(images())
    torch.testing.assert_close(found, 3 * expected.mean((2, 3)), rtol=1e-12, atol=1e-12)
    refused(external(folder, length=480), "weights in weights.bin are truncated")
    refused(external(folder, length=16), "damaged")
    refused(external(folder, "gone.bin"), "should lie beside it in gone.bin, which is missing")
    (tmp_path / "outside.bin").write_bytes((folder / "weights.bin").read_bytes())
    (folder / "link.bin").symlink_to(tmp_path / "outside.bin")
    for location in ("../outside.bin", str(tmp_path / "outside.bin"), "link.bin", "../model/../outside.bin", ".", ""):
        refused(external(folder, location), "outside its folder")


@pytest.mark.parametrize("factor", [1 + 1e-4, 2.0])
def test_a_graph_that_differs_from_the_file_is_refused(factor, tmp_path, monkeypatch):
    monkeypatch.setitem(OPERATORS, "Relu", lambda call: call.builder.scale(call.builder.relu(call.value), factor))
    refused(made(tmp_path / "x.onnx", [node("Relu", ["x"])]), "does not reproduce the file on a batch of 1", RunError)


def test_without_the_package(tmp_path, monkeypatch):
    path = made(tmp_path / "x.onnx", [node("Relu", ["x"])])
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(RunError, match="install it with: pip install onnx"):
        read_onnx(path)
