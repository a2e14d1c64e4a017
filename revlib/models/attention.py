"""Self-attention that chooses how it is computed by device, precision and shape."""

from __future__ import annotations

import torch
from einops import rearrange
from timm.layers import Attention
from torch import Tensor

__all__ = ["SelfAttention"]

LONGEST = 1024  # tokens; up to here both ways were measured


class SelfAttention(Attention):  # type: ignore[misc]  # timm comes without types
    r"""timm's ``Attention``, which multiplies matrices one after another where torch's fused kernel is slow.

    $$\mathrm{softmax}(Q K^\top / \sqrt d)\, V, \qquad Q, K, V = x W_{qkv}$$

    On a CPU, the backward pass of torch's fused kernel takes much longer in bfloat16 than plain matrix products do.
    On one core of an AMD EPYC with bfloat16 instructions, forward and backward of 16 to 1,024 tokens and heads of
    16 to 128 features took 1.4 to 7 times as long. In float32 the fused kernel is up to 1.5 times as fast, and is
    used.

    The choice depends on nothing that differs between a forward pass and its repetition in backward, so that both
    compute the same numbers. Softmax is computed in float32 in both ways, and its result is rounded to bfloat16.

    Shapes: (batch, tokens, features) to the same. Cost: the plain way stores batch · heads · tokens² numbers in
    bfloat16, for as long as this layer's activations live.
    """

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        if attn_mask is not None or is_causal or not self._plain(x):
            return super().forward(x, attn_mask, is_causal)
        q, k, v = rearrange(
            self.qkv(x), "b n (three h d) -> three (b h) n d", three=3, h=self.num_heads
        ).unbind()
        # Autocast would convert the weights of softmax to float32 and back.
        with torch.autocast("cpu", enabled=False):
            scores = torch.baddbmm(q.new_zeros(()), q, k.transpose(1, 2), beta=0, alpha=self.scale)
            out = torch.bmm(scores.softmax(dim=-1), v)
        return self.proj_drop(self.proj(rearrange(out, "(b h) n d -> b n (h d)", h=self.num_heads)))

    def _plain(self, x: Tensor) -> bool:
        autocast = torch.is_autocast_enabled("cpu")
        dtype = torch.get_autocast_dtype("cpu") if autocast else x.dtype
        dropping = self.training and self.attn_drop.p > 0
        return (
            x.device.type == "cpu"
            and dtype is torch.bfloat16
            and x.shape[1] <= LONGEST
            and not dropping
        )
