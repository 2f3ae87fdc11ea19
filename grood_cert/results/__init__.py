"""Results without torch: tables of rows, other thresholds, curves, summaries and figures."""
