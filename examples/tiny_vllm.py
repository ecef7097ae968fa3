"""A real vLLM server without a GPU and without a download: a tiny Llama with random weights, and how to serve it.

What it says is noise; how it says it (streams, metrics, queues, drain) is vLLM's. Run with vLLM's Python:

    .venv-vllm/bin/python examples/tiny_vllm.py MODEL_FOLDER       # writes weights and tokenizer, then exits
    .venv-vllm/bin/python -m vllm.entrypoints.openai.api_server --model MODEL_FOLDER ...    # see `serve_command`

Importable without vLLM: tests and benchmarks take `serve_command` and `ENV` from here.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

MODEL_NAME = "tiny"
VOCABULARY, MAX_MODEL_LEN, MAX_NUM_SEQS = 2048, 2048, 16
KV_CACHE_BYTES = 64 * 2**20  # of the default model's 512 bytes per token: room for 131,072 tokens
READY_LOG = "Application startup complete"

# No hub, no usage report. One thread per engine, bound to no core: by default every server binds its thread to the
# first core, and then three servers have the speed of one. No prefix cache: random prompts would be served by it.
ENV = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
}


def vllm_python() -> Path:
    """The interpreter that has vLLM: ``RL_AUTOSCALE_VLLM_PYTHON``, or that of ``make test-vllm``."""
    default = Path(__file__).resolve().parent.parent / ".venv-vllm" / "bin" / "python"
    return Path(os.environ.get("RL_AUTOSCALE_VLLM_PYTHON", default))


def has_vllm(python: Path) -> bool:
    """Whether an interpreter exists and finds vLLM (which is not imported: that takes seconds)."""
    if not python.exists():
        return False
    look = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
    return subprocess.run([str(python), "-c", look], check=False).returncode == 0


def make_model(python: Path, folder: Path, **sizes: int) -> None:
    """Write weights and tokenizer to a folder, with vLLM's interpreter; ``sizes`` as of `write_model`."""
    words = [f"{name}={value}" for name, value in sizes.items()]
    subprocess.run([str(python), __file__, str(folder), *words], check=True, env={**os.environ, **ENV})


def serve_command(python: Path, folder: Path) -> list[str]:
    """One server, as a template for the `local` back end: ``{port}`` is left to it.

    The module is started instead of the command ``vllm``, which looks for a distribution of that name and does not
    find it when vLLM was installed as ``vllm-cpu``. ``RL_AUTOSCALE_VLLM_ARGS`` is appended.
    """
    settings = {
        "--host": "127.0.0.1",
        "--port": "{port}",
        "--model": str(folder),
        "--served-model-name": MODEL_NAME,
        "--dtype": "bfloat16",
        "--max-model-len": str(MAX_MODEL_LEN),
        "--max-num-seqs": str(MAX_NUM_SEQS),
        "--kv-cache-memory-bytes": str(KV_CACHE_BYTES),
        "--shutdown-timeout": "30",
    }
    flags = ["--enforce-eager", "--no-enable-prefix-caching"]
    more = shlex.split(os.environ.get("RL_AUTOSCALE_VLLM_ARGS", ""))
    server = [str(python), "-m", "vllm.entrypoints.openai.api_server"]
    return [*server, *(word for pair in settings.items() for word in pair), *flags, *more]


def write_model(folder: Path, *, layers: int = 2, hidden: int = 128, heads: int = 4, kv_heads: int = 2) -> None:
    """Write a random Llama and a tokenizer that knows the words w3, w4, ...: one token per word.

    Args:
        folder: made if need be.
        layers: transformer blocks; 2 layers of 128 are about a million parameters.
        hidden: width; the feed-forward part is three times as wide.
        heads: attention heads.
        kv_heads: of which keys and values have so many.
    """
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = {"<unk>": 0, "<s>": 1, "</s>": 2}
    words = special | {f"w{token}": token for token in range(len(special), VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=MAX_MODEL_LEN,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    fast.save_pretrained(folder)

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=MAX_MODEL_LEN,
        bos_token_id=special["<s>"],
        eos_token_id=special["</s>"],
        pad_token_id=special["</s>"],
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(f"usage: {sys.argv[0]} MODEL_FOLDER [layers=N] [hidden=N] [heads=N] [kv_heads=N]")
    sizes = dict(word.split("=") for word in sys.argv[2:])
    write_model(Path(sys.argv[1]), **{name: int(value) for name, value in sizes.items()})
