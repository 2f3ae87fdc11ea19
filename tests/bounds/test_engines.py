"""Which engine bounds a network, and that auto_LiRPA is needed by its users only."""

import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

from grood_cert.ball import Ball
from grood_cert.bounds.auto_lirpa import LirpaNetwork
from grood_cert.bounds.engines import build
from grood_cert.errors import InputError
from grood_cert.networks.architectures import build as network_of

SHAPE = (1, 4, 4)


class Reshaped(nn.Module):
    """Flattened in a way that the native engine does not take."""

    def __init__(self, last):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(16, 6), last, nn.Linear(6, 3))

    def forward(self, images):
        return self.layers(images.reshape(-1, 16))


def reshaped(last):
    torch.manual_seed(0)
    return Reshaped(last).double().eval()


def test_auto_takes_the_native_engine():
    network = network_of("conv-small", SHAPE, 3, [0.5], [0.5], width=2).eval()
    choice = build("auto", network, SHAPE, "crown")
    assert (choice.engine, choice.note) == ("native", "")
    assert build("auto_lirpa", network, SHAPE, "crown").engine == "auto_lirpa"


def test_auto_takes_auto_lirpa_where_the_native_engine_cannot_and_says_so():
    network = reshaped(nn.ReLU())
    with pytest.raises(InputError):
        build("native", network, SHAPE, "crown")
    choice = build("auto", network, SHAPE, "crown")
    assert choice.engine == "auto_lirpa"
    assert choice.note.startswith("bounds by auto_LiRPA, since the native engine cannot take the network: ")
    ball, rows = Ball(torch.rand(2, *SHAPE).double(), 0.05, "linf"), torch.eye(3).double().expand(2, -1, -1)
    theirs = LirpaNetwork(network, SHAPE, "crown").relax(ball).rows(rows)
    for one, other in zip(choice.bounded.relax(ball).rows(rows), theirs, strict=True):
        assert torch.equal(one, other)


class Moody(nn.Module):
    """Adds 40 to all logits of dark images: a trace at a bright one knows nothing of it."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))

    def forward(self, images):
        logits = self.layers(images)
        return logits if float(images.mean()) > 0.3 else logits + 40


def test_auto_never_hands_conditions_on_to_an_engine_that_follows_one_path():
    for engine in ("auto", "native"):
        with pytest.raises(InputError, match=r"cannot be traced into a graph: .*; write it without conditions"):
            build(engine, Moody().double().eval(), (1, 4, 4), "crown")


def test_where_neither_can_both_reasons_are_named():
    with pytest.raises(InputError, match=r"^no engine can bound this network: native: .*; auto_lirpa: .*"):
        build("auto", reshaped(nn.Softsign()), SHAPE, "crown")


@pytest.mark.parametrize("engine", ["auto", "native", "auto_lirpa"])
def test_a_network_in_train_mode_is_refused(engine):
    network = network_of("mlp", SHAPE, 3, [0.5], [0.5])
    with pytest.raises(InputError, match=r"is in train mode; call network\.eval\(\) first"):
        build(engine, network.train(), SHAPE, "crown")
    with pytest.raises(InputError, match="unknown method 'magic'; use one of ibp, crown-ibp, crown"):
        build(engine, network.eval(), SHAPE, "magic")


def test_an_unknown_engine_is_refused():
    with pytest.raises(InputError, match="unknown engine 'steam'; use one of auto, native, auto_lirpa"):
        build("steam", network_of("mlp", SHAPE, 3, [0.5], [0.5]).eval(), SHAPE, "crown")


HIDDEN = """
    import importlib.metadata, sys
    import torch

    class Blocked:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] == "auto_LiRPA":
                raise ModuleNotFoundError(name)

    sys.meta_path.insert(0, Blocked())
    real = importlib.metadata.version

    def version(name):
        if name.lower() == "auto-lirpa":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    importlib.metadata.version = version
"""


def without_auto_lirpa(code):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(HIDDEN) + textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_without_auto_lirpa_everything_else_is_there():
    out = without_auto_lirpa("""
        import pkgutil, importlib
        import grood_cert
        for found in pkgutil.walk_packages(grood_cert.__path__, "grood_cert."):
            if not found.name.endswith("__main__"):
                importlib.import_module(found.name)
        from grood_cert.bounds.engine import lirpa_version
        from grood_cert.bounds.engines import build
        from grood_cert.errors import RunError
        from grood_cert.networks.architectures import build as network_of
        network = network_of("mlp", (1, 4, 4), 3, [0.5], [0.5]).eval()
        print(lirpa_version(), [build(name, network, (1, 4, 4), "crown").engine for name in ("auto", "native")])
        try:
            build("auto_lirpa", network, (1, 4, 4), "crown")
        except RunError as error:
            print(error)
    """)
    assert out.splitlines() == [
        "None ['native', 'native']",
        "this engine needs auto_LiRPA, which is not installed; run: pip install --no-deps auto-LiRPA==0.3",
    ]
