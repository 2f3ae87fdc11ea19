"""What every proof, attack and score asks of a network before it looks at one."""

from __future__ import annotations

from torch import nn

from grood_cert.errors import InputError


def check_eval(network: nn.Module) -> None:
    """Refuse a network in train mode: BatchNorm would use the batch, dropout would be active.

    Raises:
        InputError: Naming the first module in train mode.

    Example:
        >>> check_eval(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).eval())
    """
    for name, module in network.named_modules():
        if module.training:
            what = f"module {name}" if name else f"the network ({type(module).__name__})"
            raise InputError(f"{what} is in train mode; call network.eval() first")
