"""How tests compile, for conftest.py and for the processes that tests start.

Without LLVM's optimizations, by XLA's older emitters and in one piece, for their programs are small and run a few
times: compiling is what tests spend their time on, and so it takes a third (tests/test_stream.py, test_losses.py and
test_decode.py 103 s in place of 243).
"""

import importlib.util

# libtpu, where it is installed, reads the same variable and ends the process at a flag that it does not know.
_OF_CPU = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
CHEAP = f"--xla_backend_optimization_level=0 {'' if importlib.util.find_spec('libtpu') else _OF_CPU}".strip()
EIGHT_DEVICES = "--xla_force_host_platform_device_count=8"  # Fake ones.
