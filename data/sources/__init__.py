"""Where raw records come from: one reader a storage format, behind the registry ``SOURCE_FORMATS``.

A reader cuts its files into units of work and yields the raw records of one unit; it neither checks nor repairs them
(``data.records`` does), and it holds no more than one record or one batch at a time.
"""

from lookalike.data.sources import folder, lance, parquet, tables, webdataset
from lookalike.data.sources.reader import SOURCE_FORMATS, Reader, Record, RecordSource, Unit

__all__ = [
    "SOURCE_FORMATS",
    "Reader",
    "Record",
    "RecordSource",
    "Unit",
    "folder",
    "lance",
    "parquet",
    "tables",
    "webdataset",
]
