"""`grood-cert train`."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from grood_cert.cli import options, output

if TYPE_CHECKING:
    from grood_cert.training.loop import Epoch


def _epoch_line(epoch: Epoch) -> str:
    return (
        f"epoch {epoch.epoch:3d}  loss {epoch.loss:.3f}  CE {epoch.cross_entropy:.3f}  L_S {epoch.energy_loss:.3f}  "
        f"L_grad {epoch.gradient_loss:.3f}  "
        f"active L_S {epoch.active_energy_id:.2f}/{epoch.active_energy_aux:.2f}  "
        f"L_grad {epoch.active_gradient_id:.2f}/{epoch.active_gradient_aux:.2f}  "
        f"|grad S| {epoch.gradient_norm_id:.2f}/{epoch.gradient_norm_aux:.2f}  "
        f"acc {epoch.accuracy:.3f}  fpr95_id {epoch.fpr95_id:.3f}  "
        f"{epoch.samples_per_second:.0f} samples/s, {epoch.gradient_share:.0%} for L_grad"
    )


def _events(folder: Path) -> Callable[[Epoch], None]:
    """A function that writes an epoch's record as TensorBoard events, over those of an earlier run from there on.

    Written here and not by `SummaryWriter`, whose thread prints a traceback of its own where the disk is full.
    """
    from grood_cert.errors import InputError, RunError

    try:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter
    except ImportError:
        raise InputError("--tensorboard needs the package tensorboard; pip install 'grood-cert[tensorboard]'") from None
    path, begun = folder / f"events.out.tfevents.{time.time():.0f}.{os.getpid()}", False

    def write(epoch: Epoch) -> None:
        nonlocal begun
        values = [Summary.Value(tag=name, simple_value=value) for name, value in dataclasses.asdict(epoch).items()]
        events = [Event(step=epoch.epoch, summary=Summary(value=values))]
        if not begun:
            purge = SessionLog(status=SessionLog.START)
            events = [Event(file_version="brain.Event:2"), Event(step=epoch.epoch, session_log=purge), *events]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with path.open("ab") as stream:
                for event in events:
                    event.wall_time = time.time()
                    RecordWriter(stream).write(event.SerializeToString())
        except OSError as error:
            raise RunError(
                f"cannot write {path}: {error.strerror or error}; the run stops, what it last saved is kept: make room, "
                "then add --resume"
            ) from error
        begun = True

    return write


DETECTION = {"kind": "kind", "samples": "samples", "auroc": "AUROC", "fpr95_id": "fpr95_id", "fpr95_ood": "fpr95_ood"}


def train(
    recipe: Annotated[str, typer.Argument(help="Recipe file, or a name that `grood-cert recipe list` shows.")],
    out: Annotated[Path, typer.Option(help="Folder of the run: model.pt, log.csv, best.pt.")],
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Change one setting: objective.lambda_grad=0.1 (repeatable).")
    ] = None,
    data_dir: options.DataDir = None,
    download: options.Download = False,
    device: options.Device = "auto",
    force: options.Force = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the unfinished run in the folder.")] = False,
    checkpoint_steps: Annotated[
        int, typer.Option(min=0, help="Save what --resume needs after this many steps too; 0: after epochs alone.")
    ] = 0,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Write TensorBoard events too, to OUT/tensorboard.")
    ] = False,
) -> None:
    """Train a detector from a recipe. Cross-entropy + energy margins + gradient penalty (GReg).

    Several processes share a run with: torchrun --nproc-per-node 2 -m grood_cert train RECIPE --out FOLDER
    """
    from grood_cert import recipe as recipes
    from grood_cert.system import processes
    from grood_cert.system.files import check_apart
    from grood_cert.training import run as training

    source = recipes.find(recipe)
    check_apart((out / name for name in training.FILES), [source])
    chosen = recipes.load(source, settings or ())
    with contextlib.ExitStack() as stack:
        place = stack.enter_context(processes.joined(options.device_name(device)))
        write = _events(out / "tensorboard") if tensorboard else lambda epoch: None
        bar = stack.enter_context(output.Bar())
        if note := options.bounds_note(chosen.network.name):
            bar.say(note)

        def report(epoch: Epoch) -> None:
            bar.say(_epoch_line(epoch))
            write(epoch)

        detector = training.run(
            chosen,
            out,
            data_dir=data_dir,
            download=download,
            device=place,
            force=force,
            resume=resume,
            checkpoint_steps=checkpoint_steps,
            reporter=bar,
            report=report,
        )
        first = processes.rank() == 0
    if not first:
        return
    found = detector.origin.metrics
    sets = [{"set": name, **values} for name, values in found["ood"].items()]
    title = f"{chosen.name}: ID accuracy {found['accuracy']:.4f}, gamma {detector.gamma:.4f}"
    if not sets:
        title += "; detection was not measured, data.ood names no set"
    output.print_across(sets, "set", DETECTION, title)
    typer.echo(f"wrote {out / 'model.pt'} and {out / 'log.csv'}")
