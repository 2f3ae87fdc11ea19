"""Which engine bounds a network, and that auto_LiRPA is needed by its users only."""

import subprocess
import sys
import textwrap

import pytest
from torch import nn

from grood_cert.bounds.engines import ENGINES, build
from grood_cert.errors import InputError, RunError
from grood_cert.networks.architectures import build as network_of

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
                try:
                    importlib.import_module(found.name)
                except ModuleNotFoundError as error:
                    assert error.name in ("pytorch_ood", "foolbox"), error  # optional, and what the module is for
        from grood_cert.bounds.engine import lirpa_version
        from grood_cert.bounds.engines import ENGINES, build
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
