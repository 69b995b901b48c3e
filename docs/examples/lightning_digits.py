"""Lightning: one callback makes any ``LightningModule`` train adversarially; the verdict tells what that changed.

python docs/examples/lightning_digits.py
"""

# First, for it also makes torchvision fit a torch without CUDA.
from assay.integrations.lightning import AdversarialTraining

# isort: split
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import assay


class Digits(LightningModule):
    """What a tutorial writes."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            *(nn.Conv2d(1, 16, 5, stride=2), nn.BatchNorm2d(16), nn.ReLU()),
            *(nn.Conv2d(16, 32, 5, stride=2), nn.BatchNorm2d(32), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(32 * 16, 10)),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (b, 10)."""
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        """Return the loss of a batch."""
        x, y = batch
        return F.cross_entropy(self(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimiser."""
        return torch.optim.Adam(self.parameters(), 3e-3)


def main(train: int = 4000, epochs: int = 5, limit: int = 200) -> dict[str, float]:
    """Return the robust accuracy after training plainly, on PGD points, and by TRADES."""
    data = assay.load_data("demo:mnist", limit=train + limit)
    x, y = data.batch(range(len(data))), data.labels
    found = {}
    for name, callbacks in {
        "plain": [],
        "pgd": [AdversarialTraining("linf:0.1", "pgd", steps=5)],
        "trades": [AdversarialTraining("linf:0.1", "trades", steps=5, beta=6)],
    }.items():
        torch.manual_seed(0)
        module = Digits()
        trainer = Trainer(max_epochs=epochs, callbacks=callbacks, logger=False, enable_checkpointing=False,
                          enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
        trainer.fit(module, DataLoader(TensorDataset(x[:train], y[:train]), batch_size=100, shuffle=True))
        e = assay.evaluate(module, (x[train:], y[train:]), "linf:0.1", "quick", progress=False)
        print(f"{name:6}  clean {e.clean_accuracy:.1%}  robust {e.robust_accuracy:.1%}")
        found[name] = e.robust_accuracy or 0.0
    return found


if __name__ == "__main__":
    main()
