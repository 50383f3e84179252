"""What the scripts beside this one write."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mendlm.files import write_bytes


def write_requests(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """Write records as JSON Lines of the task `records`, and say how many."""
    write_bytes(path, "".join(f"{json.dumps(record, ensure_ascii=False)}\n" for record in records).encode())
    print(f"{len(records)} requests in {path}")
