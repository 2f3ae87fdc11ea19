"""Marabou, a complete verifier that shares no code with ours, as a judge of properties that we export."""
