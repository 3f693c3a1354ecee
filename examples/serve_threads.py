"""Serves one tower to many threads: POST an image, get its embedding as a safetensors file.

    python examples/serve_threads.py --port 8000
    curl --data-binary @photo.jpg http://127.0.0.1:8000 --output embedding.safetensors

Threads decode and preprocess in parallel and take turns on the device; repeated images come from a cache.
"""

import argparse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from safetensors.torch import save

from tritontower import TowerError, VisionTower
from tritontower.cache import EmbeddingCache

LARGEST_UPLOAD = 32 * 2**20


def make_handler(tower: VisionTower) -> type[BaseHTTPRequestHandler]:
    """Makes a request handler that encodes with ``tower``."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            length = self.headers.get("Content-Length", "")
            if not length.isdecimal() or int(length) > LARGEST_UPLOAD:
                self._answer(413, f"send a Content-Length of at most {LARGEST_UPLOAD} bytes".encode())
                return
            try:
                (embedding,) = tower.encode(self.rfile.read(int(length)), output_device="cpu")
            except TowerError as error:
                self._answer(400, str(error).encode())  # the message contains no private data
                return
            self._answer(200, save({"embeddings": embedding.embeddings}, {"grid_thw": str(embedding.grid_thw)}))

        def _answer(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    return Handler


def main() -> None:
    """Serves until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen/Qwen2-VL-2B-Instruct", help="a local folder or a hub id")
    parser.add_argument("--port", type=int, default=8000, help="0 for a free port")
    arguments = parser.parse_args()
    tower = VisionTower.from_pretrained(arguments.model, cache=EmbeddingCache(max_bytes=2**30))
    with ThreadingHTTPServer(("127.0.0.1", arguments.port), make_handler(tower)) as server:
        print(f"http://127.0.0.1:{server.server_port}", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main()
