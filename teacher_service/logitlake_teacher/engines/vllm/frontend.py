"""Drives vLLM; beside the worker's hook the only file of the service that imports it. Two ways to run one engine.

`AsyncFrontend` owns an `AsyncLLM` on an event loop in a thread of its own: requests of all callers are in flight at
once and images are prepared beside the steps. It always runs vLLM's core in a child process. `InProcessFrontend` runs
the core here and is for CPUs: measured on two cores with a checkpoint of 1 MB, the start takes 12 to 20 s against 24 s
(fork) or 57 s (spawn) for the child process, and closing it nothing against 4 s. vLLM refuses the mixture ("EngineCore
in asyncio without multiprocessing"), so there are two. VLLM_ENABLE_V1_MULTIPROCESSING decides where it is set.

Both take calls from several threads, answer a call's requests in order, and never let scoring and sampling share a
step: the calls of one phase wait until those of the other are through.
"""

import asyncio
import itertools
import os
import threading
from collections.abc import Coroutine, Sequence
from typing import Any, ClassVar, Literal, Protocol, TypeVar

from logitlake_shared.errors import EngineError
from logitlake_teacher.engines.vllm.phases import Phase, PhaseGate

__all__ = ["Frontend", "open_frontend", "sampling_params"]

Result = TypeVar("Result")

# A CPU build of vLLM wants these before it is imported; a GPU build has better defaults. What the user has set stays.
_CPU_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # vLLM compiles its rank count on first use: half a minute, and a C++ compiler that a machine may not have.
    "TORCHDYNAMO_DISABLE": "1",
}
_QUIET_ENVIRONMENT = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}


class Frontend(Protocol):
    """One running vLLM engine."""

    vocab_size: int
    """entries of the model's own vocabulary, those that no token has included"""
    can_draw: bool
    """whether candidates can be drawn with seeds"""
    image_backend: str | None
    """what resamples images: `pil`, `torchvision`; None for a model that sees none"""

    def run(self, phase: Phase, prompts: Sequence[dict[str, Any]], params: Sequence[Any]) -> list[Any]:
        """A `RequestOutput` for each prompt, in order, or the exception with which vLLM refused that one.

        Raises `EngineError` when the engine itself failed; it answers nothing after that.
        """
        ...

    def call_workers(self, method: str, *arguments: Any) -> list[Any]:
        """What each worker's `method` returns."""
        ...

    def close(self) -> None:
        """Ends the engine. Calling it twice is fine."""
        ...


def open_frontend(options: dict[str, Any], num_threads: int, runner: Literal["v1"] | None = None) -> Frontend:
    """Starts vLLM with these engine arguments; `runner` asks for that model runner. Raises `EngineError`."""
    import torch

    wanted = dict(_QUIET_ENVIRONMENT)
    if not torch.cuda.is_available():
        wanted |= _CPU_ENVIRONMENT
        # On a CPU vLLM cannot draw with a seed from a prompt that it computes in pieces ("CPU Generator does not use
        # offset"), so where a step holds every prompt whole, it must not cut any.
        options = options | {"enable_chunked_prefill": options["max_num_batched_tokens"] < options["max_model_len"]}
    if runner == "v1":
        wanted["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    for name, value in wanted.items():
        os.environ.setdefault(name, value)
    try:
        import vllm
    except ImportError as error:
        raise EngineError(
            f"engine.type is 'vllm', but vLLM cannot be imported: {error}; install logitlake[teacher] (GPU) or "
            "logitlake[teacher-cpu], or use engine.type=hf"
        ) from error

    torch.set_num_threads(num_threads)
    try:
        if vllm.envs.VLLM_ENABLE_V1_MULTIPROCESSING:
            return AsyncFrontend(options)
        return InProcessFrontend(options)
    except (ValueError, RuntimeError, OSError, KeyError) as error:
        raise EngineError(f"{options['model']}: vLLM cannot load the teacher: {error}") from error


def sampling_params(**options: Any) -> Any:
    """vLLM's `SamplingParams`: one output at the end, flat lists, no text. Raises `EngineError` if it refuses one."""
    from vllm.exceptions import VLLMClientError
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    try:
        return SamplingParams(**options, flat_logprobs=True, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY)
    except (ValueError, VLLMClientError) as error:
        raise EngineError(f"vLLM does not sample so: {error}") from error


def _image_backend(model_config: Any) -> str | None:
    """Of the processor that vLLM has loaded already."""
    from vllm.transformers_utils.processor import cached_processor_from_config

    if not model_config.is_multimodal_model:
        return None
    return str(cached_processor_from_config(model_config).image_processor.backend)


def _can_draw(vllm_config: Any) -> bool:
    from vllm.platforms import current_platform

    return not (current_platform.is_cpu() and vllm_config.scheduler_config.enable_chunked_prefill)


class InProcessFrontend:
    """vLLM's engine core in this process. Implements `Frontend`; one call at a time.

    All cores of a process share vLLM's process groups, and the first that is shut down takes them from the others: so
    they are shut down together, when the last is closed.
    """

    _registry: ClassVar[threading.Lock] = threading.Lock()
    _num_open: ClassVar[int] = 0
    _closed: ClassVar[list[Any]] = []

    def __init__(self, options: dict[str, Any]) -> None:
        import vllm

        self._engine: Any = vllm.LLMEngine.from_engine_args(vllm.EngineArgs(**options))
        with InProcessFrontend._registry:
            InProcessFrontend._num_open += 1
        self.vocab_size = int(self._engine.model_config.get_vocab_size())
        self.can_draw = _can_draw(self._engine.vllm_config)
        self.image_backend = _image_backend(self._engine.model_config)
        self._lock = threading.Lock()
        self._ids = itertools.count()
        self._failure: str | None = None

    def run(self, phase: Phase, prompts: Sequence[dict[str, Any]], params: Sequence[Any]) -> list[Any]:
        """See `Frontend.run`. Calls of both phases exclude each other, so phases cannot mix."""
        from vllm.exceptions import VLLMClientError

        del phase
        with self._lock:
            if self._failure is not None:
                raise _dead(self._failure)
            answers: dict[str, Any] = {str(next(self._ids)): None for _ in prompts}
            added = []
            try:
                for request_id, prompt, param in zip(answers, prompts, params, strict=True):
                    try:
                        added.append(self._engine.add_request(request_id, prompt, param))
                    except (ValueError, VLLMClientError) as error:
                        answers[request_id] = error
                while self._engine.has_unfinished_requests():
                    for output in self._engine.step():
                        if output.finished:
                            answers[output.request_id] = output
            except Exception as error:  # whatever a kernel raises: the core's state is unknown from here on
                self._failure = f"{type(error).__name__}: {error}"
                raise _dead(self._failure) from error
            except BaseException:  # an interrupt: nothing of this call may answer the next one
                self._engine.abort_request(added, internal=True)
                raise
            return list(answers.values())

    def call_workers(self, method: str, *arguments: Any) -> list[Any]:
        """See `Frontend.call_workers`."""
        results: list[Any] = self._engine.collective_rpc(method, args=arguments)
        return results

    def close(self) -> None:
        """Frees weights and key-value cache; see the class for when."""
        self._failure = "it was closed"
        with InProcessFrontend._registry:
            engine, self._engine = self._engine, None
            if engine is None:
                return
            InProcessFrontend._num_open -= 1
            InProcessFrontend._closed.append(engine)
            if InProcessFrontend._num_open == 0:
                while InProcessFrontend._closed:
                    InProcessFrontend._closed.pop().engine_core.shutdown()


class AsyncFrontend:
    """An `AsyncLLM` on an event loop in a thread of its own. Implements `Frontend`."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._gate = PhaseGate()
        self._ids = itertools.count()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vllm-frontend", daemon=True)
        self._thread.start()
        self._llm: Any = None
        try:
            self._llm = self._wait(_start(options))
        except BaseException:
            self.close()
            raise
        self.vocab_size = int(self._llm.model_config.get_vocab_size())
        self.can_draw = _can_draw(self._llm.vllm_config)
        self.image_backend = _image_backend(self._llm.model_config)

    def run(self, phase: Phase, prompts: Sequence[dict[str, Any]], params: Sequence[Any]) -> list[Any]:
        """See `Frontend.run`. Calls of one phase are batched together."""
        with self._gate.enter(phase):
            return self._wait(self._generate_all(prompts, params))

    def call_workers(self, method: str, *arguments: Any) -> list[Any]:
        """See `Frontend.call_workers`."""
        results: list[Any] = self._wait(self._llm.collective_rpc(method, args=arguments))
        return results

    def close(self) -> None:
        """Ends vLLM's processes and the loop."""
        llm, self._llm = self._llm, None
        if llm is not None:
            llm.shutdown()
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def _wait(self, work: Coroutine[Any, Any, Result]) -> Result:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            # An interrupt of the waiting thread: cancelled requests are aborted by vLLM.
            future.cancel()
            raise

    async def _generate_all(self, prompts: Sequence[dict[str, Any]], params: Sequence[Any]) -> list[Any]:
        from vllm.exceptions import VLLMClientError

        if self._llm is None:
            raise _dead("it was closed")
        answers = await asyncio.gather(
            *(self._generate(prompt, param) for prompt, param in zip(prompts, params, strict=True)),
            return_exceptions=True,
        )
        for answer in answers:
            if isinstance(answer, BaseException) and not isinstance(answer, ValueError | VLLMClientError):
                raise _dead(f"{type(answer).__name__}: {answer}") from answer
        return answers

    async def _generate(self, prompt: dict[str, Any], params: Any) -> Any:
        from vllm.v1.engine.exceptions import EngineGenerateError

        try:
            # One output at the end: see `sampling_params`.
            (output,) = [output async for output in self._llm.generate(prompt, params, str(next(self._ids)))]
        except EngineGenerateError as error:
            # vLLM wraps what went wrong with one request.
            raise error.__cause__ or error from None
        return output


async def _start(options: dict[str, Any]) -> Any:
    """On the loop, so that vLLM's own tasks belong to it."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    return AsyncLLM.from_engine_args(AsyncEngineArgs(**options))


def _dead(cause: str) -> EngineError:
    return EngineError(f"the vLLM engine died and answers nothing any more: {cause}; start a new one")
