"""Train out-of-distribution detectors with gradient-regularised energy and prove how robust their score is."""

__version__ = "0.1.0"
