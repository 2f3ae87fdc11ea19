"""The counts of a campaign as Markdown."""

from __future__ import annotations

from collections import Counter

from tests.soundness.campaign import Counts

_GROUPS = ("energy", "max-logit", "msp")


def report(counts: Counts, seed: int) -> str:
    """Tables of what was tried and what came out."""
    tally = counts.tally
    networks, balls = sum(counts.networks.values()), sum(counts.balls.values())
    said = (
        f"{networks:,} networks (seed {seed}), {balls:,} balls, {sum(tally.proved.values()):,} bounds, "
        f"{counts.points:,} points, {sum(tally.compared.values()):,} comparisons, "
        f"{sum(counts.oracles.values()):,} of bounds with exact extremes; {len(counts.violations)} violations, "
        f"{sum(counts.errors.values())} errors."
    )
    rounding = (
        f"Judged in extended precision: {tally.judged:,}; float64 runs beyond a bound that holds exactly: "
        f"{tally.rounded:,}, the largest by {tally.rounding:.2g} of 1 + the score."
    )
    lines = [
        said,
        "",
        rounding,
        "",
        "| stage | bounds | not proved | comparisons | energy | max-logit | msp | violations |",
        "|---|---|---|---|---|---|---|---|",
    ]
    stages = sorted({stage for stage, _ in tally.proved | tally.compared})
    for stage in stages:
        compared = [sum(_of(tally.compared, stage, group)) for group in _GROUPS]
        lines.append(
            f"| {stage} | {sum(_of(tally.proved, stage)):,} | {sum(_of(tally.unproved, stage)):,} | {sum(compared):,} "
            f"| {' | '.join(f'{part:,}' for part in compared)} | {sum(_of(tally.violated, stage))} |"
        )
    lines += ["", "| oracle | comparisons | within 1e-6 of the truth |", "|---|---|---|"]
    lines += [f"| {name} | {count:,} | {counts.reached[name]:,} |" for name, count in sorted(counts.oracles.items())]
    lines += ["", "| networks made for | captured |", "|---|---|"]
    lines += [f"| {name} | {count:,} |" for name, count in sorted(counts.networks.items())]
    lines += ["", "| norm | balls |", "|---|---|"]
    lines += [f"| {name} | {count:,} |" for name, count in sorted(counts.balls.items())]
    for title, counter in (("refused", counts.refused), ("errors", counts.errors)):
        if counter:
            lines += ["", f"| {title} | times |", "|---|---|"]
            lines += [f"| {message.replace('|', '/')} | {count} |" for message, count in counter.most_common()]
    spent = ", ".join(f"{stage} {seconds:.0f}" for stage, seconds in counts.seconds.most_common())
    lines += ["", f"CPU seconds: {spent}.", ""]
    return "\n".join(lines)


def _of(counter: Counter[tuple[str, str]], stage: str, group: str = "") -> list[int]:
    return [count for (name, score), count in counter.items() if name == stage and score.startswith(group)]
