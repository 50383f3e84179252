"""Start-up times: an empty Python, `mendlm --help`, `import mendlm`, and `mendlm demo` with a warm cache.

python benchmarks/startup.py
"""

from __future__ import annotations

import subprocess
import sys

import torch

import bench


def main() -> None:
    parser = bench.parser(__doc__)
    parser.add_argument("--no-demo", action="store_true", help="leave the demo out; it needs the starter model")
    arguments = parser.parse_args()

    def run(*command: str) -> object:
        return subprocess.run([sys.executable, *command], check=True, capture_output=True)

    sides = {
        "python": lambda: run("-c", "pass"),
        "import mendlm": lambda: run("-c", "import mendlm"),
        "mendlm --help": lambda: run("-m", "mendlm", "--help"),
        "import torch": lambda: run("-c", "import torch"),
    }
    seconds = bench.interleaved(sides, arguments.rounds)
    if not arguments.no_demo:
        seconds |= bench.interleaved({"mendlm demo": lambda: run("-m", "mendlm", "demo")}, 3)
    result = {
        "help_over_python": seconds["mendlm --help"] / seconds["python"],
        "import_over_python": seconds["import mendlm"] / seconds["python"],
        "seconds": seconds,
    }
    bench.save(arguments, "startup", torch.device("cpu"), result)


if __name__ == "__main__":
    main()
