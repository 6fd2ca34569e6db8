"""SIGTERM, SIGINT (Ctrl-C) and SIGUSR1 do not break off a training step: a checkpoint comes first.

`arguments.run` installs the handler for the training scripts. Until training begins there is nothing to save and a
signal ends the process; from `defer` on it is only noted, and the training loop asks for it with `received`.
"""

import os
import signal
import sys
import time


SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1")  # SLURM can send the last ahead of time: --signal=USR1@300
_AT_ONCE_AFTER = 3  # seconds; launchers pass on a Ctrl-C that the terminal has sent to all processes already

_deferred, _first = False, None  # _first: name and time of the first signal


def install():
    """Handle the signals in this process; in those that it forks they do what is the default (but see `ignore`)."""
    main = os.getpid()

    def handle(number, frame):
        global _first
        if os.getpid() != main:
            signal.signal(number, signal.SIG_DFL)
            return os.kill(os.getpid(), number)
        name = signal.Signals(number).name
        if not _deferred:
            if os.environ.get("LOCAL_RANK", "0") == "0":
                print(f"\nStopped by {name} before anything was done: start the same command again.", file=sys.stderr)
            sys.exit("RANK" in os.environ)  # of several, the launcher ends the others only at an error
        if _first is None:
            _first = name, time.monotonic()
            print(f"\n{name}: this step is finished and saved first.", file=sys.stderr)
        elif name == "SIGINT" and time.monotonic() - _first[1] > _AT_ONCE_AFTER:
            raise KeyboardInterrupt

    for name in SIGNALS:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), handle)


def defer():
    """From now on a signal is noted only."""
    global _deferred
    _deferred = True


def received():
    """The name of the signal that has come since `defer`, or None."""
    return _first and _first[0]


def ignore(*_):
    """For the worker processes of a loader, which has to go on until the step ends."""
    for name in SIGNALS:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
