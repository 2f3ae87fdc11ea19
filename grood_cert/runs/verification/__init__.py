"""A finished run, checked again from outside."""
