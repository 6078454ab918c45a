"""Run a linearised chain of operators as one operator."""
