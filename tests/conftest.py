"""Settings of all tests: one thread, reproducible examples, and a Ctrl-C that is heard."""

import signal

import torch
from hypothesis import HealthCheck, settings

# A shell's background job ignores Ctrl-C, and hands that on to whatever it starts, these tests and theirs included.
signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)
settings.register_profile(
    "assay", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], max_examples=80
)
settings.load_profile("assay")
