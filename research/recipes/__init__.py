"""Whole runs as plain values, one a file: `python -m research.train --recipe NAME`, where other flags
override.

minrev_vit, minrev_swin and minrev_mvit: the three runs of minREV (github.com/karttikeya/minREV,
README and script of May 2023), whose readme promises 80 %, 80 % and 90 %. Everything that changes a
number is as in its code: the networks and their initial weights (revlib.models.minrev), Adam at
1e-3, batches of 128, its statistics of the images, its cosine of 100 epochs, which is two epochs
late, crops of images padded by 4 black pixels, flips, and nothing else. What differs on purpose is
in the table of README.md beside this file, which is complete.

tuned_vit, tuned_swin and tuned_mvit, by way of tuned, which has what they share: the same networks
under today's rules, to aim past what transformers of three times the parameters reach from scratch:
ViT-Lite-7/4 91.4 % in 200 epochs, CVT 92.6 %, CCT-7/3x1 94.8 % (Hassani et al., *Escaping the Big
Data Paradigm with Compact Transformers*, 2021). No setting was searched for: that waits for a GPU.

All of these figures are for CIFAR-10 as published. Copies as JPEG, as many a tree of images has,
cost 2 to 3 %.
"""

from typing import Any, Literal

from research.recipes import minrev_mvit, minrev_swin, minrev_vit, tuned_mvit, tuned_swin, tuned_vit

RecipeName = Literal["minrev-vit", "minrev-swin", "minrev-mvit", "tuned-vit", "tuned-swin", "tuned-mvit"]

# The flags that each sets; research/settings/config.py makes a Config of each.
SETTINGS: dict[RecipeName, dict[str, Any]] = {
    "minrev-vit": minrev_vit.RECIPE,
    "minrev-swin": minrev_swin.RECIPE,
    "minrev-mvit": minrev_mvit.RECIPE,
    "tuned-vit": tuned_vit.RECIPE,
    "tuned-swin": tuned_swin.RECIPE,
    "tuned-mvit": tuned_mvit.RECIPE,
}
