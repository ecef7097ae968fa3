"""Experiments: benchmark, tuning, statistics, reports, run folders and trackers."""
