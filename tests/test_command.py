import subprocess
import sys

SLOW_TO_END = """
import atexit, time
from absl import flags
from dmax_jax import command

def main():
    atexit.register(time.sleep, 600)  # as JAX waits for what devices still compute
    raise KeyboardInterrupt

command.run(main, flags.FlagValues(), "")
"""


def test_ctrl_c_ends_the_process_at_once():
    done = subprocess.run([sys.executable, "-c", SLOW_TO_END], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (130, "interrupted")
