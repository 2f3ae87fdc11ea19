"""What a GPU computes is what the CPU computes; left out where there is none."""

from __future__ import annotations

import copy
import dataclasses
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional

import grood_cert as gc
from grood_cert.attacks import AttackEffort, minimum_norm
from grood_cert.ball import NORMS, Ball
from grood_cert.bounds.engines import build
from grood_cert.bounds.score import score_bounds
from grood_cert.certification.smoothing import Smoother, SmoothingSettings
from grood_cert.data import experiment_of
from grood_cert.networks import architectures
from grood_cert.runs.batches import generator
from grood_cert.sections import ObjectiveSection
from grood_cert.training import run as training
from grood_cert.training.objective import objective
from grood_cert.training.step import tf32
from tests.training.examples import small

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

SHAPE = (3, 8, 8)
NETWORKS = {
    "conv-small": {"width": 4},
    "resnet-small": {"width": 4},
    "mlp": {"width": 16, "hidden_layers": 2},
}


def network(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    made = architectures.build(name, SHAPE, 4, [0.5] * 3, [0.25] * 3, **NETWORKS[name]).to(dtype)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(1.5)
    return made.eval()


def detector(name: str) -> gc.Detector:
    made = network(name).requires_grad_(False)
    scores = -torch.logsumexp(made(images(31)), 1)
    return gc.Detector(made, float(scores.median()), SHAPE)


def there(found: gc.Detector) -> gc.Detector:
    return gc.Detector(copy.deepcopy(found.network).cuda(), found.gamma, found.shape)


def images(count: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("method", ["ibp", "crown-ibp", "crown"])
@pytest.mark.parametrize("engine", ["native", "auto_lirpa"])
def test_bounds_are_those_of_the_cpu(name, norm, method, engine):
    eps = {"linf": 0.01, "l2": 0.1, "l1": 0.3}[norm]
    found = {}
    for device in ("cpu", "cuda"):
        bounded = build(engine, network(name).to(device), SHAPE, method).bounded
        ball = Ball(images(6).to(device), torch.full((6,), eps, dtype=torch.float64, device=device), norm)
        bounds = score_bounds(bounded, ball, method)
        assert bounds.lower.device.type == device and bounds.lower.dtype == torch.float64
        found[device] = torch.stack([bounds.lower, bounds.upper]).cpu()
    assert bool(torch.isfinite(found["cpu"]).all())
    torch.testing.assert_close(found["cuda"], found["cpu"], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("effort", ["fast", "default"])
def test_certificates_and_attacks_of_both_bracket_one_another(name, norm, effort):
    """A ball proved on one holds no point that the other found; radii are the same but for what attacks were lucky in."""
    grid = [0.002, 0.01] if norm == "linf" else [0.02, 0.1]
    here = detector(name)
    both = [gc.certify(made, images(8), grid, norm=norm, effort=effort) for made in (here, there(here))]
    (cpu, gpu) = both
    assert not cpu.failures and not gpu.failures
    torch.testing.assert_close(gpu.score.cpu(), cpu.score, rtol=1e-9, atol=1e-9)
    for one, other in ((cpu, gpu), (gpu, cpu)):
        assert bool((one.radius.cpu() <= other.attack_radius.cpu() * (1 + 1e-9)).all())
    assert float(gpu.radius.median()) == pytest.approx(float(cpu.radius.median()), rel=0.05)
    assert float(gpu.attack_radius.median()) == pytest.approx(float(cpu.attack_radius.median()), rel=0.05)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", NETWORKS)
def test_lipschitz_bounds_are_those_of_the_cpu(name, norm):
    constants = [
        gc.lipschitz_bound(network(name).to(device), images(4), 0.01, norm).cpu() for device in ("cpu", "cuda")
    ]
    torch.testing.assert_close(constants[1], constants[0], rtol=1e-7, atol=1e-9)


def test_attacks_end_where_the_decision_is_another():
    found = there(detector("conv-small"))
    points = minimum_norm(
        found.network, images(6).cuda(), found.gamma, "l2", generator(0, 0), AttackEffort.preset("fast")
    )
    assert points.points.device.type == "cuda"
    reached = torch.isfinite(points.radius)
    assert bool(reached.any())
    flipped = found.predict(points.points).accepted != found.predict(images(6)).accepted
    assert bool(flipped[reached.cpu()].all())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_smoothed_scores_are_those_of_the_cpu(dtype):
    """Other draws of the same noise: the medians differ by what n draws leave open."""
    here, settings = detector("conv-small"), SmoothingSettings(0.1, (0.0,), n=4000, alpha=1e-3, dtype=dtype)
    medians, spread = [], []
    for made in (here, there(here)):
        draws = Smoother(made, settings).draws(images(1)[0], "test", "x", 0)
        medians.append(float(torch.as_tensor(draws).median()))
        spread.append(float(torch.as_tensor(draws).std()))
    assert medians[0] == pytest.approx(medians[1], abs=6 * 1.2533 * 2**0.5 * max(spread) / 4000**0.5 + 0.02)


# Training.

MARGINS = ObjectiveSection(lambda_grad=0.5, m_in=-1.0, m_out=-2.0)


def gradient(
    device: str, dtype: torch.dtype, section: ObjectiveSection, allowed: bool = False, name: str = "resnet-small"
) -> tuple[float, torch.Tensor]:
    made = network(name, dtype).to(device)
    pixels, labels = images(24, dtype).to(device), (torch.arange(12) % 4).to(device)
    with tf32(allowed):
        total = objective(
            made.train(), pixels[:12], labels, pixels[12:], section, generator=torch.Generator().manual_seed(0)
        ).total
        parts = torch.autograd.grad(total, list(made.parameters()), allow_unused=True)
    return float(total.detach()), torch.cat([part.flatten() for part in parts if part is not None]).double().cpu()


@pytest.mark.parametrize("penalty", ["exact", "fast", "stochastic"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_objective_is_that_of_the_cpu_in_float64(penalty, dtype):
    section = dataclasses.replace(MARGINS, penalty=penalty)
    value, expected = gradient("cpu", torch.float64, dataclasses.replace(section, penalty="exact"))
    if penalty == "stochastic":
        value, expected = gradient("cpu", torch.float64, section)
    got, found = gradient("cuda", dtype, section)
    assert got == pytest.approx(value, rel=1e-4)
    error = float((found - expected).norm() / expected.norm())
    assert error < (1e-2 if penalty == "fast" else 1e-9 if dtype == torch.float64 else 1e-3)


def test_tf32_rounds_on_the_card_and_fast_allows_for_it():
    exact = gradient("cuda", torch.float32, MARGINS)[1]
    rounded = gradient("cuda", torch.float32, MARGINS, allowed=True)[1]
    fast = gradient("cuda", torch.float32, dataclasses.replace(MARGINS, penalty="fast"), allowed=True)[1]
    if torch.cuda.get_device_capability() >= (8, 0):
        assert not torch.equal(exact, rounded)
    assert float(functional.cosine_similarity(fast, exact, dim=0)) > 0.99


def test_the_certified_term_is_that_of_the_cpu():
    section = dataclasses.replace(
        MARGINS, lambda_grad=0.0, certified="both", certified_eps=0.02, certified_mix=1.0, certified_ramp=0.0
    )
    value, expected = gradient("cpu", torch.float64, section, name="conv-small")
    got, found = gradient("cuda", torch.float32, section, name="conv-small")
    assert got == pytest.approx(value, rel=1e-4)
    assert float((found - expected).norm() / expected.norm()) < 1e-3


COMPUTE = {
    "float32": {},
    "tf32": {"precision": "tf32"},
    "bf16": {"precision": "bf16", "channels_last": True},
    "compiled": {"precision": "bf16", "compile": True},
}


@pytest.mark.parametrize("compute", COMPUTE)
def test_a_run_ends_with_a_detector_that_the_cpu_reads(compute, tmp_path):
    recipe = small(
        network={"name": "resnet-small", "width": 4},
        objective={"penalty": "fast", "lambda_grad": 0.1},
        compute=COMPUTE[compute],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        training.run(recipe, tmp_path / "run", device="cuda")
    model = tmp_path / "run" / "model.pt"
    here, moved = gc.load(model), gc.load(model, "cuda")
    test = experiment_of(recipe).test.images[:50]
    torch.testing.assert_close(moved.predict(test).score, here.predict(test).score, rtol=1e-9, atol=1e-9)
    assert (tmp_path / "run" / "log.csv").read_text().count("\n") == 3


def test_sampling_and_certified_terms_train(tmp_path):
    for name, sections in {
        "plus": {"sampling": {"method": "energy", "pool": 80}},
        "mix": {
            "objective": {"certified": "both", "certified_eps": 0.02, "lambda_certified": 0.1, "certified_mix": 0.3}
        },
    }.items():
        training.run(small(**sections), tmp_path / name, device="cuda")
        assert gc.load(tmp_path / name / "model.pt").gamma < 0


def test_an_interrupted_run_goes_on(tmp_path, monkeypatch):
    recipe = small(optimizer={"epochs": 3})
    calls = []

    class Stop(Exception):
        pass

    def stop(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise Stop
        return real(*arguments)

    from grood_cert.training import loop

    real = loop.watch
    with monkeypatch.context() as patched, pytest.raises(Stop):
        patched.setattr(loop, "watch", stop)
        training.run(recipe, tmp_path / "run", device="cuda")
    training.run(recipe, tmp_path / "run", device="cuda", resume=True)
    training.run(recipe, tmp_path / "whole", device="cuda")
    resumed, whole = (gc.load(tmp_path / name / "model.pt") for name in ("run", "whole"))
    for key, value in whole.network.state_dict().items():
        torch.testing.assert_close(resumed.network.state_dict()[key], value, rtol=1e-3, atol=1e-4)
