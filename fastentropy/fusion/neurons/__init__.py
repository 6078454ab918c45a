"""Take activations apart that treat each neuron by itself: cut out the constant neurons, and lead the linear ones past it.

`elementwise`, `operators` and `shuffles` follow channels through the operators of a traced graph. `links` holds which of them
belong together. `cutting` rewrites the graph without the constant ones, `paths` gives linear ones a path of their own, and
`masks` simplifies the activations that are left. `taking_apart` does it all.
"""
