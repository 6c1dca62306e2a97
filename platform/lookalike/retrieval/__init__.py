"""Adaptive retrieval: prefix store, shortlist, re-rank, funnel, planner and metrics. faiss is used in here only."""
