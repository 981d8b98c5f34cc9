"""Child process that writes the rows of a Parquet file as lines of JSON, within a limit of memory.

engine/data/row_files.py starts it as a script, so it imports no module of this program.
"""

import base64
import contextlib
import json
import resource
import sys
from collections.abc import Iterator
from typing import Any


def replies(path: str, max_bytes: int) -> Iterator[list[Any]]:
    """Yield ["schema", base64], then ["row", values] in order.

    The last reply is ["end", ""], ["unreadable", reason] or ["not UTF-8", ""].
    """
    import pyarrow
    import pyarrow.parquet

    with contextlib.suppress(ValueError, OSError):  # macOS has no such limit
        resource.setrlimit(resource.RLIMIT_AS, (max_bytes, max_bytes))
    try:
        # In pieces: a row group may have gigabytes.
        with pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 16) as file:
            yield ["schema", base64.b64encode(file.schema_arrow.serialize()).decode()]
            for batch in file.iter_batches(batch_size=64, use_threads=False):
                for values in batch.to_pylist():
                    yield ["row", values]
        yield ["end", ""]
    except UnicodeDecodeError:
        yield ["not UTF-8", ""]
    except MemoryError:
        yield ["unreadable", f"its rows need more than {max_bytes / 2**30:g} GB of memory"]
    except (pyarrow.ArrowException, ValueError, OverflowError, OSError) as error:
        yield ["unreadable", str(error)[:1000]]


def name_type(value: Any) -> dict[str, None]:
    """A value that JSON has not, such as a date, as an object."""
    return {type(value).__name__: None}


if __name__ == "__main__":
    for reply in replies(sys.argv[1], int(sys.argv[2])):
        sys.stdout.buffer.write(json.dumps(reply, default=name_type).encode() + b"\n")
