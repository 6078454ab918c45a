"""Measure a model's statistics every so many steps of its training, and write each layer's figures to a log."""

from fastentropy.monitoring.monitor import EntropyMonitor
from fastentropy.monitoring.writers import json_lines_writer, tensorboard_writer, wandb_writer

__all__ = ["EntropyMonitor", "json_lines_writer", "tensorboard_writer", "wandb_writer"]
