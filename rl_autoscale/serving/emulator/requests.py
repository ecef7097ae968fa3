"""What a client asks the emulated engine for."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np

from rl_autoscale.fleet.spec import ServiceClass
from rl_autoscale.serving.emulator.loop import Job
from rl_autoscale.serving.emulator.prompts import TEXT_BYTES_PER_TOKEN, block_keys
from rl_autoscale.serving.gateway.completion import BadRequestError, Completion
from rl_autoscale.sim.reference.request import Request

_COMPLETION_DEFAULT_TOKENS = 16  # OpenAI's and vLLM's default for /v1/completions


@dataclass(frozen=True, slots=True)
class OutputLengths:
    """How long answers are that no ``ignore_eos`` fixes: log-normal.

    Attributes:
        mean_tokens: > 0.
        cv: standard deviation over mean, >= 0.
    """

    mean_tokens: float = 200.0
    cv: float = 1.0

    def draw(self, rng: np.random.Generator) -> int:
        """One answer's natural length, >= 1."""
        variance = np.log1p(self.cv**2)
        return max(round(float(rng.lognormal(np.log(self.mean_tokens) - variance / 2, np.sqrt(variance)))), 1)


class JobMaker:
    """Turns bodies into engine requests.

    Args:
        max_model_len: prompt and output together.
        lengths: of answers.
        rng: stream of the lengths.
        caching: whether equal beginnings of prompts are to be found again.
    """

    def __init__(
        self, max_model_len: int, lengths: OutputLengths, rng: np.random.Generator, *, caching: bool = False
    ) -> None:
        self._caching = caching
        self._max_model_len = max_model_len
        self._lengths = lengths
        self._rng = rng
        self._numbers = itertools.count()
        self._classes: dict[int, ServiceClass] = {}

    def make(self, completion: Completion) -> Job:
        """A request for the engine.

        Raises:
            BadRequestError: a field out of range, or a prompt that does not fit.
        """
        body = completion.body
        if _whole(body, "n", 1) != 1:
            raise BadRequestError("the emulator gives one answer per request; set n to 1")
        prompt_tokens = completion.size.known_tokens + round(completion.size.text_bytes / TEXT_BYTES_PER_TOKEN)
        prompt_tokens = max(prompt_tokens, 1)
        room = self._max_model_len - prompt_tokens
        if room < 1:
            raise BadRequestError(
                f"the prompt has {prompt_tokens} tokens; the model's maximum context length is {self._max_model_len}"
            )
        max_tokens = min(self._max_tokens(completion), room)  # cut silently, as vLLM does
        natural = max_tokens if body.get("ignore_eos") is True else self._lengths.draw(self._rng)
        priority = _whole(body, "priority", 0)
        keys = block_keys(body, prompt_tokens) if self._caching else ()
        request = Request(
            next(self._numbers), 0, self._class(priority), 0.0, prompt_tokens, min(natural, max_tokens), (), keys
        )
        return Job(request, max_tokens, natural >= max_tokens)

    def _max_tokens(self, completion: Completion) -> int:
        default = self._max_model_len if "messages" in completion.body else _COMPLETION_DEFAULT_TOKENS
        tokens = _whole(completion.body, "max_tokens", _whole(completion.body, "max_completion_tokens", default))
        if tokens < 1:
            raise BadRequestError(f"max_tokens must be at least 1, got {tokens}")
        return tokens

    def _class(self, priority: int) -> ServiceClass:
        """A stand-in that carries the priority; the scheduler reads nothing else of it."""
        if len(self._classes) > 1000:
            self._classes.clear()
        if priority not in self._classes:
            self._classes[priority] = ServiceClass(name=str(priority), ttft_slo_s=1, tpot_slo_s=1, priority=priority)
        return self._classes[priority]


def _whole(body: dict[str, Any], name: str, default: int) -> int:
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int):
        raise BadRequestError(f"{name} must be a whole number, got {value!r}")
    return value
