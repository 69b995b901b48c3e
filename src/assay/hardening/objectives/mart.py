"""MART: adversarial training that looks hardest at what is still misclassified."""

from dataclasses import dataclass
from typing import final

from assay.attacks.losses import pick
from assay.core.types import Inputs, Labels, Logits, PerSample
from assay.hardening.objective import OBJECTIVES, Objective, Step, Terms, mean_terms
from assay.hardening.objectives.adversarial import attacked
from assay.hardening.objectives.checks import require
from assay.hardening.objectives.trades import divergence


@final
@OBJECTIVES.register("mart")
@dataclass(frozen=True, slots=True, kw_only=True)
class Mart(Objective):
    """Misclassification-aware training: J = BCE(x') + beta KL(p(x) || p(x')) (1 - p_y(x)).

    BCE(x') = CE(x') - log(1 - max of p_k(x') over k != y) is the boosted cross-entropy, which widens the margin too.

    *Cost* ``steps`` + 2 forwards and backwards.

    Args:
        beta: what the divergence weighs.
        steps: of projected gradient descent.
        rel_step: length of a step as a fraction of eps.
        start: ``uniform``, ``sphere`` or ``clean``.

    *Differs from the paper in*: x' is found with the network in eval mode; the boosting is computed from logits without
    a constant inside the logarithm; smoothed and mixed labels change the cross-entropy only, y stays the label.

    References:
        Wang et al. 2020, "Improving Adversarial Robustness Requires Revisiting Misclassified Examples", ICLR,
        algorithm 1.
    """

    beta: float = 5.0
    steps: int = 10
    rel_step: float = 0.25
    start: str = "uniform"

    def __post_init__(self) -> None:
        require("beta", self.beta, 0)

    def find(self, s: Step) -> Inputs:
        return attacked(s, self.steps, self.rel_step, self.start)

    def loss(self, s: Step, x: Inputs) -> Terms:
        z, hard = s.net(s.x), s.net(x)
        boosted = s.cross_entropy(hard) + _boost(hard, s.y)
        apart = divergence(z, hard) * (1 - pick(z.softmax(1), s.y))
        return mean_terms(boosted + self.beta * apart, hard, boosted=boosted, divergence=apart)


def _boost(logits: Logits, y: Labels) -> PerSample:
    """Return -log(1 - p) (b,) for the probability p of the strongest class but y."""
    rival = logits.scatter(1, y[:, None], -float("inf")).argmax(1, keepdim=True)
    return logits.logsumexp(1) - logits.scatter(1, rival, -float("inf")).logsumexp(1)
