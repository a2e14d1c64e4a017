"""A mixture of experts in a reversible stack: routing that survives inversion, and its balance as a stream.

    python -m research.examples.experts

Each position goes to the expert with the largest score. Inversion that rounds could send a position elsewhere in
backward; under ``ExactAdditive`` every bit comes back, and so does every decision. The losses that keep the experts
evenly used add up in a first stream, and the graph of none of them is stored.

Source: Fedus et al., *Switch Transformers*, JMLR 2022: top-1 routing, and the load-balancing loss.
"""

import torch
import typer
from torch import Tensor, nn
from torch.nn import functional as F

from revlib import ExactAdditive, ReversibleSequence, Step
from revlib.bijections import with_losses


class Experts(nn.Module):
    """Returns what is merged, and a loss, which is least if all experts get equally many positions."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.norm, self.route = nn.LayerNorm(width), nn.Linear(width, count, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)) for _ in range(count)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.norm(x).flatten(0, -2)
        odds = self.route(h).softmax(-1)
        chosen = odds.argmax(-1)
        out = torch.zeros_like(h)
        for i, expert in enumerate(self.experts):
            mine = (chosen == i).nonzero()[:, 0]
            out = out.index_add(0, mine, expert(h[mine]) * odds[mine, i, None])
        used = F.one_hot(chosen, len(self.experts)).to(odds.dtype).mean(0)
        return out.view_as(x), len(self.experts) * (used * odds.mean(0)).sum()


class Mixing(nn.Module):
    """A mixing of positions, which has no loss of its own."""

    def __init__(self, positions: int, width: int) -> None:
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(width), nn.Linear(positions, positions)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.mix(self.norm(x).mT).mT, x.new_zeros(())


def stack(positions: int = 8, width: int = 32, experts: int = 4, depth: int = 6) -> ReversibleSequence:
    """A stack on (losses, x1, x2), where the first is a scalar and the others are (batch, positions, width)."""
    functions = [f for _ in range(depth) for f in (Mixing(positions, width), Experts(width, experts))]
    return ReversibleSequence(with_losses(Step(f, ExactAdditive()) for f in functions))


def train(blocks: ReversibleSequence, steps: int = 200, positions: int = 8, width: int = 32, weight: float = 0.01):
    """Sort the positions of random sequences by one of their channels; returns the first and the last loss."""
    head = nn.Linear(width, width)
    optimizer = torch.optim.AdamW([*blocks.parameters(), *head.parameters()], 3e-3)
    first = None
    for step in range(steps):
        x = torch.randn(64, positions, width)
        wanted = x.gather(1, x[..., :1].argsort(1).expand_as(x))
        balance, y1, y2 = blocks(torch.zeros((), dtype=torch.float64), x, x)
        error = F.mse_loss(head(y1 + y2), wanted)
        optimizer.zero_grad()
        (error + weight * balance).backward()
        optimizer.step()
        first = error.item() if first is None else first
        if step % 20 == 0:
            print(f"step {step}: error {error.item():.3f}, balance {balance.item() * 2 / len(blocks):.3f} (1 is even)")
    return first, error.item()


if __name__ == "__main__":
    typer.run(lambda steps=200: train(stack(), int(steps)))
