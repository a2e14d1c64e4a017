"""Models: thin compositions of timm's layers and :class:`~revlib.ReversibleSequence`.

Importing this registers their published sizes with timm, see :mod:`revlib.models.presets`.
"""

from typing import TYPE_CHECKING, Any

from revlib.models import presets
from revlib.models.fusion import ConcatLinear, ConcatMlp, Mean
from revlib.models.mvit import RevMViT
from revlib.models.mvit_published import PublishedRevMViT
from revlib.models.swin import RevSwin
from revlib.models.vit import RevViT

__all__ = [
    "ConcatLinear",
    "ConcatMlp",
    "Mean",
    "PublishedRevMViT",
    "RevMViT",
    "RevMViTVideo",
    "RevSwin",
    "RevViT",
    "presets",
]

if TYPE_CHECKING:
    from revlib.models.video import RevMViTVideo


def __getattr__(name: str) -> Any:
    """The model of clips is of torchvision's blocks, which are imported for those who ask for it."""
    if name != "RevMViTVideo":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from revlib.models.video import RevMViTVideo

    return RevMViTVideo
