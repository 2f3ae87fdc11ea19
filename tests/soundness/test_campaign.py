"""A part of the campaign; and a wrong bound is found, kept, and shown again."""

from dataclasses import replace

import pytest
import torch

from tests.soundness import claims
from tests.soundness.__main__ import main
from tests.soundness.campaign import tried
from tests.soundness.report import report

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # what torch thinks of odd networks


@pytest.mark.parametrize("part", range(4))
def test_nothing_is_contradicted(part):
    counts = tried(12, range(6 * part, 6 * part + 6))
    assert not counts.failed, report(counts, 12) + "".join(map(str, counts.violations))
    assert sum(counts.networks.values()) >= 3
    assert sum(counts.tally.compared.values()) > 10_000


def planted(side):
    """Bounds of S that are a little too tight on one side."""
    right = claims.score_bounds

    def wrong(*arguments):
        found = right(*arguments)
        width = found.upper - found.lower
        return replace(found, **{side: getattr(found, side) + (0.3 if side == "lower" else -0.3) * width})

    return wrong


@pytest.mark.parametrize("side", ["lower", "upper"])
def test_a_planted_bound_is_found_kept_and_shown_again(side, monkeypatch, tmp_path, capsys):
    command = ["--nets", "1", "--workers", "1", "--out", str(tmp_path)]
    with monkeypatch.context() as patch:
        patch.setattr(claims, "score_bounds", planted(side))
        assert main(command) == 1
        saved = sorted(tmp_path.glob("violation-*.pt"))
        assert saved
        assert f"--show {saved[0]}" in capsys.readouterr().out
        assert main(["--show", str(saved[0])]) == 1
        assert "again: claimed" in capsys.readouterr().out
    assert main(["--show", str(saved[0])]) == 0
    assert "the claim holds at this point" in capsys.readouterr().out
    assert torch.load(saved[0], weights_only=True)["kind"] == side
