"""minREV's RevViT: `main.py --lr 1e-3 --bs 128 --embed_dim 128 --depth 6 --n_head 8 --epochs 100 --model vit`.

Aim: over 80 %. 1,207,178 parameters, as minREV's. Two things differ: minREV's attention, as its code runs, is over the
images of a batch (torch's MultiheadAttention, given the batch first, expects patches first), here it is over patches;
and patches are normalised before they are averaged, not after.
"""

from research.config import Config

RECIPE = Config(
    recipe="minrev-vit",
    dataset="cifar10",
    model="vit",
    patch_size=4,
    embed_dim=128,
    depth=6,
    num_heads=8,
    drop_path=0.0,
    optimizer="adam",
    lr=1e-3,
    batch_size=128,
    epochs=100,
)
