"""Bijections: steps that change shapes, the number of streams, or anything else that can be inverted.

==================  ===========================================================  =====
bijection           what it does                                                 exact
==================  ===========================================================  =====
``Rearrange``       an einops pattern: space to depth, patches, heads            yes
``Split``           one stream into several, along a dimension                   yes
``Concat``          several streams into one                                     yes
``Permute``         the streams in another order                                 yes
``Convolution1x1``  an invertible mixing of channels                             no
``ActNorm``         a scale and a shift a channel, initialised from data         no
``Inverse``         another bijection backwards                                  as it
==================  ===========================================================  =====

``base.py`` says what a bijection is, ``reshaping.py`` has those that move elements, and ``glow.py`` those with
parameters. ``sums.py`` has sums that are carried as a stream: log-determinants, and losses from inside functions.
"""

from revlib.bijections.base import Bijection, Inverse
from revlib.bijections.glow import ActNorm, Convolution1x1
from revlib.bijections.reshaping import Concat, Permute, Rearrange, Split
from revlib.bijections.sums import with_log_det, with_losses

__all__ = [
    "ActNorm",
    "Bijection",
    "Concat",
    "Convolution1x1",
    "Inverse",
    "Permute",
    "Rearrange",
    "Split",
    "with_log_det",
    "with_losses",
]
