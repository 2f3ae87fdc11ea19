"""The run around the Lipschitz numerics: rows, chain check, figure, objective and radii in certification."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from grood_cert import detector
from grood_cert.ball import Ball
from grood_cert.certification import stages
from grood_cert.certification.cascade import Cascade
from grood_cert.certification.settings import Settings
from grood_cert.data import experiment_of
from grood_cert.errors import InputError, SoundnessError
from grood_cert.lipschitz import analyser as analysis
from grood_cert.lipschitz.bound import METHODS
from grood_cert.results import figures
from grood_cert.results.columns import SCHEMAS
from grood_cert.results.table import Table
from grood_cert.runs import analyse
from grood_cert.runs import certify as certification
from grood_cert.runs.batches import generator
from grood_cert.scores import gradient_norm_estimate
from grood_cert.sections import ObjectiveSection
from grood_cert.training import objective

SETTINGS = analysis.AnalysisSettings(eps=(0.0, 0.01, 0.04), samples=32, clever_batches=4, ascents=2)
LIMIT = 2  # samples of a set


@pytest.fixture(scope="module")
def loaded(mlp_model):
    return detector.load(mlp_model)


@pytest.fixture(scope="module")
def sets(loaded):
    experiment = experiment_of(loaded.origin.recipe)
    return [experiment.test, experiment.ood[0]]


@pytest.fixture(scope="module")
def result_file(loaded, mlp_model, sets, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lipschitz")
    analyse.run(loaded, mlp_model, sets, SETTINGS, folder, limit=LIMIT)
    return folder / "lipschitz.csv"


@pytest.fixture(scope="module")
def result(result_file):
    return Table.read(result_file, "lipschitz")


def column(result, name, **where):
    chosen = np.ones(len(result), bool)
    for key, value in where.items():
        chosen &= result[key] == value
    return result[name][chosen]


def test_one_row_for_each_sample_and_eps(result):
    assert len(result) == 2 * LIMIT * 3
    assert list(dict.fromkeys(result["kind"])) == ["id", "ood"]
    assert set(result.columns) == set(SCHEMAS["lipschitz"].columns)
    assert result.manifest["norm"] == "linf" and result.manifest["recipe"]["objective"]["lambda_grad"] == 0.1


def test_estimates_lie_below_bounds_and_bounds_grow_with_eps(result):
    lower = np.max([column(result, name) for name in analysis._LOWER], axis=0)
    for name in ("bound", *(f"bound_{method.replace('-', '_')}" for method in METHODS)):
        assert (lower <= column(result, name) * (1 + 1e-9)).all()
    for index in range(LIMIT):
        along = [column(result, "bound", kind="id", eps=eps)[index] for eps in SETTINGS.eps]
        assert along == sorted(along)
    ratio = column(result, "bound", eps=0.01) / column(result, "ascended_estimate", eps=0.01)
    assert np.median(ratio) < 1.3


def test_at_eps_zero_the_bound_is_the_gradient_norm(result, loaded, sets):
    names = column(result, "index", kind="id", eps=0.0).astype(int)
    expected = gradient_norm_estimate(loaded.network, sets[0].images[names].double(), "linf").numpy()
    np.testing.assert_allclose(column(result, "bound", kind="id", eps=0.0), expected, rtol=1e-9)
    np.testing.assert_allclose(column(result, "gradient_norm_estimate", kind="id", eps=0.04), expected, rtol=1e-9)


def test_the_bound_limits_what_a_certified_network_can_do(result, loaded, sets):
    """Secants to points an attack of the certifier finds, drawn anew, stay below the bound."""
    from grood_cert import attacks

    names = column(result, "index", kind="id", eps=0.04).astype(int)
    images = sets[0].images[names].double()
    ball = Ball(images, torch.full((LIMIT,), 0.04).double(), "linf")
    (seen,) = attacks.extremes(loaded.network, [ball], torch.Generator().manual_seed(9))
    rise = (seen.maximum - loaded.scores(images)) / ball.distance(seen.argmax)
    bound = torch.tensor(column(result, "bound", kind="id", eps=0.04))
    head = torch.tensor(column(result, "bound_fixed_head", kind="id", eps=0.04))
    assert bool((rise <= bound).all()) and bool((rise <= head).all())


def test_a_bound_below_an_estimate_stops_the_run(loaded, mlp_model, sets, tmp_path, monkeypatch):
    real = analysis.local_lipschitz

    def halved(*arguments, **options):
        found = real(*arguments, **options)
        return replace(found, methods={**found.methods, "interval": found.methods["interval"] / 5})

    monkeypatch.setattr(analysis, "local_lipschitz", halved)
    with pytest.raises(SoundnessError, match="exceed bound_interval at eps") as caught:
        analyse.run(loaded, mlp_model, sets, SETTINGS, tmp_path, limit=2)
    with np.load(caught.value.counterexample) as archive:
        evidence = dict(archive)
    assert (evidence["ascended_estimate"] > evidence["bound_interval"]).any()
    assert [entry.name for entry in tmp_path.iterdir()] == ["counterexample.npz"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eps": (-0.1,)}, "eps -0.1: expected a number from 0"),
        ({"eps": (0.2, 0.1)}, "ascending"),
        ({"samples": 0}, "samples must be 1 or more, got 0"),
        ({"clever_batches": -1}, "clever batches must be 0 or more"),
        ({"memory": 10}, "memory must be 65536 or more"),
        ({"norm": "l7"}, "unknown norm"),
    ],
)
def test_settings_are_checked(loaded, changes, message):
    with pytest.raises(InputError, match=message):
        analysis.Analyser(loaded, replace(SETTINGS, **changes))


def test_a_network_in_train_mode_or_with_dropout_is_refused(loaded):
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(0.5), torch.nn.Linear(64, 6)).double()
    with pytest.raises(InputError, match="is in train mode; call network"):
        analysis.Analyser(replace(loaded, network=network), SETTINGS)
    strange = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LayerNorm(64), torch.nn.Linear(64, 6)).double().eval()
    with pytest.raises(InputError, match="layer_norm"):
        analysis.Analyser(replace(loaded, network=strange), SETTINGS)


def test_a_ball_outside_the_pixel_box_is_refused():
    with pytest.raises(InputError, match=r"pixels in \[0, 1\]"):
        Ball(torch.full((1, 1, 2, 2), 1.2), torch.tensor([0.1]), "linf")


@pytest.mark.parametrize("damage", [lambda t: t.replace("bound_hull", "x"), lambda t: t[: len(t) // 2], lambda t: ""])
def test_damaged_analyses_are_refused(result_file, tmp_path, damage):
    (tmp_path / "lipschitz.json").write_text(result_file.with_suffix(".json").read_text())
    (tmp_path / "lipschitz.csv").write_text(damage(result_file.read_text()))
    with pytest.raises(InputError, match=r"not the rows of a Lipschitz analysis|holds no rows"):
        Table.read(tmp_path / "lipschitz.csv", "lipschitz")
    with pytest.raises(InputError, match="no such file; write it with: grood-cert lipschitz"):
        Table.read(tmp_path / "other.csv", "lipschitz")


def test_figure_and_table(result, tmp_path):
    models = {"one": result, "two": result}
    drawing = figures.lipschitz(models)
    drawn = [
        line.get_ydata() for line in drawing.axes[1].lines if line.get_linestyle() == "-" and len(line.get_xdata()) > 1
    ]
    expected = [np.median(column(result, "bound", kind="ood", eps=eps)) for eps in SETTINGS.eps]
    assert [list(values) for values in drawn] == [expected, expected]
    figures.save(drawing, tmp_path / "x.png")
    figures.write_numbers(figures.numbers(models), tmp_path / "x.csv")
    assert len((tmp_path / "x.csv").read_text().splitlines()) == 1 + 2 * 2 * 3


# The objective


def test_interval_slope_at_radius_zero_is_greg():
    """One formula by two ways: double backward, and one interval pass through the transposed network."""
    torch.manual_seed(0)
    from grood_cert.networks import architectures

    network = architectures.build("conv-small", (1, 8, 8), 4, [0.3], [0.3], width=3).double()
    images, outliers = torch.rand(6, 1, 8, 8).double(), torch.rand(9, 1, 8, 8).double()
    labels = torch.arange(6) % 4
    found = []
    for slope in ("gradient-norm", "interval"):
        weights = ObjectiveSection(0.1, 0.5, m_in=-1.0, m_out=-2.0, slope=slope, slope_eps=0.0)
        network.zero_grad()
        terms = objective.objective(network, images, labels, outliers, weights)
        terms.total.backward()
        found.append((terms.gradient, [parameter.grad.clone() for parameter in network.parameters()]))
    (point, point_gradients), (interval, interval_gradients) = found
    torch.testing.assert_close(interval, point, rtol=1e-9, atol=0)
    for one, other in zip(point_gradients, interval_gradients, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-6, atol=1e-9)


def test_interval_slope_grows_with_its_radius():
    from grood_cert.networks import architectures

    torch.manual_seed(0)
    network = architectures.build("mlp", (1, 8, 8), 4, [0.3], [0.3], width=16)
    images, outliers = torch.rand(6, 1, 8, 8), torch.rand(6, 1, 8, 8)
    slopes = [
        float(
            objective.objective(
                network,
                images,
                torch.zeros(6).long(),
                outliers,
                ObjectiveSection(0.1, 1.0, m_in=9.0, m_out=-9.0, slope="interval", slope_eps=eps),
            ).gradient
        )
        for eps in (0.0, 0.05, 0.2)
    ]
    assert slopes[0] < slopes[1] < slopes[2]


# Radii in certification

LIPSCHITZ = Settings(eps=(0.01,), stages=("crown", "lipschitz"), effort="fast")


@pytest.mark.parametrize("norm", ["linf", "l1"])
def test_lipschitz_radii_stand_beside_the_others(loaded, mlp_model, sets, tmp_path, quick_attacks, norm):
    settings = Settings(eps=(0.02,), norm=norm, stages=("crown", "lipschitz"), engine="native")
    certification.run(loaded, mlp_model, sets, settings, tmp_path, limit=2)
    found = Table.read(tmp_path / "rows.csv")
    right = found["status"] != "misdecided"
    for name in ("radius_lipschitz_fixed_point", "radius_lipschitz_path"):
        assert (found[name][right] > 0).all() and (found[name] <= found["radius_attack"]).all()
        assert (found[name][~right] == 0).all()
    assert np.median(found["radius_lipschitz_path"][right] / found["radius_lipschitz_fixed_point"][right]) > 0.95
    assert found.manifest["failures"] == {}


def test_lipschitz_radii_are_empty_unless_asked_for(rows_file):
    found = Table.read(rows_file)
    assert np.isnan(found["radius_lipschitz_path"]).all() and "lipschitz" not in found.manifest["stages"]


def test_a_lipschitz_radius_beyond_the_attack_is_caught(loaded, sets, monkeypatch):
    real = stages.local_lipschitz

    def tiny(*arguments, **options):
        found = real(*arguments, **options)
        return replace(found, auto=found.auto / 10, fixed_head=None)

    monkeypatch.setattr(stages, "local_lipschitz", tiny)
    cascade = Cascade(loaded, LIPSCHITZ)
    with pytest.raises(SoundnessError):
        cascade.certify(sets[0].images[:4], "id", generator(0, 0))


def test_constants_far_too_small_are_caught_at_batch_size_one(loaded, sets, monkeypatch):
    real = stages.local_lipschitz

    def tiny(*arguments, **options):
        found = real(*arguments, **options)
        return replace(found, auto=torch.full_like(found.auto, 1e-9), fixed_head=None)

    monkeypatch.setattr(stages, "local_lipschitz", tiny)
    for broken in ("fixed_point_radius", "path_radius"):
        with monkeypatch.context() as patch:  # the other form is switched off: each must betray itself
            other = {"fixed_point_radius": "path_radius", "path_radius": "fixed_point_radius"}[broken]
            patch.setattr(stages, other, lambda *arguments: torch.zeros(1).double())
            cascade = Cascade(loaded, LIPSCHITZ)
            with pytest.raises(SoundnessError):
                cascade.certify(sets[0].images[:1], "id", generator(0, 0))


def test_a_margin_of_rounding_noise_proves_nothing():
    """f = -a x twice, gamma 3 ulp above S: the margin is an artefact of rounding, and the exact radius is smaller."""
    from torch import nn

    from grood_cert.detector import Detector
    from grood_cert.scores import energy

    layer = nn.Linear(1, 2)
    with torch.no_grad():
        layer.weight.fill_(-1e-12)
        layer.bias.zero_()
    network = nn.Sequential(nn.Flatten(), layer).double().eval().requires_grad_(False)
    image = torch.full((1, 1, 1, 1), 0.9).double()
    gamma = float(energy(network(image))) + 3.33e-16
    loaded = Detector(network, gamma, (1, 1, 1))
    found = Cascade(loaded, LIPSCHITZ).certify(image, "id", generator(0, 0))
    assert found.radius_lipschitz_fixed_point.tolist() == found.radius_lipschitz_path.tolist() == [0.0]
