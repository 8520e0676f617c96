#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# SGLang's own clients against the needle server on a GPU: its benchmark, whose requests must all succeed, and its
# test of repeatability. Usage: bench/serve/clients.sh [flags of sglang.launch_server]
set -euo pipefail
port=31555
python3 -m sglang_tokenselect.needle_server --device cuda --port "$port" "$@" >server.log 2>&1 &
server=$!
trap 'kill "$server"' EXIT
until curl -sf "http://127.0.0.1:$port/health_generate" >/dev/null; do
  kill -0 "$server" || { tail -30 server.log; exit 1; }
  sleep 1
done
checkpoint=$(python3 -c 'from sglang_tokenselect.needle import checkpoint_path; print(checkpoint_path())')
python3 -m sglang.benchmark.serving --backend sglang --host 127.0.0.1 --port "$port" \
  --model "$checkpoint" --tokenizer "$checkpoint" --dataset-name random-ids --num-prompts 200 --max-concurrency 16 \
  --random-input-len 12000 --random-output-len 64 --random-range-ratio 0.1
for mode in single prefix; do
  python3 -m sglang.test.test_deterministic --host 127.0.0.1 --port "$port" --test-mode "$mode" --n-trials 30 \
    --max-new-tokens 32
done
