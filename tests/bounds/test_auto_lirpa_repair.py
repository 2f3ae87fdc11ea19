"""What is done to auto_LiRPA before it runs leaves everything else as it was."""

import importlib.metadata
import os
import subprocess
import sys
import textwrap

import pytest

from grood_cert.bounds.auto_lirpa_repair import is_old, version
from grood_cert.errors import RunError


def test_a_missing_library_names_the_command_that_installs_it(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(RunError, match=r"not installed; run: pip install --no-deps auto-LiRPA==0\.3"):
        version()


_SNAPSHOT = """
import logging, os, sys, threading, warnings
import numpy, numpy.random, random
import torch, torch.onnx, torch.onnx.utils, torch.onnx.symbolic_helper
import torch.optim; torch.optim.Adam([torch.zeros(1, requires_grad=True)])  # brings in what torch imports late
from grood_cert.bounds import auto_lirpa, auto_lirpa_repair
from grood_cert.ball import Ball
from grood_cert.networks.architectures import build

def globals_of_exporter():
    return dict(vars(auto_lirpa_repair._exporter_globals()))

def switch(function):
    state = function(True); function(state)
    return state

def snapshot():
    root = logging.getLogger()
    return {
        "modules": {n: id(sys.modules.get(n)) for n in ("numpy.lib.arraysetops", "appdirs", "setuptools",
                    "torch.utils.cpp_extension", "distutils") if auto_lirpa_repair.is_old()},
        "onnx": {n: dict(vars(sys.modules[n])) for n in ("torch.onnx", "torch.onnx.utils", "torch.onnx.symbolic_helper")},
        "node": sorted(dir(torch._C.Node)), "graph": sorted(dir(torch._C.Graph)), "torch": sorted(dir(torch)),
        "exporter": globals_of_exporter(),
        "filters": list(warnings.filters), "showwarning": warnings.showwarning,
        "logging": (list(root.handlers), root.level, logging.root.manager.disable),
        "dtype": torch.get_default_dtype(), "grad": torch.is_grad_enabled(),
        "jit": [switch(torch._C._jit_set_profiling_executor), switch(torch._C._jit_set_profiling_mode)],
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads(), threading.active_count()),
        "torch rng": torch.get_rng_state().tolist(),
        "numpy rng": numpy.random.get_state()[1].tolist(), "rng": random.getstate(),
        "numpy errors": numpy.geterr(), "environment": dict(os.environ), "streams": (sys.stdout, sys.stderr),
        "path": list(sys.path), "deterministic": torch.are_deterministic_algorithms_enabled(),
        "tensor": sorted(vars(torch.Tensor)), "module": {n: id(v) for n, v in vars(torch.nn.Module).items()},
    }

before = snapshot()
torch.manual_seed(5); random.seed(5); numpy.random.seed(5)
network = build("conv-small", (1, 4, 4), 3, [0.3], [0.4], width=2).eval()
before.update({n: v for n, v in snapshot().items() if "rng" in n})
for method in METHODS:
    relaxation = auto_lirpa.LirpaNetwork(network, (1, 4, 4), method).relax(
        Ball(torch.full((2, 1, 4, 4), 0.5), torch.full((2,), 0.1), "l2"))
    relaxation.rows(torch.ones(2, 1, 3))
    try:
        relaxation.rows(torch.ones(2, 1, 7))
        raise SystemExit("a wrong shape was accepted")
    except RuntimeError:
        pass
after = snapshot()
for name in before:
    if isinstance(before[name], dict):
        changed = [k for k in {*before[name], *after[name]} if before[name].get(k) is not after[name].get(k)
                   and before[name].get(k) != after[name].get(k)]
        assert not changed, (name, changed)
    assert before[name] == after[name], (name, before[name], after[name])
assert not os.listdir(os.environ["HOME"]), os.listdir(os.environ["HOME"])
"""


@pytest.mark.skipif(not is_old(), reason="later versions are used as they are, with what their import changes")
def test_nothing_global_is_changed_and_nothing_is_printed(tmp_path):
    """Import, builds, bounds and failing bounds in a fresh interpreter, with an empty home."""
    code = "METHODS = 'ibp', 'crown'\n" + textwrap.dedent(_SNAPSHOT)
    environment = {
        **os.environ,
        "HOME": str(tmp_path),
        "XDG_DATA_HOME": "",
        "PYTHONWARNINGS": "default",
    }
    environment.pop("XDG_DATA_HOME")
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == ""
    ours = [line for line in done.stderr.splitlines() if line.strip()]
    assert not ours, done.stderr[-3000:]
