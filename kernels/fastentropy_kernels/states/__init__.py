"""Count the states of a tensor, alone or together with its activation."""
