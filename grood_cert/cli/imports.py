"""`grood-cert import`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from grood_cert.cli import options, output
from grood_cert.cli.train import DETECTION


def import_(
    file: Annotated[Path | None, typer.Argument(metavar="[FILE]", help="A network in a file: .onnx or .pt2.")] = None,
    network: Annotated[
        str | None,
        typer.Option(
            "--network",
            metavar="NAME",
            help="In place of a file: package.module:factory, torchvision:NAME, timm:NAME, or an architecture of ours.",
        ),
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help="The named network's weights: .pt, .pth, .ckpt, .safetensors, ...")
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option(help="Argument of the named network: num_classes=10 (repeatable).")
    ] = None,
    id: Annotated[
        str, typer.Option("--id", metavar="SPEC", help="ID images that the network was not trained on.")
    ] = "",
    test: Annotated[
        str, typer.Option("--test", metavar="SPEC", help="ID images for the test. [default: of --id]")
    ] = "",
    calibration: Annotated[
        str, typer.Option("--calibration", metavar="SPEC", help="ID images that set gamma. [default: of --id]")
    ] = "",
    ood: Annotated[list[str] | None, typer.Option("--ood", metavar="SPEC", help="OOD test set (repeatable).")] = None,
    out: Annotated[Path, typer.Option(help="Checkpoint to write.")] = Path("model.pt"),
    mean: Annotated[
        str,
        typer.Option(
            help="What the network wants subtracted from pixels in [0, 1]: one number a channel, 0.5,0.4,0.4."
        ),
    ] = "",
    std: Annotated[str, typer.Option(help="And what it wants them divided by.")] = "",
    score: Annotated[str, typer.Option(help="energy, max-logit or msp.")] = "energy",
    temperature: Annotated[float | None, typer.Option(help="Temperature of energy or msp. [default: 1]")] = None,
    tpr: Annotated[int, typer.Option(min=1, max=99, help="Percent of ID to accept.")] = 95,
    classes: Annotated[str, typer.Option(help="Class names: cat,dog,... [default: those of --id]")] = "",
    name: Annotated[str, typer.Option(help="What to call the detector. [default: the network's name]")] = "",
    seed: options.Seed = 0,
    data_dir: options.DataDir = None,
    download: options.Download = False,
    device: options.Device = "auto",
    force: Annotated[bool, typer.Option("--force", help="Overwrite the checkpoint.")] = False,
) -> None:
    """Make a detector of a network that was trained elsewhere: gamma is calibrated, nothing is trained."""
    from grood_cert import scores
    from grood_cert.errors import InputError
    from grood_cert.runs import imports
    from grood_cert.sections import DataSection

    if (file is None) == (network is None):
        raise InputError("name what to import: a FILE (.onnx, .pt2), or --network NAME")
    if not id:
        raise InputError("name ID images that the network was not trained on: --id SPEC, such as --id images/val")
    if score == scores.MaxLogit.name and temperature is not None:
        raise InputError("max-logit has no temperature")
    data = DataSection(
        id=id, test=test, calibration=calibration, auxiliary="", ood=tuple(ood or ()), calibration_share=0.5, seed=seed
    )
    with output.Bar() as bar:
        detector = imports.run(
            file if file is not None else str(network),
            out,
            data,
            weights=weights,
            options=dict(_argument(text) for text in option or ()),
            mean=_numbers("--mean", mean),
            std=_numbers("--std", std),
            score=scores.named(score, 1.0 if temperature is None else temperature),
            tpr=tpr,
            class_names=tuple(part.strip() for part in classes.split(",")) if classes else (),
            name=name,
            data_dir=data_dir,
            download=download,
            device=options.device_name(device),
            force=force,
            reporter=bar,
        )
    assert detector.provenance is not None
    found = detector.provenance.metrics
    accuracy = "" if found["accuracy"] is None else f"ID accuracy {found['accuracy']:.4f}, "
    title = f"{detector.name}: {accuracy}{detector.score}, gamma {detector.gamma:.4f}"
    sets = [{"set": name, **values} for name, values in found["ood"].items()]
    output.print_across(sets, "set", DETECTION, title)
    typer.echo(f"wrote {out}; next: grood-cert certify {out} --eps 1/255,2/255 --effort fast")


def _argument(text: str) -> tuple[str, Any]:
    import ast

    from grood_cert.errors import InputError

    key, equals, value = text.partition("=")
    if not equals or not key.isidentifier():
        raise InputError(f"--option {text!r}: expected NAME=VALUE, such as num_classes=10")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


def _numbers(option: str, text: str) -> tuple[float, ...]:
    from grood_cert.errors import InputError

    try:
        found = tuple(float(part) for part in text.split(",")) if text else ()
    except ValueError:
        raise InputError(f"{option} {text!r}: expected one number a channel, such as 0.5,0.4,0.4") from None
    if option == "--std" and not all(value > 0 for value in found):
        raise InputError(f"--std {text!r}: expected numbers above 0")
    return found
