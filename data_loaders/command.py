"""How the command lines python -m data_loaders.* end, whatever happens in them."""

import sys
from collections.abc import Callable

from dlrm_xla.specs import UserError, one_line


def ended(work: Callable[[], None], when_interrupted: str = "interrupted") -> int:
    """The exit status of `work`: 0; 2 after one line on stderr for bad input or a place that cannot be read or written; 130 when interrupted,
    after the line `when_interrupted`. A reader of stdout that leaves (| head) is no error."""
    try:
        work()
        return 0
    except UserError as error:
        message = str(error)
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    except OSError as error:
        message = f"{error.filename or 'output'}: {error.strerror or error}"
    except KeyboardInterrupt:
        print(when_interrupted, file=sys.stderr)
        return 130
    print(f"error: {one_line(message)}", file=sys.stderr)
    return 2
