"""Connected components of a graph of rows, each named by its smallest row.

scipy finds them in memory. For more edges than one task holds, large-star and small-star take turns (Kiveris et al.
2014, "Connected components in MapReduce and beyond"). Each is a function of all edges of a node, so edges can be spread
by node; after O(log^2 n) rounds every node is tied to the smallest of its component.
"""

from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from lookalike.sampling import mix_keys

EDGES = {"node": pl.Int64, "other": pl.Int64}


def connected(left: NDArray[Any], right: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(nodes [n] ascending, smallest node of the component of each [n]) of the edges ``left`` [p], ``right`` [p]."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    nodes, codes = np.unique(np.concatenate([left, right]).astype(np.int64), return_inverse=True)
    half = len(left)
    graph = coo_matrix((np.ones(half, np.int8), (codes[:half], codes[half:])), shape=(len(nodes), len(nodes)))
    _, labels = connected_components(graph, directed=False)
    smallest = np.full(int(labels.max(initial=-1)) + 1, len(nodes), np.int64)
    np.minimum.at(smallest, labels, np.arange(len(nodes)))
    return nodes, nodes[smallest[labels]]


def edge_frame(left: NDArray[Any], right: NDArray[Any]) -> pl.DataFrame:
    """A frame of edges (node, other)."""
    return pl.DataFrame({"node": left, "other": right}, schema=EDGES)


def contract(edges: pl.DataFrame) -> pl.DataFrame:
    """Edges with the same components, at most one per node: each node but the smallest is tied to the smallest."""
    nodes, smallest = connected(edges["node"].to_numpy(), edges["other"].to_numpy())
    return edge_frame(nodes, smallest).filter(pl.col("node") != pl.col("other"))


def both_ways(edges: pl.DataFrame) -> pl.DataFrame:
    """Each edge listed at both of its nodes, as :func:`large_star` needs it."""
    return pl.concat([edges, edges.select(node="other", other="node")])


def downwards(edges: pl.DataFrame) -> pl.DataFrame:
    """Each edge listed at its larger node, as :func:`small_star` needs it."""
    return edges.select(node=pl.max_horizontal("node", "other"), other=pl.min_horizontal("node", "other"))


def large_star(edges: pl.DataFrame) -> pl.DataFrame:
    """Tie the larger neighbours of every node to its smallest neighbour, or to the node if it is smaller.

    Needs all edges of a node, both ways.
    """
    least = edges.group_by("node").agg(least=pl.col("other").min())
    least = least.with_columns(least=pl.min_horizontal("node", "least"))
    larger = edges.filter(pl.col("other") > pl.col("node")).join(least, on="node")
    return larger.select(node="other", other="least").unique()


def small_star(edges: pl.DataFrame) -> pl.DataFrame:
    """Tie every node and its smaller neighbours to the smallest of them. Needs all edges down from a node."""
    least = edges.group_by("node").agg(least=pl.col("other").min())
    tied = edges.join(least, on="node").select(node="other", other="least")
    return pl.concat([tied, least.select("node", other="least")]).filter(pl.col("node") != pl.col("other")).unique()


def edge_checksum(edges: pl.DataFrame) -> int:
    """A checksum of a set of edges, modulo 2^64: those of its parts add up to that of the whole."""
    node, other = (edges[name].to_numpy().astype(np.uint64) for name in ("node", "other"))
    return int(mix_keys(mix_keys(node, 0, "node") ^ other, 0, "edge").sum(dtype=np.uint64))
