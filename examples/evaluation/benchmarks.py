# SPDX-License-Identifier: Apache-2.0
"""Evaluate a Hugging Face directory on the paper's eighteen benchmarks, with lmms-eval and vLLM.

    python examples/evaluation/benchmarks.py runs/mine/hf --out eval/mine

It starts vLLM's OpenAI-compatible server on the directory, runs lmms-eval (which has an environment of its own, see
``--harness``) against it, prints a table and stops the server. The prompts are those of training: a chat template that
adds the instruction of the response format to every question. A message's content is the answer alone
(``rollout.vllm.answer_parser``), so the harness needs no change.

Run it where vLLM and this package are installed. Benchmarks come from the Hugging Face hub. MathVista, MathVerse,
CharXiv and MMBench ask a judge about answers that no rule can read: set OPENAI_API_KEY, and MODEL_VERSION, for it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from megatron_g2rpo.data.processing import ChatProcessor
from megatron_g2rpo.tasks import response_formats

# The paper's benchmarks, and lmms-eval's tasks for each (version 0.7.3).
BENCHMARKS = {
    "MMMU": ["mmmu_val"],
    "MMBench": ["mmbench_en_dev"],
    "MMStar": ["mmstar"],
    "MathVista": ["mathvista_testmini_format"],
    "MathVerse": ["mathverse_testmini"],
    "MathVision": ["mathvision_test"],
    "AI2D": ["ai2d"],
    "ChartQA": ["chartqa"],
    "CharXiv": ["charxiv_val_reasoning"],
    "EmbSpatial": ["embspatial"],
    "RefSpatial": ["refspatial_location_json", "refspatial_placement_json", "refspatial_unseen_json"],
    "RoboSpatial": ["robo_spatial_all"],
    "DocVQA": ["docvqa_val"],
    "OCRBench": ["ocrbench"],
    "InfoVQA": ["infovqa_val"],
    "RefCOCO": ["refcoco_grounding_testA", "refcoco_grounding_testB"],
    "RefCOCO+": ["refcoco_plus_grounding_testA", "refcoco_plus_grounding_testB"],
    "RefCOCOg": ["refcocog_grounding_test"],
}

PARSER = "g2rpo_answers"
# Put before the model's own template, which then sees questions that end with the instruction.
INSTRUCTED = """\
{{%- set instructed = namespace(messages=[]) -%}}
{{%- for message in messages -%}}
{{%- if message.role == 'user' and loop.last -%}}
{{%- if message.content is string -%}}
{{%- set content = message.content + {paragraph} -%}}
{{%- else -%}}
{{%- set content = message.content + [{{'type': 'text', 'text': {paragraph}}}] -%}}
{{%- endif -%}}
{{%- set instructed.messages = instructed.messages + [{{'role': 'user', 'content': content}}] -%}}
{{%- else -%}}
{{%- set instructed.messages = instructed.messages + [message] -%}}
{{%- endif -%}}
{{%- endfor -%}}
{{%- set messages = instructed.messages -%}}
"""


def chat_template(processor: ChatProcessor, response_format: str) -> str:
    """A model's chat template, which adds the instruction of a response format to the last question.

    Raises:
        ValueError: the format's instruction stands in the system prompt, where a template of a model puts its own.
    """
    layout = response_formats.get(response_format)
    if not layout.instruction:
        return processor.chat_template
    if layout.placement != "question":
        raise ValueError(
            f"response format {response_format}: its instruction stands in the system prompt; use --no-instruction, "
            "and give it to the harness"
        )
    return INSTRUCTED.format(paragraph=json.dumps(f"\n\n{layout.instruction}")) + processor.chat_template


@contextmanager
def server(command: Sequence[str], log: Path, address: str, timeout_s: float) -> Iterator[None]:
    """A running server; it is stopped at the end.

    Raises:
        RuntimeError: it ended, or was not ready in time; the message names its log.
    """
    environment = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1", **os.environ}
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
    try:
        deadline = time.monotonic() + timeout_s
        while not _is_ready(address):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the server is not ready; see {log}")
            time.sleep(1.0)
        yield
    finally:
        process.terminate()
        try:
            process.wait(timeout=30.0)
        except subprocess.TimeoutExpired:
            process.kill()


def _is_ready(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5.0):
            return True
    except (urllib.error.URLError, OSError):
        return False


def table(results: Path, tasks: Sequence[str]) -> list[str]:
    """The metrics of the tasks, a line each: what the newest results file of lmms-eval says."""
    newest = max(results.rglob("*_results.json"), key=lambda path: path.stat().st_mtime)
    measured = json.loads(newest.read_text())["results"]
    lines = []
    for task in tasks:
        for name, value in measured[task].items():
            metric, _, kind = name.partition(",")
            if isinstance(value, int | float) and kind and "stderr" not in metric:
                lines.append(f"{task:36} {metric:32} {value:.4f}")
    return lines


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="Hugging Face directory, such as the hf/ of a run")
    parser.add_argument("--out", type=Path, required=True, help="directory for answers, metrics and logs")
    parser.add_argument("--benchmarks", nargs="+", choices=BENCHMARKS, default=list(BENCHMARKS), metavar="NAME",
                        help=f"of the paper's: {', '.join(BENCHMARKS)} (default: all)")  # fmt: skip
    parser.add_argument("--tasks", nargs="+", help="tasks of lmms-eval instead, such as one of local_task.py")
    parser.add_argument("--include-path", type=Path, help="directory with further tasks")
    parser.add_argument("--harness", type=Path, default=Path(".venv-lmms/bin/python"),
                        help="Python with lmms-eval 0.7.3 (default: %(default)s, of `make lmms-eval`)")  # fmt: skip
    parser.add_argument("--response-format", default="thinking_answer", help="as in data.response_format")
    parser.add_argument("--no-instruction", action="store_true", help="as data.format_instruction: false")
    parser.add_argument("--max-new-tokens", type=int, default=4096, help="longest response, tokens")
    parser.add_argument("--limit", type=int, help="number of samples of each task; default: all")
    parser.add_argument("--concurrency", type=int, default=64, help="requests under way at once")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--timeout-s", type=float, default=1800.0, help="for the server's start")
    parser.add_argument("--server-options", nargs=argparse.REMAINDER, default=[],
                        help="everything after it goes to the server, such as --tensor-parallel-size 8")  # fmt: skip
    return parser.parse_args(arguments)


def main() -> None:
    """Evaluate."""
    options = parsed()
    if not options.harness.exists():
        sys.exit(f"{options.harness} does not exist: `make lmms-eval` sets it up, or name another by --harness")
    options.out.mkdir(parents=True, exist_ok=True)
    processor = ChatProcessor(options.model)
    template, plugin = options.out / "chat_template.jinja", options.out / "answers.py"
    template.write_text(
        processor.chat_template if options.no_instruction else chat_template(processor, options.response_format)
    )
    plugin.write_text(
        "from megatron_g2rpo.rollout.vllm.answer_parser import register\n\n"
        f"register({PARSER!r}, response_format={options.response_format!r}, "
        f"response_prefix={processor.response_prefix!r})\n"
    )
    tasks = options.tasks or [task for name in options.benchmarks for task in BENCHMARKS[name]]
    address = f"http://127.0.0.1:{options.port}"
    serve = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(options.model),
        "--served-model-name", "policy", "--host", "127.0.0.1", "--port", str(options.port),
        "--chat-template", str(template), "--chat-template-content-format", "openai",
        "--reasoning-parser-plugin", str(plugin), "--reasoning-parser", PARSER,
        "--generation-config", "vllm", *options.server_options,
    ]  # fmt: skip
    evaluate = [
        str(options.harness), "-m", "lmms_eval", "--model", "async_openai",
        "--model_args", f"model=policy,base_url={address}/v1,api_key=none,num_cpus={options.concurrency}",
        "--tasks", ",".join(tasks), "--batch_size", "1", "--log_samples", "--output_path", str(options.out),
        "--gen_kwargs", f"max_new_tokens={options.max_new_tokens},temperature=0",
        *(["--include_path", str(options.include_path)] if options.include_path else []),
        *(["--limit", str(options.limit)] if options.limit is not None else []),
    ]  # fmt: skip
    with server(serve, options.out / "server.log", address, options.timeout_s):
        done = subprocess.run(evaluate, check=False)
    if done.returncode != 0:
        sys.exit(f"lmms-eval ended with status {done.returncode}")
    print("\n".join(table(options.out, tasks)))


if __name__ == "__main__":
    main()
