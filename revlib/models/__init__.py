"""Models: thin compositions of timm's layers and :class:`~revlib.ReversibleSequence`."""

from revlib.models.vit import RevViT

__all__ = ["RevViT"]
