"""Run a chain, a stretch of convolutions or linear layers without an activation in between, as one operator."""
