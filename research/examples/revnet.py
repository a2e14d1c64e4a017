"""RevNet for CIFAR-10: from the image to the features, downsampling included, one reversible sequence.

    python -m research.examples.revnet --data-dir DIR            # CIFAR-10, downloaded if it is not there
    python -m research.examples.revnet --fake                    # random images, to see it run

Source: Gomez et al., *The Reversible Residual Network*, NeurIPS 2017. There, each stage keeps its input; here nothing
is kept between stages, since space to depth is a bijection.
"""

from pathlib import Path

import torch
import typer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision import datasets
from torchvision.transforms import v2

from revlib import ReversibleSequence
from revlib.bijections import Concat, Rearrange, Split

HALVE = "b c (h p) (w q) -> b (c p q) h w"


def branch(width: int, groups: int) -> nn.Module:
    """A function of one stream for the other: a pre-activated bottleneck with batch norm."""
    inner = max(width // 4, 8)
    return nn.Sequential(
        *(nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, inner, 1, bias=False)),
        *(nn.BatchNorm2d(inner), nn.ReLU(), nn.Conv2d(inner, inner, 3, padding=1, groups=groups, bias=False)),
        *(nn.BatchNorm2d(inner), nn.ReLU(), nn.Conv2d(inner, width, 1, bias=False)),
    )


def items(width: int = 32, depths: tuple[int, ...] = (3, 3, 3), groups: int = 1) -> list:
    """The steps from ``width`` channels to ``width * 4 ** (len(depths) - 1)``; each stage but the first halves the
    resolution first."""
    steps: list = [Split(2)]
    for stage, depth in enumerate(depths):
        steps += [Rearrange(HALVE, p=2, q=2)] if stage else []
        channels = width // 2 * 4**stage
        steps += [(branch(channels, groups), branch(channels, groups)) for _ in range(depth)]
    return [*steps, Concat(2)]


class RevNet(nn.Module):
    def __init__(self, width: int = 32, depths: tuple[int, ...] = (3, 3, 3), classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.stages = ReversibleSequence(items(width, depths))
        self.norm = nn.BatchNorm2d(width * 4 ** (len(depths) - 1))
        self.head = nn.Linear(self.norm.num_features, classes)

    def forward(self, images: Tensor) -> Tensor:
        (features,) = self.stages(self.stem(images))
        return self.head(F.relu(self.norm(features)).mean((2, 3)))


def accuracy(model: nn.Module, data: DataLoader) -> float:
    model.eval()
    with torch.no_grad():
        right = [(model(x).argmax(1) == y).float().mean().item() for x, y in data]
    model.train()
    return sum(right) / len(right)


def train(model: nn.Module, train: Dataset, test: Dataset, epochs: int, batch: int = 128, rate: float = 0.1) -> float:
    """Returns the accuracy on the test set."""
    batches = DataLoader(train, batch, shuffle=True, drop_last=True)
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=epochs * len(batches))
    for epoch in range(epochs):
        for images, labels in batches:
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        found = accuracy(model, DataLoader(test, batch))
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}, test accuracy {found:.3f}")
    return found


def main(data_dir: Path = Path("data"), epochs: int = 30, width: int = 32, fake: bool = False) -> None:
    scaled = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize((0.49, 0.48, 0.45), (0.25, 0.24, 0.26))]
    ways = v2.Compose([v2.RandomCrop(32, 4), v2.RandomHorizontalFlip(), *scaled]), v2.Compose(scaled)
    if fake:
        sets = [datasets.FakeData(256, (3, 32, 32), 10, transform=way) for way in ways]
    else:
        sets = [datasets.CIFAR10(data_dir, i == 0, way, download=True) for i, way in enumerate(ways)]
    train(RevNet(width), *sets, epochs=epochs)


if __name__ == "__main__":
    typer.run(main)
