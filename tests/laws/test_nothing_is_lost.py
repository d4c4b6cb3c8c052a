"""Law 8, as far as files go: whoever looks at any moment finds the old file or the new one, and so it stays when killed."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

pytestmark = pytest.mark.once

COUNT = 100_000
# Writes {"number": n, "values": [n, n, ...]} over and over, for n = 0, 1, 2, ...
WRITER = f"""
import itertools, sys
from keras_morph.runs import write_json
for number in itertools.count():
    write_json(sys.argv[1], {{"number": number, "values": [number] * {COUNT}}})
"""


def read_whole(path):
    data = json.loads(path.read_text())
    assert data["values"] == [data["number"]] * COUNT
    return data["number"]


@pytest.fixture
def writer(tmp_path):
    path = tmp_path / "structure.json"
    environment = os.environ | {"KERAS_BACKEND": "numpy"}  # writing needs no framework
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    yield process, path
    process.kill()
    process.wait()


def test_a_file_is_whole_at_every_moment_and_after_a_kill(writer):
    process, path = writer
    numbers = [read_whole(path) for _ in range(60)]
    assert numbers == sorted(numbers)
    assert numbers[-1] > numbers[0] + 1  # it was replaced while it was read
    process.send_signal(signal.SIGKILL)
    assert process.wait(timeout=30) == -signal.SIGKILL
    last = read_whole(path)
    assert last >= numbers[-1]
    # What the kill may leave behind is hidden, and named as temporary.
    for other in path.parent.iterdir():
        assert other == path or other.name.startswith(".")
