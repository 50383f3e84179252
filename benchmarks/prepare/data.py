"""Check the data behind the published numbers: every file by its sha256.

    python benchmarks/prepare/data.py --data-dir DIR

The files are public, under the licences named below, and are not shipped. A folder that passes reproduces docs/results.md.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from pathlib import Path

FILES = {
    "counterfact-dev.json": (
        "77e9b7088462e3f17ce6c4faf375331a994863a8b075863fc822593944342d5d",
        "1,000 requests; the same source; shares no subject and no prompt with train",
    ),
    "counterfact-train.json": (
        "f028c75a06146a1cb4b3190deb2f74f0db9883fc04efd24e03af3c49699d08b3",
        "9,391 requests; CounterFact (ROME), MIT, in the flat form of editing frameworks",
    ),
    "zsre-dev.json": (
        "bf502214147828fbbb980c6fb91e36c0cb3175b647a47cf3940e7d78ffc694df",
        "200 requests; the same source; shares no subject with train",
    ),
    "zsre-train.json": (
        "02a8ca52e5a4659ff2071fb50f05fbc518f5c0c9374b826a7769a33efc4187a5",
        "997 requests; zsRE as prepared for MEND, MIT",
    ),
    "fever-claims-dev.jsonl": (
        "87b179ca4b7e6058112471e280915a8762e324c266dba5ee1f36af03f70ad529",
        "8,000 claims; FEVER, CC BY-SA 3.0",
    ),
    "nq-open-dev.jsonl": (
        "f1ab21689b843772d1c9cda278dd3bd74405fabf206179f0c8c9c084639be707",
        "2,494 questions; Natural Questions, CC BY-SA 3.0",
    ),
    "wikitext-2-a.txt": (
        "ff8be9584b90f4fbaada0085fe0a5104cb375c0e25e3a13fb5dd39ab153e2939",
        "146,617 words; Wikitext-2 raw, CC BY-SA 3.0; for training",
    ),
    "wikitext-2-b.txt": (
        "44927026174ee7c8ab5ae4404ec32c096dc00a69370b981d7a7575790218600d",
        "67,269 words; the same source; for perplexity only",
    ),
}
"""File name -> sha256, and what it is."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Check the data behind the published numbers.")
    parser.add_argument("--data-dir", type=Path, required=True)
    folder = parser.parse_args().data_dir
    bad = 0
    for name, (sha256, what) in FILES.items():
        path = folder / name
        found = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
        state = "ok" if found == sha256 else "missing" if found is None else f"has another content, sha256 {found}"
        bad += found != sha256
        print(f"{name}: {state}   ({what}; expected {sha256})")
    if bad:
        sys.exit(f"{bad} of {len(FILES)} files are missing or differ; numbers made with them are not those of docs/results.md")


if __name__ == "__main__":
    main()
