r"""The cascade: stages of proof from cheap to tight over balls of growing eps, only what is undecided goes on.

For an input whose decision at x is right (ID accepted, OOD rejected), a ball of radius eps is *certified* if

    ID:  S_ub(x; eps) < gamma           OOD:  S_lb(x; eps) > gamma

was proved. The stages, in this order:

    ibp, crown-ibp, crown    bounds of S from linear bounds of the logits (`grood_cert.bounds.score`)
    lipschitz                |S(x') - S(x)| <= integral of L, L a local Lipschitz bound (`grood_cert.lipschitz`)
    alpha-crown              the same bounds of S with every free parameter optimised (`grood_cert.bounds.alpha_crown`)
    branch-and-bound         cases over the signs of unstable ReLUs (`grood_cert.bounds.branching`)

All bounds feed one *envelope*, S_lb(x; eps_j) and S_ub(x; eps_j) on the eps grid. A bound on a ball holds on every ball
inside it, so each one counts for all smaller eps of the grid: envelopes are monotone, and know nothing of gamma, which
only chooses where the expensive stages are spent. The certified radius is the largest eps at which a ball was proved;
it is searched for by secant steps and only proved values are returned, so no bound need be monotone in eps.

On the other side stands an attack: the distance of the nearest point found with the other decision. `certified <= attack`
and S_lb <= S(x') <= S_ub for every point that an attack reports are checked on every batch; a violation raises
`SoundnessError`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from grood_cert.ball import Ball, dual_norm
from grood_cert.bounds.engines import build
from grood_cert.bounds.score import score_bounds
from grood_cert.certification.adversary import Adversary
from grood_cert.certification.envelope import Envelope
from grood_cert.certification.guard import Guard
from grood_cert.certification.outcomes import Outcome
from grood_cert.certification.settings import Settings
from grood_cert.certification.stages import Means, stages_of
from grood_cert.certification.state import State
from grood_cert.detector import Detector, check_network
from grood_cert.errors import SoundnessError
from grood_cert.networks.capture import capture
from grood_cert.networks.operations import Convolution
from grood_cert.scores import score_gradient


@dataclass(frozen=True, eq=False)
class Certificates:
    """What was found out about a batch of B images on a grid of E radii; radii in pixel units, NaN where not asked for.

    Attributes:
        right: Whether the decision at x is right, shape (B,), as all but the last five.
        prediction: Most likely class.
        score: S(x).
        accepted: 1 if S(x) <= gamma, else 0.
        stage: The `Outcome` that certified the radius; undecided where there is none, misdecision where x is wrong.
        radius_certified: Largest eps certified, 0 if none.
        radius_certified_per_logit: The same from bounds of each logit alone.
        radius_lipschitz_fixed_point: From one local Lipschitz bound.
        radius_lipschitz_path: From its integral along a path.
        radius_attack: Distance of the nearest counterexample found, infinity if there is none.
        radius_gradient_norm_estimate: Margin over slope at x: an estimate.
        gradient_norm_estimate: Dual norm of the gradient of S at x.
        points: The nearest counterexamples, or x, shape (B, C, H, W).
        outcome: The `Outcome` of every ball of the grid, shape (B, E).
        s_lb: Proved lower bound of S over the ball, NaN where nothing was proved, shape (B, E).
        s_ub: Proved upper bound.
        s_attack_min: Lowest S that attacks found in the ball, shape (B, E).
        s_attack_max: Highest.
    """

    right: Tensor
    prediction: Tensor
    score: Tensor
    accepted: Tensor
    stage: Tensor
    radius_certified: Tensor
    radius_certified_per_logit: Tensor
    radius_lipschitz_fixed_point: Tensor
    radius_lipschitz_path: Tensor
    radius_attack: Tensor
    radius_gradient_norm_estimate: Tensor
    gradient_norm_estimate: Tensor
    points: Tensor
    outcome: Tensor
    s_lb: Tensor
    s_ub: Tensor
    s_attack_min: Tensor
    s_attack_max: Tensor

    @property
    def outcomes(self) -> list[list[Outcome]]:
        """What became of each ball: one list a sample, one entry an eps."""
        return [[Outcome.numbered(code) for code in codes] for codes in self.outcome.tolist()]


class Cascade:
    """Certifies batches of images against one detector.

    Args:
        detector: Network and gamma.
        settings: What to certify.
        together: Most balls bounded at once, None: all of a batch.

    Attributes:
        settings: As given.
        choice: The engine of the linear bounds.
        stages: What proves, in this order.
        failures: Messages of exceptions in bound engines with the number of balls lost to each; those balls count as
            not proved.

    Raises:
        InputError: If the settings make no sense for the detector, or a stage cannot bound one of its layers.
        RunError: If the bound engine is missing or cannot convert the network.
    """

    def __init__(self, detector: Detector, settings: Settings, together: int | None = None) -> None:
        settings.check(detector.shape)
        check_network(detector.network)
        graph = capture(detector.network, detector.shape).deployed(settings.deployment)
        single = any(isinstance(node.operation, Convolution) for node in graph.nodes)  # others gain nothing
        method = settings.linear[-1]
        self.choice = build(settings.engine, detector.network, detector.shape, method, graph, single)
        self.detector, self.settings = detector, settings
        guard = Guard(together)
        self.failures = guard.failures
        self.stages = stages_of(
            Means(settings, detector.gamma, detector.score, detector.shape, self.choice.bounded, guard)
        )

    def certify(self, images: Tensor, kind: str, generator: torch.Generator) -> Certificates:
        """Certify a batch, and attack it.

        Args:
            images: Shape (B, C, H, W), pixels in [0, 1].
            kind: "id" (to be accepted), "ood" or "noise" (to be rejected).
            generator: Random numbers of the attacks.

        Raises:
            SoundnessError: If an attack contradicts a proof.
        """
        settings, network, gamma = self.settings, self.detector.network, self.detector.gamma
        images = images.to(next(network.parameters()))
        with torch.no_grad():
            logits = network(images)
        self._check_graph(images, logits)
        score = self.detector.score.value(logits)
        accepted = score <= gamma
        right = accepted if kind == "id" else ~accepted
        adversary = Adversary(self.detector, settings, images, kind, right, generator)
        state = State(
            images=images,
            kind=kind,
            norm=settings.norm,
            right=right,
            envelope=Envelope(settings.eps, score, gamma, kind),
            per_logit=Envelope(settings.eps, score, gamma, kind),
            adversary=adversary,
            deadline=time.monotonic() + (settings.time_limit * len(images) or torch.inf),
            timed_out=torch.zeros_like(right),
        )
        adversary.search_grid(generator)
        for stage in self.stages:
            stage.run(state)
        envelope = state.envelope
        adversary.check_envelope(envelope)
        for name, radius in {"radius_certified": envelope.radius, **state.radii}.items():
            adversary.check_radius(name, radius)
        with torch.no_grad():
            self._check_graph(adversary.points, network(adversary.points))
        unknown = torch.full_like(score, torch.nan)
        slope = dual_norm(score_gradient(network, images, self.detector.score)[1], settings.norm)
        return Certificates(
            right=right,
            prediction=logits.argmax(1),
            score=score,
            accepted=accepted.long(),
            stage=torch.where(right, envelope.stage, Outcome.MISDECISION),
            radius_certified=envelope.radius,
            radius_certified_per_logit=state.radii.get("radius_certified_per_logit", unknown),
            radius_lipschitz_fixed_point=state.radii.get("radius_lipschitz_fixed_point", unknown),
            radius_lipschitz_path=state.radii.get("radius_lipschitz_path", unknown),
            radius_attack=adversary.radius,
            radius_gradient_norm_estimate=torch.where(right, envelope.margin / slope, torch.zeros_like(score)),
            gradient_norm_estimate=slope,
            points=adversary.points,
            outcome=_outcome(state),
            s_lb=_proved(envelope.lower),
            s_ub=_proved(envelope.upper),
            s_attack_min=torch.stack([seen.minimum for seen in adversary.seen], 1),
            s_attack_max=torch.stack([seen.maximum for seen in adversary.seen], 1),
        )

    def _check_graph(self, images: Tensor, logits: Tensor) -> None:
        """Proofs are about the graph, attacks about the network: both must be the same function."""
        wrong = ~self.choice.bounded.graph.agrees(images, logits)
        if bool(wrong.any()):
            raise SoundnessError(
                f"the network and the graph that was captured of it disagree on {int(wrong.sum())} images: nothing that "
                "was proved in this run can be trusted",
                {"image": images[wrong].cpu().numpy(), "logits": logits[wrong].cpu().numpy()},
            )

    def probe(self, images: Tensor) -> None:
        """Bound some balls together as `certify` does, to see how much memory that takes."""
        images = images.to(next(self.detector.network.parameters()))
        eps = images.new_full((len(images),), self.settings.eps[-1])
        ball = Ball(images, eps, self.settings.norm)
        score_bounds(self.choice.bounded, ball, self.settings.linear[-1], self.detector.score)


def _outcome(state: State) -> Tensor:
    """What became of each (sample, eps)."""
    found = state.envelope.outcome
    open_ = found == Outcome.UNDECIDED
    attacked = state.envelope.grid >= state.adversary.radius[:, None]
    found = torch.where(open_ & state.timed_out[:, None], Outcome.TIMEOUT, found)
    found = torch.where(open_ & attacked, Outcome.ATTACK, found)
    return torch.where(state.right[:, None], found, Outcome.MISDECISION)


def _proved(bound: Tensor) -> Tensor:
    """An infinite bound is no bound: NaN."""
    return torch.where(torch.isfinite(bound), bound, torch.nan)
