"""A seeded fuzzer of everything that people hand to the command line.

    python -m tests.fuzz --cases 20000

Cases run in children forked off a process that has torch loaded; a child does many of them, one after another.
"""
