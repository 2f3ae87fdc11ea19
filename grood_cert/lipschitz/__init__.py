"""Local Lipschitz constants of the energy score: estimates from below, proofs from above.

They stand on `grood_cert.bounds`. Imports point down: `interval`, `jacobian_crown`, `product` <- `bound` <- `radius`;
`estimates` and `clever` stand beside them.
"""
