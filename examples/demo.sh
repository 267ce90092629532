#!/usr/bin/env bash
# Starts a server on the shipped model at a free port, runs quickstart.py against it, stops it. Called by `make demo`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
url="http://127.0.0.1:$port"

branchwise serve --port "$port" --log-level warning &
server=$!
stop() {
  trap - EXIT
  kill -TERM "$server" 2>/dev/null || true
  wait "$server" 2>/dev/null || true
}
trap stop EXIT

# One process polls: an interpreter for each try would take the processor that the server starts on.
python - "$url/health" "$server" <<'END' || exit 1
import os, sys, time, urllib.request
url, server, end = sys.argv[1], int(sys.argv[2]), time.monotonic() + 60
while time.monotonic() < end:
    try:
        urllib.request.urlopen(url, timeout=2)
        sys.exit()
    except OSError:  # it does not answer yet
        time.sleep(0.05)
    try:
        os.kill(server, 0)
    except ProcessLookupError:
        sys.exit("the server did not start")
sys.exit("the server did not answer within a minute")
END

echo
python quickstart.py "$url"
stop
echo "server stopped. What to try next (after: . .venv/bin/activate):"
echo "  branchwise serve                                   the same server, at http://127.0.0.1:8000"
echo "  branchwise chat --url http://127.0.0.1:8000        talk to it: \"Who is Mira?\", \"Tell me a story.\""
echo "  python examples/tree_of_thought.py                 a program that branches, with the cache and without"
echo "  branchwise bench http://127.0.0.1:8000 --scale 0.02    the workloads that fit this model: four of seven"
echo "  branchwise doctor Qwen/Qwen3-0.6B                  would a real model run here?"
