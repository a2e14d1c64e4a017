"""minREV's RevMViT: `main.py --lr 1e-3 --bs 128 --embed_dim 64 --depth 4 --n_head 1 --epochs 100 --model mvit`.

Aim: over 90 %. 1,261,386 parameters, as minREV's.
"""

from typing import Any

RECIPE: dict[str, Any] = {
    "dataset": "cifar10",
    "statistics": "minrev",
    "model": "mvit",
    "variant": "minrev",
    "patch_size": 2,
    "embed_dim": 64,
    "depth": 4,
    "num_heads": 1,
    "drop_path": 0.0,
    "optimizer": "adam",
    "lr": 1e-3,
    "cosine_lag": 2,
    "batch_size": 128,
    "epochs": 100,
}
