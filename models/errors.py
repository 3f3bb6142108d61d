"""What can be wrong with a checkpoint."""


class CheckpointError(Exception):
    """A checkpoint cannot be served: the message names the file, field or tensor and the mend."""


class WeightUpdateError(CheckpointError):
    """New weights cannot be taken; those that serve are as they were. The message names the tensor or the peer."""
