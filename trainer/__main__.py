"""`python -m trainer`: the training application, which `zero-ps train` runs too."""

import os
import signal
import sys
from collections.abc import Sequence

import trainer
from trainer.app.flags import parse
from trainer.app.loop import StoppedAtOnce, TrainingFailed, train


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0 when done, 1 when training began and failed, 2 when it could not begin; after a signal 128 and its
    number."""
    settings = parse(arguments)
    try:
        return train(settings)
    except TrainingFailed as error:
        return _fail(error, 1)
    except (trainer.ZeroPsError, ValueError, OSError) as error:
        return _fail(error, 2)
    except KeyboardInterrupt as error:
        number = error.number if isinstance(error, StoppedAtOnce) else signal.SIGINT
        return _fail("interrupted at once; what the last commit has is safe", 128 + number)


def _fail(error: object, status: int) -> int:
    rank = f" (rank {os.environ['RANK']})" if "RANK" in os.environ else ""
    print(f"zero-ps train{rank}: {error}", file=sys.stderr, flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
