"""Local Lipschitz constants of the energy score: estimates from below, proofs from above.

Imports point down: `activations`, `operations` <- `graph` <- `simplex`, `rows` <- `preactivations` <- `interval`,
`jacobian_crown`, `product` <- `bound` <- `radius`; `estimates`, `weng2018clever` and `regulariser` stand beside them.
"""
