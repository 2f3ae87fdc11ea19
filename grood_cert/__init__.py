r"""Train out-of-distribution detectors with gradient-regularised energy and prove how robust their score is.

A detector accepts x as in-distribution (ID) iff S(x) = -logsumexp f(x) <= gamma. Any classifier on pixels in [0, 1]
becomes one; gamma comes from ID images that it was not trained on.

    >>> import torch
    >>> import grood_cert as gc
    >>> _ = torch.manual_seed(0)
    >>> layers = torch.nn.Flatten(), torch.nn.Linear(16, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3)
    >>> model, id_images, x = torch.nn.Sequential(*layers).eval(), torch.rand(99, 1, 4, 4), torch.rand(2, 1, 4, 4)
    >>> detector = gc.Detector.calibrate(model, id_images, tpr=95)  # mean=, std= if the model wants normalised input
    >>> found = detector.predict(x)
    >>> found.score.shape, found.accepted.tolist(), found.label.shape
    (torch.Size([2]), [True, True], torch.Size([2]))

`certify` proves the decisions that the detector makes at x: nothing within `radius` of x, in pixel units, changes them.
An attack says how much larger the true radius can be at most.

    >>> found = gc.certify(detector, x, eps=0.02)  # or a list of eps; norm="linf", effort="default"
    >>> bool((0 < found.radius).all() and (found.radius <= found.attack_radius).all())
    True
    >>> bool((found.lower <= found.score).all() and (found.score <= found.upper).all())
    True
    >>> print(found.outcome[0])
    certified by interval bounds (IBP)
    >>> bounds = gc.score_bounds(model, x, eps=0.02)
    >>> bool((bounds.lower <= found.score).all() and (found.score <= bounds.upper).all())
    True
    >>> bool((gc.lipschitz_bound(model, x, eps=0.02) > 0).all())
    True
    >>> gc.attack(detector, x).radius.shape
    torch.Size([2])
    >>> gc.smooth(detector, sigma=0.25, calibration=id_images, n=100).certify(x, eps=0.1).radius.shape
    (2,)
    >>> gc.Ball(x, 0.02, "linf").upper.shape
    torch.Size([2, 1, 4, 4])

Whole sets, as tensors, datasets or loaders, become a table of one row a sample; a call that was interrupted goes on.

    >>> import tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(id_images[:8], torch.zeros(8).long()))
    >>> sets = {"id": loader, "svhn": torch.rand(8, 1, 4, 4).square()}
    >>> table = gc.certify_sets(detector, sets, eps=[2 / 255, 8 / 255], out=folder.name, effort="fast")
    >>> len(table.to_pandas()), table.summary()[0]["samples"]
    (16, 8)
    >>> gc.figures.robustness({"energy": table}).savefig(f"{folder.name}/f.pdf")

Scores from anywhere are measured exactly, as this package or as another toolkit does it (`convention="openood"`, ...).

    >>> gc.evaluate(score_id=[-5.0, -4.0, -1.0], score_ood=[-2.0, 0.0])["auroc"]
    0.8333333333333334

A training run (`grood-cert train`) leaves a checkpoint. A network that this package did not build is kept by its own
`state_dict`.

    >>> from grood_cert.detector import Architecture
    >>> architecture = Architecture("mlp", (1, 4, 4), 3, mean=(0.5,), std=(0.3,), options={"width": 8})
    >>> trained = gc.Detector(architecture.build().double().eval(), -1.0, (1, 4, 4), architecture=architecture)
    >>> trained.save(f"{folder.name}/model.pt")
    >>> gc.load(f"{folder.name}/model.pt").classes
    3
    >>> folder.cleanup()
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grood_cert.api import attack, certify, certify_sets, lipschitz_bound, score_bounds, smooth
    from grood_cert.ball import Ball
    from grood_cert.certification.outcomes import Outcome
    from grood_cert.conventions import evaluate
    from grood_cert.detector import Detector, load
    from grood_cert.errors import InputError, RunError, SoundnessError
    from grood_cert.results import figures
    from grood_cert.results.table import Table
    from grood_cert.scores import MSP, Energy, MaxLogit

__all__ = [
    "MSP",
    "Ball",
    "Detector",
    "Energy",
    "InputError",
    "MaxLogit",
    "Outcome",
    "RunError",
    "SoundnessError",
    "Table",
    "attack",
    "certify",
    "certify_sets",
    "evaluate",
    "figures",
    "lipschitz_bound",
    "load",
    "score_bounds",
    "smooth",
]
__version__ = "0.1.0"

_HOMES = {
    "MSP": "scores",
    "Ball": "ball",
    "Detector": "detector",
    "Energy": "scores",
    "InputError": "errors",
    "MaxLogit": "scores",
    "Outcome": "certification.outcomes",
    "RunError": "errors",
    "SoundnessError": "errors",
    "Table": "results.table",
    "evaluate": "conventions",
    "figures": "results.figures",
    "load": "detector",
}  # of all others: api


def __getattr__(name: str) -> Any:
    """A public name, imported when it is first asked for: without it, an import of the package costs nothing."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = _HOMES.get(name, "api")
    module = importlib.import_module(f"{__name__}.{home}")
    globals()[name] = value = module if home.endswith(f".{name}") else getattr(module, name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
