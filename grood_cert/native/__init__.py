"""Our own bound engine: a network as a graph of operations, intervals and linear bounds (CROWN) over it.

Imports point down: `activations`, `operations` <- `graph` <- `folding`, `rows` <- `windows` <- `backward`, `simplex` <-
`preactivations` <- `engine`; `optimised` <- `branching` stand on `preactivations` too.
"""
