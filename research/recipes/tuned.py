"""What the tuned recipes have in common, as settings of a Config."""

from typing import Any

TUNED: dict[str, Any] = {
    "rand_augment": 9,
    "label_smoothing": 0.1,
    "drop_path": 0.1,
    "optimizer": "adamw",
    "lr": 1e-3,
    "warmup_epochs": 10,
    "cosine_lag": 0,
    "weight_decay": 0.05,
    "clip_grad": 1.0,
    "ema": 0.999,
    "epochs": 200,
    "amp": True,
}
