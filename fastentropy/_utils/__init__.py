"""Helpers without a word about models."""
