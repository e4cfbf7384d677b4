"""The engine: a model directory whose experts live in a host store, with a generate loop whose every step is timed.

What happens in a visit stands in `runtime.executor`; here tokens are chosen and sequences recorded.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from runtime import models
from runtime.devices import open_device
from runtime.executor import Executor, check_options, gates_of
from runtime.lookahead import GATES_FILE
from runtime.store import HostStore
from sim.machine import HardwareProfile
from sim.spec import Options
from traces import DECODE, PREFILL


class Engine(Executor):
    """Generates with an offloaded model and keeps account of what it did.

    Args:
        model_dir: a transformers checkpoint.
        bits, slots, options, machine, record, record_logits, record_all, compiled, paced: as `Executor`.
        gates: heads of a trained predictor; those of the model directory when None.
        device: where experts are computed.
        store: an expert store to share between engines; built (and owned) when None.

    Raises:
        ModelError, SpecError, StoreError: inputs that cannot be used.
        CopierError: the copier does not start.
    """

    def __init__(
        self,
        model_dir: Path,
        *,
        bits: int,
        slots: int,
        options: Options,
        machine: HardwareProfile,
        store: HostStore | None = None,
        record: int | None = None,
        record_logits: bool = False,
        record_all: bool = True,
        compiled: bool = False,
        gates: Path | None = None,
        device: str = "cpu",
        paced: bool = True,
    ) -> None:
        check_options(options)
        spec = models.spec_of(model_dir)
        place = open_device(device)
        self._owned = HostStore.build(model_dir, spec, bits, order=place.order) if store is None else None
        try:
            self.model, self.tokenizer = models.load(model_dir)
            self.model.to(place.torch_device)
            super().__init__(
                self.model,
                spec,
                store or self._owned,
                place,
                bits=bits,
                slots=slots,
                options=options,
                machine=machine,
                gates=gates_of(self.model, spec, options, gates or model_dir / GATES_FILE, record or 0),
                record=record,
                record_logits=record_logits,
                record_all=record_all,
                compiled=compiled,
                paced=paced,
            )
        except BaseException:
            if self._owned is not None:
                self._owned.close()
            raise

    @torch.inference_mode()
    def generate(
        self, prompt: list[int], max_new_tokens: int, *, temperature: float = 0.0, seed: int = 0, domain: str = ""
    ) -> Iterator[int]:
        """Token ids one by one; greedy at temperature 0.

        One prefill pass gives the first, ``max_new_tokens - 1`` decode passes the others.

        Raises:
            ValueError: an empty prompt.
            CopierError: the copier has ended, or is slower than its waits allow.
        """
        if not prompt:
            raise ValueError("the prompt has no tokens; give it at least one")
        generator = torch.Generator().manual_seed(seed)
        cache = None
        ids = prompt
        context = 0
        for _ in range(max_new_tokens):
            phase = DECODE if context else PREFILL
            self.begin_pass(phase, len(ids), context, domain=domain)
            tokens = torch.tensor([ids], device=self.device.torch_device)
            out = self.model(input_ids=tokens, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            token = choose(out.logits[0, -1].cpu(), temperature, generator)
            self.end_pass()
            context += len(ids)
            ids = [token]
            yield token

    def close(self) -> None:
        """End the copier and let go of store and slots."""
        super().close()
        if self._owned is not None:
            self._owned.close()


def choose(logits: torch.Tensor, temperature: float, generator: torch.Generator) -> int:
    """The next token from logits [V]: the largest at temperature 0, else sampled."""
    if temperature == 0:
        return int(logits.argmax())
    return int(torch.multinomial((logits.float() / temperature).softmax(-1), 1, generator=generator))
