"""What can be wrong with a checkpoint."""


class CheckpointError(Exception):
    """A checkpoint cannot be served: the message names the file, field or tensor and the mend."""
