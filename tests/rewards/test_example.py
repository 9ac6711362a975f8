"""The example that asks a served UnifiedReward: what it sends, and how it reads the answers."""

import base64
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch
from PIL import Image

from flowbp.rewards import load_reward

ANSWERS = {"a red circle": "It fits.\nFinal Score: 3.5", "a blue star": "final score:  2", "nothing": "I cannot tell."}


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """A server that answers by the caption in the question; the bodies of what it was asked."""
    bodies = []

    class Server(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            bodies.append(body | {"path": self.path})
            text = body["messages"][0]["content"][1]["text"]
            answer = next(answer for caption, answer in ANSWERS.items() if f"[{caption}]" in text)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"choices": [{"message": {"content": answer}}]}).encode())

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    (tmp_path / "ur-align.txt").write_text("How well? [{prompt}]")
    monkeypatch.setenv("UNIFIED_REWARD_URL", f"http://127.0.0.1:{server.server_port}/v1")
    monkeypatch.setenv("UNIFIED_REWARD_QUESTIONS", str(tmp_path))
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "examples")
    yield bodies
    server.shutdown()


def test_it_asks_greedily_about_every_image_and_reads_the_number(asked):
    images = torch.zeros(3, 3, 8, 16)
    images[0, 0] = 1.0
    scores = load_reward("unified_reward:Alignment")(images, list(ANSWERS))
    assert scores[:2].tolist() == [3.5, 2.0] and scores[2].isnan()
    assert len(asked) == 3 and all(
        body["temperature"] == 0 and body["path"] == "/v1/chat/completions" for body in asked
    )
    content = asked[0]["messages"][0]["content"]
    assert content[1]["text"] == "How well? [a red circle]"
    picture = Image.open(io.BytesIO(base64.b64decode(content[0]["image_url"]["url"].partition(",")[2])))
    assert picture.size == (512, 512) and picture.getpixel((256, 256)) == (255, 0, 0)
