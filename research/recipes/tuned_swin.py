"""The RevSwin of minrev_swin, tuned: AdamW, warm-up, RandAugment, a little mixup, smoothed labels, averaged weights.

Aim: past CVT-7/4's 92.6 %. 2,221,218 parameters.
"""

import dataclasses

from research.recipes import minrev_swin

RECIPE = dataclasses.replace(
    minrev_swin.RECIPE,
    recipe="tuned-swin",
    rand_augment=9,
    mixup=0.2,
    cutmix=0.0,
    label_smoothing=0.1,
    drop_path=0.1,
    optimizer="adamw",
    lr=1e-3,
    warmup_epochs=10,
    weight_decay=0.05,
    clip_grad=1.0,
    ema=0.999,
    epochs=200,
    amp=True,
)
