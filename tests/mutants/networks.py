"""Bugs of `grood_cert.networks`: activations, operations, capture, rebuilding, and ONNX."""

from __future__ import annotations

from tests.mutants.runner import planted

_LINES = "networks/test_activations.py", "bounds/test_crown.py", "bounds/test_layers.py"

MUTANTS = (
    *planted(
        "networks/activations.py",
        _LINES,
        {
            "the line above a ReLU passes through 0": (
                "torch.where(unstable, torch.maximum((self.slope - high) * lower, (1 - high) * upper), 0.0)",
                "torch.zeros_like(lower)",
            ),
            "a stable leaky ReLU is flat": (
                "torch.where(lower >= 0, torch.ones_like(lower), torch.full_like(lower, self.slope))",
                "torch.where(lower >= 0, torch.ones_like(lower), torch.zeros_like(lower))",
            ),
            "the line below a ReLU takes the chord for its slope": (
                "return torch.where(unstable, steep, stable), torch.zeros_like(lower), high, constant",
                "return torch.where(unstable, 1 + chord, stable), torch.zeros_like(lower), high, constant",
            ),
            "a ReLU at 0 has slope 1": (
                "return torch.where(lower > 0, one, self.slope * one)",
                "return torch.where(lower >= 0, one, self.slope * one)",
            ),
        },
    ),
)
