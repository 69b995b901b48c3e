"""Adversarial training, adversarial examples and the verdict for a fastai ``Learner``.

``from assay.integrations.fastai import AdversarialTrainer, AdversarialLearner``; importing this also gives every
Learner the method ``to_learner``. Sizes are those of pixels from 0 to 1, whatever the Learner normalises.
"""

from assay.integrations.fastai.callback import AdversarialTrainer, smoothing_of
from assay.integrations.fastai.learner import AdversarialLearner, NothingFoundError, to_learner

__all__ = ["AdversarialLearner", "AdversarialTrainer", "NothingFoundError", "smoothing_of", "to_learner"]
