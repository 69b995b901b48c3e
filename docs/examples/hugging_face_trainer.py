"""Hugging Face transformers: a Trainer that learns from adversarial points, and the verdict on what it leaves.

python docs/examples/hugging_face_trainer.py
"""

# First, for it also makes torchvision fit a torch without CUDA.
from assay.integrations.hugging_face import AdversarialTrainer

# isort: split
import tempfile

import torch
from torch.utils.data import Dataset
from transformers import AutoModelForImageClassification, ResNetConfig, TrainingArguments, ViTImageProcessor

import assay

MEAN, STD = [0.1307], [0.3081]


class Digits(Dataset):
    """Digits as an image processor leaves them: normalised."""

    def __init__(self, start: int, stop: int) -> None:
        data = assay.load_data("demo:mnist", limit=stop)
        self.pixels, self.labels = data.batch(range(start, stop)), data.labels[start:stop]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": (self.pixels[i] - MEAN[0]) / STD[0], "labels": self.labels[i]}


def main(folder: str, train: int = 2000, epochs: int = 4, limit: int = 200) -> dict[str, float]:
    """Return the robust accuracy after training plainly and on PGD points."""
    test, found = Digits(train, train + limit), {}
    for method, how in {"plain": {}, "pgd": {"steps": 5}}.items():
        torch.manual_seed(0)
        config = ResNetConfig(num_channels=1, embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], num_labels=10,
                              layer_type="basic")  # fmt: skip
        args = TrainingArguments(folder, num_train_epochs=epochs, per_device_train_batch_size=50, learning_rate=3e-3,
                                 save_strategy="no", report_to="none", disable_tqdm=True)  # fmt: skip
        trainer = AdversarialTrainer(
            model=AutoModelForImageClassification.from_config(config),
            args=args,
            train_dataset=Digits(0, train),
            processing_class=ViTImageProcessor(image_mean=MEAN, image_std=STD, do_resize=False),
            threat="linf:0.1",  # in pixels from 0 to 1, although the batches are normalised
            method=method,
            hyperparameters=how,
        )
        trainer.train()
        model = assay.Model(trainer.model, mean=MEAN, std=STD)
        e = assay.evaluate(model, (test.pixels, test.labels), "linf:0.1", "quick", progress=False)
        print(f"{method:6}  clean {e.clean_accuracy:.1%}  robust {e.robust_accuracy:.1%}")
        found[method] = e.robust_accuracy or 0.0
    return found


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(folder)
