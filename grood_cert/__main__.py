"""`python -m grood_cert`: the same as the command `grood-cert`."""

from grood_cert.cli import main

main()
