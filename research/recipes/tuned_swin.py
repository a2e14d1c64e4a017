"""The RevSwin of minrev_swin, tuned: AdamW, warm-up, RandAugment, a little mixup, smoothed labels, averaged weights.

Aim: past CVT-7/4's 92.6 %. 2,220,706 parameters.
"""

from research.recipes import minrev_swin
from research.recipes.tuned import TUNED

RECIPE = minrev_swin.RECIPE | TUNED | {"mixup": 0.2, "cutmix": 0.0}
