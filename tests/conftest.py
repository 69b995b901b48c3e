"""Settings of all tests: one thread, reproducible examples."""

import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)
settings.register_profile(
    "assay", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], max_examples=80
)
settings.load_profile("assay")
