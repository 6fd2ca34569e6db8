"""Starts a script that soon gives the Hub up: impatient.py SCRIPT FLAGS..."""

import os
import runpy
import sys


sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(os.path.abspath(sys.argv[0])))

import hub  # noqa: E402


hub.AT_START = hub.AFTER_A_SIGNAL = (0.1, 0.2)
hub.AT_END = (0.1,) * 40
hub.LONGEST_WAIT = 0.3
runpy.run_path(sys.argv[0], run_name="__main__")
