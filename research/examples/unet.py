"""An invertible U-Net: skip connections are streams that wait, in images and in volumes.

    python -m research.examples.unet                    # denoise random blobs in images
    python -m research.examples.unet --dims 3           # in volumes

Going down, half of the channels stay behind as a stream, and the other half is rearranged to half the resolution. Going
up, both halves meet again. So the whole network, with every skip connection, keeps nothing for backward but its output.

Source: Etmann et al., *iUNets: Fully invertible U-Nets with learnable up- and downsampling*, 2020; here up- and
downsampling are a rearrangement.
"""

import torch
import typer
from torch import Tensor, nn
from torch.nn import functional as F

from revlib import ReversibleSequence, Step
from revlib.bijections import Concat, Inverse, Rearrange, Split

HALVE = {
    2: Rearrange("b c (h p) (w q) -> b (c p q) h w", p=2, q=2),
    3: Rearrange("b c (h p) (w q) (d r) -> b (c p q r) h w d", p=2, q=2, r=2),
}


def branch(width: int, dims: int) -> nn.Module:
    """A function of one stream for the other. Its convolution over positions is depthwise."""
    conv = (nn.Conv2d, nn.Conv3d)[dims - 2]
    return nn.Sequential(
        nn.GroupNorm(1, width), conv(width, width, 3, padding=1, groups=width), nn.GELU(), conv(width, width, 1)
    )


def items(width: int, depth: int, levels: int, dims: int) -> list:
    """Steps from one stream of ``width`` channels to one stream of the same shape.

    With ``levels`` below this one, the state is (skip, half, half) on the way down and on the way up.
    """

    def blocks() -> list[Step]:  # on the last two streams
        return [Step(branch(width // 2, dims), streams=2) for _ in range(2 * depth)]

    if levels == 0:
        return [Split(2), *blocks(), Concat(2)]
    halve = Rearrange(HALVE[dims].pattern, **HALVE[dims].sizes).on_last(1)
    below = items(width // 2 * 2**dims, depth, levels - 1, dims)
    return [
        *(Split(2), *blocks(), Concat(2)),
        *(Split(2), halve, *below, Inverse(Rearrange(halve.pattern, **halve.sizes)).on_last(1), Concat(2)),
        *(Split(2), *blocks(), Concat(2)),
    ]


class UNet(nn.Module):
    """Maps ``channels`` to as many at the same resolution, which must be a multiple of ``2 ** levels``."""

    def __init__(self, channels: int = 1, width: int = 16, depth: int = 2, levels: int = 2, dims: int = 2) -> None:
        super().__init__()
        conv = (nn.Conv2d, nn.Conv3d)[dims - 2]
        self.stem, self.head = conv(channels, width, 3, padding=1), conv(width, channels, 1)
        self.body = ReversibleSequence(items(width, depth, levels, dims))

    def forward(self, x: Tensor) -> Tensor:
        (features,) = self.body(self.stem(x))
        return self.head(features)


def blobs(batch: int, size: int, dims: int) -> Tensor:
    """Images or volumes with a bright ball each."""
    places = torch.meshgrid(*[torch.linspace(-1, 1, size)] * dims, indexing="ij")
    centres, radius = torch.rand(dims, batch) - 0.5, 0.2 + 0.4 * torch.rand(batch)
    one = (slice(None), *[None] * dims)
    squares = sum((place - centre[one]) ** 2 for place, centre in zip(places, centres, strict=True))
    return (squares < radius[one] ** 2).float()[:, None]


def train(model: nn.Module, dims: int, steps: int = 200, size: int = 32, batch: int = 8) -> list[float]:
    """Denoise; returns the losses."""
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for step in range(steps):
        clean = blobs(batch, size, dims)
        loss = F.mse_loss(model(clean + 0.5 * torch.randn_like(clean)), clean)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % 20 == 0:
            print(f"step {step}: error {loss.item():.4f}, of the noisy image 0.25")
    return losses


def main(dims: int = 2, steps: int = 200, size: int = 32, width: int = 16, depth: int = 2, levels: int = 2) -> None:
    train(UNet(1, width, depth, levels, dims), dims, steps, size)


if __name__ == "__main__":
    typer.run(main)
