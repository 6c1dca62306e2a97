"""Connected components of a graph of rows, each named by its smallest row.

In memory with scipy; for more edges than one task holds, by alternating large-star and small-star (Kiveris et al. 2014,
"Connected components in MapReduce and beyond"): each is a function of all edges of a node, so edges can be spread by
node, and O(log^2 n) rounds leave every node tied to the smallest of its component.
"""

from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from lookalike.sampling import mix_keys

EDGES = {"node": pl.Int64, "other": pl.Int64}


def connected(left: NDArray[Any], right: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(nodes [n] ascending, the smallest node of each one's component [n]) of the edges ``left`` [p], ``right`` [p]."""
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
    """Edges (node, other) as a frame."""
    return pl.DataFrame({"node": left, "other": right}, schema=EDGES)


def contract(edges: pl.DataFrame) -> pl.DataFrame:
    """Edges that connect what ``edges`` do, at most one a node: each node but the smallest, tied to the smallest."""
    nodes, smallest = connected(edges["node"].to_numpy(), edges["other"].to_numpy())
    return edge_frame(nodes, smallest).filter(pl.col("node") != pl.col("other"))


def both_ways(edges: pl.DataFrame) -> pl.DataFrame:
    """Each edge at both of its nodes: what :func:`large_star` asks for."""
    return pl.concat([edges, edges.select(node="other", other="node")])


def downwards(edges: pl.DataFrame) -> pl.DataFrame:
    """Each edge at its larger node: what :func:`small_star` asks for."""
    return edges.select(node=pl.max_horizontal("node", "other"), other=pl.min_horizontal("node", "other"))


def large_star(edges: pl.DataFrame) -> pl.DataFrame:
    """Ties every node's larger neighbours to the smallest, or to itself. Asks for all edges of a node, both ways."""
    least = (
        edges.group_by("node").agg(least=pl.col("other").min()).with_columns(least=pl.min_horizontal("node", "least"))
    )
    larger = edges.filter(pl.col("other") > pl.col("node")).join(least, on="node")
    return larger.select(node="other", other="least").unique()


def small_star(edges: pl.DataFrame) -> pl.DataFrame:
    """Ties every node and its smaller neighbours to the smallest of them. Asks for all edges down from a node."""
    least = edges.group_by("node").agg(least=pl.col("other").min())
    tied = edges.join(least, on="node").select(node="other", other="least")
    return pl.concat([tied, least.select("node", other="least")]).filter(pl.col("node") != pl.col("other")).unique()


def edge_checksum(edges: pl.DataFrame) -> int:
    """A number that adds up over any partition of a set of edges and changes with it."""
    node, other = (edges[name].to_numpy().astype(np.uint64) for name in ("node", "other"))
    return int(mix_keys(mix_keys(node, 0, "node") ^ other, 0, "edge").sum(dtype=np.uint64))
