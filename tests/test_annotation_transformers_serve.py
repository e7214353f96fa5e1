"""A real OpenAI-compatible server, `transformers serve`, with a tiny model on the CPU."""

import importlib.util
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from query_gpt35_for_annotation import annotate
from query_gpt35_for_annotation.job import read_records

TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
START_SECONDS = 120

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not all(map(importlib.util.find_spec, ("fastapi", "uvicorn"))),
        reason="transformers serve needs: pip install fastapi uvicorn",
    ),
]


@pytest.fixture
def server(tiny_model_dir, tmp_path):
    """The server's address, and the model it has loaded."""
    (Path(tiny_model_dir) / "chat_template.jinja").write_text(TEMPLATE)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / "hub").mkdir()
    command = [Path(sys.executable).with_name("transformers"), "serve", tiny_model_dir]
    process = subprocess.Popen(
        [*command, "--device", "cpu", "--port", str(port)],
        env=os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"},
    )
    try:
        wait_for(f"http://localhost:{port}/health", process)
        yield f"http://localhost:{port}/v1", tiny_model_dir
    finally:
        process.terminate()
        process.wait(30)


def wait_for(url, process):
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        assert process.poll() is None, "the server did not start"
        try:
            urllib.request.urlopen(url, timeout=2).close()
            return
        except OSError:
            time.sleep(0.2)
    pytest.fail(f"no server at {url} after {START_SECONDS} s")


def test_a_real_server_annotates(server, tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    url, model = server
    (tmp_path / "i.txt").write_text("".join(f"Say {each}\n" for each in range(6)))
    code = annotate.main(
        ["--instructions", str(tmp_path / "i.txt"), "--output", str(tmp_path / "out"),
         "--base_url", url, "--model", model, "--max_tokens", "8", "--concurrency", "3"]
    )  # fmt: skip
    assert code == 0
    records = read_records(tmp_path / "out").values()
    assert len(records) == 6
    for record in records:
        # A random model may stop anywhere, even at once.
        assert record["status"] in ("ok", "truncated", "empty")
        assert record["usage"]["prompt_tokens"] > 0
        assert 0 <= record["usage"]["completion_tokens"] <= 8
        assert record["unmetered_attempts"] == 0
