"""Networks: the named architectures, and the files of weights they start from."""
