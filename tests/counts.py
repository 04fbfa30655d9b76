"""Counts of the tests: printed, and added to the file that benchmarks/soak.py names."""

import json
import os

FILE = "SOAK_COUNTS"  # environment variable


def record_count(name, **figures):
    """Print what was counted: record_count('signals', kind='prepare', sent=600); names 'most_...' are maxima."""
    print(f"{name}: {', '.join(f'{key} {value}' for key, value in figures.items())}")
    if path := os.environ.get(FILE):
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"name": name, **figures}) + "\n")
