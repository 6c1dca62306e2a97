"""Raw records: one reader per storage format, behind the registry ``SOURCE_FORMATS``, and the checks of records.

A reader cuts its files into units of work and yields the raw records of a unit. It neither checks nor repairs them
(``records`` does) and holds one record or one batch at a time.
"""

from lookalike.data.sources import delimited, folder, lance, parquet, tables, webdataset
from lookalike.data.sources.reader import SOURCE_FORMATS, Reader, Record, RecordSource, Unit

__all__ = [
    "SOURCE_FORMATS",
    "Reader",
    "Record",
    "RecordSource",
    "Unit",
    "delimited",
    "folder",
    "lance",
    "parquet",
    "tables",
    "webdataset",
]
