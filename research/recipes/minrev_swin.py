"""minREV's RevSwin: `main.py --lr 1e-3 --bs 128 --embed_dim 128 --depth 4 --n_head 4 --epochs 100 --model swin`.

Aim: over 80 %. 2,221,218 parameters, 512 more than minREV's: the MLP that fuses the streams between stages has a norm
here. Stochastic depth of 0.2 is a default of its network, which its main.py leaves as it is; there, both halves of a
block are dropped together. Its biases begin at 0.02, here at 0.
"""

from research.config import Config

RECIPE = Config(
    recipe="minrev-swin",
    dataset="cifar10",
    model="swin",
    fusion="concat-mlp",
    patch_size=4,
    embed_dim=128,
    depth=4,
    num_heads=4,
    drop_path=0.2,
    optimizer="adam",
    lr=1e-3,
    batch_size=128,
    epochs=100,
)
