"""``rl-autoscale emulate``: a server with vLLM's API and metric names, timed by a latency profile."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from rl_autoscale.fleet.errors import MissingExtraError

if TYPE_CHECKING:
    from rl_autoscale.serving.emulator.server import Emulator


def command(
    profile: Annotated[str, typer.Option(help="A shipped latency profile or a path ending in .yaml.")],
    port: Annotated[int, typer.Option(help="0 takes a free one and says which.")] = 8000,
    host: Annotated[str, typer.Option(help="Where to listen.")] = "127.0.0.1",
    model: Annotated[str, typer.Option(help="Served model name.")] = "emulated",
    speed: Annotated[float, typer.Option(help="Engine seconds per real second.")] = 1.0,
    startup_s: Annotated[float, typer.Option(help="Engine seconds before it listens.")] = 0.0,
    drain_s: Annotated[float, typer.Option(help="Engine seconds that SIGTERM leaves running requests.")] = 0.0,
    max_num_seqs: Annotated[int | None, typer.Option(help="Sequences per batch; default the profile's.")] = None,
    max_num_batched_tokens: Annotated[int | None, typer.Option(help="Token budget; default the profile's.")] = None,
    kv_blocks: Annotated[int | None, typer.Option(help="KV blocks of 16 tokens; default the profile's.")] = None,
    scheduler: Annotated[str, typer.Option(help="vllm or vllm-priority.")] = "vllm",
    prefix_caching: Annotated[bool, typer.Option(help="Find equal beginnings of prompts again; vLLM: on.")] = False,
    max_model_len: Annotated[
        int | None, typer.Option(help="Prompt and output; default what the KV cache holds.")
    ] = None,
    max_queued: Annotated[int | None, typer.Option(help="Requests inside before it says 503.")] = None,
    mean_output_tokens: Annotated[float, typer.Option(help="Of answers that no ignore_eos fixes.")] = 200.0,
    output_cv: Annotated[float, typer.Option(help="Their standard deviation over their mean.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the output lengths.")] = 0,
) -> None:
    """Play a vLLM replica: API, streams, metrics, priorities, start-up and drain, without a GPU.

    Examples:
        rl-autoscale emulate --profile llama-3.1-8b_h100_tp1 --port 8001

        rl-autoscale emulate --profile llama-3.1-70b_h100_tp4 --port 8002 --startup-s 120 --speed 10
    """
    try:
        from rl_autoscale.serving.emulator.server import Emulator, EmulatorConfig
        from rl_autoscale.serving.running import run, serve_until_signal
    except ImportError as error:
        raise MissingExtraError(f"the emulator ({error.name})", "serve") from None
    engine = {
        "name": "emulated",
        "profile": profile,
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": max_num_batched_tokens,
        "kv_blocks": kv_blocks,
        "scheduler": scheduler,
        "prefix_caching": prefix_caching,
    }
    config = EmulatorConfig.from_dict(
        {
            "engine": engine,
            "model": model,
            "host": host,
            "port": port,
            "speed": speed,
            "startup_s": startup_s,
            "drain_s": drain_s,
            "max_model_len": max_model_len,
            "max_queued": max_queued,
            "mean_output_tokens": mean_output_tokens,
            "output_cv": output_cv,
            "seed": seed,
        },
        where="emulate",
    )
    run(serve_until_signal(Emulator(config), _say_where, Emulator.drain))


def _say_where(emulator: Emulator) -> None:
    typer.echo(f"Application startup complete: {emulator.url}", err=True)
