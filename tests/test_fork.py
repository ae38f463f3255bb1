"""A process that has checked an adapter can still be forked, as vLLM forks its front end."""

import subprocess
import sys

import torch
from engines import make_pair

SCRIPT = """
import os, sys, time
import torch
torch.set_num_threads(4)
from vllm_adafuse.format.adapter import load_adapter
load_adapter(sys.argv[1])
if torch.get_num_threads() != 4:
    sys.exit("the threads were not given back")
child = os.fork()
if child == 0:
    torch.isfinite(torch.randn(4_000_000)).all()
    os._exit(0)
end = time.monotonic() + 20
while time.monotonic() < end:
    pid, status = os.waitpid(child, os.WNOHANG)
    if pid:
        sys.exit(os.waitstatus_to_exitcode(status))
    time.sleep(0.05)
os.kill(child, 9)
sys.exit("the child hangs")
"""


def test_a_fork_after_the_check_runs_parallel_loops(tmp_path):
    wide = {"hidden_size": 512, "intermediate_size": 2048}
    _, adapter = make_pair(tmp_path, config=wide, num_experts=8, r=16)
    # Its tensors must be large enough for torch to use threads.
    command = [sys.executable, "-c", SCRIPT, str(adapter)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_threads_are_given_back(tmp_path):
    from vllm_adafuse.format.adapter import load_adapter

    threads = torch.get_num_threads()
    load_adapter(make_pair(tmp_path)[1])
    assert torch.get_num_threads() == threads
