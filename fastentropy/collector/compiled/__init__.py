"""Count the activations in the graphs of torch.compile, as one more output of each graph."""
