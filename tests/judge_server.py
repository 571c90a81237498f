"""A server that answers judges' questions by script, and the command run against it."""

import contextlib
import http.server
import json
import threading
import time
from pathlib import Path

import pytest

import evaluate

FAST = dict(judge_model=("m",), backoff=0.002, timeout=60.0, tries=4, concurrency=4)


class Server(http.server.ThreadingHTTPServer):
    """`script(question, number of the request, how often this question came before)` gives the judge's text,
    (status, headers, body), "cut" for a closed connection, "half" for one closed within the body, or a
    number of seconds to be silent."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, script):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script = script
        self.lock = threading.Lock()
        self.active = 0
        self.most = 0
        self.asked = []
        self.times = []
        self.bodies = []
        self.keys = []
        self.endpoint = f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request, client_address):
        pass  # a client that gave up


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16  # head and body in one packet, or each reply waits for an acknowledgement

    def log_message(self, *args):
        pass

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        question = body["messages"][-1]["content"]
        with server.lock:
            number = len(server.asked)
            before = server.asked.count(question)
            server.asked.append(question)
            server.times.append(time.monotonic())
            server.bodies.append(body)
            server.keys.append(self.headers["authorization"])
            server.active += 1
            server.most = max(server.most, server.active)
        try:
            does = None
            time.sleep(0.004)  # so that requests overlap
            does = server.script(question, number, before)
            if does in ("cut", "half") or isinstance(does, float):
                if does == "half":
                    self.send_response(200)
                    self.send_header("content-length", "100")
                    self.end_headers()
                    self.wfile.write(b'{"choices": [')
                    self.wfile.flush()
                self.close_connection = True
                return
        finally:
            with server.lock:
                server.active -= 1
            if isinstance(does, float):
                time.sleep(does)  # by now nobody waits
        if isinstance(does, str):
            choice = {"index": 0, "message": {"role": "assistant", "content": does}, "finish_reason": "stop"}
            does = 200, {}, json.dumps({"id": "x", "object": "chat.completion", "choices": [choice]})
        status, headers, text = does
        self.send_response(status)
        for name, value in (
            {"content-type": "application/json"} | headers | {"content-length": str(len(text.encode()))}
        ).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(text.encode())


@contextlib.contextmanager
def serving(script):
    server = Server(script)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def run(server, files, folder, **changes):
    """(summary, error or None)"""
    endpoint = server if isinstance(server, str) else server.endpoint
    error = None
    try:
        flags = FAST | {"responses": files, "endpoint": (endpoint,)} | changes
        evaluate.judge(evaluate.Judge(run_dir=str(folder), **flags))
    except SystemExit as stop:
        error = str(stop)
    file = Path(folder, "judge.json")
    if not file.exists():
        return None, error
    out = json.loads(file.read_text(), parse_constant=pytest.fail)
    if len(out.get("judges", ())) == 1:  # the numbers of one judge and one comparison at the top
        out |= out["judges"][0]
        if len(out.get("comparisons", ())) == 1:
            out |= out["comparisons"][0]
    return out, error
