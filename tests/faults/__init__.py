"""Faults: what kills, starves or damages a run, and the law that what was done stays done.

    python -m tests.faults --moments 50

Every run is a child that is forked off a process which has torch loaded already, and calls the command line there.
"""
