"""Models: thin compositions of timm's layers and :class:`~revlib.ReversibleSequence`.

Importing this registers their published sizes with timm, see :mod:`revlib.models.presets`.
"""

from revlib.models import presets
from revlib.models.fusion import Concat, ConcatLinear, ConcatMlp, Mean
from revlib.models.minrev import minrev_mvit, minrev_swin, minrev_vit
from revlib.models.mvit import RevMViT
from revlib.models.mvit_published import PublishedRevMViT
from revlib.models.swin import RevSwin
from revlib.models.video import RevMViTVideo
from revlib.models.vit import RevViT

__all__ = [
    "Concat",
    "ConcatLinear",
    "ConcatMlp",
    "Mean",
    "PublishedRevMViT",
    "RevMViT",
    "RevMViTVideo",
    "RevSwin",
    "RevViT",
    "minrev_mvit",
    "minrev_swin",
    "minrev_vit",
    "presets",
]
