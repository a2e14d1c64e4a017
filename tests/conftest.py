"""One hypothesis profile for all tests, and one thread: tensors here are small."""

import torch
from hypothesis import HealthCheck, settings

settings.register_profile("revlib", deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("revlib")
torch.set_num_threads(1)
