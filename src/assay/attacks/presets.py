"""Attacks that are known by a name of their own, and are made of others.

Those of the FGSM family aim at perturbations that fool other networks too. Their step is eps / 10, their number of
steps 10, as published.
"""

from typing import Any

from assay.attacks.combine import OutputDiversified, Targets
from assay.attacks.gradient.apgd import APGD
from assay.attacks.gradient.bim import BIM
from assay.attacks.gradient.pgd import PGD
from assay.attacks.losses import cross_entropy, dlr, margin
from assay.attacks.registry import ATTACKS
from assay.attacks.transforms import Diversity, Momentum, Scales, Smoothing, Transformed, Variance
from assay.models.door import Loss

_FGSM: dict[str, Any] = {"norm": ("linf", "l2"), "access": "gradient", "kind": "budget"}


@ATTACKS.register("mi-fgsm", **_FGSM)
def mi_fgsm(steps: int = 10, rel_step: float = 0.1, decay: float = 1.0, loss: Loss = cross_entropy) -> Transformed:
    """BIM with momentum (Dong et al. 2018, arXiv:1710.06081)."""
    return Transformed(BIM(steps=steps, rel_step=rel_step, loss=loss), (Momentum(decay=decay),))


@ATTACKS.register("ni-fgsm", **_FGSM)
def ni_fgsm(steps: int = 10, rel_step: float = 0.1, decay: float = 1.0, loss: Loss = cross_entropy) -> Transformed:
    """BIM with Nesterov's momentum (Lin et al. 2020, arXiv:1908.06281)."""
    nesterov = Momentum(decay=decay, look_ahead=rel_step)
    return Transformed(BIM(steps=steps, rel_step=rel_step, loss=loss), (nesterov,))


@ATTACKS.register("di-fgsm", **_FGSM)
def di_fgsm(
    steps: int = 10,
    rel_step: float = 0.1,
    decay: float = 1.0,
    chance: float = 0.5,
    smallest: float = 0.9,
    loss: Loss = cross_entropy,
) -> Transformed:
    """MI-FGSM through random resizing and padding (Xie et al. 2019, arXiv:1803.06978)."""
    transforms = (Diversity(chance=chance, smallest=smallest), Momentum(decay=decay))
    return Transformed(BIM(steps=steps, rel_step=rel_step, loss=loss), transforms)


@ATTACKS.register("ti-fgsm", **_FGSM)
def ti_fgsm(
    steps: int = 10,
    rel_step: float = 0.1,
    decay: float = 1.0,
    chance: float = 0.5,
    smallest: float = 0.9,
    size: int = 15,
    kernel: str = "gaussian",
    loss: Loss = cross_entropy,
) -> Transformed:
    """DI-FGSM with a smoothed gradient, known as TI-DIM (Dong et al. 2019, arXiv:1904.02884)."""
    diverse, smooth = Diversity(chance=chance, smallest=smallest), Smoothing(size=size, kernel=kernel)
    return Transformed(BIM(steps=steps, rel_step=rel_step, loss=loss), (diverse, smooth, Momentum(decay=decay)))


@ATTACKS.register("si-ni-fgsm", **_FGSM)
def si_ni_fgsm(
    steps: int = 10, rel_step: float = 0.1, decay: float = 1.0, scales: int = 5, loss: Loss = cross_entropy
) -> Transformed:
    """NI-FGSM with the mean gradient over scaled copies (Lin et al. 2020, arXiv:1908.06281)."""
    nesterov = Momentum(decay=decay, look_ahead=rel_step)
    return Transformed(BIM(steps=steps, rel_step=rel_step, loss=loss), (Scales(count=scales), nesterov))


@ATTACKS.register("vmi-fgsm", **_FGSM)
def vmi_fgsm(
    steps: int = 10,
    rel_step: float = 0.1,
    decay: float = 1.0,
    count: int = 20,
    radius: float = 1.5,
    loss: Loss = cross_entropy,
) -> Transformed:
    """MI-FGSM with variance tuning (Wang & He 2021, arXiv:2103.15571)."""
    transforms = (Variance(count=count, radius=radius), Momentum(decay=decay))
    return Transformed(BIM(steps=steps, rel_step=rel_step, loss=loss), transforms)


@ATTACKS.register("vni-fgsm", **_FGSM)
def vni_fgsm(
    steps: int = 10,
    rel_step: float = 0.1,
    decay: float = 1.0,
    count: int = 20,
    radius: float = 1.5,
    loss: Loss = cross_entropy,
) -> Transformed:
    """NI-FGSM with variance tuning (Wang & He 2021, arXiv:2103.15571)."""
    nesterov = Momentum(decay=decay, look_ahead=rel_step)
    return Transformed(BIM(steps=steps, rel_step=rel_step, loss=loss), (Variance(count=count, radius=radius), nesterov))


@ATTACKS.register("apgd-targeted", norm=("linf", "l2", "l1"), access="gradient", kind="budget")
def apgd_targeted(steps: int = 100, rho: float = 0.75, targets: int = 9, loss: Loss = dlr) -> Targets:
    """APGD toward each of the nearest classes in turn (Croce & Hein 2020, arXiv:2003.01690, sec. 6)."""
    return Targets(APGD(steps=steps, rho=rho, loss=loss), targets)


@ATTACKS.register("odi-pgd", norm=("linf", "l2", "l1", "l0"), access="gradient", kind="budget")
def odi_pgd(steps: int = 20, rel_step: float = 0.1, odi_steps: int = 2, loss: Loss = margin) -> OutputDiversified:
    """PGD from output-diversified starts (Tashiro et al. 2020, arXiv:2003.06878)."""
    return OutputDiversified(PGD(steps=steps, rel_step=rel_step, loss=loss), odi_steps)
