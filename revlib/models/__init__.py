"""Models: thin compositions of timm's layers and :class:`~revlib.ReversibleSequence`."""

from revlib.models.swin import RevSwin
from revlib.models.vit import RevViT

__all__ = ["RevSwin", "RevViT"]
