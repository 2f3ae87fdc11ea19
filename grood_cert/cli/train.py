"""`grood-cert train`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from grood_cert.cli import options, output

if TYPE_CHECKING:
    from grood_cert.training import Epoch


def _epoch_line(epoch: Epoch) -> str:
    return (
        f"epoch {epoch.epoch:3d}  loss {epoch.loss:.3f}  CE {epoch.cross_entropy:.3f}  L_S {epoch.energy_loss:.3f}  "
        f"L_grad {epoch.gradient_loss:.3f}  "
        f"active L_S {epoch.active_energy_id:.2f}/{epoch.active_energy_aux:.2f}  "
        f"L_grad {epoch.active_gradient_id:.2f}/{epoch.active_gradient_aux:.2f}  "
        f"|grad S| {epoch.gradient_norm_id:.2f}/{epoch.gradient_norm_aux:.2f}  "
        f"acc {epoch.accuracy:.3f}  fpr95_id {epoch.fpr95_id:.3f}"
    )


_DETECTION = {"kind": "kind", "samples": "samples", "auroc": "AUROC", "fpr95_id": "fpr95_id", "fpr95_ood": "fpr95_ood"}


def train(
    recipe: Annotated[Path, typer.Argument(help="Recipe file, for example train/digits-greg.toml.")],
    out: Annotated[Path, typer.Option(help="Folder of the run: model.pt and log.csv.")],
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Change one setting: objective.lambda_grad=0.1 (repeatable).")
    ] = None,
    data_dir: options.DataDir = None,
    download: options.Download = False,
    device: options.Device = "auto",
    force: options.Force = False,
) -> None:
    """Train a detector from a recipe. Cross-entropy + energy margins + gradient penalty (GReg)."""
    from grood_cert import recipe as recipes
    from grood_cert import training

    chosen = recipes.load(recipe, settings or ())
    with output.Bar() as bar:
        detector = training.run(
            chosen,
            out,
            data_dir=data_dir,
            download=download,
            device=options.device_name(device),
            force=force,
            begin=lambda steps: bar.begin("training", steps),
            advance=bar.advance,
            report=lambda epoch: bar.print(_epoch_line(epoch)),
        )
    found = detector.metrics
    sets = [{"set": name, **values} for name, values in found["ood"].items()]
    title = f"{chosen.name}: ID accuracy {found['accuracy']:.4f}, gamma {detector.gamma:.4f}"
    output.print_across(sets, "set", _DETECTION, title)
    typer.echo(f"wrote {out / 'model.pt'} and {out / 'log.csv'}")
