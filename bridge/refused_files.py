"""What the system refuses to do with a file, said as what the user can change."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from bridge.errors import InputError

REFUSALS = (errno.EACCES, errno.EPERM, errno.EROFS)


@contextmanager
def refused_files() -> Iterator[None]:
    """Raise an InputError that names the file where it, or its folder, may not be read or written."""
    try:
        yield
    except OSError as error:
        if error.errno not in REFUSALS or error.filename is None:
            raise
        raise InputError(
            f"{error.filename} cannot be used: {error.strerror}: change its permissions, or those of its"
            " folder, or give another place"
        ) from error
