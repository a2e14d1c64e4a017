"""A reversible model in the training loops of Lightning and of Accelerate: nothing about it is special.

python -m research.examples.loops lightning          # pip install lightning
python -m research.examples.loops accelerate         # pip install accelerate
"""

import torch
import typer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from revlib.models import RevViT

app = typer.Typer()


def model() -> nn.Module:
    return RevViT(img_size=8, patch_size=2, in_chans=1, num_classes=2, embed_dim=16, depth=4, num_heads=2)


def data(count: int = 128) -> DataLoader:
    """Images that are bright or dark on the whole, and labels that say which."""
    labels = torch.randint(2, (count,))
    return DataLoader(TensorDataset(torch.randn(count, 1, 8, 8) + labels[:, None, None, None], labels), 32)


@app.command()
def lightning(epochs: int = 5) -> float:
    import lightning

    class Classifier(lightning.LightningModule):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), 3e-3)

    classifier, batches = Classifier(model()), data()
    trainer = lightning.Trainer(max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.fit(classifier, batches)
    return accuracy(classifier.net, batches)


@app.command()
def accelerate(epochs: int = 5) -> float:
    from accelerate import Accelerator

    accelerator, net, batches = Accelerator(cpu=True), model(), data()
    net, optimizer, batches = accelerator.prepare(net, torch.optim.AdamW(net.parameters(), 3e-3), batches)
    for images, labels in (batch for _ in range(epochs) for batch in batches):
        loss = F.cross_entropy(net(images), labels)
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
    return accuracy(accelerator.unwrap_model(net), batches)


@torch.no_grad()
def accuracy(net: nn.Module, batches: DataLoader) -> float:
    right = [(net.eval()(images).argmax(1) == labels).float().mean().item() for images, labels in batches]
    print(f"accuracy {sum(right) / len(right):.3f}")
    return sum(right) / len(right)


if __name__ == "__main__":
    app()
