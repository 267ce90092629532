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

answers() { python -c "import sys, urllib.request as u; u.urlopen(sys.argv[1] + '/health', timeout=2)" "$url" 2>/dev/null; }
for _ in $(seq 300); do
  answers && break
  kill -0 "$server" 2>/dev/null || { echo "the server did not start"; exit 1; }
  sleep 0.2
done
answers || { echo "the server did not answer within a minute"; exit 1; }

echo
python quickstart.py "$url"
stop
echo "server stopped. What to try next (after: . .venv/bin/activate):"
echo "  branchwise serve                                   the same server, at http://127.0.0.1:8000"
echo "  branchwise chat --url http://127.0.0.1:8000        talk to it: \"Who is Mira?\", \"Tell me a story.\""
echo "  python examples/tree_of_thought.py                 a program that branches, with the cache and without"
echo "  branchwise bench http://127.0.0.1:8000 --scale 0.02    the workloads that fit this model: four of seven"
echo "  branchwise doctor Qwen/Qwen3-0.6B                  would a real model run here?"
