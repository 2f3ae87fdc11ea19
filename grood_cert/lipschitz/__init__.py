"""Local Lipschitz constants of the energy score: estimates from below, proofs from above.

They stand on `grood_cert.native`. Imports point down: `interval`, `jacobian_crown`, `product` <- `bound` <- `radius`;
`estimates`, `weng2018clever` and `regulariser` stand beside them.
"""
