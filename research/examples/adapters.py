"""Fine-tuning with adapters on a frozen base, in constant memory.

    python -m research.examples.adapters

A reversible vision transformer learns the digits 0 to 4. Then it is frozen, and low-rank adapters on all of its linear
layers learn the digits 5 to 9, with a fresh head. Steps recover their inputs also where nothing in them is trained.

Source: Hu et al., *LoRA: Low-Rank Adaptation of Large Language Models*, ICLR 2022. Data: scikit-learn's digits.
"""

import torch
import typer
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from revlib.models import RevViT


class Adapter(nn.Module):
    """A linear layer that stays as it is, and a product of two small matrices that learns."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def adapt(model: nn.Module, rank: int = 4) -> None:
    """Freeze a model, and put an adapter around every linear layer of its blocks."""
    model.requires_grad_(False)
    for module in list(model.blocks.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, Adapter(child, rank))


def digits(classes: range) -> tuple[Tensor, Tensor]:
    """Images (n, 1, 8, 8) and labels from 0."""
    images, labels = (torch.from_numpy(a) for a in load_digits(return_X_y=True))
    mine = (labels >= classes.start) & (labels < classes.stop)
    return images[mine].float().view(-1, 1, 8, 8) / 8 - 1, labels[mine].long() - classes.start


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int, rate: float = 3e-3) -> float:
    """Returns the accuracy on the last fifth, which is held out."""
    count = len(images) * 4 // 5
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], rate)
    for _ in range(epochs):
        for places in torch.randperm(count).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(images[places]), labels[places]).backward()
            optimizer.step()
    model.eval()
    with torch.no_grad():
        right = (model(images[count:]).argmax(1) == labels[count:]).float().mean().item()
    model.train()
    return right


def main(epochs: int = 10, depth: int = 4, rank: int = 4) -> tuple[float, float]:
    model = RevViT(img_size=8, patch_size=2, in_chans=1, num_classes=5, embed_dim=32, depth=depth, num_heads=4)
    base = train(model, *digits(range(5)), epochs=epochs)
    adapt(model, rank)
    model.reset_classifier(5)
    learned = sum(p.numel() for p in model.parameters() if p.requires_grad)
    tuned = train(model, *digits(range(5, 10)), epochs=epochs)
    share = learned / sum(p.numel() for p in model.parameters())
    print(f"digits 0 to 4: {base:.3f}; 5 to 9 with {share:.0%} of the parameters: {tuned:.3f}")
    return base, tuned


if __name__ == "__main__":
    typer.run(main)
