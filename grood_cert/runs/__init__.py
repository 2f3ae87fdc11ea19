"""Runs over image sets: batches, shards, saving and merging, and what each kind of run does with a batch."""
