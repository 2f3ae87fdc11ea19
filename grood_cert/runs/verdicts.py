"""Read what a complete verifier says of exported properties, and judge what it is worth.

Unsat certifies, in the verifier's name. Sat proves nothing: its counterexample is evaluated again, in float64, and
believed only if S crosses gamma there. `grood_cert.runs.vnnlib` writes the properties.
"""

from __future__ import annotations

import csv
import gzip
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from grood_cert.ball import Ball
from grood_cert.data import ImageSet
from grood_cert.detector import Detector, versions
from grood_cert.errors import InputError
from grood_cert.runs.vnnlib import INSTANCES
from grood_cert.system.files import check_apart, sha256, write_csv, write_json

VERDICTS = ("unsat", "sat", "timeout", "unknown", "error")
COLUMNS: dict[str, str] = {
    "set": "name of the image set",
    "kind": "id, ood or noise",
    "index": "position of the image in its test set",
    "eps": "radius of the l_inf ball",
    "verdict": "what the verifier said: unsat, sat, timeout, unknown or error; missing: nothing",
    "certified_external": "1 if the decision is proved on the ball by the named verifier, not by us; else 0",
    "refuted": "1 if its counterexample lies in the ball and has the other decision, evaluated in float64; else 0",
    "score_counterexample": "S at the counterexample, in float64; nan if there is none",
    "verifier": "name of the verifier",
}
_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_SYNONYMS = {"holds": "unsat", "violated": "sat", "run_instance_timeout": "timeout", "safe": "unsat", "unsafe": "sat"}


@dataclass(frozen=True)
class Verdict:
    """What a verifier said of one property.

    Attributes:
        verdict: One of `VERDICTS`.
        counterexample: The inputs X_0, X_1, ..., if it gave any.
    """

    verdict: str
    counterexample: tuple[float, ...] | None = None


def _word(text: str) -> str | None:
    word = text.strip().strip('"').lower()
    word = _SYNONYMS.get(word, word)
    return word if word in VERDICTS else None


def _text(path: Path) -> str:
    try:
        content = path.read_bytes()
        return (gzip.decompress(content) if path.suffix == ".gz" else content).decode()
    except (OSError, EOFError, UnicodeDecodeError, gzip.BadGzipFile) as error:
        raise InputError(f"cannot read {path}: {error}") from error


def _counterexample(text: str) -> tuple[float, ...] | None:
    """The inputs of a counterexample in the competition's form, ((X_0 0.1) (X_1 0.2) ... (Y_0 3.0))."""
    found = {int(i): float(value) for i, value in re.findall(rf"\(\s*X_(\d+)\s+({_NUMBER})\s*\)", text)}
    complete = found and sorted(found) == list(range(len(found)))
    return tuple(found[i] for i in range(len(found))) if complete else None


def read_verdicts(path: Path) -> dict[str, Verdict]:
    """Verdicts by the name of the property, without suffix.

    * A CSV as the competition's scripts write it, one line an instance, in which a cell ends in `.vnnlib` and a later
      one is a verdict; counterexamples lie beside it as NAME.counterexample, also with .gz.
    * A folder of files NAME.txt, whose first word is the verdict, counterexample below: what alpha-beta-CROWN writes to
      its results file, and Marabou to its summary file.

    Whatever is not a known verdict counts as `unknown`.

    Args:
        path: The file or the folder.

    Raises:
        InputError: If it cannot be read, holds no verdicts, or two that contradict each other.
    """
    verdicts: dict[str, Verdict] = {}

    def add(name: str, verdict: str, text: str) -> None:
        if name in verdicts and verdicts[name].verdict != verdict:
            raise InputError(f"{path}: {name} is both {verdicts[name].verdict} and {verdict}")
        verdicts[name] = Verdict(verdict, _counterexample(text) if verdict == "sat" else None)

    if path.is_dir():
        for file in sorted(path.glob("*.txt")):
            text = _text(file)
            add(file.stem, _word((text.split() or [""])[0]) or "unknown", text)
    else:
        for cells in csv.reader(_text(path).splitlines(), skipinitialspace=True):
            at = next((i for i, cell in enumerate(cells) if re.search(r"\.vnnlib(\.gz)?$", cell.strip())), None)
            if at is None:
                continue
            name = re.sub(r"\.vnnlib(\.gz)?$", "", Path(cells[at].strip()).name)
            beside = [path.parent / f"{name}.counterexample{suffix}" for suffix in ("", ".gz")]
            text = "".join(_text(file) for file in beside if file.is_file())
            add(name, next(filter(None, map(_word, cells[at + 1 :])), "unknown"), text)
    if not verdicts:
        raise InputError(f"{path}: no verdicts; expected a CSV with .vnnlib names, or a folder of NAME.txt files")
    return verdicts


def judge(
    detector: Detector,
    exported: Mapping[str, Any],
    sets: Sequence[ImageSet],
    verdicts: Mapping[str, Verdict],
    verifier: str,
) -> list[dict[str, Any]]:
    """What the verdicts are worth: one record an instance, with the keys of `COLUMNS`.

    Unsat certifies, in the name of the verifier. Sat refutes only if its counterexample, projected into the ball, has
    the other decision in float64. Everything else leaves the sample undecided.

    Args:
        detector: The detector.
        exported: Content of instances.json.
        sets: The image sets.
        verdicts: By name of the property.
        verifier: Name of the verifier.

    Raises:
        InputError: If a verdict is of no instance, an image set is missing, or a counterexample has the wrong size.
    """
    by_name = {images.name: images for images in sets}
    stray = verdicts.keys() - {instance["name"] for instance in exported["instances"]}
    if stray:
        raise InputError(f"verdicts of properties that were not exported: {', '.join(sorted(stray)[:3])}")
    weight, records = next(detector.network.parameters()), []
    for instance in exported["instances"]:
        found = verdicts.get(instance["name"], Verdict("missing"))
        record = {name: instance[name] for name in ("set", "kind", "index")} | {"eps": exported["eps"]}
        record |= {"verdict": found.verdict, "certified_external": int(found.verdict == "unsat")}
        record |= {"refuted": 0, "score_counterexample": math.nan, "verifier": verifier}
        if found.counterexample is not None:
            if instance["set"] not in by_name:
                raise InputError(f"image set {instance['set']} is not given; add it with --ood")
            image = by_name[instance["set"]].images[instance["index"]].to(weight).unsqueeze(0)
            if len(found.counterexample) != image.numel():
                raise InputError(f"{instance['name']}: a counterexample of {len(found.counterexample)} pixels")
            ball = Ball(image, image.new_tensor([exported["eps"]]), "linf")
            point = ball.project(image.new_tensor(found.counterexample).reshape(image.shape))
            with torch.no_grad():
                score = float(detector.score.value(detector.network(point)))
            crossed = score > detector.gamma if instance["kind"] == "id" else score <= detector.gamma
            record |= {"refuted": int(crossed), "score_counterexample": score}
        records.append(record)
    return records


def write_verdicts(
    detector: Detector, model: Path, folder: Path, sets: Sequence[ImageSet], results: Path, verifier: str
) -> list[dict[str, Any]]:
    """Read a verifier's results for an exported folder and write verdicts.csv and verdicts.json there.

    Raises:
        InputError: If the folder was not exported from this model, or the results cannot be used.
    """
    source = folder / INSTANCES
    try:
        exported = json.loads(source.read_text(encoding="utf-8"))
        known = exported["model"]["sha256"] == sha256(model) and exported["gamma"] == detector.gamma
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{source}: not written by grood-cert vnnlib ({type(error).__name__})") from None
    if not known:
        raise InputError(f"{folder} was not exported from {model}")
    if not verifier.strip():
        raise InputError("name the verifier, with its version; its certificates are not ours")
    check_apart((folder / "verdicts.csv", folder / "verdicts.json"), [model, results])
    records = judge(detector, exported, sets, read_verdicts(results), verifier)
    write_csv(folder / "verdicts.csv", list(COLUMNS), records)
    origin = {"verifier": verifier, "results": str(results), "versions": versions()}
    write_json(folder / "verdicts.json", {name: exported[name] for name in ("model", "gamma", "norm", "eps")} | origin)
    return records
