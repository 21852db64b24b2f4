"""The network of a policy that somebody else owns, such as a training loop: what it holds, and leaving it as it was."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from qlibero.policies.base import Policy


def network_of(policy: Policy) -> nn.Module | None:
    """The policy itself where it is a module, else its `model`; None where it has neither."""
    return policy if isinstance(policy, nn.Module) else getattr(policy, "model", None)


def weights_sha256(network: nn.Module) -> str:
    """Hex digest over names, dtypes, shapes and bytes of all parameters and buffers, as they are in memory."""
    digest = hashlib.sha256()
    tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


@contextmanager
def left_as_it_was(network: nn.Module | None) -> Iterator[None]:
    """Eval mode, no gradients and one thread inside; the caller's modes, threads and generators again afterwards."""
    modes = {} if network is None else {module: module.training for module in network.modules()}
    threads, python, numbers = torch.get_num_threads(), random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices), torch.no_grad():
        try:
            torch.set_num_threads(1)  # simulators have the other cores, and a sum split over threads is another sum
            if network is not None:
                network.eval()
            yield
        finally:
            for module, training in modes.items():
                module.training = training
            torch.set_num_threads(threads)
            random.setstate(python)
            np.random.set_state(numbers)
