"""Learned autoscaling and backpressure for LLM serving."""

__version__ = "0.1.0"
