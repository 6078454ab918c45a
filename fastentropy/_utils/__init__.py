"""Helpers that know nothing about models: files, timing, the machine, text, optional packages and errors."""
