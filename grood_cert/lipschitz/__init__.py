"""Local Lipschitz constants of the energy score: estimates from below, proofs from above."""
