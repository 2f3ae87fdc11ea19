"""Train one recipe over several lambda_grad and seeds, certify and analyse each detector, and draw what comes of it.

    python train/sweep.py --out runs/sweep

is `grood-cert sweep` on the digits, with three seeds; its other options are those of the command.
"""

from __future__ import annotations

import sys

from grood_cert.cli import main

if __name__ == "__main__":
    grid = "objective.lambda_grad=0,0.03,0.1,1"
    sys.argv[1:1] = ["sweep", "digits-greg", "--grid", grid, "--seeds", "3", "--effort", "fast"]
    main()
