"""Planted bugs, one line each, applied one at a time to a copy of the tree: does the suite notice?"""
