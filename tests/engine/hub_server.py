"""A Hugging Face hub in miniature on loopback: one repository, and what was fetched of it."""

import hashlib
import json
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubServer:
    """Serves `files` as the repository `repository`, on branch main.

    The connection breaks in the middle of the file `cut_short`.

    Attributes:
        endpoint: For HF_ENDPOINT.
        fetched: Names of the files that were asked for.
    """

    def __init__(
        self, repository: str, files: dict[str, bytes], *, cut_short: str | None = None
    ) -> None:
        self.fetched: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                self.do_GET()

            def do_GET(self) -> None:
                path = urllib.parse.unquote(self.path.partition("?")[0])
                if path == f"/api/models/{repository}/revision/main":
                    siblings = [{"rfilename": name} for name in files]
                    self._send_json({"id": repository, "sha": COMMIT, "siblings": siblings})
                elif path.startswith(f"/api/models/{repository}/tree/"):
                    self._send_json(
                        [
                            {
                                "type": "file",
                                "path": name,
                                "size": len(content),
                                "oid": hashlib.sha1(content).hexdigest(),
                            }
                            for name, content in files.items()
                        ]
                    )
                elif path.startswith(f"/{repository}/resolve/"):
                    self._send_file(path.split("/", 5)[5])
                else:
                    self._send(404, b"", {"X-Error-Code": "RepoNotFound"})

            def _send_file(self, name: str) -> None:
                if self.command == "GET":
                    hub.fetched.append(name)
                etag = hashlib.sha1(files[name]).hexdigest()
                headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}
                self._send(200, files[name], headers, is_cut=name == cut_short)

            def _send_json(self, value: object) -> None:
                self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

            def _send(
                self, status: int, body: bytes, headers: dict[str, str], *, is_cut: bool = False
            ) -> None:
                self.send_response(status)
                for key, value in headers.items():
                    self.send_header(key, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body[: len(body) // 2] if is_cut else body)
                    self.close_connection = is_cut

            def log_request(self, code: object = "-", size: object = "-") -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
