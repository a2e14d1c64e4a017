"""Whole runs as plain values: `python -m research.train --recipe NAME`, where other flags override.

minrev_*: the three runs of minREV (github.com/karttikeya/minREV, README and main.py of May 2023), whose readme
promises 80 %, 80 % and 90 %. Everything that changes a number is as in its code: the networks and their initial
weights (revlib/models/minrev.py), Adam at 1e-3, batches of 128, its statistics of the images, its cosine of 100
epochs, which is two epochs late, crops of images padded by 4 black pixels, flips, and nothing else. Its attention
runs over the patches of each image, as here, since 23 February 2023; in its first two commits, of 8 February, it
ran over the images of a batch. What differs on purpose is this, and nothing else:

- Shifted windows of RevSwin are rolled back after attention. In minREV they stay where the shift has put them,
  which is a mistake; --unrolled-windows has it.
- Stochastic depth of RevSwin drops each half of a block by itself, as Swin and timm do. minREV drops both together,
  and gives the generator a new seed in every block, so that no run of it can be repeated.
- In minREV's RevMViT, F of a block that follows another in its stage gets one stream in the forward pass and the
  other in backward, and the head fits a depth of 4 only. With these four blocks no pair follows another, so the
  mistake has no effect; here other depths train too.
- --amp is bfloat16 autocast around the whole network, whose streams stay in float32. minREV's is float16 with loss
  scaling inside F and G of RevViT alone; its RevSwin and RevMViT ignore it. --amp-dtype float16 has the scaling.
- Random numbers come from one generator on the CPU, not from a data loader's workers: the distributions are the same.
  Its losses are means over batches, of which the last is smaller; here they are means over images.

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
