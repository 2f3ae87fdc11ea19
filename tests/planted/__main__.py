"""`python -m tests.planted check`: what attacks and proofs say of the planted networks; `make` trains them anew."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from tests.planted import nets
from tests.planted.check import check, table

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("command", choices=("check", "make"))
parser.add_argument("--out", type=Path, default=nets.DATA, help="folder of the networks")
parser.add_argument("--tries", type=int, default=11, help="seeds for each network to make")
arguments = parser.parse_args()
torch.set_num_threads(1)
if arguments.command == "make":
    made = []
    for recipe in nets.RECIPES:
        one = nets.make(recipe, arguments.tries)
        print(f"{recipe.name}: {'found by attacks, left out' if one is None else 'made'}", flush=True)
        made += [] if one is None else [one]
    nets.save(made, arguments.out)
else:
    planted = nets.load(arguments.out)
    findings = [check(one) for one in planted]
    print(table(findings, [nets.missed(one) for one in planted]))
    for finding in findings:
        for fault in finding.faults:
            print(f"{finding.planted.recipe.name}: {fault}")
    sys.exit(any(finding.faults for finding in findings))
