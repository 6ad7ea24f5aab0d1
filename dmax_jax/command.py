"""What every command shares: parsing flags, `--help`, and one line with exit code 2 for what the user can remedy."""

import inspect
import multiprocessing
import os
import re
import sys
from collections.abc import Callable, Sequence

from absl import flags

from dmax_jax.errors import InputError


def run(
    main: Callable[[], None],
    flag_values: flags.FlagValues,
    doc: str,
    argv: Sequence[str] | None = None,
    *,
    verbs: Sequence[str] = (),
) -> None:
    """Parses `argv` (default: the process's own) into `flag_values`, then calls `main`.

    Where a command does several things, `verbs` are the words of which the first argument must be one.

    Raises SystemExit(2) after one line on stderr for bad flags, InputError and OSError, SystemExit(130) after Ctrl-C;
    with the process's own `argv`, that ends the process at once.
    Flags live in a FlagValues of their own per command, so that several commands can be imported into one process.
    """
    own_process = argv is None
    argv = list(sys.argv if own_process else argv)
    if {"--help", "-h", "--helpfull"} & set(argv[1:]):
        _, described = flag_values.get_help(include_special_flags=False).lstrip().split("\n", 1)  # the module's line
        print(f"{inspect.cleandoc(doc)}\n\nFlags:\n{described}")
        return
    try:
        if verbs and (len(argv) < 2 or argv.pop(1) not in verbs):
            raise InputError(f"the first argument says what to do: {' or '.join(verbs)} (see --help)")
        flag_values.unparse_flags()
        for name in flag_values:
            flag_values[name].unparse()
        rest = flag_values(argv)[1:]
        if rest:
            raise InputError(f"unexpected argument {rest[0]!r}; options are written --name=value (see --help)")
        main()
    except (InputError, OSError, flags.Error) as error:
        line = " ".join(str(error).split())
        missing = re.search(r"Flag (--\w+) must have a value other than None", line)  # absl's words for a required flag
        print(f"error: {missing[1] + ' is required (see --help)' if missing else line}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        if own_process:
            leave_at_once(130)
        raise SystemExit(130) from None


def leave_at_once(code: int) -> None:
    """Ends the process; at its usual end JAX waits for what devices still compute, which may take minutes."""
    for child in multiprocessing.active_children():
        child.terminate()
    sys.stdout.flush()
    os._exit(code)
