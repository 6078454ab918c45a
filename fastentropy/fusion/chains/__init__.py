"""Chains: find them in a traced model, merge them into one operator exactly, and compile them.

A chain is a maximal stretch of linear operators with one input and one output.
"""

from fastentropy.fusion.chains.elements import Chain, Element
from fastentropy.fusion.chains.finding import FoundChain, find_chains
from fastentropy.fusion.chains.lowering import compile_chain

__all__ = ["Chain", "Element", "FoundChain", "compile_chain", "find_chains"]
