"""minREV's RevViT: `main.py --lr 1e-3 --bs 128 --embed_dim 128 --depth 6 --n_head 8 --epochs 100 --model vit`.

Aim: over 80 %. 1,207,178 parameters, as minREV's.
"""

from typing import Any

RECIPE: dict[str, Any] = {
    "dataset": "cifar10",
    "statistics": "minrev",
    "model": "vit",
    "variant": "minrev",
    "patch_size": 4,
    "embed_dim": 128,
    "depth": 6,
    "num_heads": 8,
    "drop_path": 0.0,
    "optimizer": "adam",
    "lr": 1e-3,
    "cosine_lag": 2,
    "batch_size": 128,
    "epochs": 100,
}
