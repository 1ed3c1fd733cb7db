"""The exceptions of the package. A message names the file or tensor, the expected and the found."""


class CheckpointError(ValueError):
    """A checkpoint whose files, tensors or configuration do not fit together."""


class ReadError(OSError):
    """A file of experts that is missing, short or unreadable."""


class CapacityError(RuntimeError):
    """More slots or memory were asked for than there are."""


class UnsupportedError(RuntimeError):
    """Something this machine, build or version lacks."""


class TraceError(ValueError):
    """A routing trace that is truncated, foreign, or holds ids, sizes or phases that cannot be."""
