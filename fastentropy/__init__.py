"""Find the layers that a network does not need, at the speed of inference, and take them out."""
