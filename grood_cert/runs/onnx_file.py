"""Write a network as ONNX, and check the file against it.

The older of torch's exporters is used: it needs no package but onnx, and told to preserve the mode it leaves BatchNorm
as it is, where folding it would round the weights.
"""

from __future__ import annotations

import copy
import importlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from grood_cert.errors import RunError, said
from grood_cert.networks.onnx import INSTALL_COMMAND
from grood_cert.system.files import replacing

_OPSET = 15  # below 14, the evaluator of onnx takes BatchNorm to be training
_AGREEMENT = 1e-4  # of float32 with float64, relative to the largest output


def write_onnx(network: nn.Module, images: Tensor, path: Path, *, any_batch: bool) -> float:
    """Write a network as ONNX, in float32, with input X and output Y.

    Args:
        network: In eval mode; a copy of it is exported.
        images: Inputs on which the file, run by onnxruntime if it is installed or else by onnx itself, must agree with
            the network in float64; shape (B, C, H, W).
        path: Where to write.
        any_batch: Leave the number of images open; without it, the file takes one at a time.

    Returns:
        The largest difference of an output from the network's in float64 on these images, relative to 1 + the largest.

    Raises:
        RunError: If onnx is missing, torch cannot export the network, or the file disagrees with it; nothing is then
            written.
    """
    try:
        onnx = importlib.import_module("onnx")
    except ImportError:
        raise RunError(f"writing ONNX needs the package onnx; install it with: {INSTALL_COMMAND}") from None
    module = copy.deepcopy(network).cpu().float().eval()
    inputs = images.cpu().float()
    with replacing(path) as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this exporter is the older one
        try:
            torch.onnx.export(
                module,
                (inputs[:1],),
                str(temporary),
                dynamo=False,
                opset_version=_OPSET,
                input_names=["X"],
                output_names=["Y"],
                dynamic_axes={"X": {0: "N"}, "Y": {0: "N"}} if any_batch else None,
                training=torch.onnx.TrainingMode.PRESERVE,
                do_constant_folding=False,
            )
            onnx.checker.check_model(str(temporary), full_check=True)
            run = _session(temporary)
            batches = [inputs[:1], inputs] if any_batch else inputs.split(1)
            got = np.concatenate([run(batch.numpy()) for batch in batches])
        except Exception as error:
            reason = said(error)[:160]
            raise RunError(f"the network could not be exported ({type(error).__name__}: {reason})") from error
        with torch.no_grad():
            wanted = torch.cat([module.double()(batch.double()) for batch in batches]).numpy()
        scale = 1 + np.abs(wanted).max()
        difference = float(np.abs(got - wanted).max() / scale) if got.shape == wanted.shape else np.inf
        if not difference <= _AGREEMENT:
            raise RunError("the exported network disagrees with the model; nothing was written")
    return difference


def _session(path: Path) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
    try:
        runtime = importlib.import_module("onnxruntime")
    except ImportError:
        session: Any = importlib.import_module("onnx.reference").ReferenceEvaluator(str(path))
    else:
        session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"X": images})[0]
