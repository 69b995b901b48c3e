"""fastai: train on a folder of images, attack what was trained, harden it, and let the verdict tell the two apart.

python docs/examples/fastai_digits.py
"""

# First, for it also makes torchvision fit a torch without CUDA.
from assay.integrations.fastai import AdversarialLearner, AdversarialTrainer

# isort: split
import tempfile
from pathlib import Path

import numpy as np
import torch
from fastai.vision.all import ImageDataLoaders, Learner, Normalize, PILImageBW, accuracy, mnist_stats, set_seed
from PIL import Image
from torch import nn

import assay


def digits(folder: Path, train: int, valid: int) -> None:
    """Write digits as people have them: train/3/00017.png."""
    data = assay.load_data("demo:mnist", limit=train + valid)
    for i, (label, pixels) in enumerate(zip(data.labels, data.batch(range(len(data))), strict=True)):
        path = folder / ("train" if i < train else "valid") / str(int(label)) / f"{i:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels[0] * 255).round().byte().numpy()).save(path)


def learner(folder: Path) -> Learner:
    """Return what a tutorial builds: loaders that normalise, and a small network."""
    norm = Normalize.from_stats(*mnist_stats, cuda=torch.cuda.is_available())
    dls = ImageDataLoaders.from_folder(folder, batch_tfms=norm, img_cls=PILImageBW, bs=100, num_workers=0)
    net = nn.Sequential(
        *(nn.Conv2d(1, 16, 5, stride=2), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 5, stride=2), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(32 * 16, 10)),
    )
    return Learner(dls, net, metrics=accuracy)


def main(folder: Path, train: int = 2000, valid: int = 500, epochs: int = 5, limit: int = 200) -> tuple[float, float]:
    """Return the robust accuracy of a plainly and of an adversarially trained Learner."""
    digits(folder, train, valid)
    found = []
    for cbs in ([], [AdversarialTrainer(eps=0.1, steps=5)]):
        set_seed(0)
        adv = learner(folder).to_learner(AdversarialLearner)
        with adv.no_bar():
            adv.fit_one_cycle(epochs, 1e-2, cbs=cbs)
        result = adv.evaluate_robustness("linf:0.1", limit=limit)
        found.append(result.robust_accuracy or 0.0)
        picture = next((folder / "valid" / "7").glob("*.png"))
        with adv.no_bar():
            adv_example = adv.generate_adv_example(picture, target_label="3", eps=None)  # the smallest change
            said = adv.predict(adv_example)[0]
        levels = np.abs(np.asarray(adv_example, int) - np.asarray(Image.open(picture), int)).max()
        print(f"A 7 is taken for a {said} once its pixels are changed by up to {levels} of 255 grey levels.\n")
    return found[0], found[1]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(Path(folder))
