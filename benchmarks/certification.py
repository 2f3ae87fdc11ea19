"""How quick certified radii are against the plain use of auto_LiRPA, and how close to attacks each effort gets, l_inf.

    python benchmarks/certification.py throughput --out runs/certification-benchmark
    python benchmarks/certification.py tightness --out runs/certification-benchmark
    python benchmarks/certification.py unseen --out runs/certification-benchmark --samples 10
    python benchmarks/certification.py tightness --out runs/certification-benchmark --network "digits resnet-small"

*Throughput.* The plain way hands auto_LiRPA the composition -log(sum_k exp f_k) and bisects with CROWN between 0 and the
attack radius (1 if there is none): "batched" 7 times, to 1 % of it, all samples together, the side that is asked for
alone; "one at a time" 14 times, both sides, as the library's examples do. "bounds only" is our search from the same attack
radius, one batch, without any attack; "whole" is what `grood-cert certify --effort fast` does to a sample: attack,
attacks on the grid of eps, bounds on the grid, search. "with attack" adds the same attack to the batched plain way. All
ways run in turn, in one process on one thread; times are medians of the turns. CPU seconds are what this process computed,
so that a busy machine changes them little; the ratio is one of CPU seconds, to the batched plain way without or with attack.

*Tightness.* Certified radius over attack radius of every effort, medians over the samples that are right at x; then the
stage that decided each ball of the grid. *Unseen*: the same, of `fast` and `default`, for networks on which nothing was tuned.

Detectors are trained where the folder holds none. Those of CIFAR and Fashion-MNIST read the image sets in `shared/data` beside
the repository and are left out where they are absent; they are trained on subsets and for a few epochs only.
"""

from __future__ import annotations

import importlib.util
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_args

import numpy as np
import torch
import typer
from torch import Tensor, nn

from grood_cert import attacks, detector, recipe
from grood_cert.ball import Ball
from grood_cert.bounds.auto_lirpa import LirpaNetwork
from grood_cert.bounds.auto_lirpa_repair import library, running
from grood_cert.bounds.crown import NativeNetwork
from grood_cert.bounds.engine import BoundedNetwork, Side
from grood_cert.bounds.engines import ENGINES, Engine
from grood_cert.bounds.folding import folded
from grood_cert.bounds.score import score_bounds
from grood_cert.certification.cascade import Cascade
from grood_cert.certification.envelope import Envelope
from grood_cert.certification.outcomes import LINEAR
from grood_cert.certification.search import search_radius
from grood_cert.certification.settings import EFFORTS, Settings
from grood_cert.cli import run_script
from grood_cert.data import ImageSet, experiment_of
from grood_cert.detector import Detector
from grood_cert.errors import InputError
from grood_cert.networks.capture import capture
from grood_cert.networks.rebuild import Rebuilt
from grood_cert.results.columns import KINDS, OUTCOMES
from grood_cert.runs import certify as certification
from grood_cert.runs.batches import subset
from grood_cert.system.files import write_csv
from grood_cert.training import run as training

Part = Literal["throughput", "tightness", "unseen"]
PARTS: tuple[str, ...] = get_args(Part)
BOTH: tuple[Side, ...] = get_args(Side)
PRECISION = 1e-2
PLAIN, _ATTACK = "plain, batched", "attack alone"
THROUGHPUT_COLUMNS = (
    *("network", "way", "samples", "radii_per_second", "cpu_seconds", "wall_seconds", "ratio"),
    *("median_id", "median_ood", "not_below_plain"),
)
TIGHTNESS_COLUMNS = (
    *("network", "effort", "kind", "samples", "certified_to_attack", "smallest", "certified", "attack"),
    "cpu_seconds_per_sample",
)
STAGE_COLUMNS = ("network", "effort", "kind", *OUTCOMES)

_REPOSITORY = Path(__file__).resolve().parents[1]
_SHARED = _REPOSITORY.parent / "shared" / "data"
_CIFAR, _FASHION = "CIFAR conv-small", "Fashion-MNIST conv-small"
_ARRAYS = {  # ID with labels, auxiliary, OOD
    _CIFAR: ("cifar10_train", "tin32_outliers", "tin32_ood", "dtd32_a"),
    _FASHION: ("fashion_train", "letters_test", "notmnist_test"),
}
TUNED: dict[str, tuple[str, tuple[str, ...]]] = {  # recipe and settings on top
    "digits conv-small": ("digits-greg", ()),
    "digits conv-small certified": ("digits-certified", ()),
    "digits MLP-4": ("digits-mlp-greg", ("network.hidden_layers=3",)),
    _CIFAR: ("cifar-arrays-greg", ("network.name=conv-small", "optimizer.epochs=10")),
}
UNSEEN: dict[str, tuple[str, tuple[str, ...]]] = {
    "digits conv-small, seed 1": ("digits-greg", ("seed=1",)),
    "digits conv-small, width 12": ("digits-greg", ("network.width=12",)),
    "digits conv-small, untrained": (
        "digits-greg",
        ("optimizer.epochs=1", "optimizer.lr=1e-9", "optimizer.lr_min=1e-9"),
    ),
    "digits MLP-4, seed 1": ("digits-mlp-greg", ("network.hidden_layers=3", "seed=1")),
    "digits MLP-4, width 32": ("digits-mlp-greg", ("network.hidden_layers=3", "network.width=32")),
    _FASHION: ("cifar-arrays-greg", ("network.name=conv-small", "optimizer.epochs=10", "augmentation.flip=false")),
}
RESIDUAL: dict[str, tuple[str, tuple[str, ...]]] = {
    "digits resnet-small": ("digits-greg", ("network.name=resnet-small", "optimizer.epochs=20")),
}
NETWORKS = TUNED | UNSEEN | RESIDUAL
THROUGHPUT_NETWORKS = ("digits conv-small", _CIFAR)
REFINING = {name for name, effort in EFFORTS.items() if set(effort.stages) - set(LINEAR)}


# Detectors.


def arrays(name: str, folder: Path) -> list[str]:
    """Settings of a recipe that takes its images from `shared/data`, which are written to the folder as .npz files.

    Args:
        name: Of a network with such images.
        folder: Where the files are written.

    Raises:
        InputError: If there is no such data.
    """
    spec = importlib.util.spec_from_file_location("shared_data", _SHARED / "load.py")
    if not (_SHARED / "load.py").exists() or spec is None or spec.loader is None:
        raise InputError(f"left out: no image sets in {_SHARED.parent.name}/{_SHARED.name} beside the repository")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{each}.npz" for each in _ARRAYS[name]]
    for each, path in zip(_ARRAYS[name], paths, strict=True):
        if not path.exists():
            images, meta = module.load(each)
            labels = {"labels": meta["y"].astype(np.int64)} if each == _ARRAYS[name][0] else {}
            np.savez(path, images=images, **labels)
    own, auxiliary, *ood = (str(path) for path in paths)
    return [f"data.id={own}", f"data.auxiliary={auxiliary}", f"data.ood={ood!r}"]


def trained(name: str, folder: Path) -> Detector:
    """One of `NETWORKS`, from its sub-folder if it is there already.

    Raises:
        InputError: If the images are not there.
    """
    file, settings = NETWORKS[name]
    data = arrays(name, folder / "data") if name in _ARRAYS else []
    model = folder / name / "model.pt"
    if model.exists():
        return detector.load(model)
    return training.run(recipe.load(_REPOSITORY / "train" / f"{file}.toml", [*settings, *data]), model.parent)


def test_sets(loaded: Detector) -> list[ImageSet]:
    """The ID test set and the OOD sets; noise is left out."""
    experiment = experiment_of(loaded.origin.recipe)
    return [experiment.test, *(images for images in experiment.ood if images.kind == "ood")]


# Throughput.


class _Score(nn.Module):
    """S as its formula says, in the operations that auto_LiRPA converts: a column of shape (B, 1)."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        total: Tensor = self.network(images).exp().sum(1, keepdim=True)
        return -total.log()


class PlainScore:
    """S inside auto_LiRPA, with the options that the library has by default.

    Only the repairs of `grood_cert.bounds.auto_lirpa_repair` are used, without which the old version neither imports nor is right.

    Args:
        network: The model f.
        image: One image, shape (1, C, H, W).
    """

    def __init__(self, network: nn.Module, image: Tensor) -> None:
        self._library = library()
        with running():
            plain = Rebuilt(folded(capture(network, tuple(image.shape[1:])), borders=False))
            self._module = self._library.BoundedModule(_Score(plain).eval(), image)
            self._module.eval()

    def bounds(self, images: Tensor, eps: Tensor, sides: Collection[Side] = BOTH) -> dict[Side, Tensor]:
        """CROWN bounds of S over the l_inf balls around images, intersected with the pixel box, shape (B,) each."""
        with running(), torch.no_grad():
            eps = eps.reshape(-1, 1, 1, 1)
            box = {"x_L": (images - eps).clamp(min=0), "x_U": (images + eps).clamp(max=1)}
            ball = self._library.BoundedTensor(images, self._library.PerturbationLpNorm(norm=np.inf, **box))
            wanted = {f"bound_{side}": side in sides for side in BOTH}
            lower, upper = self._module.compute_bounds(x=(ball,), method="CROWN", **wanted)
        found: dict[Side, Tensor] = {"lower": lower, "upper": upper}
        return {side: found[side].squeeze(1) for side in sides}


def plain_radii(
    score: PlainScore, images: Tensor, kind: str, gamma: float, furthest: Tensor, rounds: int, both: bool = False
) -> Tensor:
    """Largest certified radii that bisections between 0 and the attack radius find, shape (B,).

    Args:
        score: S inside auto_LiRPA.
        images: Shape (B, C, H, W).
        kind: "id" (to be accepted) or "ood" (to be rejected).
        gamma: Threshold.
        furthest: Attack radii, shape (B,).
        rounds: Bisections.
        both: Whether to bound S from both sides.
    """
    side: Side = "upper" if kind == "id" else "lower"
    low, high = torch.zeros_like(furthest), furthest.clamp(max=1.0)
    for _ in range(rounds):
        middle = (low + high) / 2
        bound = score.bounds(images, middle, BOTH if both else (side,))[side]
        proved = bound < gamma if kind == "id" else bound > gamma
        low, high = torch.where(proved, middle, low), torch.where(proved, high, middle)
    return low


def searched_radii(
    bounded: BoundedNetwork, images: Tensor, kind: str, gamma: float, furthest: Tensor, precision: float
) -> Tensor:
    """Certified radii of a batch by CROWN and the search of `grood_cert.certification.search`, from nothing but an attack radius.

    Args:
        bounded: The network inside a bound engine.
        images: Shape (B, C, H, W).
        kind: "id" or "ood".
        gamma: Threshold.
        furthest: Attack radii, shape (B,), infinity where there is none.
        precision: Relative precision of the search.
    """
    with torch.no_grad():
        score = -torch.logsumexp(bounded.network(images), 1)
    envelope, zero = Envelope((), score, gamma, kind), torch.zeros_like(score)

    def evaluate(index: Tensor, eps: Tensor) -> Tensor:
        found = score_bounds(bounded, Ball(images[index], eps, "linf"))
        return envelope.deviation(found.lower, found.upper, index)

    first = (0.7 * furthest).clamp(max=1.0)
    unknown = torch.full_like(score, torch.nan)
    return search_radius(evaluate, envelope.margin, zero, zero, zero + torch.inf, unknown, first, 1.0, precision)


def _right(loaded: Detector, sets: Sequence[ImageSet], samples: int) -> dict[str, Tensor]:
    """Images of each kind that are decided rightly."""
    found = {}
    for kind in ("id", "ood"):
        chosen = [images for images in sets if images.kind == kind]
        share = -(-samples // len(chosen))
        images = torch.cat([subset(whole, share, 0)[0].images for whole in chosen])[:samples].double()
        accepted = loaded.scores(images) <= loaded.gamma
        found[kind] = images[accepted == (kind == "id")]
    return found


def throughput(
    loaded: Detector,
    sets: Sequence[ImageSet],
    samples: int = 64,
    repeats: int = 3,
    engines: Sequence[str] = ENGINES[1:],
) -> list[dict[str, Any]]:
    """One record for each way, with the keys of `THROUGHPUT_COLUMNS` but for the network.

    Args:
        loaded: The detector.
        sets: An ID set and OOD sets.
        samples: Most samples of each kind, which is the size of our batches.
        repeats: Turns.
        engines: Engines of our ways.
    """
    shape, gamma, network = loaded.shape, loaded.gamma, loaded.network
    images = _right(loaded, sets, samples)
    plain = PlainScore(network, images["id"][:1])
    effort = EFFORTS["fast"].attack
    bounded: dict[str, BoundedNetwork] = {
        "auto_lirpa": LirpaNetwork(network, shape, "crown"),
        "native": NativeNetwork(network, shape, "crown", single=True),
    }
    eps = certification.automatic_eps(loaded, sets, "linf")
    settings = Settings(eps, effort="fast", batch_size=samples, precision=PRECISION)

    def attacked(kind: str) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return attacks.minimum_norm(network, images[kind], gamma, "linf", generator, effort).radius

    furthest = {kind: attacked(kind) for kind in images}

    def batched(kind: str) -> Tensor:
        return plain_radii(plain, images[kind], kind, gamma, furthest[kind], rounds=7)

    def one_at_a_time(kind: str) -> Tensor:
        pairs = zip(images[kind].split(1), furthest[kind].split(1), strict=True)
        return torch.cat([plain_radii(plain, image, kind, gamma, radius, 14, both=True) for image, radius in pairs])

    def bounds_only(engine: str) -> Callable[[str], Tensor]:
        return lambda kind: searched_radii(bounded[engine], images[kind], kind, gamma, furthest[kind], PRECISION)

    def whole(engine: Engine) -> Callable[[str], Tensor]:
        cascade = Cascade(loaded, replace(settings, engine=engine))

        def certified(kind: str) -> Tensor:
            return cascade.certify(images[kind], kind, torch.Generator().manual_seed(0)).radius_certified

        return certified

    ways: dict[str, Callable[[str], Tensor]] = {
        PLAIN: batched,
        "plain, one at a time": one_at_a_time,
        _ATTACK: attacked,
    }
    for engine in [name for name in get_args(Engine) if name in engines]:
        ways[f"{engine}, bounds only"] = bounds_only(engine)
        ways[f"{engine}, whole"] = whole(engine)

    radii: dict[str, dict[str, Tensor]] = {}
    spent: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, compute in ways.items():
            cpu, wall = time.process_time(), time.perf_counter()
            radii[name] = {kind: compute(kind) for kind in images}
            spent[name].append((time.process_time() - cpu, time.perf_counter() - wall))
    cost = {name: np.median(np.array(seconds), 0) for name, seconds in spent.items()}
    attack = f"{PLAIN}, with attack"
    radii[attack], cost[attack] = radii[PLAIN], cost[PLAIN] + cost.pop(_ATTACK)
    reference = torch.cat(list(radii[PLAIN].values()))
    records = []
    for name in (PLAIN, attack, *(name for name in ways if name not in (PLAIN, _ATTACK))):
        base = attack if "whole" in name or name == attack else PLAIN
        own = torch.cat(list(radii[name].values()))
        records.append(
            {
                "way": name,
                "samples": len(own),
                "radii_per_second": len(own) / float(cost[name][0]),
                "cpu_seconds": float(cost[name][0]),
                "wall_seconds": float(cost[name][1]),
                "ratio": float(cost[base][0] / cost[name][0]),
                **{f"median_{kind}": float(radii[name][kind].median()) for kind in images},
                "not_below_plain": float((own >= (1 - PRECISION) * reference).double().mean()),
            }
        )
    return records


# Tightness.


def tightness(
    loaded: Detector, model: Path, sets: Sequence[ImageSet], settings: Settings, out: Path, samples: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Certify some samples of each set with one effort.

    Args:
        loaded: The detector.
        model: Its checkpoint.
        sets: An ID set and OOD sets.
        settings: How to certify.
        out: Folder of the rows.
        samples: Most samples of each set.

    Returns:
        One record for each kind of which a sample is right, with the keys of `TIGHTNESS_COLUMNS`, and one with those of
        `STAGE_COLUMNS`, but for the network.
    """
    start = time.process_time()
    found = certification.run(loaded, model, sets, settings, out, limit=samples, force=True)
    cost = (time.process_time() - start) / len(found)
    right = found["status"] != "misdecided"
    medians, stages = [], []
    for kind in [name for name in KINDS if bool((found.of_kind(name) & right).any())]:
        mask = found.of_kind(kind) & right
        certified, attacked = found["radius_certified"][mask], found["radius_attack"][mask]
        share = certified / attacked
        values = len(share), *(float(value) for value in (np.median(share), share.min()))
        radii = float(np.median(certified)), float(np.median(attacked))
        medians.append(dict(zip(TIGHTNESS_COLUMNS[1:], (settings.effort, kind, *values, *radii, cost), strict=True)))
        counts = Counter(found.grid["outcome"][found.of_kind(kind)].ravel().tolist())
        stages.append({"effort": settings.effort, "kind": kind, **{name: counts[name] for name in OUTCOMES}})
    return medians, stages


# The command.


def _heading(columns: Sequence[str]) -> None:
    typer.echo("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))


def _line(columns: Sequence[str], record: Mapping[str, Any]) -> None:
    values = (record[column] for column in columns)
    typer.echo("| " + " | ".join(f"{value:.3g}" if isinstance(value, float) else str(value) for value in values) + " |")


def _detectors(names: Sequence[str], out: Path) -> Iterator[tuple[str, Detector]]:
    """The detectors that can be had; a line on stderr about the others."""
    for name in names:
        try:
            yield name, trained(name, out)
        except InputError as error:
            typer.echo(f"{name}: {error}", err=True)


def _throughput(names: Sequence[str], out: Path, samples: int, repeats: int) -> None:
    records: list[dict[str, Any]] = []
    _heading(THROUGHPUT_COLUMNS)
    for name, loaded in _detectors(names, out):
        for found in throughput(loaded, test_sets(loaded), samples, repeats):
            records.append({"network": name, **found})
            _line(THROUGHPUT_COLUMNS, records[-1])
        write_csv(out / "throughput.csv", THROUGHPUT_COLUMNS, records)


def _tightness(
    part: str,
    names: Sequence[str],
    out: Path,
    samples: int,
    efforts: Sequence[str],
    engine: Engine,
    time_limit: float,
) -> None:
    records: list[dict[str, Any]] = []
    decided: list[dict[str, Any]] = []
    _heading(TIGHTNESS_COLUMNS)
    for name, loaded in _detectors(names, out):
        sets = test_sets(loaded)
        eps = certification.automatic_eps(loaded, sets, "linf")
        for effort in efforts:
            settings = Settings(eps, effort=effort, engine=engine, time_limit=time_limit * (effort in REFINING))
            medians, stages = tightness(loaded, out / name / "model.pt", sets, settings, out / name / effort, samples)
            for found in medians:
                records.append({"network": name, **found})
                _line(TIGHTNESS_COLUMNS, records[-1])
            decided += [{"network": name, **found} for found in stages]
            write_csv(out / f"{part}.csv", TIGHTNESS_COLUMNS, records)
            write_csv(out / ("stages.csv" if part == "tightness" else f"{part}-stages.csv"), STAGE_COLUMNS, decided)
    columns = [column for column in STAGE_COLUMNS if any(record[column] != 0 for record in decided)]
    typer.echo()
    _heading(columns)
    for record in decided:
        _line(columns, record)


def main(
    part: Annotated[str, typer.Argument(metavar="PART", help=f"What to measure: {', '.join(PARTS)}.")],
    out: Annotated[Path, typer.Option(help="Folder of detectors, rows and tables as CSV.")],
    network: Annotated[list[str] | None, typer.Option(help=f"Among {', '.join(NETWORKS)}; repeat for more.")] = None,
    effort: Annotated[
        list[str] | None, typer.Option(help="Tightness: efforts; repeat. [default: all; unseen: fast, default]")
    ] = None,
    engine: Annotated[
        str | None, typer.Option(help="Tightness: engine of the linear bounds. [default: native]")
    ] = None,
    time_limit: Annotated[
        float, typer.Option(help="Tightness: seconds a sample may take where stages refine; 0: no limit.")
    ] = 0.0,
    samples: Annotated[int, typer.Option(help="Throughput: of each kind. Tightness: of each set.")] = 20,
    repeats: Annotated[int | None, typer.Option(min=1, help="Throughput: turns. [default: 3]")] = None,
) -> None:
    """Train what is missing, measure, print the tables as Markdown."""
    for value, known in (
        *((name, tuple(NETWORKS)) for name in network or ()),
        *((name, tuple(EFFORTS)) for name in effort or ()),
        (part, PARTS),
        (engine or ENGINES[0], ENGINES),
    ):
        if value not in known:
            raise InputError(f"unknown {value!r}; use one of {', '.join(known)}")
    given = (
        {"--repeats": repeats}
        if part != "throughput"
        else {"--effort": effort, "--engine": engine, "--time-limit": time_limit}
    )
    unused = [name for name, asked in given.items() if asked]
    if unused:
        raise InputError(f"{part} does not use {' and '.join(unused)}; leave it out")
    torch.set_num_threads(1)
    if part == "throughput":
        _throughput(network or THROUGHPUT_NETWORKS, out, samples, repeats or 3)
        return
    efforts = effort or [name for name in EFFORTS if part == "tightness" or name != "max"]
    if time_limit and not REFINING & set(efforts):
        raise InputError(f"a time limit stops refining stages, and {' and '.join(efforts)} has none; leave it out")
    networks = network or list(TUNED if part == "tightness" else UNSEEN)
    _tightness(part, networks, out, samples, efforts, cast(Engine, engine or "native"), time_limit)


if __name__ == "__main__":
    run_script(main)
