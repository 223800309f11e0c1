"""Work in children of this process: what it has imported they need not import again, which is most of what a toy takes."""

import os
import pickle
import sys
import traceback
from collections.abc import Callable
from typing import TypeVar

Found = TypeVar("Found")


def forked(work: Callable[[], Found]) -> Found:
    """What `work` gives in a child of its own. Raises RuntimeError where it raises, with its traceback on stderr.

    Before the first of autograd's threads: a child would wait for them.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            found = pickle.dumps(work())
            with os.fdopen(write, "wb") as pipe:
                pipe.write(found)
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        data = pipe.read()
    os.waitpid(child, 0)
    if not data:
        raise RuntimeError("the work of a child failed")
    made: Found = pickle.loads(data)
    return made
