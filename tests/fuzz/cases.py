"""The cases: what is handed to the command line, and what must be true of its answer beyond the general law.

The law of every case: it ends within its limit, with exit code 0, or with 1 or 2 and one line; never with a traceback.
And where a command ends with 0, what it read or wrote is right, as far as that can be told:

* command lines: no file that they read is another one, and none that they write over without being told to;
* recipes: every setting of the file stands, as it is, in what `recipe show` prints;
* checkpoints: a damaged file is only read if all that it holds is what was written;
* rows and manifests: likewise; those with a checksum of their own, made anew after the change, may be read;
* ONNX: the imported network computes what onnx's own reference does with the file, where that runs it.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import random
import shutil
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.fuzz.mutation import ODD, of_bytes, of_text, of_value

RIGHT = ""


@dataclass(frozen=True)
class Case:
    """A command line.

    Attributes:
        arguments: The words.
        judge: Asked what is wrong where it ended with 0, from what it printed; "" for nothing.
        always: Asked what is wrong however it ended.
    """

    arguments: tuple[str, ...]
    judge: Callable[[str], str] = lambda printed: RIGHT
    always: Callable[[], str] = lambda: RIGHT


@dataclass(frozen=True)
class Material:
    """What the cases are made from.

    Attributes:
        folder: The folder.
        model: A checkpoint.
        rows: Rows of its certification, manifest beside.
        shards: Rows of two shards.
        onnx: An ONNX file.
        recipe: A recipe's text.
    """

    folder: Path
    model: Path
    rows: Path
    shards: tuple[Path, ...]
    onnx: Path
    recipe: str


_SENSIBLE: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("eps", "sigma"), ("0.01", "1/255,8/255", "0.1,0.2", "0.5")),
    **dict.fromkeys(("limit", "batch_size", "samples", "clever_batches", "checkpoint_steps"), ("1", "2", "3")),
    **dict.fromkeys(("seed", "calibration_limit", "n", "timeout", "time_limit"), ("0", "5", "100")),
    **dict.fromkeys(("gamma", "temperature", "precision", "alpha", "tpr", "at"), ("0.05", "0.5", "-1.5", "1")),
    **dict.fromkeys(("ood", "id_", "id", "test", "calibration"), ("digits:0-3", "digits:8-9", "digits")),
    "norm": ("linf", "l2", "l1"),
    "effort": ("fast", "default", "max"),
    "stages": ("ibp", "ibp,crown", "attack"),
    "engine": ("auto", "native", "auto_lirpa"),
    "deployment": ("float32", "float64"),
    "method": ("ibp", "crown", "jacobian-ibp", "local", "product"),
    "memory": ("1G", "500M"),
    "shard": ("1/2", "2/2"),
    "device": ("cpu",),
    "dtype": ("float32", "float64"),
    "format": ("table", "csv", "json", "onnx", "state-dict", "torchscript"),
    "label": ("a", "b"),
    "perturb": ("id", "ood", "both"),
    "verifier": ("abcrown", "marabou"),
}


def command_lines(given: Material, draw: random.Random, place: Path) -> Case:
    """Words of the program's own vocabulary: what somebody might give, and values that nobody would give."""
    import numpy as np
    from typer.main import get_command

    from grood_cert.cli import app

    sources = (given.model, given.rows, *given.shards, given.onnx)
    files = [file for path in sources for file in (path, path.with_suffix(".json")) if file.exists()]
    for file in files:
        shutil.copy(file, place)
    model, rows, *shards = (str(place / path.name) for path in sources[:-1])
    np.save(place / "few.npy", np.linspace(0, 1, 128).reshape(2, 1, 8, 8))
    group: Any = get_command(app)
    name = draw.choice([name for name in group.commands if name not in ("demo", "recipe")])
    odd = [
        *(str(value) for value in ODD if "\0" not in str(value) and "\udc80" not in str(value)),
        *(model, rows, str(place), str(place / "new"), "/nonexistent/x", "/dev/null"),
        *("8/255", "1/0", "L2", "digits:", "digits:9-0", "cuda:7", "3/2", "1e-9", "1e9", "7K", "-3G", "a=b", "="),
        *(value for values in _SENSIBLE.values() for value in values),
    ]
    sensible = {
        **_SENSIBLE,
        "model": (model,),
        "rows": (rows,),
        "file": (str(place / given.onnx.name),),
        "shards": (*shards, rows),
        "images": (str(place / "few.npy"),),
        "folder": (str(place),),
        "out": tuple(str(place / name) for name in ("new", "new.csv", "new.pt", "new.onnx", "new.pdf", "rows.csv")),
    }
    words, senseless = [name], draw.choice((0.0, 0.0, 0.1, 0.5))
    outs: list[str] = []
    for item in group.commands[name].params:
        if item.name in ("help", "download"):
            continue
        likely = sensible.get(item.name, odd)
        value = draw.choice(odd if draw.random() < senseless else likely)
        if item.param_type_name == "argument":
            several = item.name == "shards" or draw.random() < senseless
            words += [value] if not several else [draw.choice(likely) for _ in range(draw.choice((0, 1, 2, 2, 3)))]
        elif draw.random() < (0.8 if item.name in ("out", "eps", "gamma") else 0.2):
            words.append(draw.choice(item.opts))
            if not getattr(item, "is_flag", False):
                words.append(value)
                outs += [value] if item.name == "out" else []
    if name in ("certify", "smooth", "lipschitz", "sweep"):
        words += ["--dry-run", "--limit", "2"]  # what works would work for long
    if name in ("import", "predict", "verdicts", "vnnlib") and "--limit" not in words:
        words += ["--limit", "2"] if name == "vnnlib" else []
    if name == "train":
        words += ["--set", draw.choice(("optimizer.epochs=0", "data.train_limit=-1", "network.name=none", "x=1"))]
    if draw.random() < senseless:
        words.insert(draw.randrange(len(words)), draw.choice(["--nonsense", "-x", "--", *odd]))

    def kept() -> str:
        """Inputs are as they were; another file that is there is only written over when that is asked for."""
        for file in files:
            path = place / file.name
            beside = [str(path.with_suffix(end)) for end in (".csv", ".json", ".pt", "")]
            asked = any(word in beside for word in outs) and words.count("--force") and not _read(path, words, outs)
            if not asked and (not path.exists() or path.read_bytes() != file.read_bytes()):
                return f"{path.name} is not what it was"
        return RIGHT

    return Case(tuple(words), always=kept)


def _read(path: Path, words: list[str], outs: list[str]) -> bool:
    named = [word for word in words if word in (str(path), str(path.with_suffix(".csv")))]
    return len(named) > len([out for out in outs if out in named])


def _flat(content: Any, name: str = "") -> dict[str, Any]:
    if isinstance(content, dict):
        return {key: item for part, inner in content.items() for key, item in _flat(inner, f"{name}.{part}").items()}
    return {name: content}


def recipes(given: Material, draw: random.Random, place: Path) -> Case:
    """A recipe with a changed text, or with changed settings."""
    path = place / "recipe.toml"
    text = given.recipe
    if draw.random() < 0.5:
        for _ in range(draw.choice((1, 1, 2, 3))):
            text = of_text(text, draw)
    else:
        settings = of_value(tomllib.loads(text), draw)
        lines = [
            f"{json.dumps(key)} = {_toml(value)}" for key, value in settings.items() if not isinstance(value, dict)
        ]
        for name, section in settings.items():
            if isinstance(section, dict):
                lines.append(f"[{json.dumps(name)}]")
                lines += [f"{json.dumps(key)} = {_toml(value)}" for key, value in section.items()]
        text = "\n".join(lines)
    path.write_text(text, errors="surrogateescape")

    def judge(printed: str) -> str:
        asked = _flat(tomllib.loads(path.read_text()))
        shown = _flat(tomllib.loads(printed))
        for name, value in asked.items():
            if name == ".base":
                continue
            there = shown.get(name, shown)
            if there != value and not (isinstance(value, float) and math.isnan(value)):
                return f"{name} = {value!r} became {there!r}" if name in shown else f"{name} was ignored"
        return RIGHT

    return Case(("recipe", "show", str(path)), judge)


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {_toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return json.dumps("" if value is None else value)


def checkpoints(given: Material, draw: random.Random, place: Path) -> Case:
    """A damaged checkpoint; or one with other content and a fingerprint that fits, which may be read or refused."""
    import torch

    from grood_cert.system.torch_files import fingerprint

    path, honest = place / "model.pt", True
    if draw.random() < 0.6:
        path.write_bytes(of_bytes(given.model.read_bytes(), draw))
    else:
        honest = False
        content = torch.load(given.model, weights_only=True)
        content.pop("content_sha256")
        holder, key = content, draw.choice(list(content))
        while isinstance(holder[key], dict) and holder[key] and draw.random() < 0.8:
            holder = holder[key]
            key = draw.choice(list(holder))
        tensors = [torch.tensor(math.nan), torch.zeros(0), torch.zeros(3, 3), torch.ones(2, dtype=torch.int8)]
        kind = draw.randrange(3)
        if kind == 0:
            del holder[key]
        elif kind == 1 and isinstance(holder[key], torch.Tensor):
            holder[key] = draw.choice([holder[key].half(), holder[key][:1], holder[key] * math.inf, holder[key].long()])
        else:
            holder[key] = draw.choice([*ODD, *tensors])
        with contextlib.suppress(Exception):  # what no fingerprint can be made of keeps none
            content["content_sha256"] = fingerprint(content)
        try:
            torch.save(content, path)
        except Exception:  # noqa: BLE001  (10**400, for one, cannot be pickled in every protocol)
            path.write_bytes(b"")

    def judge(printed: str) -> str:
        if not honest:
            return RIGHT
        from grood_cert.system.torch_files import opened

        one, two = (fingerprint(opened(file)) for file in (path, given.model))
        return RIGHT if one == two else "another content was read"

    return Case(("export", str(path), "--out", str(place / "weights.pt"), "--format", "state-dict"), judge)


def rows(given: Material, draw: random.Random, place: Path) -> Case:
    """Rows or a manifest, damaged; or changed, with a checksum that fits."""
    from grood_cert.results.checksum import KEY, Checksum
    from grood_cert.results.table import Table, read_cells

    path = place / "rows.csv"
    for suffix in (".csv", ".json"):
        shutil.copy(given.rows.with_suffix(suffix), path.with_suffix(suffix))
    kind = draw.randrange(4)
    honest = kind != 3
    file = path if kind == 0 else path.with_suffix(".json")
    if kind in (0, 1):
        if draw.random() < 0.5:
            file.write_bytes(of_bytes(file.read_bytes(), draw))
        else:
            file.write_text(of_text(file.read_text(), draw), errors="surrogateescape")
    else:
        manifest = of_value(json.loads(file.read_text()), draw)
        if kind == 3 and isinstance(manifest, dict):
            with contextlib.suppress(Exception):
                manifest[KEY] = Checksum(read_cells(path)[1]).of(manifest)
        file.write_text(json.dumps(manifest), errors="surrogateescape")
    stripped = False
    with contextlib.suppress(Exception):
        stripped = KEY not in json.loads(path.with_suffix(".json").read_text())

    def judge(printed: str) -> str:
        if not honest or stripped:
            return RIGHT
        found, expected = Table.read(path), Table.read(given.rows)
        same = {**found.manifest} == {**expected.manifest} and all(
            (found._wide()[name].astype(str) == values.astype(str)).all() for name, values in expected._wide().items()
        )
        return RIGHT if same else "other rows were read"

    command = draw.choice(("threshold", "threshold", "status", "merge", "vnnlib"))
    if command == "threshold":
        return Case(("threshold", str(path), "--gamma", "-1.5", "--out", str(place / "other.csv")), judge)
    if command == "status":
        return Case(("status", str(place)))
    if command == "vnnlib":
        return Case(("vnnlib", str(given.model), str(path), "--eps", "0.01", "--out", str(place / "v"), "--limit", "1"))
    first, second = given.shards
    for suffix in (".csv", ".json"):
        shutil.copy(first.with_suffix(suffix), path.with_suffix(suffix))
    file.write_bytes(of_bytes(file.read_bytes(), draw))

    def whole(printed: str) -> str:
        one, two = (Checksum(read_cells(file)[1]).of({}) for file in (place / "merged.csv", given.rows))  # by value
        same = one == two
        return RIGHT if same else "other rows were merged"

    return Case(("merge", str(path), str(second), "--out", str(place / "merged.csv")), whole)


def networks(given: Material, draw: random.Random, place: Path) -> Case:
    """An ONNX file, its bytes or its fields changed."""
    import onnx

    path = place / "net.onnx"
    if draw.random() < 0.6:
        path.write_bytes(of_bytes(given.onnx.read_bytes(), draw))
    else:
        model = onnx.load(given.onnx)
        node = draw.choice(model.graph.node)
        kind = draw.randrange(6)
        if kind == 0:
            node.op_type = draw.choice(("Relu", "Sigmoid", "Gemm", "Loop", "Nothing", "Cast", "Softmax", "Abs", "Sign"))
        elif kind == 1 and node.attribute:
            attribute = draw.choice(node.attribute)
            attribute.i, attribute.f = draw.choice((-1, 0, 2, 2**40)), draw.choice((0.0, -1.0, math.nan, 1e30))
            attribute.ints[:] = [draw.choice((-1, 0, 1, 2, 3)) for _ in attribute.ints]
        elif kind == 2:
            node.input[draw.randrange(len(node.input))] = draw.choice([item.name for item in model.graph.initializer])
        elif kind == 3:
            tensor = draw.choice(model.graph.initializer)
            tensor.dims[:] = [draw.choice((0, 1, -1, 2, 10**9, size)) for size in tensor.dims]
        elif kind == 4:
            tensor = draw.choice(model.graph.initializer)
            tensor.data_location = onnx.TensorProto.EXTERNAL
            tensor.ClearField("raw_data")
            entry = tensor.external_data.add()
            entry.key, entry.value = "location", draw.choice(("../model.pt", "/etc/hostname", "rows.csv", "net.onnx"))
        else:
            del model.graph.node[draw.randrange(len(model.graph.node))]
        path.write_bytes(model.SerializeToString())
    out = place / "imported.pt"

    def judge(printed: str) -> str:
        import numpy as np
        import torch
        from onnx.reference import ReferenceEvaluator

        from grood_cert import detector

        images = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        try:
            session = ReferenceEvaluator(onnx.load(path))
            (expected,) = session.run(None, {session.input_names[0]: images.numpy()})
        except Exception:  # noqa: BLE001  (onnx itself does not run it)
            return RIGHT
        with torch.no_grad():
            found = detector.load(out).network(images.double()).numpy()
        finite = np.isfinite(expected)  # the file computes in float32, which overflows earlier
        size = 1 + np.abs(expected[finite]).max(initial=0.0)
        close = np.allclose(found[finite], expected[finite], rtol=1e-3, atol=1e-3 * size)
        return RIGHT if close else "the imported network computes something else than the file"

    return Case(("import", str(path), "--id", "digits:0-3", "--out", str(out), "--force"), judge)


KINDS = {
    "command lines": command_lines,
    "recipes": recipes,
    "checkpoints": checkpoints,
    "rows and manifests": rows,
    "ONNX files": networks,
}


def run(case: Case) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a case, in this process; an exception that reaches the top goes on."""
    import sys

    from grood_cert import cli

    out, err = io.StringIO(), io.StringIO()
    sys.argv = ["grood-cert", *case.arguments]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main()
        except SystemExit as ended:
            return int(ended.code or 0), out.getvalue(), err.getvalue()
    raise AssertionError("the command line returned")
