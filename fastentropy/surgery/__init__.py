"""Change a model: give each call of an activation a module of its own, or replace activations, whole or by neuron."""

from fastentropy.surgery.isolation import isolate
from fastentropy.surgery.linearization import linearize
from fastentropy.surgery.neuron_linearization import NeuronStates, linearize_neurons
from fastentropy.surgery.neuron_replacement import ReplacedNeurons
from fastentropy.surgery.neuronwise import NeuronwiseActivation

__all__ = ["NeuronStates", "NeuronwiseActivation", "ReplacedNeurons", "isolate", "linearize", "linearize_neurons"]
