"""minREV's RevSwin: `main.py --lr 1e-3 --bs 128 --embed_dim 128 --depth 4 --n_head 4 --epochs 100 --model swin`.

Aim: over 80 %. 2,220,706 parameters, as minREV's. Stochastic depth of 0.2 is a default of its network, which its
main.py leaves as it is. With --unrolled-windows the network is minREV's to the bit, mistake included.
"""

from typing import Any

RECIPE: dict[str, Any] = {
    "dataset": "cifar10",
    "statistics": "minrev",
    "model": "swin",
    "variant": "minrev",
    "patch_size": 4,
    "embed_dim": 128,
    "depth": 4,
    "num_heads": 4,
    "drop_path": 0.2,
    "optimizer": "adam",
    "lr": 1e-3,
    "cosine_lag": 2,
    "batch_size": 128,
    "epochs": 100,
}
