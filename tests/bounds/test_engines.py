"""Which engine bounds a network, and that auto_LiRPA is needed by its users only."""

import importlib.metadata
import pkgutil
import sys
import warnings

import pytest
from torch import nn

from grood_cert.bounds.engines import ENGINES, build
from grood_cert.errors import InputError, RunError
from grood_cert.networks.architectures import build as network_of
from tests.faults.forks import Child, forget, report

SHAPE = (1, 4, 4)


def test_auto_takes_the_native_engine():
    network = network_of("conv-small", SHAPE, 3, [0.5], [0.5], width=2).eval()
    choice = build("auto", network, SHAPE, "crown")
    assert choice.engine == "native"
    assert build("auto_lirpa", network, SHAPE, "crown").engine == "auto_lirpa"


class Moody(nn.Module):
    """Adds 40 to all logits of dark images: a trace at a bright one knows nothing of it."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))

    def forward(self, images):
        logits = self.layers(images)
        return logits if float(images.mean()) > 0.3 else logits + 40


def test_no_engine_follows_one_path_of_python_conditions():
    for engine in ENGINES:
        with pytest.raises(InputError, match="Python conditions or numbers hang on values of the image"):
            build(engine, Moody().double().eval(), (1, 4, 4), "crown")


def test_what_auto_lirpa_lacks_is_said_with_the_way_out():
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 4), nn.SiLU(), nn.Linear(4, 2)).eval()
    with pytest.raises(RunError, match="the native engine bounds it: --engine native"):
        build("auto_lirpa", network, SHAPE, "crown")
    assert build("native", network, SHAPE, "crown").engine == "native"


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


class Blocked:
    """Finds no auto_LiRPA."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "auto_LiRPA":
            raise ModuleNotFoundError(name)


def without_auto_lirpa():
    """In a child."""
    warnings.simplefilter("ignore")
    forget("grood_cert", "auto_LiRPA")
    sys.meta_path.insert(0, Blocked())
    real = importlib.metadata.version

    def version(name):
        if name.lower() == "auto-lirpa":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    importlib.metadata.version = version
    for found in pkgutil.walk_packages(importlib.import_module("grood_cert").__path__, "grood_cert."):
        if not found.name.endswith("__main__"):
            try:
                importlib.import_module(found.name)
            except ModuleNotFoundError as error:
                assert error.name in ("pytorch_ood", "foolbox"), error  # optional, and what the module is for
    from grood_cert.bounds.engine import lirpa_version
    from grood_cert.bounds.engines import build
    from grood_cert.errors import RunError
    from grood_cert.networks.architectures import build as network_of

    network = network_of("mlp", SHAPE, 3, [0.5], [0.5]).eval()
    report(f"{lirpa_version()} {[build(name, network, SHAPE, 'crown').engine for name in ('auto', 'native')]}")
    try:
        build("auto_lirpa", network, SHAPE, "crown")
    except RunError as error:
        report(str(error))


def test_without_auto_lirpa_everything_else_is_there():
    ended = Child(without_auto_lirpa).wait()
    assert ended.code == 0, ended.said
    assert list(ended.heard) == [
        "None ['native', 'native']",
        "this engine needs auto_LiRPA, which is not installed; run: pip install --no-deps auto-LiRPA==0.3",
    ]
