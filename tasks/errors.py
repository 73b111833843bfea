"""The exceptions of tasks and flows, below those of `bridge.errors`.

BridgeworksError            exit code 1
    JobError                a job process failed, was too slow or was stopped
        JobStoppedError     it was stopped because the flow was cancelled; also a StoppedError
            JobSavedError   it was told to stop and has saved; exit code 75
        JobCrashedError     it lost a process or ended by an error that is no verdict of ours
    ArtifactError           a sealed directory is not what its artifact.json says
    StoreError              a path or an address could not be read or written
    InputError              exit code 2
        SpecError           a release spec is wrong
"""

from bridge.errors import BridgeworksError, InputError, StoppedError
from bridge.job import EXIT_STOPPED


class JobError(BridgeworksError):
    """A job process failed, was too slow or was stopped."""


class JobStoppedError(JobError, StoppedError):
    """A job, or a step without one, was stopped because its flow was cancelled."""


class JobSavedError(JobStoppedError):
    """A job was told to stop and has saved: started again, it goes on."""

    exit_code = EXIT_STOPPED


class JobCrashedError(JobError):
    """A job lost a process, or ended by an error that is no verdict of ours: it may be started again."""


class ArtifactError(BridgeworksError):
    """A sealed directory is not what its artifact.json says."""


class StoreError(BridgeworksError):
    """A path or an address could not be read or written."""


class SpecError(InputError):
    """A release spec, or an override of it, is wrong."""
