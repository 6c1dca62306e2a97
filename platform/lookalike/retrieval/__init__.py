"""Adaptive retrieval: prefix store, shortlist, re-rank, funnel, planner, metrics. Beside it ``data`` uses faiss."""
