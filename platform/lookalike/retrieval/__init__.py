"""Adaptive retrieval: prefix store, shortlist, re-rank, funnel, planner, metrics. Besides it only ``data`` uses faiss."""
