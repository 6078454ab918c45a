"""Take activations apart that treat each neuron by itself: cut out the constant neurons, and simplify what is left.

`elementwise` and `operators` follow channels through the operators of a traced graph. `links` holds which channels belong
together. `cutting` rewrites the graph without the constant ones, and `masks` the activations. `taking_apart` does it all.
"""
