"""Whole runs as plain values: `python -m research.train --recipe NAME`, where other flags override.

minrev_*: the three runs of minREV (github.com/karttikeya/minREV, README and main.py), whose readme promises 80 %, 80 %
and 90 %. In all of them: Adam at 1e-3, batches of 128, 100 epochs on one cosine (its script is two epochs behind it),
crops of images padded by 4, flips, nothing else.

tuned_*: the same networks under today's rules, to aim past what transformers of three times the parameters reach from
scratch: ViT-Lite-7/4 91.4 % in 200 epochs, CVT 92.6 %, CCT-7/3x1 94.8 % (Hassani et al., *Escaping the Big Data
Paradigm with Compact Transformers*, 2021). No setting was searched for: that waits for a GPU.

All of these figures are for CIFAR-10 as published. Copies as JPEG, as many a tree of images has, cost 2 to 3 %.
"""

from research.config import Config, RecipeName
from research.recipes import minrev_mvit, minrev_swin, minrev_vit, tuned_mvit, tuned_swin, tuned_vit

RECIPES: dict[RecipeName, Config] = {
    "minrev-vit": minrev_vit.RECIPE,
    "minrev-swin": minrev_swin.RECIPE,
    "minrev-mvit": minrev_mvit.RECIPE,
    "tuned-vit": tuned_vit.RECIPE,
    "tuned-swin": tuned_swin.RECIPE,
    "tuned-mvit": tuned_mvit.RECIPE,
}
