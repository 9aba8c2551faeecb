"""The page of examples/web classifies in a browser as the exported file does here."""

import base64
import json
import runpy
import shutil
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import export_model
import retrain

ROOT = Path(__file__).parents[1]
RUNTIME = ROOT / "node_modules" / "onnxruntime-web" / "dist"
CALLS = """
<script type="module">
const seen = [];
for (const data of IMAGES) {
  const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
  seen.push((await window.classify(new File([bytes], "image.png", {type: "image/png"})))[0]);
}
const status = document.getElementById("status").textContent;
await fetch("http://127.0.0.1:PORT", {method: "POST", mode: "no-cors", body: JSON.stringify({seen, status})});
</script>
"""


class Heard(HTTPServer):
    """Keeps what a page says."""

    heard: dict[str, Any] | None = None


class Hears(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.heard = json.loads(content)  # type: ignore[attr-defined]
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Nothing."""


@pytest.fixture
def child(searched: list[str], tmp_path: Path) -> Path:
    """An exported child."""
    retrain.main(searched)
    return export_model.main([f"--experiments_dir={tmp_path}/experiments", "--checkpoint=again"]).path


def make(child: Path, page: Path, runtime: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "examples/web/make_page.py", str(child), str(page), f"--runtime={runtime}"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_a_browser_guesses_what_the_program_beside_the_file_guesses(child: Path, tiny: Path, tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not browser or not RUNTIME.is_dir():
        pytest.skip("needs Chromium and, in the project's folder, npm install onnxruntime-web@1.30.0")
    page = tmp_path / "page.html"
    done = make(child, page, RUNTIME)
    assert done.returncode == 0, done.stderr
    images = [*sorted(tiny.rglob("*.png"))[::6], tmp_path / "transparent.png"]
    x, y = np.meshgrid(np.arange(8), np.arange(8))
    clear = np.stack([30 * x, 30 * y, 20 * (x + y), np.where(x > 3, 255, 0)], -1).astype(np.uint8)
    Image.fromarray(clear, "RGBA").save(images[-1])
    data = json.dumps([base64.b64encode(path.read_bytes()).decode() for path in images])
    with Heard(("127.0.0.1", 0), Hears) as server:
        server.timeout = 1
        calls = CALLS.replace("IMAGES", data).replace("PORT", str(server.server_port))
        page.write_text(page.read_text().replace("</body>", calls + "</body>"))
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
        command += [f"--user-data-dir={tmp_path}/browser", page.as_uri()]
        log = tmp_path / "log"
        with log.open("w") as file, subprocess.Popen(command, stdout=file, stderr=file) as process:
            try:
                for _ in range(150):
                    if not server.heard and process.poll() is None:
                        server.handle_request()
            finally:
                process.terminate()
    assert server.heard and "CONSOLE" not in log.read_text(), log.read_text()
    assert server.heard["status"] == "Ready."
    here = runpy.run_path(str(child.with_name("child_onnx.py")))["classify"]([str(path) for path in images])
    for got, (name, share) in zip(server.heard["seen"], here, strict=True):
        assert got["name"] == name and got["share"] == pytest.approx(share, abs=1e-3)


def test_what_is_missing_is_named_and_nothing_overwritten(child: Path, tmp_path: Path) -> None:
    done = make(child, tmp_path / "page.html", tmp_path)
    assert done.returncode == 2 and "npm install onnxruntime-web" in done.stderr and "Traceback" not in done.stderr
    for name in ("ort-wasm-simd-threaded.wasm", "ort.wasm.bundle.min.mjs"):
        (tmp_path / name).write_bytes(b"x")
    assert make(child, tmp_path / "page.html", tmp_path).returncode == 0
    again = make(child, tmp_path / "page.html", tmp_path)
    assert again.returncode == 2 and "exists; name another file" in again.stderr
