"""Chains of linear operators: find them, merge them exactly, and compile them."""

from fastentropy.fusion.chains.elements import Chain, Element
from fastentropy.fusion.chains.finding import FoundChain, find_chains
from fastentropy.fusion.chains.lowering import compile_chain

__all__ = ["Chain", "Element", "FoundChain", "compile_chain", "find_chains"]
