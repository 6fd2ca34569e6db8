"""Starts a script under FSDP2 on CPUs, for which accelerate would choose DDP: fsdp_on_cpu.py SCRIPT FLAGS..."""

import os
import runpy
import sys

from accelerate.state import PartialState
from accelerate.utils import DistributedType


os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
