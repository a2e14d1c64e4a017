"""minREV's RevMViT: `main.py --lr 1e-3 --bs 128 --embed_dim 64 --depth 4 --n_head 1 --epochs 100 --model mvit`.

Aim: over 90 %. 1,261,386 parameters, as minREV's: the next stage takes both streams side by side, where `--model mvit`
by itself averages them (1,179,466 parameters). Two things differ: keys and values of the third block are not pooled
again (by 2 there), and patches are normalised before they are averaged, as in timm's MViTv2, not after.
"""

from research.config import Config

RECIPE = Config(
    recipe="minrev-mvit",
    dataset="cifar10",
    model="mvit",
    fusion="concat",
    patch_size=2,
    embed_dim=64,
    depth=4,
    num_heads=1,
    drop_path=0.0,
    optimizer="adam",
    lr=1e-3,
    batch_size=128,
    epochs=100,
)
