"""Linearised chains of operators as one."""
