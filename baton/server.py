"""Imported by the server process from which stages are forked, before anything else: no signal ends that process.

Slurm and Kubernetes signal every process of a job. A server that ended before its stage could not tell how the stage
ended. The signals are blocked and not ignored, so that one for a stage that was just forked waits until
`baton.worker` unblocks it there.
"""

import signal

from training.signals import ENDING

signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
