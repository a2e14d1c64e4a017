"""An ``nn.TransformerEncoderLayer`` taken apart into the two functions of a reversible pair."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["encoder_pair"]


class _SelfAttention(nn.Module):
    """What the first half of the layer adds to its input."""

    def __init__(self, layer: nn.TransformerEncoderLayer) -> None:
        super().__init__()
        self.norm, self.attention, self.dropout = layer.norm1, layer.self_attn, layer.dropout1

    def forward(
        self,
        x: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        x = self.norm(x)
        masks = {
            "attn_mask": src_mask,
            "key_padding_mask": src_key_padding_mask,
            "is_causal": is_causal,
        }
        return self.dropout(self.attention(x, x, x, need_weights=False, **masks)[0])


class _FeedForward(nn.Module):
    """What the second half of the layer adds to its input."""

    def __init__(self, layer: nn.TransformerEncoderLayer) -> None:
        super().__init__()
        self.norm, self.linear1, self.activation = layer.norm2, layer.linear1, layer.activation
        self.dropout1, self.linear2, self.dropout2 = layer.dropout, layer.linear2, layer.dropout2

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout1(self.activation(self.linear1(self.norm(x))))
        return self.dropout2(self.linear2(x))


def encoder_pair(layer: nn.TransformerEncoderLayer) -> tuple[nn.Module, nn.Module]:
    r"""The pair (F, G) of a pre-norm layer: attention and feed-forward network, each without its residual connection.

    The layer computes $h = x + F(x)$, then $h + G(h)$. A reversible pair does the additions itself, on two streams:
    $y_1 = x_1 + F(x_2)$, then $y_2 = x_2 + G(y_1)$. If a whole layer were a function of a pair, each input would be
    added a second time: the streams would grow by a factor with every block, until they no longer invert accurately.

    F takes the layer's masks as context, by the layer's names: ``src_mask``, ``src_key_padding_mask``, ``is_causal``.

    Shapes: each function maps (batch, tokens, width) to the same, or (tokens, batch, width) without ``batch_first``.
    Cost: no copy; the functions hold the layer's own modules, and training the pair trains the layer.

    Raises:
        TypeError: if the layer is of another class, or of a subclass with a ``forward`` of its own.
        ValueError: for a post-norm layer (``norm_first=False``), whose norms act on the sum and cannot be undone.

    Source: torch.nn.TransformerEncoderLayer, by its equations; Mangalam et al., *Reversible Vision Transformers*, 2022,
    for the attention as F and the feed-forward network as G.

    Example:
        >>> import torch
        >>> from revlib import ReversibleSequence
        >>> layers = [nn.TransformerEncoderLayer(64, 4, batch_first=True, norm_first=True) for _ in range(6)]
        >>> stack = ReversibleSequence(encoder_pair(layer) for layer in layers)
        >>> x, mask = torch.randn(2, 10, 64), nn.Transformer.generate_square_subsequent_mask(10)
        >>> y1, y2 = stack(x, x, src_mask=mask)
        >>> y1.shape
        torch.Size([2, 10, 64])
    """
    if getattr(type(layer), "forward", None) is not nn.TransformerEncoderLayer.forward:
        raise TypeError(
            f"encoder_pair takes an nn.TransformerEncoderLayer, got {type(layer).__name__}; of a block of your own, "
            "pass what it adds to its input as the two modules of a pair"
        )
    if not layer.norm_first:
        raise ValueError(
            "encoder_pair takes a pre-norm layer, got norm_first=False, whose norms act on the sums; make it by "
            "nn.TransformerEncoderLayer(..., norm_first=True), which must be trained anew"
        )
    return _SelfAttention(layer), _FeedForward(layer)
