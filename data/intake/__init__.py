"""Files of vectors that were made elsewhere, and the table of their ids and columns.

Importing the room registers its formats.
"""

from lookalike.data.intake import arrays, faiss_index, tables
from lookalike.data.intake.files import FORMATS, VectorFile, Where, list_sources, open_file

__all__ = ["FORMATS", "VectorFile", "Where", "arrays", "faiss_index", "list_sources", "open_file", "tables"]
