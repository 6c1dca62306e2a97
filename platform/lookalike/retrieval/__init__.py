"""Adaptive retrieval: prefix store, shortlist, re-rank, funnel, planner, metrics. Beside it only ``data`` uses faiss."""
