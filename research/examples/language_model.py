"""A causal language model on text that comes with Python, at a context that plain training has no memory for.

    python -m research.examples.language_model

Says what bytes a training step at this context takes with every activation stored and with none, and which of both fits
into the budget; trains on Python's own help pages; and writes on, with the keys and values of earlier positions kept.
"""

from pydoc_data.topics import topics

import torch
import typer
from timm.layers import Mlp
from torch import Tensor, nn
from torch.nn import functional as F

from revlib import Naive, Reversible, ReversibleSequence
from revlib.schedulers import Scheduler
from revlib.testing import LiveBytes

TEXT = "\n\n".join(topics[name] for name in sorted(topics)).encode()
Cache = dict[int, tuple[Tensor, Tensor]]  # keys and values by layer


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, layer: int) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.heads, self.layer = heads, layer

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if cache is not None:
            if self.layer in cache:
                k, v = (torch.cat(pair, 2) for pair in zip(cache[self.layer], (k, v), strict=True))
            cache[self.layer] = k, v
        y = F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] == k.shape[2])
        return self.out(y.transpose(1, 2).flatten(2))


class LanguageModel(nn.Module):
    def __init__(self, context: int, width: int = 128, heads: int = 4, depth: int = 12) -> None:
        super().__init__()
        self.context = context
        self.bytes, self.places = nn.Embedding(256, width), nn.Embedding(context, width)
        mlps = [nn.Sequential(nn.LayerNorm(width), Mlp(width, 4 * width)) for _ in range(depth)]
        self.blocks = ReversibleSequence((Attention(width, heads, i), mlp) for i, mlp in enumerate(mlps))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256, bias=False)

    def forward(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        start = next(iter(cache.values()))[0].shape[2] if cache else 0
        x = self.bytes(tokens) + self.places(torch.arange(start, start + tokens.shape[1], device=tokens.device))
        y1, y2 = self.blocks(x, x, **({} if cache is None else {"cache": cache}))
        return self.head(self.norm(y1 + y2))

    @torch.no_grad()
    def generate(self, text: bytes, temperature: float = 0.8) -> bytes:
        tokens, cache = torch.tensor([list(text)]), {}
        while len(text) < self.context:
            tokens = torch.softmax(self(tokens, cache)[0, -1] / temperature, 0).multinomial(1)[None]
            text += bytes([tokens.item()])
        return text


def loss_of(model: LanguageModel, batch: int) -> Tensor:
    starts = torch.randint(len(TEXT) - model.context - 1, (batch,))
    tokens = torch.tensor([list(TEXT[i : i + model.context + 1]) for i in starts])
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def peak(model: LanguageModel, scheduler: Scheduler, batch: int) -> int:
    """Bytes of activations and gradients of one training step at the model's context."""
    model.blocks.scheduler = scheduler
    with LiveBytes(model.parameters()) as live:
        loss_of(model, batch).backward()
    return live.peak


def train(model: LanguageModel, steps: int, batch: int, rate: float = 1e-3) -> float:
    optimizer = torch.optim.AdamW(model.parameters(), rate)
    for step in range(steps):
        loss = loss_of(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step}: {loss.item():.3f} nats a byte", end="\r")
    return loss.item()


def main(context: int = 1024, steps: int = 200, batch: int = 1, depth: int = 12, budget: int = 100_000_000) -> None:
    model = LanguageModel(context, depth=depth)
    for scheduler in (Naive(), Reversible()):
        found = peak(model, scheduler, batch)
        print(f"{scheduler}: {found:,} bytes {'fit' if found <= budget else 'do not fit'} into {budget:,}")
    train(model, steps, batch)
    print(model.generate(b"The statement ").decode(errors="replace"))


if __name__ == "__main__":
    typer.run(main)
