"""Table to figure."""
from __future__ import annotations
def save_summary(history, summary, path): pass
