"""The command line: `mendlm`.

Commands import what they need when they run. A `MendError` is one message and exit code 2, never a traceback.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from typing import Any, NoReturn

import typer

from mendlm.cli import comparing, data, edits, exporting, learning, serving, sharing, storing, sweeping
from mendlm.errors import InputError, MendError, ModelError
from mendlm.processes import launched

app = typer.Typer(
    name="mendlm",
    help="Correct what a pre-trained language model knows: fast, local, reversible edits by MEND.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
for command in (
    edits.demo,
    learning.train,
    sweeping.sweep,
    edits.edit,
    edits.generate,
    learning.evaluate,
    comparing.compare,
    comparing.report,
    exporting.export,
    sharing.push,
    sharing.pull,
    edits.inspect,
    serving.serve,
):
    app.command(name={"evaluate": "eval"}.get(command.__name__, command.__name__))(command)
app.add_typer(data.app, name="data")
app.add_typer(storing.app, name="store")
app.add_typer(serving.token, name="token")
_USAGE_ERROR: Any = typer.BadParameter.__base__
"""click's `UsageError`, from the click that typer brings along or depends on."""
OUT_OF_MEMORY = (
    "The device is too small for this: a smaller micro_batch_size or batch_size, a lower editor.rank, --quantize, "
    "--editor-device or --device-map take less of it; `mendlm inspect MODEL --plan` says how much. "
    "A training goes on from its last checkpoint by --resume."
)


def main(arguments: list[str] | None = None) -> None:
    """Run a command; exits the process. Of several processes the main one speaks, and each says what went wrong in it."""
    arguments = sys.argv[1:] if arguments is None else arguments
    for chatty in ("bitsandbytes", "torchao", "torch.utils._pytree"):  # notes on importing them, and one a layer and pass
        logging.getLogger(chatty).setLevel(logging.ERROR)
    as_json, number = "--json" in arguments, 0
    try:
        number, _ = launched()
        with contextlib.ExitStack() as stack:
            if number > 0:
                nowhere = stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(contextlib.redirect_stdout(nowhere))
                stack.enter_context(contextlib.redirect_stderr(nowhere))
            code = app(arguments, prog_name="mendlm", standalone_mode=not as_json)  # which shows errors of usage in its own way
    except _USAGE_ERROR as error:
        refuse(InputError(error.format_message()), number, as_json=as_json)
    except typer.Abort:
        sys.exit(130)
    except MendError as error:
        refuse(error, number, as_json=as_json)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which is not imported for its name
            raise
        refuse(ModelError(f"{str(error).splitlines()[0]} {OUT_OF_MEMORY}"), number, as_json=as_json)
    sys.exit(code or 0)


def refuse(error: MendError, number: int, *, as_json: bool) -> NoReturn:
    """Say what is wrong in process `number`, with `as_json` on standard output too, and exit with code 2."""
    if as_json and number == 0:
        sys.stdout.write(json.dumps({"error": {"kind": type(error).__name__, "message": str(error)}}) + "\n")
    sys.stderr.write(f"error{f' in process {number}' if number else ''}: {error}\n")
    sys.exit(2)
