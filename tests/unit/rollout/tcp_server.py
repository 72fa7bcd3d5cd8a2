"""`python tcp_server.py PORT REFUSED`: SGLang's HTTP interface as far as a router and the client use it, over TCP.

A response to the prompt [a, ...] is the tokens [a, a + 1] of log-probs -a; the prompt [REFUSED] is found fault with.
It starts with the weights "none".
"""

from __future__ import annotations

import http.server
import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from fake_servers import answer


class State:
    version = "none"
    prompts: list[str] = []  # of each sequence answered
    lock = threading.Lock()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_args: object) -> None:
        pass

    def do_GET(self) -> None:
        known = {"weight_version": State.version, "model_path": "/m", "served_model_name": "m", "is_generation": True}
        self._say(
            {
                "/model_info": known,
                "/server_info": known | {"version": "0.5.21"},
                "/served": len(State.prompts),
                "/prompts": State.prompts,
            }.get(self.path, {})
        )

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"] or 0)) or b"{}")
        if self.path == "/generate":
            prompt = body["input_ids"]
            if prompt == [int(sys.argv[2])]:
                return self._say({"error": {"message": f"cannot do prompt {prompt[0]}"}}, 400)
            version = State.version
            time.sleep(0.002)
            with State.lock:
                State.prompts.append(str(prompt))
            return self._say(answer(body, version))
        if self.path == "/update_weights_from_disk":
            State.version = body["weight_version"]
        return self._say({"success": True, "message": ""})

    def _say(self, what: Any, status: int = 200) -> None:
        data = json.dumps(what).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


class Server(http.server.ThreadingHTTPServer):
    request_queue_size = 512
    daemon_threads = True


if __name__ == "__main__":
    Server(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
