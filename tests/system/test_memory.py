from __future__ import annotations

import subprocess
import sys
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from grood_cert.ball import Ball
from grood_cert.bounds.crown import NativeNetwork
from grood_cert.bounds.score import score_bounds
from grood_cert.errors import InputError
from grood_cert.networks import architectures
from grood_cert.system.memory import batch_for_memory, is_memory_error, split_on_memory_error


def cpu_error():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    return caught.value


def wrapped(error):
    try:
        try:
            raise error
        except Exception as cause:
            raise ValueError("the engine failed") from cause
    except ValueError as failure:
        return failure


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (wrapped(MemoryError()), True),
        (RuntimeError("shapes do not match"), False),
        (ValueError("not enough memory of the past"), False),
        (wrapped(RuntimeError("shapes")), False),
    ],
)
def test_what_counts_as_lack_of_memory(error, expected):
    assert is_memory_error(error) is expected


def test_an_error_that_led_to_itself_is_none_of_memory():
    again, first = RuntimeError("raised once more"), ValueError("raised first")
    again.__cause__, first.__cause__ = first, again
    assert not is_memory_error(again)


def test_the_allocator_of_the_cpu_is_understood():
    assert is_memory_error(cpu_error())


# Splitting


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), cpu_error()])
@pytest.mark.parametrize("most", [1, 3, 7, 20])
def test_parts_give_what_the_whole_would_give(error, most):
    images, eps = torch.rand(20, 2), torch.rand(20)
    calls = []

    def function(images, eps):
        calls.append(len(images))
        if len(images) > most:
            raise error
        return images.sum(1) * eps

    parts = split_on_memory_error(function, [images, eps], lambda error, samples: pytest.fail("nothing is lost"))
    assert torch.equal(torch.cat(parts), images.sum(1) * eps)
    assert all(len(part) <= most for part in parts)
    assert calls[0] == 20 and len(calls) < 40


def test_only_the_sample_that_never_fits_is_lost():
    def function(x):
        if (x == 5).any():
            raise MemoryError("5 is too much")
        return x

    lost = []

    def failed(error, samples):
        lost.append((str(error), samples))
        return torch.full((samples,), -1)

    parts = split_on_memory_error(function, [torch.arange(12)], failed)
    assert torch.cat(parts).tolist() == [0, 1, 2, 3, 4, -1, 6, 7, 8, 9, 10, 11]
    assert lost == [("5 is too much", 1)]


def test_other_exceptions_are_not_tried_again():
    calls = []

    def function(x):
        calls.append(len(x))
        raise KeyError("x")

    assert split_on_memory_error(function, [torch.zeros(8)], lambda error, samples: samples) == [8]
    assert calls == [8]


def test_interruption_passes():
    def function(x):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        split_on_memory_error(function, [torch.zeros(8)], lambda error, samples: None)


# Budgets


@pytest.mark.parametrize("base", [0, 1000])
@pytest.mark.parametrize("cost", [1, 7, 300])
@pytest.mark.parametrize("largest", [1, 5, 64, 1000])
def test_a_linear_peak_gives_the_largest_batch_that_fits(base, cost, largest):
    measured = []

    def measure(samples):
        measured.append(samples)
        return base + cost * samples

    for budget in (base + cost, base + 2 * cost, base + 37 * cost + cost // 2, base + 10_000 * cost):
        measured.clear()
        found = batch_for_memory(measure, budget, largest)
        assert found == min(largest, (budget - base) // cost)
        assert sorted(measured) == measured and all(base + cost * samples <= budget for samples in measured[2:])


def test_a_peak_that_does_not_grow_gives_all():
    assert batch_for_memory(lambda samples: 100, 100, 48) == 48


def test_one_sample_that_does_not_fit_is_refused():
    with pytest.raises(InputError, match="memory 1M: one sample alone takes 3M; allow more"):
        batch_for_memory(lambda samples: 3 * 2**20, 2**20, 8)


class TensorMemory(TorchDispatchMode):
    """Most bytes that tensors made under it held at once: no matter of malloc, or of the machine's load."""

    def __init__(self):
        super().__init__()
        self.held, self.peak, self.storages = 0, 0, weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage() not in self.storages:
                storage = tensor.untyped_storage()
                self.storages.add(storage)
                self.count(storage.nbytes())
                weakref.finalize(storage, self.count, -storage.nbytes())
        return result

    def count(self, change):
        self.held += change
        self.peak = max(self.peak, self.held)


def test_the_budget_is_met_on_conv_small():
    """The batch chosen from measurements of small ones takes what it may, within 20 %, and measuring takes less."""
    shape = (3, 16, 16)
    network = architectures.build("conv-small", shape, 10, [0.5] * 3, [0.3] * 3).double().eval()
    bounded, measured = NativeNetwork(network, shape, "crown"), []

    def measure(samples):
        ball = Ball(torch.rand(samples, *shape, dtype=torch.float64), torch.full((samples,), 0.01).double(), "linf")
        with TensorMemory() as memory:
            score_bounds(bounded, ball)
        measured.append(memory.peak)
        return memory.peak

    start = measure(1)
    budget = start + 10 * 2**20
    samples = batch_for_memory(measure, budget, 4096)
    assert samples >= 4 and start < max(measured) < budget
    assert 0.8 < measure(samples) / budget < 1.2


def test_the_peak_of_a_process_is_what_it_has_touched():
    script = """
import torch
from grood_cert.system.memory import peak_memory
for _ in range(2):
    held = torch.ones(2**28, dtype=torch.uint8), _ and held
    print(peak_memory())
del held
print(peak_memory())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    one, two, after = map(int, done.stdout.split())
    assert one >= 2**28 and abs(two - one - 2**28) < 2**23 and abs(after - two) < 2**23
