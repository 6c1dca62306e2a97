"""The steps of the ``labels`` stage on Ray Data. No step computes here: its tasks call the rooms below."""
