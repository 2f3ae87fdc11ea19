"""Detectors in the libraries of others: pytorch-ood, OpenOOD, foolbox."""
