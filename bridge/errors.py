"""The exceptions of bridge and training.

    BridgeworksError            exit code 1
        GateError               a check of numbers or digests failed
        DivergenceError         a training run met a loss or gradient that is no number, or jumps
        StoppedError            the user stopped the work; what is finished can be gone on with
        InputError              exit code 2: what the user gave cannot be used
            CheckpointError     a file is missing, truncated, malformed or outside its folder
            UnsupportedModelError   unknown model_type, refused value, unknown config key
            CoverageError       a tensor is missing, left over or of another shape
            ConfigError         an override, a parallel size or a setting is wrong

    OtherRankError              another rank met an error that is none of these

A message is one line: what was found, what is allowed and what to do. Errors carry the message only, so that
they can be pickled and cross a process boundary as text.
"""


class BridgeworksError(Exception):
    """An error whose message is meant for the user."""

    exit_code = 1


class GateError(BridgeworksError):
    """A gate measured something outside its thresholds."""


class DivergenceError(BridgeworksError):
    """A training run met a loss or gradient with which it cannot go on; another start would meet it too."""


class StoppedError(BridgeworksError):
    """The user stopped the work; another start goes on from what is finished."""


class InputError(BridgeworksError):
    """What the user gave cannot be used; nothing was written."""

    exit_code = 2


class CheckpointError(InputError):
    """A checkpoint's files are missing, truncated, malformed or point outside their folder."""


class UnsupportedModelError(InputError):
    """No family knows this model, or a family refuses one of its config values."""


class CoverageError(InputError):
    """The tensors of a checkpoint are not those that its config and family declare."""


class ConfigError(InputError):
    """A setting, an override or a parallel size is wrong."""


class OtherRankError(Exception):
    """Another rank met an error that is none of ours: no verdict, because another start may go well."""
