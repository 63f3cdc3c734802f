"""Anyone's files, as the project's records: containers, formats, readers.

`load` is the one entry for data; `python -m minirlhf.data check FILE` shows what it makes of a file.
"""

from minirlhf.data.readers import Dataset, Kind, is_hub_name, load, local_files, read
from minirlhf.files import write_records

__all__ = ["Dataset", "Kind", "is_hub_name", "load", "local_files", "read", "write_records"]
