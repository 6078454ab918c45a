"""Count the states (off, zero, on) of a tensor, alone or in one pass with its activation."""
